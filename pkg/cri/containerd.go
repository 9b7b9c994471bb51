package cri

import (
	"context"
	"errors"
	"fmt"

	"github.com/containerd/containerd/api/services/tasks/v1"
	runcapi "github.com/containerd/containerd/api/types/runc/options"
	containerd "github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/core/containers"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/typeurl/v2"
	specs "github.com/opencontainers/runtime-spec/specs-go"
)

const (
	containerdName = "containerd" // VersionResponse.runtime_name

	// containerdNamespace is the containerd namespace of everything created through the CRI. The shim appends it
	// to the OCI runtime's root.
	containerdNamespace = "k8s.io"
)

// newContainerdClient returns a client of containerd's own API, which is served on the same socket as its CRI. It
// shares the upstream's connection, and so its behaviour at restarts. It owns nothing and need not be closed.
func newContainerdClient(upstream *Upstream) (*containerd.Client, error) {
	client, err := containerd.NewWithConn(upstream.conn, containerd.WithDefaultNamespace(containerdNamespace))
	if err != nil {
		return nil, fmt.Errorf("client of containerd's API at %s: %w", upstream.endpoint, err)
	}
	return client, nil
}

// addContainerdFacts replaces the facts from the verbose status by what containerd's own API says about the
// runtime, its options, the OCI spec and the main process. That API is stable, while the verbose status is meant
// for debugging. On an error info is unchanged: the API may be disabled or closed to us while the CRI works.
func addContainerdFacts(ctx context.Context, client *containerd.Client, id string, info *containerInfo) error {
	ctx = namespaces.WithNamespace(ctx, containerdNamespace)
	record, err := client.ContainerService().Get(ctx, id)
	if err != nil {
		return fmt.Errorf("container from containerd's API: %w", err)
	}
	options, err := containerdRuncOptions(record)
	if err != nil {
		return err
	}
	spec, err := containerdSpec(record)
	if err != nil {
		return err
	}
	task, err := client.TaskService().Get(ctx, &tasks.GetRequest{ContainerID: id})
	if err != nil {
		return fmt.Errorf("task from containerd's API: %w", err)
	}
	info.Pid = int(task.GetProcess().GetPid())
	info.RuntimeType = record.Runtime.Name
	info.RuntimeSpec = spec
	info.runc = options
	if info.SandboxID == "" { // the verbose status could not be read
		info.SandboxID = record.SandboxID
	}
	return nil
}

// containerdRuncOptions returns the options of runc's shim. For other shims they are empty.
func containerdRuncOptions(record containers.Container) (*runcOptions, error) {
	if !runcShim(record.Runtime.Name) || record.Runtime.Options == nil {
		return &runcOptions{}, nil
	}
	var options runcapi.Options
	if err := typeurl.UnmarshalTo(record.Runtime.Options, &options); err != nil {
		return nil, fmt.Errorf("options of %s: %w", record.Runtime.Name, err)
	}
	return &runcOptions{BinaryName: options.GetBinaryName(), Root: options.GetRoot()}, nil
}

func containerdSpec(record containers.Container) (*specInfo, error) {
	if record.Spec == nil {
		return nil, errors.New("containerd has no OCI spec of the container")
	}
	var spec specs.Spec
	if err := typeurl.UnmarshalTo(record.Spec, &spec); err != nil {
		return nil, fmt.Errorf("OCI spec of the container: %w", err)
	}
	info := &specInfo{Process: spec.Process, Annotations: spec.Annotations}
	if spec.Linux != nil {
		info.Linux = &linuxInfo{
			UIDMappings: spec.Linux.UIDMappings,
			GIDMappings: spec.Linux.GIDMappings,
			Namespaces:  spec.Linux.Namespaces,
		}
	}
	return info, nil
}
