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

	"github.com/streamshim/streamshim/internal/testutil"
	"github.com/streamshim/streamshim/test/internal/harness"
	"github.com/streamshim/streamshim/test/internal/node"
)

// TestSessionEndsWithItsContainer checks that a session ends with its container or pod, with a status that says why. Others
// hang (kubernetes#129144, kubernetes#89233, E3) or report success (E5).
func TestSessionEndsWithItsContainer(t *testing.T) {
	t.Parallel()
	for _, e := range harness.Endings {
		t.Run(e.Name, func(t *testing.T) {
			t.Parallel()
			pod := harness.RunPod(t, e.Pod)
			container := harness.RunContainerIn(t, pod, e.Container)
			type client struct {
				what   string
				mark   string
				ended  <-chan error
				output *harness.Gate // closed, for a client that does not read
				said   *testutil.Buffer
			}
			var clients []client
			for _, transport := range harness.Transports {
				for _, tty := range []bool{false, true} {
					for _, reads := range []bool{true, false} {
						c := client{what: fmt.Sprintf("%s, tty %v, reads %v", transport, tty, reads), mark: harness.Unique(t.Name())}
						c.said = &testutil.Buffer{}
						script, options := "sleep 1000; :", remotecommand.StreamOptions{Stdin: harness.OpenStdin(t), Stdout: io.Discard, Stderr: c.said}
						if tty {
							options.Stdout, options.Stderr, options.Tty = c.said, nil, true
						}
						if !reads {
							script = "yes"
							c.output = harness.NewGate(options.Stdout)
							options.Stdout = c.output
						}
						u := harness.Shared.Shim.ExecURL(t, container, options, harness.Marked(c.mark, script)...)
						c.ended, _ = harness.Begin(t, transport, u, options)
						clients = append(clients, c)
					}
				}
			}
			for _, c := range clients {
				harness.AwaitMarked(t, c.mark, 1)
			}
			begin := time.Now()
			e.End(t, pod, container)
			took := time.Since(begin)
			t.Logf("the container was gone after %v", took)
			// E12: a client that does not read must not delay the container's end.
			if took > 15*time.Second {
				t.Errorf("with sessions in it the container took %v to end", took)
			}
			for _, c := range clients {
				harness.AwaitNone(t, c.mark, harness.EndLimit)
			}
			for _, c := range clients {
				if c.output != nil {
					c.output.Open() // it reads again, and is told, too
				}
				select {
				case err := <-c.ended:
					t.Logf("%s: told %v after the container's end: %v", c.what, time.Since(begin)-took, err)
					if harness.ExitCodeOf(err) != 137 || !namesOneOf(c.said.String(), e.Reasons) {
						said := c.said.String()
						t.Errorf("%s: %v and %q, want 137 and one of %q", c.what, err, said[max(0, len(said)-200):], e.Reasons)
					}
				case <-time.After(harness.EndLimit):
					t.Errorf("%s: the session did not end", c.what)
				}
			}
		})
	}
}

func namesOneOf(said string, reasons []string) bool {
	return slices.ContainsFunc(reasons, func(reason string) bool { return strings.Contains(said, "[streamshim: "+reason+"]") })
}

// TestSessionEndedByUsIsAFailure checks that a session that streamshim ends gets a status: an empty error stream would be a
// success (kubectl#1208, E5).
func TestSessionEndedByUsIsAFailure(t *testing.T) {
	t.Parallel()
	for _, test := range []struct{ name, configuration, reason string }{
		{"idle-timeout", "[exec]\nidle_timeout = \"2s\"\n", "nothing was sent or received"},
		{"lifetime", "[exec]\nmax_lifetime = \"2s\"\n", "sessions may last"},
		{"shutdown", "[shutdown]\ndrain = \"1s\"\n", "shutting down"},
	} {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			shim := harness.StartStreamshim(t, test.configuration)
			container := harness.RunContainer(t, node.ContainerSpec{})
			for _, transport := range harness.Transports {
				var output bytes.Buffer
				mark := harness.Unique(t.Name())
				options := remotecommand.StreamOptions{Stdin: harness.OpenStdin(t), Stdout: &output}
				ended, _ := harness.Begin(t, transport, shim.ExecURL(t, container, options, harness.Marked(mark, "echo hello; sleep 1000; :")...), options)
				harness.AwaitMarked(t, mark, 2)
				if test.name == "shutdown" {
					shim.Command.Process.Signal(syscall.SIGTERM) //nolint:errcheck // seen below
				}
				select {
				case err := <-ended:
					if err == nil || !strings.Contains(err.Error(), test.reason) || output.String() != "hello\n" {
						t.Errorf("%s: %q, %v; want %q", transport, &output, err, test.reason)
					}
				case <-time.After(testutil.Patience):
					t.Errorf("%s: the session did not end", transport)
				}
				harness.AwaitNone(t, mark, goneLimit)
				if test.name == "shutdown" {
					select {
					case <-shim.Ended:
					case <-time.After(testutil.Patience):
						t.Fatal("streamshim did not end")
					}
					shim.Start(t)
				}
			}
		})
	}
}

// TestStopDoesNotWaitForSession checks that a session whose client does not read does not delay StopContainer (E12,
// cri-o#6699).
func TestStopDoesNotWaitForSession(t *testing.T) {
	t.Parallel()
	stop := func(sessions int) time.Duration {
		container := harness.RunContainer(t, node.ContainerSpec{})
		ctx, cancel := context.WithCancel(context.Background())
		defer cancel()
		var marks []string
		for i := range sessions {
			mark := harness.Unique(t.Name())
			marks = append(marks, mark)
			options := remotecommand.StreamOptions{Stdout: harness.NewGate(io.Discard), Tty: i%4 > 1}
			u := harness.Shared.Shim.ExecURL(t, container, options, harness.Marked(mark, "trap '' HUP TERM; yes")...)
			go harness.Stream(ctx, harness.Transports[i%2], u.String(), options) //nolint:errcheck // cancelled
		}
		for _, mark := range marks {
			harness.AwaitMarked(t, mark, 1)
		}
		begin := time.Now()
		harness.StopContainer(t, "", container)
		return time.Since(begin)
	}
	without, with := stop(0), stop(8)
	t.Logf("StopContainer took %v without sessions, %v with", without, with)
	if with > without+10*time.Second {
		t.Errorf("StopContainer took %v, without sessions %v", with, without)
	}
}
