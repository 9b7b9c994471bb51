package cri

import (
	"context"
	"errors"
	"log/slog"
	"os/exec"
	"path/filepath"
	"sync"

	containerd "github.com/containerd/containerd/v2/client"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
	kubelettypes "k8s.io/kubelet/pkg/types"

	"github.com/streamshim/streamshim/pkg/workload"
)

// resolver finds out about containers and sandboxes by asking the upstream.
type resolver struct {
	upstream   *Upstream
	containerd *containerd.Client // used if the upstream is containerd
	log        *slog.Logger
	containers *containerCache
	lookPath   func(string) (string, error) // absolute path of a binary

	mu          sync.Mutex
	runtimeName string              // from Version; "" until known
	warned      map[string]struct{} // ids of containers that warnRelayed has reported
}

// maxWarned bounds resolver.warned.
const maxWarned = 1024

func newResolver(upstream *Upstream, log *slog.Logger) (*resolver, error) {
	client, err := newContainerdClient(upstream)
	if err != nil {
		return nil, err
	}
	return &resolver{
		upstream:   upstream,
		containerd: client,
		log:        log,
		containers: newContainerCache(),
		lookPath:   lookPath,
		warned:     make(map[string]struct{}),
	}, nil
}

func lookPath(binary string) (string, error) {
	path, err := exec.LookPath(binary)
	if err != nil {
		return "", err
	}
	return filepath.Abs(path)
}

// running resolves a container by its full id or a unique prefix, and checks that it runs. The error is a gRPC
// status: the upstream's own for an unknown id, FailedPrecondition for a container that does not run.
func (r *resolver) running(ctx context.Context, id string) (workload.Container, error) {
	if container, ok := r.containers.get(id); ok {
		return container, nil
	}
	response, err := r.upstream.runtime.ContainerStatus(ctx, &runtimeapi.ContainerStatusRequest{ContainerId: id, Verbose: true})
	if err != nil {
		return workload.Container{}, err
	}
	found := response.GetStatus()
	if state := found.GetState(); state != runtimeapi.ContainerState_CONTAINER_RUNNING {
		return workload.Container{}, status.Errorf(codes.FailedPrecondition, "container %q is in %s state, it must be running", id, state)
	}
	labels := found.GetLabels()
	container := workload.Container{Target: workload.Target{
		ContainerID:   found.GetId(),
		ContainerName: kubelettypes.GetContainerName(labels),
		PodName:       kubelettypes.GetPodName(labels),
		PodNamespace:  kubelettypes.GetPodNamespace(labels),
		PodUID:        kubelettypes.GetPodUID(labels),
	}}
	factsErr := r.addFacts(ctx, &container, response.GetInfo())
	if isTransient(factsErr) {
		return workload.Container{}, factsErr
	}
	labelsErr := r.addPodLabels(ctx, &container)
	if isTransient(labelsErr) {
		return workload.Container{}, labelsErr
	}
	if labelsErr != nil {
		r.log.Debug("the labels of the container's pod are not known", "container", container.ContainerID, "error", labelsErr)
	}
	// Do not cache what is incomplete: the next call may find out more.
	if factsErr != nil {
		r.warnRelayed(container, factsErr)
		return container, nil
	}
	if labelsErr != nil && !neverTold(labelsErr) {
		return container, nil
	}
	r.containers.put(container)
	return container, nil
}

// isTransient reports whether asking again may help.
func isTransient(err error) bool {
	switch status.Code(err) {
	case codes.Unavailable, codes.DeadlineExceeded, codes.Canceled:
		return true
	}
	return false
}

// errNoSandbox is returned by addPodLabels if the runtime does not name the sandbox.
var errNoSandbox = errors.New("the runtime does not say which sandbox is the container's")

// neverTold reports whether a runtime will not return labels however often it is asked.
func neverTold(err error) bool {
	return errors.Is(err, errNoSandbox) || status.Code(err) == codes.Unimplemented
}

// addPodLabels adds the labels of the container's sandbox, which never change. If the verbose status did not name
// the sandbox, it asks the runtime for it.
func (r *resolver) addPodLabels(ctx context.Context, container *workload.Container) error {
	if container.SandboxID == "" {
		list, err := r.upstream.runtime.ListContainers(ctx, &runtimeapi.ListContainersRequest{
			Filter: &runtimeapi.ContainerFilter{Id: container.ContainerID},
		})
		if err != nil {
			return err
		}
		for _, found := range list.GetContainers() {
			if found.GetId() == container.ContainerID {
				container.SandboxID = found.GetPodSandboxId()
			}
		}
	}
	if container.SandboxID == "" {
		return errNoSandbox
	}
	response, err := r.upstream.runtime.PodSandboxStatus(ctx, &runtimeapi.PodSandboxStatusRequest{PodSandboxId: container.SandboxID})
	if err != nil {
		return err
	}
	container.PodLabels = knownLabels(response.GetStatus().GetLabels())
	return nil
}

// knownLabels never returns nil, which would mean unknown labels.
func knownLabels(labels map[string]string) map[string]string {
	if labels == nil {
		return map[string]string{}
	}
	return labels
}

// warnRelayed logs once about a container that should be served here but is not. Such a container may have a probe
// every second.
func (r *resolver) warnRelayed(container workload.Container, reason error) {
	r.mu.Lock()
	_, done := r.warned[container.ContainerID]
	if len(r.warned) >= maxWarned {
		clear(r.warned)
	}
	r.warned[container.ContainerID] = struct{}{}
	r.mu.Unlock()
	if !done {
		r.log.Warn("the container's OCI runtime is not known, its sessions are relayed to the upstream",
			"container", container.ContainerID, "error", reason)
	}
}

// addFacts adds what the upstream says about the runtime and the process. On an error the container has no
// Runtime.
func (r *resolver) addFacts(ctx context.Context, container *workload.Container, verbose map[string]string) error {
	info, err := r.containerInfo(ctx, container.ContainerID, verbose)
	if err != nil {
		return err
	}
	container.SandboxID = info.SandboxID
	container.InitPid = info.Pid
	container.StdinOnce = info.stdinOnce()

	runtime, err := r.ociRuntime(ctx, container.ContainerID, info)
	container.RuntimeType = runtime.kind
	if err != nil {
		return err
	}
	if runtime.binary == "" {
		return nil
	}
	if info.RuntimeSpec == nil || info.RuntimeSpec.Process == nil {
		return errors.New("the runtime gives no process spec")
	}
	container.Runtime = runtime.binary
	container.Root = runtime.root
	container.Process = info.RuntimeSpec.Process
	if linux := info.RuntimeSpec.Linux; linux != nil {
		container.UIDMappings = linux.UIDMappings
		container.GIDMappings = linux.GIDMappings
	}
	container.InitStartTime, err = initStartTime(container.InitPid, container.ContainerID)
	if err != nil {
		// Not visible in our /proc: usable, but to be asked for again at every call.
		r.log.Debug("the container's init process cannot be watched", "container", container.ContainerID, "error", err)
	}
	return nil
}

// containerInfo returns what the verbose status says. With containerd, its own API takes precedence.
func (r *resolver) containerInfo(ctx context.Context, id string, verbose map[string]string) (containerInfo, error) {
	info, err := parseContainerInfo(verbose)
	name, nameErr := r.upstreamName(ctx)
	if nameErr != nil {
		return info, nameErr
	}
	if name != containerdName {
		return info, err
	}
	containerdErr := addContainerdFacts(ctx, r.containerd, id, &info)
	if containerdErr == nil {
		return info, nil
	}
	r.log.Debug("containerd's API does not help, its verbose status must do", "container", id, "error", containerdErr)
	if err != nil {
		return info, errors.Join(containerdErr, err)
	}
	return info, nil
}

func (r *resolver) ociRuntime(ctx context.Context, id string, info containerInfo) (ociRuntime, error) {
	if info.RuntimeType != "" {
		return r.containerdRuntime(info)
	}
	name, err := r.upstreamName(ctx)
	if err != nil {
		return ociRuntime{}, err
	}
	if name == crioRuntimeName {
		return r.crioRuntime(ctx, id, info)
	}
	return ociRuntime{kind: name}, nil
}

// upstreamName returns the name that the upstream gives itself, which is asked for once.
func (r *resolver) upstreamName(ctx context.Context) (string, error) {
	r.mu.Lock()
	name := r.runtimeName
	r.mu.Unlock()
	if name != "" {
		return name, nil
	}
	response, err := r.upstream.runtime.Version(ctx, &runtimeapi.VersionRequest{})
	if err != nil {
		return "", err
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	r.runtimeName = response.GetRuntimeName()
	return r.runtimeName, nil
}

// readySandbox resolves a pod sandbox and checks that it is ready. The error is a gRPC status: the upstream's own
// for an unknown id, FailedPrecondition for a sandbox that is not ready or whose network namespace cannot be
// found.
func (r *resolver) readySandbox(ctx context.Context, id string) (workload.Sandbox, error) {
	response, err := r.upstream.runtime.PodSandboxStatus(ctx, &runtimeapi.PodSandboxStatusRequest{PodSandboxId: id, Verbose: true})
	if err != nil {
		return workload.Sandbox{}, err
	}
	found := response.GetStatus()
	if state := found.GetState(); state != runtimeapi.PodSandboxState_SANDBOX_READY {
		return workload.Sandbox{}, status.Errorf(codes.FailedPrecondition, "pod sandbox %q is in %s state, it must be ready", id, state)
	}
	labels := found.GetLabels()
	sandbox := workload.Sandbox{Target: workload.Target{
		SandboxID:    found.GetId(),
		PodName:      kubelettypes.GetPodName(labels),
		PodNamespace: kubelettypes.GetPodNamespace(labels),
		PodUID:       kubelettypes.GetPodUID(labels),
	}, PodLabels: knownLabels(labels)}
	info, infoErr := parseSandboxInfo(response.GetInfo())
	sandbox.Pid = info.Pid
	if found.GetLinux().GetNamespaces().GetOptions().GetNetwork() == runtimeapi.NamespaceMode_NODE {
		return sandbox, nil
	}
	if info.Metadata != nil {
		sandbox.NetworkNamespace = info.Metadata.Metadata.NetNSPath
	}
	if sandbox.NetworkNamespace == "" {
		sandbox.NetworkNamespace = info.RuntimeSpec.networkNamespace()
	}
	if sandbox.NetworkNamespace == "" {
		// The sandbox is not a container itself, as with containerd's external sandbox controllers. Its containers
		// join the same namespace.
		sandbox.NetworkNamespace, err = r.containerNetworkNamespace(ctx, sandbox.SandboxID)
		if err != nil {
			return workload.Sandbox{}, status.Errorf(codes.FailedPrecondition, "the network namespace of pod sandbox %q cannot be found: %v", id, errors.Join(infoErr, err))
		}
	}
	return sandbox, nil
}

// containerNetworkNamespace returns the network namespace that a sandbox's first running container joined.
func (r *resolver) containerNetworkNamespace(ctx context.Context, sandboxID string) (string, error) {
	list, err := r.upstream.runtime.ListContainers(ctx, &runtimeapi.ListContainersRequest{Filter: &runtimeapi.ContainerFilter{
		PodSandboxId: sandboxID,
		State:        &runtimeapi.ContainerStateValue{State: runtimeapi.ContainerState_CONTAINER_RUNNING},
	}})
	if err != nil {
		return "", err
	}
	for _, member := range list.GetContainers() {
		response, err := r.upstream.runtime.ContainerStatus(ctx, &runtimeapi.ContainerStatusRequest{ContainerId: member.GetId(), Verbose: true})
		if err != nil {
			return "", err
		}
		info, err := parseContainerInfo(response.GetInfo())
		if err != nil {
			return "", err
		}
		if path := info.RuntimeSpec.networkNamespace(); path != "" {
			return path, nil
		}
	}
	return "", errors.New("no running container of the pod names one")
}
