package attach

import (
	"fmt"
	"io"
	"os"
	"strings"
	"testing"
	"time"

	"k8s.io/client-go/tools/remotecommand"

	"github.com/streamshim/streamshim/internal/testutil"
	"github.com/streamshim/streamshim/test/internal/harness"
	"github.com/streamshim/streamshim/test/internal/node"
)

// TestSlowViewerLeavesTheContainerRunning checks that a viewer that does not read does not stop the container and its log
// (moby#41827, A1). Output and log go on. The viewer finds a gap when it reads again.
func TestSlowViewerLeavesTheContainerRunning(t *testing.T) {
	t.Parallel()
	for _, tty := range []bool{false, true} {
		for _, transport := range harness.Transports {
			t.Run(fmt.Sprintf("%s/tty=%v", transport, tty), func(t *testing.T) {
				t.Parallel()
				name := harness.Unique("printer")
				container := harness.RunContainer(t, node.ContainerSpec{Name: name, TTY: tty, Command: []string{"sh", "-c",
					"line=$(head -c 1000 /dev/zero | tr '\\0' x); while :; do yes $line | head -n 300; sleep 0.1; done"}})
				log := harness.Shared.Node.ContainerLog(harness.Shared.Pod, name)
				size := func() int64 {
					info, err := os.Stat(log)
					if err != nil {
						return 0
					}
					return info.Size()
				}
				output := &testutil.Buffer{}
				viewer := harness.NewGate(output)
				options := remotecommand.StreamOptions{Stdout: viewer, Tty: tty}
				ended, cancel := harness.Begin(t, transport, harness.Shared.Shim.AttachURL(t, container, options), options)
				// More than all the buffers between the container and the viewer can hold.
				before := size()
				testutil.Eventually(t, "the log has grown by 25 MB", func() bool { return size() > before+25_000_000 })
				viewer.Open()
				testutil.Eventually(t, "the viewer is told of the gap", func() bool {
					return strings.Contains(output.String(), "bytes skipped because the client reads too slowly]")
				})
				cancel()
				harness.AwaitEnd(t, ended) //nolint:errcheck // cancelled
			})
		}
	}
}

// TestViewerThatLeavesAtOnceLeavesTheContainerRunning checks that a client that leaves while it is being attached does not
// stop the container for good. Without the relay, containerd would wait for a reply that it can no longer send, and hold
// its lock on the output. The relay lets it reply first.
func TestViewerThatLeavesAtOnceLeavesTheContainerRunning(t *testing.T) {
	t.Parallel()
	for _, transport := range harness.Transports {
		t.Run(transport, func(t *testing.T) {
			t.Parallel()
			name := harness.Unique("printer")
			container := harness.RunContainer(t, node.ContainerSpec{Name: name, Command: []string{"sh", "-c",
				"while :; do echo line; sleep 0.01; done"}})
			log := harness.Shared.Node.ContainerLog(harness.Shared.Pod, name)
			size := func() int64 {
				info, err := os.Stat(log)
				if err != nil {
					return 0
				}
				return info.Size()
			}
			options := remotecommand.StreamOptions{Stdout: io.Discard, Stderr: io.Discard}
			for i := range 150 {
				ended, cancel := harness.Begin(t, transport, harness.Shared.Shim.AttachURL(t, container, options), options)
				time.Sleep(time.Duration(i%15) * time.Millisecond) // to leave at any point of the start
				cancel()
				harness.AwaitEnd(t, ended) //nolint:errcheck // cancelled
			}
			before := size()
			testutil.Eventually(t, "the log goes on", func() bool { return size() > before })
		})
	}
}

// The table of docs/attach.md (kubernetes#56453, A3): what happens to the container's stdin and to the session when the
// client's input ends, and when the client leaves.
var attachTable = []struct {
	once, tty bool
	// eofEndsStdin: the main process sees the end of its input when the client's input has ended. goneEndsStdin: it sees
	// the end when the client has left.
	eofEndsStdin, goneEndsStdin bool
}{
	{once: false, tty: false},
	{once: false, tty: true},
	{once: true, tty: false, eofEndsStdin: true, goneEndsStdin: true},
	{once: true, tty: true},
}

func TestAttachStdinTable(t *testing.T) {
	t.Parallel()
	const main = `while read line; do echo "got $line"; done; echo end of input; sleep 1000`
	for _, row := range attachTable {
		for _, transport := range harness.Transports {
			start := func(t *testing.T) (container string, log func() string) {
				name := harness.Unique("reader")
				container = harness.RunContainer(t, node.ContainerSpec{
					Name: name, Stdin: true, StdinOnce: row.once, TTY: row.tty, Command: []string{"sh", "-c", main},
				})
				return container, func() string {
					text, _ := os.ReadFile(harness.Shared.Node.ContainerLog(harness.Shared.Pod, name)) //nolint:errcheck // empty until it is there
					return string(text)
				}
			}
			t.Run(fmt.Sprintf("once=%v/tty=%v/%s/EOF", row.once, row.tty, transport), func(t *testing.T) {
				t.Parallel()
				container, _ := start(t)
				output := &testutil.Buffer{}
				// More than one line, because the output of the last must not be cut.
				options := remotecommand.StreamOptions{Stdin: strings.NewReader("one\ntwo\n"), Stdout: output, Tty: row.tty}
				input, typed := io.Pipe()
				defer typed.Close()
				if row.tty {
					options.Stdin = input // its end is a detach
				}
				ended, cancel := harness.Begin(t, transport, harness.Shared.Shim.AttachURL(t, container, options), options)
				if row.tty {
					io.WriteString(typed, "one\ntwo\n") //nolint:errcheck // seen below
				}
				testutil.Eventually(t, "both lines are answered", func() bool { return strings.Contains(output.String(), "got two") })
				if row.tty {
					typed.Close()
					if err := harness.AwaitEnd(t, ended); err != nil {
						t.Errorf("the client detached and got %v", err)
					}
					expectAnswer(t, container, transport, row.tty)
					return
				}
				if row.eofEndsStdin {
					testutil.Eventually(t, "the process sees the end", func() bool { return strings.Contains(output.String(), "end of input") })
				} else {
					if err := harness.AwaitEnd(t, ended); err != nil {
						t.Errorf("the input ended and the client got %v", err)
					}
					expectAnswer(t, container, transport, row.tty) // others may still type
				}
				cancel()
			})
			t.Run(fmt.Sprintf("once=%v/tty=%v/%s/gone", row.once, row.tty, transport), func(t *testing.T) {
				t.Parallel()
				container, log := start(t)
				output := &testutil.Buffer{}
				input, typed := io.Pipe()
				defer typed.Close()
				options := remotecommand.StreamOptions{Stdin: input, Stdout: output, Tty: row.tty}
				ended, cancel := harness.Begin(t, transport, harness.Shared.Shim.AttachURL(t, container, options), options)
				io.WriteString(typed, "one\n") //nolint:errcheck // seen below
				testutil.Eventually(t, "the line is answered", func() bool { return strings.Contains(output.String(), "got one") })
				cancel()
				harness.AwaitEnd(t, ended) //nolint:errcheck // cancelled
				if row.goneEndsStdin {
					testutil.Eventually(t, "the process sees the end", func() bool { return strings.Contains(log(), "end of input") })
					return
				}
				expectAnswer(t, container, transport, row.tty)
			})
		}
	}
}

// expectAnswer attaches another client and checks that a line is answered.
func expectAnswer(t *testing.T, container, transport string, tty bool) {
	t.Helper()
	output := &testutil.Buffer{}
	input, typed := io.Pipe()
	defer typed.Close()
	options := remotecommand.StreamOptions{Stdin: input, Stdout: output, Tty: tty}
	_, cancel := harness.Begin(t, transport, harness.Shared.Shim.AttachURL(t, container, options), options)
	defer cancel()
	io.WriteString(typed, "again\n") //nolint:errcheck // seen below
	testutil.Eventually(t, "a second client's line is answered", func() bool { return strings.Contains(output.String(), "got again") })
}

// TestAttachedTerminalHasTheClientsSize checks that the size of the client's terminal reaches the container that it is
// attached to (cri-o#9246, A6).
func TestAttachedTerminalHasTheClientsSize(t *testing.T) {
	t.Parallel()
	harness.ForEachTransport(t, func(t *testing.T, transport string) {
		container := harness.RunContainer(t, node.ContainerSpec{Stdin: true, TTY: true, Command: []string{"sh"}})
		output := &testutil.Buffer{}
		queue := make(harness.Sizes, 2)
		queue <- remotecommand.TerminalSize{Width: 123, Height: 45}
		input, typed := io.Pipe()
		defer typed.Close()
		options := remotecommand.StreamOptions{Stdin: input, Stdout: output, Tty: true, TerminalSizeQueue: queue}
		_, cancel := harness.Begin(t, transport, harness.Shared.Shim.AttachURL(t, container, options), options)
		defer cancel()
		defer close(queue)
		testutil.Eventually(t, "the size is right", func() bool {
			io.WriteString(typed, "stty size\n") //nolint:errcheck // seen in the output
			return strings.Contains(output.String(), "45 123")
		})
	})
}
