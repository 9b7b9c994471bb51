package cri

import (
	"testing"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/streamshim/streamshim/test/internal/node"
)

// TestExecSyncTimeoutCode checks the code by which the kubelet knows a probe that timed out. It takes
// any other for a result it does not know, and a liveness probe then never restarts its container.
func TestExecSyncTimeoutCode(t *testing.T) {
	n := startNode(t, "synccode")
	_, container := runLab(t, n, node.PodSpec{}, node.ContainerSpec{})
	for _, client := range []struct {
		name    string
		runtime runtimeapi.RuntimeServiceClient
	}{{"streamshim", n.Runtime()}, {"containerd", n.Upstream()}} {
		_, err := client.runtime.ExecSync(t.Context(), &runtimeapi.ExecSyncRequest{
			ContainerId: container, Cmd: []string{"sleep", "60"}, Timeout: 1,
		})
		if status.Code(err) != codes.DeadlineExceeded {
			t.Errorf("%s answered a command that timed out with %v", client.name, err)
		}
	}
}
