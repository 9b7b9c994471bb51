package exec

import (
	"bytes"
	"context"
	"fmt"
	"strings"
	"testing"

	"k8s.io/client-go/tools/remotecommand"

	"github.com/streamshim/streamshim/internal/testutil"
	"github.com/streamshim/streamshim/test/internal/harness"
	"github.com/streamshim/streamshim/test/internal/node"
)

// TestTerminalSizeIsRightAtFirst checks that the terminal has the right size when the command first looks at it
// (kubernetes#47990, E8): 100 times of 100, with each protocol and behind proxies.
func TestTerminalSizeIsRightAtFirst(t *testing.T) {
	// Not in parallel with the other tests: beside them, a client may not be able to send its size within the half second
	// that the command waits for it.
	container := harness.RunContainer(t, node.ContainerSpec{})
	harness.InParallel(t, 100, 2, func(i int) {
		transport, hops := harness.Transports[i%2], i/4%3
		var output bytes.Buffer
		queue := make(harness.Sizes, 1)
		queue <- remotecommand.TerminalSize{Width: uint16(100 + i), Height: uint16(30 + i)}
		options := remotecommand.StreamOptions{Stdout: &output, Tty: true, TerminalSizeQueue: queue}
		u := harness.Shared.Shim.ExecURL(t, container, options, "stty", "size")
		u = harness.ThroughProxies(t, u, hops, transport, options)
		ctx, cancel := context.WithTimeout(t.Context(), testutil.Patience)
		defer cancel()
		err := harness.Stream(ctx, transport, u.String(), options)
		close(queue)
		if want := fmt.Sprintf("%d %d", 30+i, 100+i); err != nil || strings.TrimSpace(output.String()) != want {
			t.Errorf("%s, %d proxies, run %d: %q, %v; want %s", transport, hops, i, &output, err, want)
		}
	})
}

// TestTerminalIsResized checks that later sizes arrive in their order, and that 0x0 is no size.
func TestTerminalIsResized(t *testing.T) {
	t.Parallel()
	container := harness.RunContainer(t, node.ContainerSpec{})
	harness.ForEachTransport(t, func(t *testing.T, transport string) {
		output := &testutil.Buffer{}
		queue := make(harness.Sizes, 8)
		options := remotecommand.StreamOptions{Stdin: harness.OpenStdin(t), Stdout: output, Tty: true, TerminalSizeQueue: queue}
		u := harness.Shared.Shim.ExecURL(t, container, options, "sh", "-c",
			`trap 'stty size; [ "$(stty size)" = "49 109" ] && exit 0' WINCH; echo ready; while :; do sleep 0.1; done`)
		ended, _ := harness.Begin(t, transport, u, options)
		testutil.Eventually(t, "the command runs", func() bool { return strings.Contains(output.String(), "ready") })
		for i := range uint16(10) {
			queue <- remotecommand.TerminalSize{}
			queue <- remotecommand.TerminalSize{Width: 100 + i, Height: 40 + i}
		}
		if err := harness.AwaitEnd(t, ended); err != nil {
			t.Error(err)
		}
		close(queue)
		last := ""
		for _, line := range strings.Fields(strings.ReplaceAll(output.String(), "ready", "")) {
			if len(line) == 3 { // the width
				if line < last {
					t.Errorf("%s after %s: %q", line, last, output)
				}
				last = line
			}
		}
		if strings.Contains(output.String(), "0 0\r") {
			t.Errorf("0x0 was applied: %q", output)
		}
	})
}

// TestEndOfStdinKeepsTerminalOutput checks that the end of stdin does not cut the output of a terminal (cri-tools#269,
// E11).
func TestEndOfStdinKeepsTerminalOutput(t *testing.T) {
	t.Parallel()
	container := harness.RunContainer(t, node.ContainerSpec{})
	harness.ForEachTransport(t, func(t *testing.T, transport string) {
		for _, input := range []string{"sleep 2; echo mar''ker\n", "sleep 2; echo mar''ker\nexit 5\n"} {
			var output bytes.Buffer
			err := harness.Shared.Shim.Exec(t, transport, container,
				remotecommand.StreamOptions{Stdin: strings.NewReader(input), Stdout: &output, Tty: true}, "sh")
			if !strings.Contains(output.String(), "marker") {
				t.Errorf("%q, %v", &output, err)
			}
			if want := strings.Count(input, "exit 5") * 5; harness.ExitCode(t, err) != want {
				t.Errorf("%v, want exit code %d", err, want)
			}
		}
	})
}

// TestReopenedTerminalGoesOn checks that a command that closes its terminal and opens it again, as daemons and passphrase
// prompts do, does not count as ended between.
func TestReopenedTerminalGoesOn(t *testing.T) {
	t.Parallel()
	container := harness.RunContainer(t, node.ContainerSpec{})
	harness.ForEachTransport(t, func(t *testing.T, transport string) {
		var output bytes.Buffer
		err := harness.Shared.Shim.Exec(t, transport, container, remotecommand.StreamOptions{Stdout: &output, Tty: true},
			"sh", "-c", "echo first; exec <&- >&- 2>&-; sleep 1; echo again > /dev/tty; exit 3")
		if harness.ExitCode(t, err) != 3 || output.String() != "first\r\nagain\r\n" {
			t.Errorf("%q, %v", &output, err)
		}
	})
}
