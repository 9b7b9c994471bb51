package cri

import (
	"strings"
	"testing"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/streamshim/streamshim/test/internal/harness"
	"github.com/streamshim/streamshim/test/internal/node"
)

// calls makes the streaming calls and ExecSync for a container.
func calls(t *testing.T, n *node.Node, container string) map[string]error {
	t.Helper()
	client := n.Runtime()
	_, exec := client.Exec(t.Context(), &runtimeapi.ExecRequest{ContainerId: container, Cmd: []string{"true"}, Stdout: true})
	_, execSync := client.ExecSync(t.Context(), &runtimeapi.ExecSyncRequest{ContainerId: container, Cmd: []string{"true"}})
	_, attach := client.Attach(t.Context(), &runtimeapi.AttachRequest{ContainerId: container, Stdout: true})
	return map[string]error{"Exec": exec, "ExecSync": execSync, "Attach": attach}
}

func wantCalls(t *testing.T, n *node.Node, container string, code codes.Code, text string) {
	t.Helper()
	for name, err := range calls(t, n, container) {
		if status.Code(err) != code || err != nil && !strings.Contains(err.Error(), text) {
			t.Errorf("%s: got %v, want %v with %q", name, err, code, text)
		}
	}
}

// TestContainerStates makes these calls for containers in all states, with full and shortened IDs.
func TestContainerStates(t *testing.T) {
	n := harness.Shared.Node
	pod, running := runContainer(t, n, node.PodSpec{}, node.ContainerSpec{})
	other, err := n.RunContainer(t.Context(), pod, node.ContainerSpec{Name: "other"})
	if err != nil {
		t.Fatal(err)
	}

	t.Run("running", func(t *testing.T) {
		for _, id := range []string{running, running[:13], running[:6], other, other[:13]} {
			wantCalls(t, n, id, codes.OK, "")
			stdout, stderr, code := run(t, n.Crictl("exec", id, "hostname"))
			if stdout != "pod\n" || code != 0 {
				t.Errorf("crictl exec %s: %q, %q, %d", id, stdout, stderr, code)
			}
			if stdout, stderr, code := run(t, n.Crictl("exec", "-s", id, "hostname")); strings.TrimSpace(stdout) != "pod" || code != 0 { // crictl adds newlines
				t.Errorf("crictl exec -s %s: %q, %q, %d", id, stdout, stderr, code)
			}
		}
	})
	t.Run("known to streamshim", func(t *testing.T) {
		// Not relayed: the URL is streamshim's own, and the process in the container is its child.
		before := takeFootprint(t, n, running)
		exec := start(t, n.Crictl("exec", running[:13], "sh", "-c", "echo started; exec sleep 1000"))
		exec.expect("started")
		if now := takeFootprint(t, n, running); now.children != 1 || now.members != 2 {
			t.Errorf("during an exec streamshim has %d children, the container %d processes; want 1 and 2", now.children, now.members)
		}
		if err := exec.command.Process.Kill(); err != nil {
			t.Fatal(err)
		}
		exec.end(-1)
		expectNothingLeft(t, n, before, running)
	})
	t.Run("unknown", func(t *testing.T) {
		for _, id := range []string{"nosuch", strings.Repeat("0", 64)} {
			wantCalls(t, n, id, codes.NotFound, "not found")
			_, err := n.Runtime().PortForward(t.Context(), &runtimeapi.PortForwardRequest{PodSandboxId: id})
			if status.Code(err) != codes.NotFound {
				t.Errorf("PortForward: got %v, want NotFound", err)
			}
		}
		if _, stderr, code := run(t, n.Crictl("exec", "nosuch", "true")); code == 0 || !strings.Contains(stderr, "not found") {
			t.Errorf("crictl exec: %q, %d", stderr, code)
		}
	})
	t.Run("created", func(t *testing.T) {
		created, err := n.CreateContainer(t.Context(), pod, node.ContainerSpec{Name: "created"})
		if err != nil {
			t.Fatal(err)
		}
		wantCalls(t, n, created, codes.FailedPrecondition, "CONTAINER_CREATED")
		if _, err := n.Runtime().StartContainer(t.Context(), &runtimeapi.StartContainerRequest{ContainerId: created}); err != nil {
			t.Fatal(err)
		}
		wantCalls(t, n, created, codes.OK, "")
	})
	t.Run("exited", func(t *testing.T) {
		wantCalls(t, n, other, codes.OK, "")
		if _, err := n.Runtime().StopContainer(t.Context(), &runtimeapi.StopContainerRequest{ContainerId: other}); err != nil {
			t.Fatal(err)
		}
		wantCalls(t, n, other, codes.FailedPrecondition, "CONTAINER_EXITED")
		if _, stderr, code := run(t, n.Crictl("exec", other, "true")); code == 0 || !strings.Contains(stderr, "must be running") {
			t.Errorf("crictl exec: %q, %d", stderr, code)
		}
		if _, err := n.Runtime().RemoveContainer(t.Context(), &runtimeapi.RemoveContainerRequest{ContainerId: other}); err != nil {
			t.Fatal(err)
		}
		wantCalls(t, n, other, codes.NotFound, "not found")
	})
	t.Run("requests that make no sense", func(t *testing.T) {
		client := n.Runtime()
		_, noStreams := client.Exec(t.Context(), &runtimeapi.ExecRequest{ContainerId: running, Cmd: []string{"true"}})
		_, noAttachStreams := client.Attach(t.Context(), &runtimeapi.AttachRequest{ContainerId: running})
		_, ttyAndStderr := client.Exec(t.Context(), &runtimeapi.ExecRequest{ContainerId: running, Cmd: []string{"true"}, Tty: true, Stdout: true, Stderr: true})
		_, noCommand := client.Exec(t.Context(), &runtimeapi.ExecRequest{ContainerId: running, Stdout: true})
		_, noContainer := client.Exec(t.Context(), &runtimeapi.ExecRequest{Cmd: []string{"true"}, Stdout: true})
		for name, err := range map[string]error{
			"Exec without streams": noStreams, "Attach without streams": noAttachStreams, "tty and stderr": ttyAndStderr,
			"no command": noCommand, "no container": noContainer,
		} {
			if status.Code(err) != codes.InvalidArgument {
				t.Errorf("%s: got %v, want InvalidArgument", name, err)
			}
		}
	})
	t.Run("pod stopped", func(t *testing.T) {
		request := &runtimeapi.PortForwardRequest{PodSandboxId: pod[:13]}
		if _, err := n.Runtime().PortForward(t.Context(), request); err != nil {
			t.Error(err)
		}
		if _, err := n.Runtime().StopPodSandbox(t.Context(), &runtimeapi.StopPodSandboxRequest{PodSandboxId: pod}); err != nil {
			t.Fatal(err)
		}
		if _, err := n.Runtime().PortForward(t.Context(), request); status.Code(err) != codes.FailedPrecondition {
			t.Errorf("PortForward to a stopped pod: got %v, want FailedPrecondition", err)
		}
		wantCalls(t, n, running, codes.FailedPrecondition, "CONTAINER_EXITED")
	})
}
