package cri

import (
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/streamshim/streamshim/test/internal/harness"
	"github.com/streamshim/streamshim/test/internal/node"
)

// TestExecSyncTimeoutIsDeadlineExceeded checks the code by which the kubelet recognizes a probe that timed out. It takes
// any other code for an unknown result, and then a liveness probe never restarts its container.
func TestExecSyncTimeoutIsDeadlineExceeded(t *testing.T) {
	n := harness.Shared.Node
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

// TestExecSyncBudgets has many ExecSync calls share one turn to start, and little room for their output.
func TestExecSyncBudgets(t *testing.T) {
	config := filepath.Join(t.TempDir(), "config.toml")
	if err := os.WriteFile(config, []byte("[limits]\nconcurrent_probes = 1\nconcurrent_starts = 1\nsync_output = 1000000\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	node.Require(t)
	n := node.StartForTest(t, node.Config{Name: "budgets", Streamshim: node.Binary(t), StreamshimArgs: []string{"--config", config}})
	_, container := runLab(t, n, node.PodSpec{}, node.ContainerSpec{})
	call := func(command string) (*runtimeapi.ExecSyncResponse, error) {
		return n.Runtime().ExecSync(t.Context(), &runtimeapi.ExecSyncRequest{ContainerId: container, Cmd: []string{"sh", "-c", command}})
	}
	var calls sync.WaitGroup
	for range 10 {
		calls.Go(func() {
			if response, err := call("head -c 50000 /dev/zero; exit 3"); err != nil || response.ExitCode != 3 || len(response.Stdout) != 50000 {
				t.Errorf("a probe: exit code %d, %d bytes, %v", response.GetExitCode(), len(response.GetStdout()), err)
			}
		})
		calls.Go(func() {
			_, err := call("yes")
			if status.Code(err) != codes.ResourceExhausted || !strings.Contains(err.Error(), "limits.sync_output") {
				t.Errorf("more output than there is room for: %v", err)
			}
		})
	}
	calls.Wait()
	if response, err := call("head -c 900000 /dev/zero"); err != nil || len(response.Stdout) != 900000 {
		t.Errorf("afterwards: %d bytes, %v", len(response.GetStdout()), err)
	}
}
