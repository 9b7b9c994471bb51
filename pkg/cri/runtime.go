package cri

import (
	"fmt"
	"path/filepath"
	"strings"
)

// containerdRuncRoot is the shim's root for runc if its options name none. It does not follow containerd's own
// state directory.
const containerdRuncRoot = "/run/containerd/runc"

// ociRuntime is the OCI runtime of one container. Without a binary, it cannot start processes from here.
type ociRuntime struct {
	kind   string // see workload.Container.RuntimeType
	binary string // absolute path
	root   string
}

// containerdRuntime finds the OCI runtime behind a containerd container. A runtime type other than runc's shim is
// not an error, but has no binary.
func (r *resolver) containerdRuntime(info containerInfo) (ociRuntime, error) {
	runtime := ociRuntime{kind: info.RuntimeType}
	if !runcShim(info.RuntimeType) {
		return runtime, nil
	}
	options, err := info.runcOptions()
	if err != nil {
		return runtime, err
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

// runcShim reports whether containerd's runtime type is the shim for runc and compatible runtimes.
func runcShim(runtimeType string) bool {
	return runtimeType == "io.containerd.runc.v2" || runtimeType == "io.containerd.runc.v1"
}

// runcCompatible excludes binaries that understand runc's command line but behave differently: processes of gVisor
// and Kata live in a kernel of their own, where their pids mean nothing to us and our pipes cannot be inherited.
func runcCompatible(binary string) bool {
	name := filepath.Base(binary)
	return !strings.HasPrefix(name, "runsc") && !strings.HasPrefix(name, "kata-")
}
