// Package relay tests sessions in containers whose processes cannot be started from the node, with gVisor: exec is relayed to
// containerd's own streaming server, ExecSync to containerd. It needs a folder of programs that has gVisor; "make matrix
// MATRIX=gvisor" makes one. Elsewhere it skips its tests.
package relay

import (
	"bytes"
	"context"
	"crypto/rand"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"k8s.io/client-go/tools/remotecommand"

	"github.com/streamshim/streamshim/internal/testutil"
	"github.com/streamshim/streamshim/test/internal/harness"
	"github.com/streamshim/streamshim/test/internal/node"
)

// sandboxed is a pod that gVisor runs, for the containers of all tests.
var sandboxed string

func TestMain(m *testing.M) {
	if _, err := os.Stat(filepath.Join(node.DefaultPrograms(), "runsc")); err != nil {
		os.Exit(m.Run()) // each skips itself
	}
	os.Exit(harness.Main(m, "relay"))
}

// run runs a container in gVisor.
func run(t *testing.T, spec node.ContainerSpec) string {
	t.Helper()
	if harness.Shared.Node == nil {
		t.Skip("these programs have no gVisor; make matrix MATRIX=gvisor")
	}
	if sandboxed == "" { // the tests start one after the other
		pod, err := harness.Shared.Node.RunPod(t.Context(), node.PodSpec{Name: "sandboxed", Handler: node.GVisorHandler})
		if err != nil {
			t.Fatal(err)
		}
		sandboxed = pod // goes with the node
	}
	return harness.RunContainerIn(t, sandboxed, spec)
}

// TestExec checks that a command runs in gVisor, not beside it on the node, with its streams, its exit code and its terminal.
func TestExec(t *testing.T) {
	container := run(t, node.ContainerSpec{})
	shim := harness.Shared.Shim
	for _, transport := range harness.Transports {
		t.Run(transport, func(t *testing.T) {
			var output, complaints testutil.Buffer
			err := shim.Exec(t, transport, container, remotecommand.StreamOptions{Stdout: &output, Stderr: &complaints},
				"sh", "-c", "cat /proc/version; echo problem >&2; exit 7")
			if code := harness.ExitCode(t, err); code != 7 || !strings.Contains(output.String(), "gvisor") || complaints.String() != "problem\n" {
				t.Errorf("exit code %d, %q, %q", code, &output, &complaints)
			}

			sent := make([]byte, 3<<20)
			rand.Read(sent) //nolint:errcheck // never fails
			var got testutil.Buffer
			if err := shim.Exec(t, transport, container, remotecommand.StreamOptions{Stdin: bytes.NewReader(sent), Stdout: &got}, "cat"); err != nil {
				t.Error(err)
			}
			if got.String() != string(sent) {
				t.Errorf("cat returned %d bytes of %d, or others", len(got.String()), len(sent))
			}

			sizes := make(harness.Sizes, 1)
			sizes <- remotecommand.TerminalSize{Width: 93, Height: 31}
			var screen testutil.Buffer
			typed, keyboard := io.Pipe()
			defer keyboard.Close()
			options := remotecommand.StreamOptions{Stdin: typed, Stdout: &screen, Tty: true, TerminalSizeQueue: sizes}
			ended, cancel := harness.Begin(t, transport, shim.ExecURL(t, container, options, "sh"), options)
			defer cancel()
			// Only the upstream can set the size of a relayed terminal, and it starts the command first.
			testutil.Eventually(t, "the terminal has the client's size", func() bool {
				if _, err := io.WriteString(keyboard, "stty size\n"); err != nil {
					return false
				}
				return strings.Contains(screen.String(), "31 93")
			})
			if _, err := io.WriteString(keyboard, "exit 3\n"); err != nil {
				t.Fatal(err)
			}
			if code := harness.ExitCode(t, harness.AwaitEnd(t, ended)); code != 3 {
				t.Errorf("exit code %d of a terminal, want 3: %q", code, &screen)
			}
		})
	}
}

// TestExecSync checks probes: one that passes, one that fails, and one that hangs, which ends at its time-out.
func TestExecSync(t *testing.T) {
	container := run(t, node.ContainerSpec{})
	shim := harness.Shared.Shim
	response, err := shim.ExecSync(t.Context(), container, 60*time.Second, "sh", "-c", "cat /proc/version; echo problem >&2; exit 7")
	if err != nil {
		t.Fatal(err)
	}
	if response.ExitCode != 7 || !strings.Contains(string(response.Stdout), "gvisor") || string(response.Stderr) != "problem\n" {
		t.Errorf("exit code %d, %q, %q", response.ExitCode, response.Stdout, response.Stderr)
	}
	_, err = shim.ExecSync(t.Context(), container, time.Second, "sleep", "1000")
	if status.Code(err) != codes.DeadlineExceeded {
		t.Errorf("a probe that hangs: %v", err)
	}
	testutil.Eventually(t, "nothing is left of the probe that hung", func() bool {
		response, err := shim.ExecSync(t.Context(), container, 60*time.Second, "ps", "-o", "args")
		return err == nil && !strings.Contains(string(response.Stdout), "sleep 1000")
	})
}

// TestAttach checks that a line that is typed is answered.
func TestAttach(t *testing.T) {
	for _, transport := range harness.Transports {
		t.Run(transport, func(t *testing.T) {
			container := run(t, node.ContainerSpec{Stdin: true, Command: []string{"sh", "-c", "while read line; do echo you said: $line; done"}})
			typed, keyboard := io.Pipe()
			defer keyboard.Close()
			var output testutil.Buffer
			options := remotecommand.StreamOptions{Stdin: typed, Stdout: &output, Stderr: io.Discard}
			ended, cancel := harness.Begin(t, transport, harness.Shared.Shim.AttachURL(t, container, options), options)
			if _, err := io.WriteString(keyboard, "hello\n"); err != nil {
				t.Fatal(err)
			}
			testutil.Eventually(t, "the line is answered", func() bool { return strings.Contains(output.String(), "you said: hello\n") })
			cancel()
			harness.AwaitEnd(t, ended) //nolint:errcheck // cancelled
		})
	}
}

// TestClientLeaves checks that a command sees the end of its input when its client leaves. Nobody outside gVisor can do more:
// a command that does not read its input stays, as it does with containerd alone.
func TestClientLeaves(t *testing.T) {
	container := run(t, node.ContainerSpec{})
	for _, transport := range harness.Transports {
		t.Run(transport, func(t *testing.T) {
			var output testutil.Buffer
			typed, keyboard := io.Pipe()
			defer keyboard.Close()
			options := remotecommand.StreamOptions{Stdin: typed, Stdout: &output}
			mark := harness.Unique("reader")
			ended, cancel := harness.Begin(t, transport, harness.Shared.Shim.ExecURL(t, container, options, "sh", "-c", "cat; : "+mark), options)
			if _, err := io.WriteString(keyboard, "hello\n"); err != nil {
				t.Fatal(err)
			}
			testutil.Eventually(t, "the command answers", func() bool { return strings.Contains(output.String(), "hello") })
			cancel()
			harness.AwaitEnd(t, ended) //nolint:errcheck // cancelled
			testutil.Eventually(t, "the command has ended", func() bool {
				response, err := harness.Shared.Shim.ExecSync(context.WithoutCancel(t.Context()), container, 60*time.Second, "ps", "-o", "args")
				return err == nil && !strings.Contains(string(response.Stdout), mark)
			})
		})
	}
}

// TestPortForward checks that a port-forward into gVisor fails as it does with containerd alone, and lives on. Both dial in the
// pod's network namespace, but the sandbox has taken its addresses: its network stack is its own. Should containerd get a way
// in, this test fails.
func TestPortForward(t *testing.T) {
	const port = 8080
	container := run(t, node.ContainerSpec{Command: []string{"sh", "-c", fmt.Sprintf("while :; do echo answer to abc | nc -l -p %d; done", port)}})
	testutil.Eventually(t, "the server answers inside", func() bool {
		response, err := harness.Shared.Shim.ExecSync(t.Context(), container, 60*time.Second, "sh", "-c", fmt.Sprintf("nc 127.0.0.1 %d </dev/null", port))
		return err == nil && string(response.Stdout) == "answer to abc\n"
	})
	if answer, _ := harness.StartForward(t, harness.Shared.Node.Upstream(), sandboxed, "SPDY", port).Talk(port, "abc"); answer != "" {
		t.Errorf("containerd's port-forward answers %q: streamshim's should, too", answer)
	}
	for _, transport := range harness.Transports {
		f := harness.StartForward(t, harness.Shared.Shim.Runtime, sandboxed, transport, port)
		for range 3 {
			if answer, _ := f.Talk(port, "abc"); answer != "" {
				t.Errorf("%s: the port answers %q", transport, answer)
			}
		}
		select {
		case err := <-f.Ended:
			f.Ended <- err
			t.Errorf("%s: the port-forward has ended: %v", transport, err)
		default:
		}
	}
}
