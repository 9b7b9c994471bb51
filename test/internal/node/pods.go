package node

import (
	"context"
	"encoding/json"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
	"k8s.io/kubelet/pkg/types"

	"github.com/streamshim/streamshim/test/internal/images"
)

// PodSpec describes a pod to run. The zero value is a plain pod.
type PodSpec struct {
	// Name, Namespace and UID default to "pod", "default" and a new UID each time. The labels that the kubelet derives from
	// them are always set, in addition to Labels and Annotations.
	Name, Namespace, UID string
	Labels, Annotations  map[string]string

	HostNetwork bool
	HostPID     bool
	SharedPID   bool // one process namespace for the sandbox and all its containers
	// UserNamespace maps the pod's users 0-65535 to 100000-165535 of the host. These need execute permission (x) for every
	// folder above the node's.
	UserNamespace bool
	Privileged    bool   // needed for privileged containers
	Handler       string // such as GVisorHandler; runc by default

	PortMappings []*runtimeapi.PortMapping

	// Change may change the request before it is sent, for what has no field here. It may be nil.
	Change func(*runtimeapi.PodSandboxConfig)
}

// ContainerSpec describes a container to run in a pod. The zero value is busybox, sleeping for ever.
type ContainerSpec struct {
	Name  string // "main" by default
	Image string // a full reference, see Image; images.Busybox by default
	// Command and Args are as in Kubernetes: nil means the image's own. But busybox sleeps then.
	Command, Args []string
	Env           map[string]string
	WorkingDir    string

	Stdin, StdinOnce, TTY bool

	RunAsUser, RunAsGroup *int64
	SupplementalGroups    []int64
	Privileged            bool
	ReadOnlyRoot          bool
	NoNewPrivileges       bool
	AddCapabilities       []string // without "CAP_"
	DropCapabilities      []string
	MemoryLimit           int64 // bytes; 0 is none

	Labels, Annotations map[string]string
	Mounts              []*runtimeapi.Mount

	// Change may change the request before it is sent, for what has no field here. It may be nil.
	Change func(*runtimeapi.ContainerConfig)
}

// RunPod runs a pod sandbox and returns its ID.
func (n *Node) RunPod(ctx context.Context, spec PodSpec) (string, error) {
	config := n.sandboxConfig(spec)
	response, err := n.Runtime().RunPodSandbox(ctx, &runtimeapi.RunPodSandboxRequest{Config: config, RuntimeHandler: spec.Handler})
	if err != nil {
		return "", fmt.Errorf("run pod %s: %w", config.Metadata.Name, err)
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	n.pods[response.PodSandboxId] = config
	return response.PodSandboxId, nil
}

// HasUserNamespaces reports whether pods can have user namespaces. Only a runtime of other programs than the default ones may
// say no, for instance runc 1.1, which has no idmapped mounts.
func (n *Node) HasUserNamespaces(t testing.TB) bool {
	t.Helper()
	if os.Getenv(programsVariable) == "" {
		return true
	}
	status, err := n.Upstream().Status(t.Context(), &runtimeapi.StatusRequest{})
	if err != nil {
		t.Fatal(err)
	}
	for _, handler := range status.RuntimeHandlers {
		if handler.Name == "" {
			return handler.GetFeatures().GetUserNamespaces()
		}
	}
	return true // containerd 1.7 does not say
}

func (n *Node) sandboxConfig(spec PodSpec) *runtimeapi.PodSandboxConfig {
	name, namespace := orDefault(spec.Name, "pod"), orDefault(spec.Namespace, "default")
	uid := orDefault(spec.UID, fmt.Sprintf("%s-%x", name, time.Now().UnixNano()))
	labels := map[string]string{
		types.KubernetesPodNameLabel:      name,
		types.KubernetesPodNamespaceLabel: namespace,
		types.KubernetesPodUIDLabel:       uid,
	}
	maps.Copy(labels, spec.Labels)
	annotations := map[string]string{"kubernetes.io/config.source": "api"}
	maps.Copy(annotations, spec.Annotations)

	namespaces := &runtimeapi.NamespaceOption{Pid: runtimeapi.NamespaceMode_CONTAINER}
	hostname := name
	if spec.HostNetwork {
		namespaces.Network, hostname = runtimeapi.NamespaceMode_NODE, ""
	}
	switch {
	case spec.HostPID:
		namespaces.Pid = runtimeapi.NamespaceMode_NODE
	case spec.SharedPID:
		namespaces.Pid = runtimeapi.NamespaceMode_POD
	}
	if spec.UserNamespace {
		mapping := func() []*runtimeapi.IDMapping {
			return []*runtimeapi.IDMapping{{HostId: 100000, ContainerId: 0, Length: 65536}}
		}
		namespaces.UsernsOptions = &runtimeapi.UserNamespace{Mode: runtimeapi.NamespaceMode_POD, Uids: mapping(), Gids: mapping()}
	}
	config := &runtimeapi.PodSandboxConfig{
		Metadata:     &runtimeapi.PodSandboxMetadata{Name: name, Namespace: namespace, Uid: uid},
		Hostname:     hostname,
		LogDirectory: n.path(filepath.Join("pods", namespace+"_"+name+"_"+uid)),
		Labels:       labels,
		Annotations:  annotations,
		PortMappings: spec.PortMappings,
		Linux: &runtimeapi.LinuxPodSandboxConfig{
			CgroupParent: n.cgroupParent(),
			SecurityContext: &runtimeapi.LinuxSandboxSecurityContext{
				NamespaceOptions: namespaces,
				Privileged:       spec.Privileged,
				Seccomp:          &runtimeapi.SecurityProfile{ProfileType: runtimeapi.SecurityProfile_RuntimeDefault},
			},
		},
	}
	if spec.Change != nil {
		spec.Change(config)
	}
	return config
}

// RunContainer creates and starts a container in a pod of RunPod, and returns its ID. Its log is below the pod's log
// folder, as with the kubelet. See ContainerLog.
func (n *Node) RunContainer(ctx context.Context, podID string, spec ContainerSpec) (string, error) {
	id, err := n.CreateContainer(ctx, podID, spec)
	if err != nil {
		return "", err
	}
	if _, err := n.Runtime().StartContainer(ctx, &runtimeapi.StartContainerRequest{ContainerId: id}); err != nil {
		return "", fmt.Errorf("start container %s: %w", id, err)
	}
	return id, nil
}

// CreateContainer is like RunContainer, but does not start the container.
func (n *Node) CreateContainer(ctx context.Context, podID string, spec ContainerSpec) (string, error) {
	n.mu.Lock()
	pod := n.pods[podID]
	n.mu.Unlock()
	if pod == nil {
		return "", fmt.Errorf("no pod %q was made by this Node's RunPod", podID)
	}
	config := containerConfig(pod, spec)
	if err := n.pull(ctx, config.Image); err != nil {
		return "", err
	}
	request := &runtimeapi.CreateContainerRequest{PodSandboxId: podID, Config: config, SandboxConfig: pod}
	response, err := n.Runtime().CreateContainer(ctx, request)
	if pod.Linux.SecurityContext.NamespaceOptions.UsernsOptions != nil && status.Code(err) == codes.AlreadyExists {
		// containerd 1.7 cannot prepare an image for two user namespaces at once. The kubelet tries again, too.
		response, err = n.Runtime().CreateContainer(ctx, request)
	}
	if err != nil {
		return "", fmt.Errorf("create container %s: %w", config.Metadata.Name, err)
	}
	return response.ContainerId, nil
}

func containerConfig(pod *runtimeapi.PodSandboxConfig, spec ContainerSpec) *runtimeapi.ContainerConfig {
	name := orDefault(spec.Name, "main")
	image, command := spec.Image, spec.Command
	if image == "" {
		image = Image(images.Busybox)
		if command == nil && spec.Args == nil {
			command = []string{"sleep", "2147483647"}
		}
	}
	labels := maps.Clone(pod.Labels)
	labels[types.KubernetesContainerNameLabel] = name
	maps.Copy(labels, spec.Labels)
	annotations := map[string]string{
		"io.kubernetes.container.hash":                   "1",
		"io.kubernetes.container.restartCount":           "0",
		"io.kubernetes.container.terminationMessagePath": "/dev/termination-log",
		"io.kubernetes.pod.terminationGracePeriod":       "30",
	}
	maps.Copy(annotations, spec.Annotations)
	var environment []*runtimeapi.KeyValue
	for _, key := range slices.Sorted(maps.Keys(spec.Env)) {
		environment = append(environment, &runtimeapi.KeyValue{Key: key, Value: []byte(spec.Env[key])})
	}
	security := &runtimeapi.LinuxContainerSecurityContext{
		NamespaceOptions:   pod.Linux.SecurityContext.NamespaceOptions,
		Privileged:         spec.Privileged,
		ReadonlyRootfs:     spec.ReadOnlyRoot,
		NoNewPrivs:         spec.NoNewPrivileges,
		RunAsUser:          int64Value(spec.RunAsUser),
		RunAsGroup:         int64Value(spec.RunAsGroup),
		SupplementalGroups: spec.SupplementalGroups,
		Capabilities:       &runtimeapi.Capability{AddCapabilities: spec.AddCapabilities, DropCapabilities: spec.DropCapabilities},
		Seccomp:            &runtimeapi.SecurityProfile{ProfileType: runtimeapi.SecurityProfile_RuntimeDefault},
		MaskedPaths:        []string{"/proc/kcore", "/proc/keys", "/proc/timer_list"},
		ReadonlyPaths:      []string{"/proc/bus", "/proc/sys"},
	}
	if spec.Privileged {
		security.MaskedPaths, security.ReadonlyPaths, security.Seccomp = nil, nil, nil
	}
	config := &runtimeapi.ContainerConfig{
		Metadata: &runtimeapi.ContainerMetadata{Name: name},
		Image:    &runtimeapi.ImageSpec{Image: image, UserSpecifiedImage: image},
		Command:  command, Args: spec.Args, Envs: environment, WorkingDir: spec.WorkingDir,
		Labels: labels, Annotations: annotations, Mounts: spec.Mounts,
		LogPath: filepath.Join(name, "0.log"),
		Stdin:   spec.Stdin, StdinOnce: spec.StdinOnce, Tty: spec.TTY,
		Linux: &runtimeapi.LinuxContainerConfig{
			SecurityContext: security,
			Resources:       &runtimeapi.LinuxContainerResources{MemoryLimitInBytes: spec.MemoryLimit},
		},
	}
	if spec.Change != nil {
		spec.Change(config)
	}
	return config
}

// ContainerLog returns the path of the log of a container in a pod of RunPod.
func (n *Node) ContainerLog(podID, containerName string) string {
	n.mu.Lock()
	defer n.mu.Unlock()
	if pod := n.pods[podID]; pod != nil {
		return filepath.Join(pod.LogDirectory, containerName, "0.log")
	}
	return ""
}

// RemovePod stops and removes a pod with everything in it. It returns no error for a pod that does not exist.
func (n *Node) RemovePod(ctx context.Context, podID string) error {
	return removePod(ctx, n.Runtime(), podID)
}

func removePod(ctx context.Context, client runtimeapi.RuntimeServiceClient, podID string) error {
	if _, err := client.StopPodSandbox(ctx, &runtimeapi.StopPodSandboxRequest{PodSandboxId: podID}); err != nil {
		return fmt.Errorf("stop pod %s: %w", podID, err)
	}
	if _, err := client.RemovePodSandbox(ctx, &runtimeapi.RemovePodSandboxRequest{PodSandboxId: podID}); err != nil {
		return fmt.Errorf("remove pod %s: %w", podID, err)
	}
	return nil
}

func (n *Node) pull(ctx context.Context, image *runtimeapi.ImageSpec) error {
	client := runtimeapi.NewImageServiceClient(n.upstream)
	status, err := client.ImageStatus(ctx, &runtimeapi.ImageStatusRequest{Image: image})
	if err != nil {
		return fmt.Errorf("look up image %s: %w", image.Image, err)
	}
	if status.Image != nil {
		return nil
	}
	if _, err := client.PullImage(ctx, &runtimeapi.PullImageRequest{Image: image}); err != nil {
		return fmt.Errorf("pull image %s from the node's image server: %w", image.Image, err)
	}
	return nil
}

func orDefault(value, fallback string) string {
	if value == "" {
		return fallback
	}
	return value
}

func int64Value(value *int64) *runtimeapi.Int64Value {
	if value == nil {
		return nil
	}
	return &runtimeapi.Int64Value{Value: *value}
}

// ContainerPID returns the process ID of a container's main process on the node.
func ContainerPID(ctx context.Context, client runtimeapi.RuntimeServiceClient, id string) (int, error) {
	response, err := client.ContainerStatus(ctx, &runtimeapi.ContainerStatusRequest{ContainerId: id, Verbose: true})
	if err != nil {
		return 0, err
	}
	var info struct{ Pid int }
	if err := json.Unmarshal([]byte(response.Info["info"]), &info); err != nil {
		return 0, fmt.Errorf("the container's info: %w", err)
	}
	return info.Pid, nil
}
