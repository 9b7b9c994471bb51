package cri

import (
	"encoding/json"
	"errors"
	"fmt"

	specs "github.com/opencontainers/runtime-spec/specs-go"
)

// infoKey is the key in a verbose status response under which both containerd and CRI-O put one JSON object. The
// CRI leaves its content to the runtime.
const infoKey = "info"

// containerInfo is the part of a container's verbose status that is needed here. containerd provides all of it;
// CRI-O provides neither runtimeType nor runtimeOptions.
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

	// runc holds the options of runc's shim if containerd's API has provided them.
	runc *runcOptions
}

// runcOptions are the options of containerd's runc shim (containerd.runc.v1.Options) that select the OCI runtime.
// Empty options mean the shim's defaults.
type runcOptions struct {
	// The verbose status encodes the Go struct, with the proto field names.
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

// crioStdinOnceAnnotation, in a container's spec, is the stdin_once of its ContainerConfig.
const crioStdinOnceAnnotation = "io.kubernetes.cri-o.StdinOnce"

// stdinOnce returns stdin_once of the ContainerConfig, or false if unknown.
func (i containerInfo) stdinOnce() bool {
	if i.Config != nil {
		return i.Config.StdinOnce
	}
	return i.RuntimeSpec != nil && i.RuntimeSpec.Annotations[crioStdinOnceAnnotation] == "true"
}

// sandboxInfo is the part of a pod sandbox's verbose status that is needed here.
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

// specInfo is the part of an OCI runtime spec that is needed here.
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

// networkNamespace returns the path of the network namespace that the spec joins, or "" if it joins none.
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
