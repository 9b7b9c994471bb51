package harness

import (
	"testing"
	"time"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/streamshim/streamshim/internal/testutil"
	"github.com/streamshim/streamshim/test/internal/node"
)

// Ending is a way in which a container ends while it has sessions.
type Ending struct {
	Name      string
	Pod       node.PodSpec
	Container node.ContainerSpec
	// End ends the container and returns when the runtime reports the end.
	End func(t *testing.T, pod, container string)
	// Reasons are what a client may be told. One of them must match.
	Reasons []string
}

// Endings are the ways in which a container may end.
var Endings = []Ending{
	{Name: "stopped", End: StopContainer, Reasons: []string{"container exited with code 137"}},
	{Name: "removed", End: removeContainer, Reasons: []string{"container exited with code 137", "container was removed"}},
	{Name: "sandbox-stopped", End: stopSandbox, Reasons: []string{"pod sandbox was stopped", "container exited with code 137"}},
	{Name: "exited", Container: node.ContainerSpec{Command: []string{"sh", "-c", "while [ ! -e /tmp/go ]; do sleep 0.1; done; exit 42"}},
		End: tellContainer, Reasons: []string{"container exited with code 42"}},
	{Name: "oom-killed", Container: node.ContainerSpec{
		MemoryLimit: 64 << 20, Command: []string{"sh", "-c", "while [ ! -e /tmp/go ]; do sleep 0.1; done; exec tail /dev/zero"},
	}, End: tellContainer, Reasons: []string{"container was OOM-killed"}},
	{Name: "shared-pid-namespace", Pod: node.PodSpec{SharedPID: true}, End: StopContainer, Reasons: []string{"container exited with code 137"}},
	{Name: "host-pid", Pod: node.PodSpec{HostPID: true}, End: StopContainer, Reasons: []string{"container exited with code 137"}},
	{Name: "host-pid-removed", Pod: node.PodSpec{HostPID: true}, End: removeContainer, Reasons: []string{"container exited with code 137", "container was removed"}},
}

// StopContainer stops a container without a grace period.
func StopContainer(t *testing.T, _, container string) {
	t.Helper()
	if _, err := Shared.Node.Runtime().StopContainer(t.Context(), &runtimeapi.StopContainerRequest{ContainerId: container}); err != nil {
		t.Error(err)
	}
}

func removeContainer(t *testing.T, _, container string) {
	t.Helper()
	if _, err := Shared.Node.Runtime().RemoveContainer(t.Context(), &runtimeapi.RemoveContainerRequest{ContainerId: container}); err != nil {
		t.Error(err)
	}
}

func stopSandbox(t *testing.T, pod, _ string) {
	t.Helper()
	if _, err := Shared.Node.Runtime().StopPodSandbox(t.Context(), &runtimeapi.StopPodSandboxRequest{PodSandboxId: pod}); err != nil {
		t.Error(err)
	}
}

// tellContainer tells the main process to end.
func tellContainer(t *testing.T, _, container string) {
	t.Helper()
	Shared.Shim.MustSync(t, container, "touch /tmp/go")
	testutil.Eventually(t, "the container has ended", func() bool {
		response, err := Shared.Node.Upstream().ContainerStatus(t.Context(), &runtimeapi.ContainerStatusRequest{ContainerId: container})
		return err == nil && response.Status.State == runtimeapi.ContainerState_CONTAINER_EXITED
	})
}

// EndLimit is the second within which a session ends with its container, and a margin for a busy machine.
const EndLimit = time.Second + 9*time.Second
