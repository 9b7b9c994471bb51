package exec

import (
	"bytes"
	"context"
	"crypto/sha256"
	"fmt"
	"hash"
	"io"
	"math/rand/v2"
	"strings"
	"sync"
	"testing"
	"time"

	"k8s.io/client-go/tools/remotecommand"

	"github.com/streamshim/streamshim/internal/testutil"
	"github.com/streamshim/streamshim/test/internal/harness"
	"github.com/streamshim/streamshim/test/internal/node"
)

// slowReader reads rate bytes a second and keeps them.
type slowReader struct {
	rate  int
	begin time.Time
	size  int
	sum   hash.Hash
}

func newSlowReader(rate int) *slowReader {
	return &slowReader{rate: rate, begin: time.Now(), sum: sha256.New()}
}

func (r *slowReader) Write(p []byte) (int, error) {
	r.size += len(p)
	time.Sleep(time.Until(r.begin.Add(time.Duration(r.size) * time.Second / time.Duration(r.rate))))
	return r.sum.Write(p)
}

// TestOutputIsComplete checks that output is complete, however slow the reader is (kubernetes#60140, E1: it was cut with
// exit code 0, the more the slower the reader). 24 MiB go to readers of 1 MB/s that send pings all the time, directly and
// behind one and two proxies. There are 25 runs for each protocol, alternately with exit codes 0 and 3. Every byte and the
// exit code must arrive. One loss cannot be prevented here: that of the API server's own translator of WebSocket, whose
// buffers hide that the reader is slow. Even that must not be taken for a success. The command itself ends at once. The
// rest of the time is the session's linger.
func TestOutputIsComplete(t *testing.T) {
	t.Parallel()
	const size, rate, runs = 24 << 20, 1_000_000, 25
	want := sha256.New()
	io.Copy(want, io.LimitReader(&counting{}, size)) //nolint:errcheck // a hash takes everything
	container := harness.RunContainer(t, node.ContainerSpec{})
	// What the commands send. The client side makes it, so it is known here.
	options := remotecommand.StreamOptions{Stdin: io.LimitReader(&counting{}, size), Stdout: io.Discard}
	if err := harness.Shared.Shim.Exec(t, "SPDY", container, options, "sh", "-c", "cat > /tmp/data"); err != nil {
		t.Fatal(err)
	}
	var all sync.WaitGroup
	for _, transport := range harness.Transports {
		for run := range runs {
			hops, code := run%3, run%2*3
			output := newSlowReader(rate)
			options := remotecommand.StreamOptions{Stdout: output, Stderr: io.Discard}
			u := harness.Shared.Shim.ExecURL(t, container, options, "sh", "-c", fmt.Sprintf("cat /tmp/data; exit %d", code))
			u = harness.ThroughProxies(t, u, hops, transport, options)
			all.Go(func() {
				err := harness.Stream(t.Context(), transport, u.String(), options)
				if transport == "WebSocket" && hops == 2 && err != nil && harness.ExitCodeOf(err) < 0 && output.size > size/2 {
					// The API server's translator closes its client's connection with data on its way. The client's next
					// ping then discards the rest. At least that is an error.
					t.Logf("lost by the API server's translator: %d of %d bytes: %v", output.size, size, err)
					return
				}
				if code == 0 && err != nil || code != 0 && harness.ExitCodeOf(err) != code {
					t.Errorf("%s, %d proxies, run %d: want exit code %d, got %v", transport, hops, run, code, err)
				}
				if output.size != size || !bytes.Equal(output.sum.Sum(nil), want.Sum(nil)) {
					t.Errorf("%s, %d proxies, run %d: %d of %d bytes", transport, hops, run, output.size, size)
				}
			})
		}
	}
	all.Wait()
}

// counting is data in which every gap shows.
type counting struct{ n uint32 }

func (c *counting) Read(p []byte) (int, error) {
	for i := range p {
		p[i] = byte(c.n >> (c.n % 4 * 8))
		c.n++
	}
	return len(p), nil
}

// TestShortTerminalCommandsKeepOutput checks that 500 short commands with a terminal lose no line of output (cri-o#8483,
// E7).
func TestShortTerminalCommandsKeepOutput(t *testing.T) {
	t.Parallel()
	container := harness.RunContainer(t, node.ContainerSpec{})
	harness.InParallel(t, 500, 16, func(i int) {
		var output bytes.Buffer
		options := remotecommand.StreamOptions{Stdout: &output, Tty: true}
		ctx, cancel := context.WithTimeout(t.Context(), testutil.Patience)
		defer cancel()
		u := harness.Shared.Shim.ExecURL(t, container, options, "echo", fmt.Sprint("line ", i))
		err := harness.Stream(ctx, harness.Transports[i%2], u.String(), options)
		if want := fmt.Sprintf("line %d\r\n", i); err != nil || output.String() != want {
			t.Errorf("%s, command %d: %q, %v", harness.Transports[i%2], i, &output, err)
		}
	})
}

// TestBackgroundChildDoesNotHoldTheSession checks that exec returns although a background child keeps stdout open
// (kubernetes#44371, E4).
func TestBackgroundChildDoesNotHoldTheSession(t *testing.T) {
	t.Parallel()
	container := harness.RunContainer(t, node.ContainerSpec{})
	harness.ForEachTransport(t, func(t *testing.T, transport string) {
		for _, tty := range []bool{false, true} {
			begin := time.Now()
			var output bytes.Buffer
			err := harness.Shared.Shim.Exec(t, transport, container, remotecommand.StreamOptions{Stdout: &output, Tty: tty},
				harness.Marked(t.Name(), "trap '' HUP; sleep 1000 & echo done; exit 3")...)
			took := time.Since(begin)
			if harness.ExitCode(t, err) != 3 || strings.TrimSpace(output.String()) != "done" {
				t.Errorf("tty %v: %q, %v", tty, &output, err)
			}
			t.Logf("tty %v: returned after %v", tty, took)
			if took > 30*time.Second {
				t.Errorf("tty %v: it took %v", tty, took)
			}
		}
		// The children of a command that has ended by itself live on, as after `docker exec`.
		if left := harness.WithMark(t.Name()); len(left) == 0 {
			t.Error("the background children were ended")
		}
	})
}

// TestFlowingOutputIsNotCutOff checks that output that still flows is never cut, even if it takes longer than drain_idle.
func TestFlowingOutputIsNotCutOff(t *testing.T) {
	t.Parallel()
	container := harness.RunContainer(t, node.ContainerSpec{})
	harness.ForEachTransport(t, func(t *testing.T, transport string) {
		var output bytes.Buffer
		err := harness.Shared.Shim.Exec(t, transport, container, remotecommand.StreamOptions{Stdout: &output},
			"sh", "-c", "(for i in 1 2 3 4 5 6 7 8; do sleep 0.7; echo $i; done) & exit 4")
		if harness.ExitCode(t, err) != 4 || output.String() != "1\n2\n3\n4\n5\n6\n7\n8\n" {
			t.Errorf("%q, %v", &output, err)
		}
	})
}

// TestClosedOutputLeavesStdinOpen checks that a process that closes one of its outputs keeps its stdin (E10): an upload of
// 50 MB is complete.
func TestClosedOutputLeavesStdinOpen(t *testing.T) {
	t.Parallel()
	container := harness.RunContainer(t, node.ContainerSpec{})
	const size = 50_000_000
	harness.ForEachTransport(t, func(t *testing.T, transport string) {
		for _, closed := range []string{"2>&-", ">&-", ">&- 2>&-"} {
			file, sum := "/tmp/"+harness.Unique("upload"), sha256.New()
			input := io.TeeReader(raggedReader{io.LimitReader(&counting{}, size)}, sum)
			err := harness.Shared.Shim.Exec(t, transport, container,
				remotecommand.StreamOptions{Stdin: input, Stdout: io.Discard, Stderr: io.Discard},
				"sh", "-c", "exec "+closed+"; sleep 1; cat > "+file)
			if err != nil {
				t.Errorf("%s: %v", closed, err)
			}
			want := fmt.Sprintf("%d %x", size, sum.Sum(nil))
			got := harness.Shared.Shim.MustSync(t, container, "echo $(wc -c < "+file+") $(sha256sum < "+file+"); rm "+file)
			if strings.TrimSuffix(strings.TrimSpace(got), " -") != want {
				t.Errorf("%s: %q arrived, want %q", closed, got, want)
			}
		}
	})
}

// raggedReader reads pieces of all sizes, so that a client sends frames of all sizes.
type raggedReader struct{ r io.Reader }

func (r raggedReader) Read(p []byte) (int, error) {
	if rand.IntN(2) == 0 {
		p = p[:rand.IntN(len(p))+1]
	}
	return r.r.Read(p)
}

// TestEndOfStdin checks that the command sees the end of its input and goes on. Over WebSocket that end cannot be sent
// (kubernetes#89899, E9). Where it can be sent, others take it for the end of the client (E2).
func TestEndOfStdin(t *testing.T) {
	t.Parallel()
	container := harness.RunContainer(t, node.ContainerSpec{})
	harness.ForEachTransport(t, func(t *testing.T, transport string) {
		for hops := range 3 {
			var output bytes.Buffer
			options := remotecommand.StreamOptions{Stdin: strings.NewReader("hello"), Stdout: &output}
			u := harness.Shared.Shim.ExecURL(t, container, options, "sh", "-c", "cat; sleep 3; echo ' and done'")
			u = harness.ThroughProxies(t, u, hops, transport, options)
			ctx, cancel := context.WithTimeout(t.Context(), testutil.Patience)
			if err := harness.Stream(ctx, transport, u.String(), options); err != nil || output.String() != "hello and done\n" {
				t.Errorf("%d proxies: %q, %v", hops, &output, err)
			}
			cancel()
		}
	})
	t.Run("crictl", func(t *testing.T) {
		t.Parallel()
		for _, transport := range []string{"spdy", "websocket"} {
			command := harness.Shared.Shim.Crictl(t, "exec", "--transport", transport, "-i", container, "cat")
			command.Stdin = strings.NewReader("hello\n")
			if output, err := command.Output(); err != nil || string(output) != "hello\n" {
				t.Errorf("%s: %q, %v", transport, output, err)
			}
		}
	})
}
