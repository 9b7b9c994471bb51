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

// slowReader takes rate bytes a second and remembers what they were.
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

// Output is complete, however slow the reader (kubernetes#60140, E1: cut off with exit code 0, the slower the
// reader, the more). 24 MiB to readers of 1 MB/s that send pings all the while, directly and behind
// one and two proxies, 25 runs for each protocol, the exit codes 0 and 3 in turn: every byte and the
// exit code arrive. Only what the API server's own translator of WebSocket loses, where buffers hide that
// the reader is slow, cannot be mended here; it must not be taken for a success. The command itself is done at once; all the rest is the session's lingering.
func TestOutputIsComplete(t *testing.T) {
	t.Parallel()
	const size, rate, runs = 24 << 20, 1_000_000, 25
	want := sha256.New()
	io.Copy(want, io.LimitReader(&counting{}, size)) //nolint:errcheck // a hash takes everything
	container := harness.RunContainer(t, node.ContainerSpec{})
	// What the commands send, made by the client side so that it is known here.
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
					// The API server's translator closes its client's connection with data on its way; the
					// client's next ping makes the rest be thrown away. It is an error at least.
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

// counting is data in which nothing can be missing unnoticed.
type counting struct{ n uint32 }

func (c *counting) Read(p []byte) (int, error) {
	for i := range p {
		p[i] = byte(c.n >> (c.n % 4 * 8))
		c.n++
	}
	return len(p), nil
}

// Short commands with a terminal keep their last output (cri-o#8483, E7): 500 of them, and no line is
// lost.
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

// exec returns although a background child holds stdout (kubernetes#44371, E4).
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
		// The children of a command that has ended in good order live on, as after `docker exec`.
		if left := harness.WithMark(t.Name()); len(left) == 0 {
			t.Error("the background children were ended")
		}
	})
}

// ...but output that still flows is never cut, even if it takes longer than drain_idle.
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

// A process that closes one of its outputs keeps its stdin (E10): an upload of 50 MB is complete.
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

// raggedReader reads pieces of all sizes, and so has a client send frames of all sizes.
type raggedReader struct{ r io.Reader }

func (r raggedReader) Read(p []byte) (int, error) {
	if rand.IntN(2) == 0 {
		p = p[:rand.IntN(len(p))+1]
	}
	return r.r.Read(p)
}

// The end of stdin cannot be sent over WebSocket (kubernetes#89899, E9), and where it can it passes for
// the end of the client (E2): the command sees the end of its input and goes on.
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
