package cri

import (
	"encoding/json"
	"errors"
	"fmt"

	specs "github.com/opencontainers/runtime-spec/specs-go"
)

// infoKey is the key of a verbose status answer under which both containerd and CRI-O put one JSON
// object. The CRI leaves its content to the runtime.
const infoKey = "info"

// containerInfo is what we need of the verbose status of a container. containerd gives all of it;
// CRI-O gives neither runtimeType nor runtimeOptions.
type containerInfo struct {
	SandboxID      string          `json:"sandboxID"`
	Pid            int             `json:"pid"`
	RuntimeType    string          `json:"runtimeType"`
	RuntimeOptions json.RawMessage `json:"runtimeOptions"`
	RuntimeSpec    *specInfo       `json:"runtimeSpec"`
	// Config is containerd's copy of the CRI's ContainerConfig, with the names of the proto fields.
	Config *struct {
		StdinOnce bool `json:"stdin_once"`
	} `json:"config"`

	// runc holds the options of runc's shim when they are known from containerd's API.
	runc *runcOptions
}

// runcOptions are those options of containerd's runc shim (containerd.runc.v1.Options) that say
// which OCI runtime it starts. Empty ones mean the shim's defaults.
type runcOptions struct {
	// The verbose status has the Go struct, with the proto field names.
	BinaryName string `json:"binary_name"`
	Root       string `json:"root"`
}

func (i containerInfo) runcOptions() (runcOptions, error) {
	if i.runc != nil {
		return *i.runc, nil
	}
	var options runcOptions
	if len(i.RuntimeOptions) == 0 || !runcShim(i.RuntimeType) {
		return options, nil
	}
	if err := json.Unmarshal(i.RuntimeOptions, &options); err != nil {
		return options, fmt.Errorf("runtimeOptions of %s: %w", i.RuntimeType, err)
	}
	return options, nil
}

// crioStdinOnceAnnotation of a container's spec is the stdin_once of its ContainerConfig.
const crioStdinOnceAnnotation = "io.kubernetes.cri-o.StdinOnce"

// stdinOnce is stdin_once of the ContainerConfig, false when it is not known.
func (i containerInfo) stdinOnce() bool {
	if i.Config != nil {
		return i.Config.StdinOnce
	}
	return i.RuntimeSpec != nil && i.RuntimeSpec.Annotations[crioStdinOnceAnnotation] == "true"
}

// sandboxInfo is what we need of the verbose status of a pod sandbox.
type sandboxInfo struct {
	Pid         int       `json:"pid"`
	RuntimeSpec *specInfo `json:"runtimeSpec"`
	// Metadata is containerd's own record.
	Metadata *struct {
		Metadata struct {
			NetNSPath string
		}
	} `json:"sandboxMetadata"`
}

// specInfo is the part of an OCI runtime spec that matters here.
type specInfo struct {
	Process     *specs.Process    `json:"process"`
	Annotations map[string]string `json:"annotations"`
	Linux       *linuxInfo        `json:"linux"`
}

type linuxInfo struct {
	UIDMappings []specs.LinuxIDMapping `json:"uidMappings"`
	GIDMappings []specs.LinuxIDMapping `json:"gidMappings"`
	Namespaces  []specs.LinuxNamespace `json:"namespaces"`
}

// networkNamespace is the path of the network namespace the spec joins, "" when it joins none.
func (s *specInfo) networkNamespace() string {
	if s == nil || s.Linux == nil {
		return ""
	}
	for _, namespace := range s.Linux.Namespaces {
		if namespace.Type == specs.NetworkNamespace {
			return namespace.Path
		}
	}
	return ""
}

func parseContainerInfo(info map[string]string) (containerInfo, error) {
	var parsed containerInfo
	if err := parseInfo(info, &parsed); err != nil {
		return containerInfo{}, fmt.Errorf("verbose status of the container: %w", err)
	}
	return parsed, nil
}

func parseSandboxInfo(info map[string]string) (sandboxInfo, error) {
	var parsed sandboxInfo
	if err := parseInfo(info, &parsed); err != nil {
		return sandboxInfo{}, fmt.Errorf("verbose status of the pod sandbox: %w", err)
	}
	return parsed, nil
}

func parseInfo(info map[string]string, v any) error {
	text, ok := info[infoKey]
	if !ok {
		return errors.New("the runtime gives none")
	}
	return json.Unmarshal([]byte(text), v)
}
