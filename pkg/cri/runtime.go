package cri

import (
	"encoding/json"
	"fmt"
	"path/filepath"
	"strings"
)

const (
	// containerdNamespace is the containerd namespace of everything made through the CRI. The shim
	// appends it to the OCI runtime's root.
	containerdNamespace = "k8s.io"
	// containerdRuncRoot is the shim's root for runc when its options name none. It does not move
	// with containerd's own state directory.
	containerdRuncRoot = "/run/containerd/runc"
)

// ociRuntime is the OCI runtime of one container. Without a binary, processes cannot be started with
// it from here.
type ociRuntime struct {
	kind   string // Container.RuntimeType
	binary string // absolute path
	root   string
}

// containerdRuntime finds the OCI runtime behind a containerd container. A runtime type other than
// runc's shim is no error, it has no binary.
func (r *resolver) containerdRuntime(info containerInfo) (ociRuntime, error) {
	runtime := ociRuntime{kind: info.RuntimeType}
	switch info.RuntimeType {
	case "io.containerd.runc.v2", "io.containerd.runc.v1":
	default:
		return runtime, nil
	}
	// containerd.runc.v1.Options, whose Go struct containerd writes with the proto field names.
	var options struct {
		BinaryName string `json:"binary_name"`
		Root       string `json:"root"`
	}
	if len(info.RuntimeOptions) > 0 {
		if err := json.Unmarshal(info.RuntimeOptions, &options); err != nil {
			return runtime, fmt.Errorf("runtimeOptions of %s: %w", info.RuntimeType, err)
		}
	}
	if options.BinaryName == "" {
		options.BinaryName = "runc"
	}
	if options.Root == "" {
		options.Root = containerdRuncRoot
	}
	if !runcCompatible(options.BinaryName) {
		return runtime, nil
	}
	binary, err := r.lookPath(options.BinaryName)
	if err != nil {
		return runtime, fmt.Errorf("the container's OCI runtime: %w", err)
	}
	runtime.binary = binary
	runtime.root = filepath.Join(options.Root, containerdNamespace)
	return runtime, nil
}

// runcCompatible sorts out binaries that understand runc's command line and still do something
// else: gVisor's and Kata's processes live in a kernel of their own, where a pid of theirs means
// nothing to us and no pipe of ours can be inherited.
func runcCompatible(binary string) bool {
	name := filepath.Base(binary)
	return !strings.HasPrefix(name, "runsc") && !strings.HasPrefix(name, "kata-")
}
