package streaming

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"net/url"
	"strings"
	"testing"
	"time"

	"k8s.io/client-go/tools/remotecommand"

	"github.com/streamshim/streamshim/internal/testutil"
)

// relayedURL returns the URL of a command that an upstream's streaming server serves.
func (s *testServer) relayedURL(upstream *url.URL, options remotecommand.StreamOptions) *url.URL {
	s.t.Helper()
	request := s.relayedRequest(func() *url.URL { return upstream }, streamsOf(options, "the", "upstream", "knows"))
	return s.url(s.Exec(request))
}

// TestExecIsRelayed checks that the upstream serves a command in a container whose runtime is not runc, and that the client
// sees no difference: input, both outputs, exit code, terminal.
func TestExecIsRelayed(t *testing.T) {
	forEachTransport(t, func(t *testing.T, transport string) {
		patient := Config{Commands: commandConfig{Waits: commandWaits{FirstSize: 10 * time.Second}}} // a busy machine must not fail the test
		upstream, s := startServer(t, patient), startServer(t, patient)
		executor := &hostExecutor{t: t}
		const size = 3 << 20
		var out, errs bytes.Buffer
		options := remotecommand.StreamOptions{Stdin: io.LimitReader(zeros{}, size), Stdout: &out, Stderr: &errs}
		u := s.relayedURL(upstream.execURL(executor, options, "sh", "-c", "cat; echo problem >&2; exit 7"), options)
		err := stream(t.Context(), t, transport, u, options)
		if exitCode(t, err) != 7 || out.Len() != size || errs.String() != "problem\n" {
			t.Errorf("%v, %d of %d bytes, %q", err, out.Len(), size, &errs)
		}

		out.Reset()
		queue := make(sizes, 1)
		queue <- remotecommand.TerminalSize{Width: 123, Height: 45}
		defer close(queue)
		options = remotecommand.StreamOptions{Stdin: openStdin(t), Stdout: &out, Tty: true, TerminalSizeQueue: queue}
		u = s.relayedURL(upstream.execURL(executor, options, "stty", "size"), options)
		if err := stream(t.Context(), t, transport, u, options); err != nil || strings.TrimSpace(out.String()) != "45 123" {
			t.Errorf("terminal: %q, %v", &out, err)
		}

		options = remotecommand.StreamOptions{Stdout: io.Discard, Stderr: io.Discard}
		missing := &hostExecutor{t: t, startErr: startError{127, "nothing: not found"}}
		u = s.relayedURL(upstream.execURL(missing, options, "nothing"), options)
		if err := stream(t.Context(), t, transport, u, options); exitCode(t, err) != 127 {
			t.Errorf("command not found: %v", err)
		}
	})
}

// TestUpstreamFails checks that the client is told when the upstream fails, whenever that is, and does not take it for a
// success.
func TestUpstreamFails(t *testing.T) {
	options := remotecommand.StreamOptions{Stdout: io.Discard, Stderr: io.Discard}
	forEachTransport(t, func(t *testing.T, transport string) {
		expect := func(what string, err error, says string) {
			t.Helper()
			if err == nil || !strings.Contains(err.Error(), says) {
				t.Errorf("%s: %v, want %q", what, err, says)
			}
		}
		upstream, s := startServer(t, Config{}), startServer(t, Config{})
		used := upstream.execURL(&hostExecutor{t: t}, options, "true")
		if err := stream(t.Context(), t, transport, s.relayedURL(used, options), options); err != nil {
			t.Fatal(err)
		}
		expect("a token used up", stream(t.Context(), t, transport, s.relayedURL(used, options), options), "404 Not Found")
		nobody := &url.URL{Scheme: "http", Host: fmt.Sprint("127.0.0.1:", unusedPort(t)), Path: "/exec/x"}
		expect("nobody listens", stream(t.Context(), t, transport, s.relayedURL(nobody, options), options), "connection refused")

		executor := &hostExecutor{t: t}
		ended := make(chan error, 1)
		u := s.relayedURL(upstream.execURL(executor, options, "sleep", "600"), options)
		go func() { ended <- stream(t.Context(), t, transport, u, options) }()
		eventually(t, "the command's start", func() bool { return executor.count() == 1 })
		eventually(t, "the session runs", func() bool { return len(upstream.config.Sessions.List()) == 1 })
		upstream.stop() // it ends with no word about the command but that it is shutting down
		expect("the upstream ends", <-ended, "shutting down")
		eventually(t, "the session's end", func() bool { return len(s.config.Sessions.List()) == 0 })
	})
}

// TestDetachFromTerminal checks that a client detaches from a terminal by ending its input. The session ends with success,
// even if the upstream does not end it (CRI-O), and what the container has written before arrives.
func TestDetachFromTerminal(t *testing.T) {
	testutil.Slow(t)
	runTogether(t, func(t *testing.T) {
		forEachTransport(t, func(t *testing.T, transport string) {
			upstream, s := startServer(t, Config{}), startServer(t, Config{Commands: commandConfig{AttachBuffer: 64 << 10}})
			var out syncBuffer
			input, typed := io.Pipe()
			defer typed.Close()
			options := remotecommand.StreamOptions{Stdin: input, Stdout: &out, Tty: true}
			main := func() *url.URL {
				return upstream.execURL(&hostExecutor{t: t}, options, "sh", "-c", "trap '' HUP; echo attached; while :; do sleep 600; done")
			}
			ended := make(chan error, 1)
			u := s.attachURL(main, options)
			go func() { ended <- stream(t.Context(), t, transport, u, options) }()
			eventually(t, "the container's output", func() bool { return strings.Contains(out.String(), "attached") })
			typed.Close()
			select {
			case err := <-ended:
				if err != nil {
					t.Errorf("the client detached and got %v", err)
				}
			case <-time.After(testTimeout):
				t.Error("the session goes on after the client has detached")
			}
		})
	})
}

// TestInputEndDetaches checks that a client without a terminal is detached when its input has ended and the answer has
// arrived. It stays if the configuration says so.
func TestInputEndDetaches(t *testing.T) {
	testutil.Slow(t)
	runTogether(t, func(t *testing.T) {
		forEachTransport(t, func(t *testing.T, transport string) {
			for _, stays := range []bool{false, true} {
				t.Run(fmt.Sprintf("stays=%v", stays), func(t *testing.T) {
					t.Parallel()
					upstream, s := startServer(t, Config{}), startServer(t, Config{Commands: commandConfig{AttachBuffer: 64 << 10, AttachStays: stays}})
					var out syncBuffer
					options := remotecommand.StreamOptions{Stdin: strings.NewReader("one\n"), Stdout: &out}
					// The end of the answer comes later than detachGrace, but the container is never silent for that long.
					main := func() *url.URL {
						return upstream.execURL(&hostExecutor{t: t}, options, "sh", "-c",
							"trap '' HUP; read line; for i in 1 2 3 4 5 6 7 8; do echo $i; sleep 0.3; done; echo answered $line; while :; do sleep 600; done")
					}
					ctx, cancel := context.WithCancel(t.Context())
					ended := make(chan error, 1)
					u := s.attachURL(main, options)
					go func() { ended <- stream(ctx, t, transport, u, options) }()
					if stays {
						eventually(t, "the answer", func() bool { return strings.Contains(out.String(), "answered one") })
						select {
						case err := <-ended:
							t.Errorf("the session ended with its input: %v", err)
						case <-time.After(2 * time.Second):
						}
					}
					if stays {
						cancel()
					}
					if err := receive(t, ended, "the end of the session"); err != nil && !stays {
						t.Errorf("the input ended and the client got %v", err)
					}
					cancel()
					if !strings.Contains(out.String(), "answered one\n") {
						t.Errorf("the client was detached before the answer: %q", out.String())
					}
				})
			}
		})
	})
}

// TestSlowViewerMissesOutput checks that a viewer that does not read does not block what it is attached to (moby#41827).
// The main process writes all that it wants, and the viewer gets a line instead of what it has missed.
func TestSlowViewerMissesOutput(t *testing.T) {
	forEachTransport(t, func(t *testing.T, transport string) {
		upstream, s := startServer(t, Config{}), startServer(t, Config{Commands: commandConfig{AttachBuffer: 64 << 10}})
		executor := &hostExecutor{t: t}
		const size = 16 << 20 // more than all buffers on the way, of which this side's socket has 4 MiB
		var out gatedBuffer
		out.opened = make(chan struct{})
		options := remotecommand.StreamOptions{Stdout: &out}
		main := func() *url.URL {
			return upstream.execURL(executor, options, "sh", "-c", fmt.Sprintf("head -c %d /dev/zero; echo last line", size))
		}
		u := s.attachURL(main, options)
		newNarrowCable(t, u)
		ended := make(chan error, 1)
		go func() { ended <- stream(t.Context(), t, transport, u, options) }()
		eventually(t, "the process's start", func() bool { return executor.count() == 1 })
		within(t, executor.last().exited, "the process ends although its viewer does not read")
		close(out.opened)
		if err := <-ended; err != nil {
			t.Error(err)
		}
		got := out.String()
		const said = "bytes skipped because the client reads too slowly]\n"
		if len(got) >= size || !strings.Contains(got, said) {
			t.Errorf("the viewer got %d of %d bytes and no word of a gap", len(got), size)
		}
	})
}

// gatedBuffer accepts nothing until it is opened.
type gatedBuffer struct {
	opened chan struct{}
	bytes.Buffer
}

func (b *gatedBuffer) Write(p []byte) (int, error) {
	<-b.opened
	return b.Buffer.Write(p)
}
