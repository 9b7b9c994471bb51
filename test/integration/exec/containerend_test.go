package exec

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"k8s.io/client-go/tools/remotecommand"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/streamshim/streamshim/test/internal/node"
)

// ending is a way in which a container ends under its sessions.
type ending struct {
	name      string
	pod       node.PodSpec
	container node.ContainerSpec
	// end ends the container and returns when the runtime has said so.
	end func(t *testing.T, pod, container string)
	// reasons are what a client may be told, one of them.
	reasons []string
}

var endings = []ending{
	{name: "stopped", end: stopContainer, reasons: []string{"container exited with code 137"}},
	{name: "removed", end: removeContainer, reasons: []string{"container exited with code 137", "container was removed"}},
	{name: "sandbox-stopped", end: stopSandbox, reasons: []string{"pod sandbox was stopped", "container exited with code 137"}},
	{name: "exited", container: node.ContainerSpec{Command: []string{"sh", "-c", "while [ ! -e /tmp/go ]; do sleep 0.1; done; exit 42"}},
		end: tellContainer, reasons: []string{"container exited with code 42"}},
	{name: "oom-killed", container: node.ContainerSpec{
		MemoryLimit: 64 << 20, Command: []string{"sh", "-c", "while [ ! -e /tmp/go ]; do sleep 0.1; done; exec tail /dev/zero"},
	}, end: tellContainer, reasons: []string{"container was OOM-killed"}},
	{name: "shared-pid-namespace", pod: node.PodSpec{SharedPID: true}, end: stopContainer, reasons: []string{"container exited with code 137"}},
	{name: "host-pid", pod: node.PodSpec{HostPID: true}, end: stopContainer, reasons: []string{"container exited with code 137"}},
	{name: "host-pid-removed", pod: node.PodSpec{HostPID: true}, end: removeContainer, reasons: []string{"container exited with code 137", "container was removed"}},
}

func stopContainer(t *testing.T, _, container string) {
	t.Helper()
	if _, err := shared.node.Runtime().StopContainer(t.Context(), &runtimeapi.StopContainerRequest{ContainerId: container}); err != nil {
		t.Error(err)
	}
}

func removeContainer(t *testing.T, _, container string) {
	t.Helper()
	if _, err := shared.node.Runtime().RemoveContainer(t.Context(), &runtimeapi.RemoveContainerRequest{ContainerId: container}); err != nil {
		t.Error(err)
	}
}

func stopSandbox(t *testing.T, pod, _ string) {
	t.Helper()
	if _, err := shared.node.Runtime().StopPodSandbox(t.Context(), &runtimeapi.StopPodSandboxRequest{PodSandboxId: pod}); err != nil {
		t.Error(err)
	}
}

// tellContainer lets the main process end by itself.
func tellContainer(t *testing.T, _, container string) {
	t.Helper()
	shared.shim.mustSync(t, container, "touch /tmp/go")
	eventually(t, testTimeout, "the container has ended", func() bool {
		response, err := shared.node.Upstream().ContainerStatus(t.Context(), &runtimeapi.ContainerStatusRequest{ContainerId: container})
		return err == nil && response.Status.State == runtimeapi.ContainerState_CONTAINER_EXITED
	})
}

// endLimit is the second within which a session ends with its container, and room for a busy machine.
const endLimit = time.Second + 9*time.Second

// The session is frozen after the container or its pod is gone (kubernetes#129144, kubernetes#89233, E3),
// or its client sees a success (E5): it ends with a status that says why.
func TestSessionFrozenAfterContainerIsGone(t *testing.T) {
	t.Parallel()
	for _, e := range endings {
		t.Run(e.name, func(t *testing.T) {
			t.Parallel()
			pod := runPod(t, e.pod)
			container := runContainerIn(t, pod, e.container)
			type client struct {
				what   string
				mark   string
				ended  <-chan error
				output *gate // closed, for a client that does not read
				said   *buffer
			}
			var clients []client
			for _, transport := range transports {
				for _, tty := range []bool{false, true} {
					for _, reads := range []bool{true, false} {
						c := client{what: fmt.Sprintf("%s, tty %v, reads %v", transport, tty, reads), mark: unique(t.Name())}
						c.said = &buffer{}
						script, options := "sleep 1000; :", remotecommand.StreamOptions{Stdin: openStdin(t), Stdout: io.Discard, Stderr: c.said}
						if tty {
							options.Stdout, options.Stderr, options.Tty = c.said, nil, true
						}
						if !reads {
							script = "yes"
							c.output = newGate(options.Stdout)
							options.Stdout = c.output
						}
						u := shared.shim.execURL(t, container, options, marked(c.mark, script)...)
						c.ended, _ = begin(t, transport, u, options)
						clients = append(clients, c)
					}
				}
			}
			for _, c := range clients {
				awaitMarked(t, c.mark, 1)
			}
			begin := time.Now()
			e.end(t, pod, container)
			took := time.Since(begin)
			t.Logf("the container was gone after %v", took)
			// E12: a client that does not read must not hold the container up.
			if took > 15*time.Second {
				t.Errorf("with sessions in it the container took %v to end", took)
			}
			for _, c := range clients {
				awaitNone(t, c.mark, endLimit)
			}
			for _, c := range clients {
				if c.output != nil {
					c.output.open() // it reads again, and is told as well
				}
				select {
				case err := <-c.ended:
					t.Logf("%s: told %v after the container's end: %v", c.what, time.Since(begin)-took, err)
					if exitCodeOf(err) != 137 || !namesOneOf(c.said.String(), e.reasons) {
						said := c.said.String()
						t.Errorf("%s: %v and %q, want 137 and one of %q", c.what, err, said[max(0, len(said)-200):], e.reasons)
					}
				case <-time.After(endLimit):
					t.Errorf("%s: the session did not end", c.what)
				}
			}
		})
	}
}

func namesOneOf(said string, reasons []string) bool {
	return slices.ContainsFunc(reasons, func(reason string) bool { return strings.Contains(said, "[streamshim: "+reason+"]") })
}

// Attach hangs when its container ends (A5).
func TestAttachFrozenAfterContainerIsGone(t *testing.T) {
	t.Parallel()
	for _, e := range endings {
		t.Run(e.name, func(t *testing.T) {
			t.Parallel()
			pod := runPod(t, e.pod)
			e.container.Stdin = true
			container := runContainerIn(t, pod, e.container)
			var ended []<-chan error
			for _, transport := range transports {
				options := remotecommand.StreamOptions{Stdin: openStdin(t), Stdout: io.Discard, Stderr: io.Discard}
				session, _ := begin(t, transport, shared.shim.attachURL(t, container, options), options)
				ended = append(ended, session)
			}
			e.end(t, pod, container)
			for i, session := range ended {
				select {
				case err := <-session:
					t.Logf("%s: %v", transports[i], err)
				case <-time.After(endLimit):
					t.Errorf("%s: the session did not end", transports[i])
				}
			}
		})
	}
}

// Our own ends have a status too: an empty error stream would be a success (kubectl#1208, E5).
func TestSessionEndedByUsIsASuccess(t *testing.T) {
	t.Parallel()
	for _, test := range []struct{ name, configuration, reason string }{
		{"idle-timeout", "[exec]\nidle_timeout = \"2s\"\n", "nothing was sent or received"},
		{"lifetime", "[exec]\nmax_lifetime = \"2s\"\n", "sessions may last"},
		{"shutdown", "[shutdown]\ndrain = \"1s\"\n", "shutting down"},
	} {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			shim := startStreamshim(t, test.configuration)
			container := runContainer(t, node.ContainerSpec{})
			for _, transport := range transports {
				var output bytes.Buffer
				mark := unique(t.Name())
				options := remotecommand.StreamOptions{Stdin: openStdin(t), Stdout: &output}
				ended, _ := begin(t, transport, shim.execURL(t, container, options, marked(mark, "echo hello; sleep 1000; :")...), options)
				awaitMarked(t, mark, 2)
				if test.name == "shutdown" {
					shim.command.Process.Signal(syscall.SIGTERM) //nolint:errcheck // seen below
				}
				select {
				case err := <-ended:
					if err == nil || !strings.Contains(err.Error(), test.reason) || output.String() != "hello\n" {
						t.Errorf("%s: %q, %v; want %q", transport, &output, err, test.reason)
					}
				case <-time.After(testTimeout):
					t.Errorf("%s: the session did not end", transport)
				}
				awaitNone(t, mark, goneLimit)
				if test.name == "shutdown" {
					select {
					case <-shim.ended:
					case <-time.After(testTimeout):
						t.Fatal("streamshim did not end")
					}
					shim.start(t)
				}
			}
		})
	}
}

// A session with a client that does not read must not delay StopContainer (E12, cri-o#6699).
func TestStopWaitsForSession(t *testing.T) {
	t.Parallel()
	stop := func(sessions int) time.Duration {
		container := runContainer(t, node.ContainerSpec{})
		ctx, cancel := context.WithCancel(context.Background())
		defer cancel()
		var marks []string
		for i := range sessions {
			mark := unique(t.Name())
			marks = append(marks, mark)
			options := remotecommand.StreamOptions{Stdout: newGate(io.Discard), Tty: i%4 > 1}
			u := shared.shim.execURL(t, container, options, marked(mark, "trap '' HUP TERM; yes")...)
			go stream(ctx, transports[i%2], u.String(), options) //nolint:errcheck // cancelled
		}
		for _, mark := range marks {
			awaitMarked(t, mark, 1)
		}
		begin := time.Now()
		stopContainer(t, "", container)
		return time.Since(begin)
	}
	without, with := stop(0), stop(8)
	t.Logf("StopContainer took %v without sessions, %v with", without, with)
	if with > without+10*time.Second {
		t.Errorf("StopContainer took %v, without sessions %v", with, without)
	}
}
