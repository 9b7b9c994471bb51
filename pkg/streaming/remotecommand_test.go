package streaming

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"k8s.io/client-go/tools/remotecommand"
	utilexec "k8s.io/client-go/util/exec"

	"github.com/streamshim/streamshim/internal/testutil"
	"github.com/streamshim/streamshim/pkg/session"
)

// exitCode returns the exit code that kubectl would have.
func exitCode(t *testing.T, err error) int {
	t.Helper()
	if err == nil {
		return 0
	}
	var exit utilexec.CodeExitError
	if !errors.As(err, &exit) {
		t.Fatalf("no exit code: %v", err)
	}
	return exit.Code
}

func TestExecOutputAndExitCode(t *testing.T) {
	forEachTransport(t, func(t *testing.T, transport string) {
		s := startServer(t, Config{})
		for _, code := range []int{0, 1, 3, 127, 255} {
			var stdout, stderr bytes.Buffer
			options := remotecommand.StreamOptions{Stdin: strings.NewReader("in"), Stdout: &stdout, Stderr: &stderr}
			u := s.execURL(&hostExecutor{t: t}, options, "sh", "-c", fmt.Sprintf("cat; echo out; echo err >&2; exit %d", code))
			err := stream(t.Context(), t, transport, u, options)
			if got := exitCode(t, err); got != code || stdout.String() != "inout\n" || stderr.String() != "err\n" {
				t.Errorf("exit %d: got %d, stdout %q, stderr %q", code, got, &stdout, &stderr)
			}
		}
	})
}

func TestExecKilledBySignal(t *testing.T) {
	forEachTransport(t, func(t *testing.T, transport string) {
		s := startServer(t, Config{})
		options := remotecommand.StreamOptions{Stdout: io.Discard}
		u := s.execURL(&hostExecutor{t: t}, options, "sh", "-c", "kill -15 $$")
		if got := exitCode(t, stream(t.Context(), t, transport, u, options)); got != 143 {
			t.Errorf("exit code %d, want 143", got)
		}
	})
}

// TestCommandNotFound checks that a command that cannot be started gives one line on stderr and the exit code of a shell
// (kubernetes#40820).
func TestCommandNotFound(t *testing.T) {
	forEachTransport(t, func(t *testing.T, transport string) {
		s := startServer(t, Config{})
		executor := &hostExecutor{t: t, startErr: startError{127, `exec: "nope": executable file not found in $PATH`}}
		var stdout, stderr bytes.Buffer
		options := remotecommand.StreamOptions{Stdout: &stdout, Stderr: &stderr}
		err := stream(t.Context(), t, transport, s.execURL(executor, options, "nope"), options)
		if got := exitCode(t, err); got != 127 || stderr.String() != executor.startErr.Error()+"\n" || stdout.Len() != 0 {
			t.Errorf("exit code %d, stdout %q, stderr %q", got, &stdout, &stderr)
		}
	})
}

type startError struct {
	code int
	text string
}

func (e startError) Error() string { return e.text }
func (e startError) ExitCode() int { return e.code }

func TestStartFails(t *testing.T) {
	forEachTransport(t, func(t *testing.T, transport string) {
		s := startServer(t, Config{})
		options := remotecommand.StreamOptions{Stdout: io.Discard}
		executor := &hostExecutor{t: t, startErr: errors.New("runc is not there")}
		err := stream(t.Context(), t, transport, s.execURL(executor, options, "x"), options)
		if err == nil || !strings.Contains(err.Error(), "runc is not there") {
			t.Errorf("the client got %v", err)
		}
	})
}

// sizes passes terminal sizes to client-go.
type sizes chan remotecommand.TerminalSize

func (s sizes) Next() *remotecommand.TerminalSize {
	size, ok := <-s
	if !ok {
		return nil
	}
	return &size
}

// TestFirstTerminalSize checks that the command sees the size of the client's terminal from its first instruction
// (kubernetes#47990).
func TestFirstTerminalSize(t *testing.T) {
	forEachTransport(t, func(t *testing.T, transport string) {
		s := startServer(t, Config{Commands: commandConfig{Waits: commandWaits{FirstSize: 10 * time.Second, SizeSlack: 10 * time.Second}}}) // a busy machine must not fail the test
		for range 10 {
			var stdout bytes.Buffer
			queue := make(sizes, 2)
			queue <- remotecommand.TerminalSize{} // a client that does not know its size yet
			queue <- remotecommand.TerminalSize{Width: 123, Height: 45}
			options := remotecommand.StreamOptions{Stdin: openStdin(t), Stdout: &stdout, Tty: true, TerminalSizeQueue: queue}
			err := stream(t.Context(), t, transport, s.execURL(&hostExecutor{t: t}, options, "stty", "size"), options)
			close(queue)
			if err != nil || strings.TrimSpace(stdout.String()) != "45 123" {
				t.Fatalf("stty size: %q, %v", &stdout, err)
			}
		}
	})
}

// openStdin returns a stdin that has no input until the test ends.
func openStdin(t *testing.T) io.Reader {
	r, w := io.Pipe()
	t.Cleanup(func() { w.Close() })
	return r
}

func TestLaterTerminalSizes(t *testing.T) {
	forEachTransport(t, func(t *testing.T, transport string) {
		s := startServer(t, Config{})
		output := &syncBuffer{}
		queue := make(sizes, 4)
		options := remotecommand.StreamOptions{Stdin: openStdin(t), Stdout: output, Tty: true, TerminalSizeQueue: queue}
		u := s.execURL(&hostExecutor{t: t}, options, "sh", "-c",
			`trap 'stty size; [ "$(stty size)" = "40 100" ] && exit 0' WINCH; echo ready; while :; do sleep 0.05; done`)
		done := make(chan error, 1)
		go func() { done <- stream(t.Context(), t, transport, u, options) }()
		eventually(t, "the command's start", func() bool { return strings.Contains(output.String(), "ready") })
		queue <- remotecommand.TerminalSize{Width: 0, Height: 0} // ignored
		queue <- remotecommand.TerminalSize{Width: 100, Height: 40}
		if err := <-done; err != nil {
			t.Error(err)
		}
		close(queue)
		if strings.Contains(output.String(), "0 0") {
			t.Errorf("0x0 was applied: %q", output)
		}
	})
}

type syncBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (b *syncBuffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.Write(p)
}

func (b *syncBuffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.String()
}

// TestTerminalOutputAfterStdinEOF checks that the end of stdin on a terminal does not cut the output (cri-tools#269).
func TestTerminalOutputAfterStdinEOF(t *testing.T) {
	forEachTransport(t, func(t *testing.T, transport string) {
		s := startServer(t, Config{})
		var stdout bytes.Buffer
		options := remotecommand.StreamOptions{Stdin: strings.NewReader("echo mar''ker\n"), Stdout: &stdout, Tty: true}
		err := stream(t.Context(), t, transport, s.execURL(&hostExecutor{t: t}, options, "sh"), options)
		if err != nil || !strings.Contains(stdout.String(), "marker") {
			t.Errorf("%v, output %q", err, &stdout)
		}
	})
}

// slowReader reads rate bytes a second.
type slowReader struct {
	rate int
	n    int
}

func (r *slowReader) Write(p []byte) (int, error) {
	r.n += len(p)
	time.Sleep(time.Duration(len(p)) * time.Second / time.Duration(r.rate))
	return len(p), nil
}

// TestSlowReaderGetsAllOutput checks that all that a command has written reaches a slow reader, also through the proxies of
// kubelet and API server, with clients that send pings all the time (kubernetes#60140).
func TestSlowReaderGetsAllOutput(t *testing.T) {
	testutil.Slow(t)
	const size, rate = 8 << 20, 4 << 20
	runTogether(t, func(t *testing.T) {
		forEachTransport(t, func(t *testing.T, transport string) {
			for hops := range 3 {
				for _, code := range []int{0, 3} {
					t.Run(fmt.Sprintf("hops=%d exit=%d", hops, code), func(t *testing.T) {
						t.Parallel()
						s := startServer(t, Config{})
						reader := &slowReader{rate: rate}
						options := remotecommand.StreamOptions{Stdout: reader}
						u := s.execURL(&hostExecutor{t: t}, options, "sh", "-c", fmt.Sprintf("head -c %d /dev/zero; exit %d", size, code))
						err := stream(t.Context(), t, transport, throughProxies(t, u, hops, transport, options), options)
						if got := exitCode(t, err); got != code || reader.n != size {
							t.Errorf("exit code %d, %d of %d bytes", got, reader.n, size)
						}
					})
				}
			}
		})
	})
}

// TestBackgroundChildHoldsStdout checks that a background child that keeps stdout open does not hold the session
// (kubernetes#44371).
func TestBackgroundChildHoldsStdout(t *testing.T) {
	forEachTransport(t, func(t *testing.T, transport string) {
		s := startServer(t, Config{Commands: commandConfig{DrainIdle: 100 * time.Millisecond}})
		var stdout bytes.Buffer
		options := remotecommand.StreamOptions{Stdout: &stdout}
		u := s.execURL(&hostExecutor{t: t}, options, "sh", "-c", "sleep 600 & echo hi; exit 3")
		if got := exitCode(t, stream(t.Context(), t, transport, u, options)); got != 3 || stdout.String() != "hi\n" {
			t.Errorf("exit code %d, output %q", got, &stdout)
		}
	})
}

// TestBackgroundChildStillWrites checks that output which still flows after the command's end is not cut.
func TestBackgroundChildStillWrites(t *testing.T) {
	runTogether(t, func(t *testing.T) {
		forEachTransport(t, func(t *testing.T, transport string) {
			s := startServer(t, Config{Commands: commandConfig{DrainIdle: 3 * time.Second}})
			var stdout bytes.Buffer
			options := remotecommand.StreamOptions{Stdout: &stdout}
			u := s.execURL(&hostExecutor{t: t}, options, "sh", "-c",
				"(for i in 1 2 3 4 5 6 7 8; do sleep 0.5; echo $i; done) & exit 3")
			if got := exitCode(t, stream(t.Context(), t, transport, u, options)); got != 3 || stdout.String() != "1\n2\n3\n4\n5\n6\n7\n8\n" {
				t.Errorf("exit code %d, output %q", got, &stdout)
			}
		})
	})
}

// TestStdinSurvivesClosedOutput checks that a process that closes one of its outputs keeps its stdin.
func TestStdinSurvivesClosedOutput(t *testing.T) {
	const size = 20 << 20
	for _, closed := range []string{"exec 2>&-", "exec >&-"} {
		forEachTransport(t, func(t *testing.T, transport string) {
			s := startServer(t, Config{})
			file := t.TempDir() + "/n"
			options := remotecommand.StreamOptions{
				Stdin: io.LimitReader(zeros{}, size), Stdout: io.Discard, Stderr: io.Discard,
			}
			u := s.execURL(&hostExecutor{t: t}, options, "sh", "-c", closed+"; sleep 0.2; [ $(wc -c) = "+fmt.Sprint(size)+" ] || exit 9", file)
			if got := exitCode(t, stream(t.Context(), t, transport, u, options)); got != 0 {
				t.Errorf("%s: exit code %d", closed, got)
			}
		})
	}
}

type zeros struct{}

func (zeros) Read(p []byte) (int, error) {
	clear(p)
	return len(p), nil
}

// TestProcessIgnoresStdin checks that a process that does not read its stdin does not block the session.
func TestProcessIgnoresStdin(t *testing.T) {
	forEachTransport(t, func(t *testing.T, transport string) {
		s := startServer(t, Config{})
		options := remotecommand.StreamOptions{Stdin: io.LimitReader(zeros{}, 64<<20), Stdout: io.Discard}
		u := s.execURL(&hostExecutor{t: t}, options, "sh", "-c", "exec <&-; exit 4")
		if got := exitCode(t, stream(t.Context(), t, transport, u, options)); got != 4 {
			t.Errorf("exit code %d", got)
		}
	})
}

// TestClientGone checks that the process is told when its client leaves (kubernetes#89031), even if the client does not
// read or the process does not read what the client sends.
func TestClientGone(t *testing.T) {
	runTogether(t, func(t *testing.T) {
		for _, test := range []struct {
			name, command string
			options       remotecommand.StreamOptions
		}{
			{"silent", "sleep 600", remotecommand.StreamOptions{Stdout: io.Discard}},
			{"chatty", "while echo x; do sleep 0.01; done", remotecommand.StreamOptions{Stdout: io.Discard}},
			{"blocked reader", "yes", remotecommand.StreamOptions{Stdout: never{}}},
			{"blocked stdin", "sleep 600", remotecommand.StreamOptions{Stdin: zeros{}, Stdout: io.Discard}},
			{"terminal", "sleep 600", remotecommand.StreamOptions{Stdout: io.Discard, Tty: true}},
		} {
			for _, politely := range []bool{true, false} {
				if politely && strings.HasPrefix(test.name, "blocked") {
					continue // client-go's own close waits behind the blocked write
				}
				t.Run(fmt.Sprintf("%s/politely=%v", test.name, politely), func(t *testing.T) {
					t.Parallel()
					forEachTransport(t, func(t *testing.T, transport string) {
						s := startServer(t, Config{Commands: commandConfig{InputGrace: time.Second}})
						executor := &hostExecutor{t: t}
						options := test.options
						if options.Tty {
							options.Stdin = strings.NewReader("")
						}
						if options.Stdout == (never{}) {
							options.Stdout = newNever(t)
						}
						u := s.execURL(executor, options, "sh", "-c", test.command)
						cable := newCable(t, u)
						ctx, cancel := context.WithCancel(t.Context())
						defer cancel()
						done := make(chan error, 1)
						go func() { done <- stream(ctx, t, transport, u, options) }()
						eventually(t, "the command's start", func() bool { return executor.count() == 1 })
						time.Sleep(200 * time.Millisecond) // lets buffers fill; if that takes longer, the test is only easier
						if politely {
							cancel()
						} else {
							cable.cut()
						}
						select {
						case <-executor.last().disconnected:
						case <-executor.last().Exited(): // one that writes may have had its SIGPIPE by now, as in a shell
						case <-time.After(testTimeout):
							t.Fatal("waited in vain for the process to be told that its client has gone")
						}
						eventually(t, "the session's end", func() bool { return len(s.config.Sessions.List()) == 0 })
						cancel()
						cable.cut()
						<-done
					})
				})
			}
		}
	})
}

// cable is a network between client and server that can be cut, as if the client were killed.
type cable struct {
	mu    sync.Mutex
	conns []net.Conn
}

// newCable leads the URL through a new cable.
func newCable(t *testing.T, u *url.URL) *cable {
	t.Helper()
	return layCable(t, u, func(*net.TCPConn) {})
}

// newNarrowCable is like newCable, for a cable that buffers little on the way to the client.
func newNarrowCable(t *testing.T, u *url.URL) *cable {
	t.Helper()
	return layCable(t, u, func(server *net.TCPConn) { server.SetReadBuffer(64 << 10) }) //nolint:errcheck // it only makes the test quicker
}

func layCable(t *testing.T, u *url.URL, prepare func(server *net.TCPConn)) *cable {
	t.Helper()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	target, c := u.Host, &cable{}
	u.Host = listener.Addr().String()
	var copies sync.WaitGroup
	copies.Go(func() {
		for {
			client, err := listener.Accept()
			if err != nil {
				return
			}
			server, err := net.Dial("tcp", target)
			if err != nil {
				client.Close()
				return
			}
			prepare(server.(*net.TCPConn))
			c.add(client, server)
			for _, direction := range [][2]net.Conn{{client, server}, {server, client}} {
				copies.Go(func() {
					io.Copy(direction[0], direction[1])
					direction[0].Close()
				})
			}
		}
	})
	t.Cleanup(func() {
		listener.Close()
		c.cut()
		copies.Wait()
	})
	return c
}

func (c *cable) add(conns ...net.Conn) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.conns = append(c.conns, conns...)
}

func (c *cable) cut() {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, conn := range c.conns {
		conn.Close()
	}
}

// never is a writer that never accepts anything.
type never struct{ stop chan struct{} }

func newNever(t *testing.T) never {
	n := never{stop: make(chan struct{})}
	t.Cleanup(func() { close(n.stop) })
	return n
}

func (n never) Write([]byte) (int, error) {
	<-n.stop
	return 0, io.ErrClosedPipe
}

// TestStdinEOFIsNotADisconnect checks that the end of stdin is not taken for the end of the client.
func TestStdinEOFIsNotADisconnect(t *testing.T) {
	forEachTransport(t, func(t *testing.T, transport string) {
		s := startServer(t, Config{})
		executor := &hostExecutor{t: t}
		var stdout bytes.Buffer
		options := remotecommand.StreamOptions{Stdin: strings.NewReader("x"), Stdout: &stdout}
		err := stream(t.Context(), t, transport, s.execURL(executor, options, "sh", "-c", "cat; sleep 0.5; echo y"), options)
		if got := exitCode(t, err); got != 0 || stdout.String() != "xy\n" {
			t.Errorf("exit code %d, output %q", got, &stdout)
		}
		select {
		case <-executor.last().disconnected:
			t.Error("the process was told that its client had gone")
		default:
		}
	})
}

// TestContainerEnds checks that the session ends with its container, with a status that says why.
func TestContainerEnds(t *testing.T) {
	forEachTransport(t, func(t *testing.T, transport string) {
		s := startServer(t, Config{})
		executor := &hostExecutor{t: t}
		options := remotecommand.StreamOptions{Stdout: io.Discard}
		u := s.execURL(executor, options, "sleep", "600")
		done := make(chan error, 1)
		go func() { done <- stream(t.Context(), t, transport, u, options) }()
		eventually(t, "the command's start", func() bool {
			return len(s.config.Sessions.List()) == 1 && s.config.Sessions.List()[0].Phase() == session.Running
		})
		close(executor.last().containerExited)
		if got := exitCode(t, <-done); got != 137 {
			t.Errorf("exit code %d, want 137", got)
		}
	})
}

// TestContainerEndsAfterItsProcess checks a process that ends because of its container but before it. How long before
// depends on how busy the machine is.
func TestContainerEndsAfterItsProcess(t *testing.T) {
	forEachTransport(t, func(t *testing.T, transport string) {
		s := startServer(t, Config{})
		for _, ends := range []bool{true, false} {
			executor := &hostExecutor{t: t}
			options := remotecommand.StreamOptions{Stdout: io.Discard, Stderr: &syncBuffer{}}
			u := s.execURL(executor, options, "sleep", "600")
			done := make(chan error, 1)
			go func() { done <- stream(t.Context(), t, transport, u, options) }()
			eventually(t, "the command's start", func() bool {
				return len(s.config.Sessions.List()) == 1 && s.config.Sessions.List()[0].Phase() == session.Running
			})
			process := executor.last()
			process.containerEnding.Store(ends)
			syscall.Kill(process.cmd.Process.Pid, syscall.SIGKILL)
			if ends {
				time.AfterFunc(3*200*time.Millisecond, func() { close(process.containerExited) })
			}
			select {
			case err := <-done:
				if got := exitCode(t, err); got != 137 {
					t.Errorf("exit code %d, want 137", got)
				}
			case <-time.After(testTimeout):
				t.Fatal("the session did not end")
			}
			const reason = "[streamshim: the container was stopped by the test]"
			if said := options.Stderr.(*syncBuffer).String(); strings.Contains(said, reason) != ends {
				t.Errorf("the container ends: %v; the client was told %q", ends, said)
			}
			eventually(t, "the session's end", func() bool { return len(s.config.Sessions.List()) == 0 })
		}
	})
}

// TestShutdownEndsSessionsWithAStatus checks that sessions which the server ends get a status: an empty error stream would
// count as success (kubectl#1208).
func TestShutdownEndsSessionsWithAStatus(t *testing.T) {
	forEachTransport(t, func(t *testing.T, transport string) {
		s := startServer(t, Config{})
		options := remotecommand.StreamOptions{Stdout: io.Discard}
		u := s.execURL(&hostExecutor{t: t}, options, "sleep", "600")
		done := make(chan error, 1)
		go func() { done <- stream(t.Context(), t, transport, u, options) }()
		eventually(t, "the command's start", func() bool {
			return len(s.config.Sessions.List()) == 1 && s.config.Sessions.List()[0].Phase() == session.Running
		})
		s.stop()
		if err := <-done; err == nil || !strings.Contains(err.Error(), ErrShuttingDown.Error()) {
			t.Errorf("the client got %v", err)
		}
		if _, err := s.Exec(&commandRequest{}); !errors.Is(err, ErrShuttingDown) {
			t.Errorf("a request after the shutdown: %v", err)
		}
	})
}

// TestShutdownTakesSessionsUntilItsEnd checks that new sessions are accepted, also with URLs issued now, while a session
// goes on. When none is left or the time is up, no more are accepted.
func TestShutdownTakesSessionsUntilItsEnd(t *testing.T) {
	forEachTransport(t, func(t *testing.T, transport string) {
		s := startServer(t, Config{})
		input, typed := io.Pipe()
		options := remotecommand.StreamOptions{Stdin: input, Stdout: io.Discard}
		u := s.execURL(&hostExecutor{t: t}, options, "cat")
		open := make(chan error, 1)
		go func() { open <- stream(t.Context(), t, transport, u, options) }()
		eventually(t, "the command's start", func() bool {
			return len(s.config.Sessions.List()) == 1 && s.config.Sessions.List()[0].Phase() == session.Running
		})
		ended := make(chan struct{})
		go func() {
			defer close(ended)
			s.Shutdown(t.Context()) //nolint:errcheck // seen below
		}()
		for range 3 {
			var out syncBuffer
			options := remotecommand.StreamOptions{Stdout: &out}
			u := s.execURL(&hostExecutor{t: t}, options, "echo", "hello")
			if err := stream(t.Context(), t, transport, u, options); err != nil || out.String() != "hello\n" {
				t.Errorf("an exec during the shutdown: %q, %v", out.String(), err)
			}
		}
		select {
		case <-ended:
			t.Error("the shutdown did not wait for the open session")
		default:
		}
		last := s.execURL(&hostExecutor{t: t}, remotecommand.StreamOptions{Stdout: io.Discard}, "true")
		typed.Close()
		if err := receive(t, open, "the open session's end"); err != nil {
			t.Errorf("the open session: %v", err)
		}
		eventually(t, "no more URLs", func() bool {
			_, err := s.Exec(&commandRequest{})
			return errors.Is(err, ErrShuttingDown)
		})
		// A URL issued before stays good until redeemGrace is over.
		if err := stream(t.Context(), t, transport, last, remotecommand.StreamOptions{Stdout: io.Discard}); err != nil {
			t.Errorf("the last URL: %v", err)
		}
		select {
		case <-ended:
		case <-time.After(testTimeout):
			t.Error("the shutdown does not end")
		}
	})
}

func TestIdleSessionEndsWithAStatus(t *testing.T) {
	forEachTransport(t, func(t *testing.T, transport string) {
		s := startServer(t, Config{Settings: Settings{IdleTimeout: map[session.Kind]time.Duration{session.Exec: 300 * time.Millisecond}}})
		options := remotecommand.StreamOptions{Stdout: io.Discard}
		u := s.execURL(&hostExecutor{t: t}, options, "sleep", "600")
		if err := stream(t.Context(), t, transport, u, options); err == nil || !strings.Contains(err.Error(), "nothing was sent or received") {
			t.Errorf("the client got %v", err)
		}
	})
}

func TestTokenAnswers(t *testing.T) {
	s := startServer(t, Config{})
	options := remotecommand.StreamOptions{Stdout: io.Discard}
	u := s.execURL(&hostExecutor{t: t}, options, "true")
	client := &http.Client{Transport: &http.Transport{DisableKeepAlives: true}}
	get := func(path string) (int, string) {
		t.Helper()
		response, err := client.Get("http://" + u.Host + path)
		if err != nil {
			t.Fatal(err)
		}
		defer response.Body.Close()
		body, err := io.ReadAll(response.Body)
		if err != nil {
			t.Fatal(err)
		}
		return response.StatusCode, string(body)
	}
	token := strings.TrimPrefix(u.Path, "/exec/")
	if code, body := get("/exec/wrong"); code != http.StatusNotFound || !strings.Contains(body, "unknown, has been used, or has expired") {
		t.Errorf("wrong token: %d %s", code, body)
	}
	if code, _ := get("/attach/" + token); code != http.StatusNotFound {
		t.Errorf("token of another kind: %d", code)
	}
	if code, body := get("/exec/" + token); code != http.StatusBadRequest || !strings.Contains(body, "SPDY/3.1 or WebSocket") {
		t.Errorf("no upgrade: %d %s", code, body)
	}
	// None of these has used the token up.
	if err := stream(t.Context(), t, "SPDY", u, options); err != nil {
		t.Errorf("first use: %v", err)
	}
	if code, _ := get("/exec/" + token); code != http.StatusNotFound {
		t.Errorf("second use: %d", code)
	}
}

// TestMissingStreams checks that a client that does not open its streams is disconnected.
func TestMissingStreams(t *testing.T) {
	s := startServer(t, Config{Commands: commandConfig{Waits: commandWaits{StreamCreation: 100 * time.Millisecond}}})
	u := s.execURL(&hostExecutor{t: t}, remotecommand.StreamOptions{Stdin: strings.NewReader(""), Stdout: io.Discard}, "true")
	// The client opens no stdin although the request has one.
	err := stream(t.Context(), t, "SPDY", u, remotecommand.StreamOptions{Stdout: io.Discard})
	if err == nil || !strings.Contains(err.Error(), "did not open all streams") {
		t.Errorf("the client got %v", err)
	}
	eventually(t, "the session's end", func() bool { return len(s.config.Sessions.List()) == 0 })
}
