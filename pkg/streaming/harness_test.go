package streaming

import (
	"cmp"
	"context"
	"errors"
	"flag"
	"io"
	"log/slog"
	"math/rand/v2"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/creack/pty"
	"github.com/gorilla/websocket"
	"golang.org/x/sys/unix"
	"k8s.io/apimachinery/pkg/util/proxy"
	apiserverproxy "k8s.io/apiserver/pkg/util/proxy"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/remotecommand"

	"github.com/streamshim/streamshim/internal/testutil/leak"
	"github.com/streamshim/streamshim/pkg/handover"
	podforward "github.com/streamshim/streamshim/pkg/portforward"
	"github.com/streamshim/streamshim/pkg/session"
	"github.com/streamshim/streamshim/pkg/workload"
)

// testTimeout only bounds tests that would hang.
const testTimeout = 60 * time.Second

// transports are the two protocols between clients and server.
var transports = []string{"SPDY", "WebSocket"}

func forEachTransport(t *testing.T, f func(t *testing.T, transport string)) {
	for _, transport := range transports {
		t.Run(transport, func(t *testing.T) {
			if together(t) {
				t.Parallel()
			}
			f(t, transport)
		})
	}
}

// togetherTests has the names of the tests whose cases run in parallel.
var togetherTests sync.Map

// runTogether runs the parallel cases of a test that mostly waits, and looks for leaks once, after all of them. Each case
// calls t.Parallel. forEachTransport does so for its own cases.
func runTogether(t *testing.T, cases func(t *testing.T)) {
	leak.Check(t)
	togetherTests.Store(t.Name(), nil)
	t.Run("cases", cases)
}

func together(t *testing.T) bool {
	test, _, _ := strings.Cut(t.Name(), "/")
	_, ok := togetherTests.Load(test)
	return ok
}

// testServer is a streaming server on loopback.
type testServer struct {
	*Server
	*testNode
	t         *testing.T
	started   Config
	served    chan error
	handovers atomic.Int64
}

// testNode serves each request as the test that has made it wants. It tells requests apart by the IDs of their containers
// and sandboxes.
type testNode struct {
	mu       sync.Mutex
	requests int
	start    map[string]func(context.Context, workload.Command) (remoteProcess, error)
	upstream map[string]func() *url.URL
	reasons  map[string]func(context.Context) string
	pods     map[string]func() (forwarder, error)
}

func newTestNode() *testNode {
	return &testNode{
		start: make(map[string]func(context.Context, workload.Command) (remoteProcess, error)), upstream: make(map[string]func() *url.URL),
		reasons: make(map[string]func(context.Context) string), pods: make(map[string]func() (forwarder, error)),
	}
}

// next returns the target of another request. set stores what serves it.
func (n *testNode) next(set func(id string)) workload.Target {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.requests++
	id := strconv.Itoa(n.requests)
	set(id)
	return workload.Target{ContainerID: id, SandboxID: id}
}

// of returns what serves a request.
func of[T any](n *testNode, all map[string]T, id string) T {
	n.mu.Lock()
	defer n.mu.Unlock()
	return all[id]
}

func (n *testNode) Start(ctx context.Context, container workload.Container, command workload.Command) (remoteProcess, error) {
	return of(n, n.start, container.ContainerID)(ctx, command)
}

// Resume returns a process that was frozen.
func (n *testNode) Resume(_ context.Context, state []byte, files *handover.Files) (remoteProcess, error) {
	return thawProcess(state, files)
}

// StreamingURL finds the request's ID in its call.
func (n *testNode) StreamingURL(_ context.Context, _ session.Kind, call []byte, _ map[string]string) (string, error) {
	return of(n, n.upstream, string(call))().String(), nil
}

func (n *testNode) EndReason(ctx context.Context, target workload.Target) string {
	if reason := of(n, n.reasons, target.ContainerID); reason != nil {
		return reason(ctx)
	}
	return "the container was stopped by the test"
}

func (n *testNode) Forwarder(sandbox workload.Sandbox) (forwarder, error) {
	return of(n, n.pods, sandbox.SandboxID)()
}

// ResumeForwarder implements portforward.Pods.
func (n *testNode) ResumeForwarder(state []byte, files *handover.Files) (forwarder, error) {
	f, err := podforward.ResumeForwarder(state, files, podforward.Config{})
	if err != nil {
		return nil, err
	}
	return podForwarder{f, f.Gone()}, nil
}

// localRequest returns a request for a command that an executor starts.
func (n *testNode) localRequest(e executor, command workload.Command) *commandRequest {
	target := n.next(func(id string) { n.start[id] = e.Start })
	return &commandRequest{Container: workload.Container{Target: target, Runtime: "/of/the/test"}, Command: command}
}

// relayedRequest returns a request for what an upstream serves.
func (n *testNode) relayedRequest(upstream func() *url.URL, command workload.Command) *commandRequest {
	target := n.next(func(id string) { n.upstream[id] = upstream })
	return &commandRequest{Container: workload.Container{Target: target}, Command: command, Call: []byte(target.ContainerID)}
}

// podRequest returns a request for ports of a pod.
func (n *testNode) podRequest(open func() (forwarder, error), ports ...int32) *forwardRequest {
	target := n.next(func(id string) { n.pods[id] = open })
	return &forwardRequest{Sandbox: workload.Sandbox{Target: workload.Target{SandboxID: target.SandboxID}}, Ports: ports}
}

// streamsOf returns a command with the streams in a client's options.
func streamsOf(options remotecommand.StreamOptions, args ...string) workload.Command {
	return workload.Command{
		Args: args, Stdin: options.Stdin != nil, Stdout: options.Stdout != nil,
		Stderr: options.Stderr != nil, TTY: options.Tty,
	}
}

// url returns the URL of a response.
func (s *testServer) url(raw string, err error) *url.URL {
	s.t.Helper()
	if err != nil {
		s.t.Fatal(err)
	}
	u, err := url.Parse(raw)
	if err != nil {
		s.t.Fatal(err)
	}
	return u
}

// executor starts a test's commands.
type executor interface {
	Start(context.Context, workload.Command) (remoteProcess, error)
}

// unlimited in a test's Config turns a limit off. Zero there is an ordinary limit.
const unlimited = -1

// ordinary sets what a test leaves open.
func ordinary(c Config) Config {
	for _, limit := range []struct {
		value    *time.Duration
		ordinary time.Duration
	}{
		{&c.Commands.DrainIdle, 2 * time.Second}, {&c.Commands.DrainMax, 10 * time.Minute}, {&c.LingerIdle, 10 * time.Minute},
		{&c.Commands.StatusWait, time.Minute}, {&c.Commands.InputGrace, 30 * time.Second}, {&c.PortForwards.Stall, 30 * time.Second},
	} {
		switch *limit.value {
		case 0:
			*limit.value = limit.ordinary
		case unlimited:
			*limit.value = 0
		}
	}
	c.Commands.AttachBuffer = cmp.Or(c.Commands.AttachBuffer, 1<<20)
	return c
}

func startServer(t *testing.T, config Config) *testServer {
	t.Helper()
	var serving *accepting
	s := startServerOn(t, config, func(listener net.Listener) net.Listener {
		serving = &accepting{Listener: listener, begun: make(chan struct{})}
		return serving
	})
	receive(t, serving.begun, "the server to accept") // so that the leak check of another server counts this one's goroutines
	return s
}

// startServerOn is like startServer, with a change to the listener. It does not wait until the server accepts.
func startServerOn(t *testing.T, config Config, change func(net.Listener) net.Listener) *testServer {
	t.Helper()
	config = ordinary(config)
	if !together(t) {
		leak.Check(t)
	}
	config.Log = slog.New(slog.DiscardHandler)
	config.Sessions = session.NewRegistry(config.Log)
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	s := newTestServer(t, config, listener.Addr())
	serving := change(listener)
	go func() { s.served <- s.Serve(serving) }()
	t.Cleanup(s.stop)
	if *restless > 0 {
		t.Cleanup(s.beRestless(*restless))
	}
	return s
}

// accepting is a listener that reports when it waits for the first connection.
type accepting struct {
	net.Listener
	once  sync.Once
	begun chan struct{}
}

func (l *accepting) Accept() (net.Conn, error) {
	l.once.Do(func() { close(l.begun) })
	return l.Listener.Accept()
}

// newTestServer returns a server that is not served yet.
func newTestServer(t *testing.T, config Config, address net.Addr) *testServer {
	node := newTestNode()
	config.Commands.Runtime, config.PortForwards.Pods = node, node
	return &testServer{Server: NewServer(config, address), testNode: node, t: t, started: config, served: make(chan error, 1)}
}

// stop ends the server at once, and with it the sessions that are left.
func (s *testServer) stop() {
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	s.Shutdown(ctx) //nolint:errcheck // the listener may be closed already
	if err := receive(s.t, s.served, "Serve to return"); err != nil {
		s.t.Errorf("Serve: %v", err)
	}
	s.served <- nil // for a second stop
}

// restless hands each server of the tests over to itself again and again, with at most this pause between.
var restless = flag.Duration("restless", 0, "hand over every so often")

// beRestless hands the server over to itself until the test ends.
func (s *testServer) beRestless(pause time.Duration) (stop func()) {
	ctx, cancel := context.WithCancel(context.Background())
	stopped := make(chan struct{})
	go func() {
		defer close(stopped)
		for {
			select {
			case <-ctx.Done():
				return
			case <-time.After(rand.N(pause)):
				s.handOver()
			}
		}
	}()
	return func() {
		cancel()
		<-stopped
	}
}

// handOver freezes the server and resumes it.
func (s *testServer) handOver() {
	s.t.Helper()
	files := handover.NewFiles()
	defer files.Close()
	ctx, cancel := context.WithTimeout(context.Background(), testTimeout)
	defer cancel()
	state, err := s.Freeze(ctx, files)
	if err != nil {
		s.t.Errorf("freeze: %v", err)
		return
	}
	if _, ended, err := s.Server.Resume(state, files); err != nil || ended > 0 {
		s.t.Errorf("resume: %v, %d sessions have ended", err, ended)
	}
	s.handovers.Add(1)
}

// hostExecutor starts processes on the host. All but the container is real.
type hostExecutor struct {
	t        *testing.T
	startErr error

	mu      sync.Mutex
	started []*hostProcess
}

type hostProcess struct {
	cmd                     *exec.Cmd
	files                   sync.Mutex // guards the following, which a hand-over replaces
	stdin, stdout, stderr   *os.File
	exited                  chan struct{}
	code                    int
	containerExited         chan struct{}
	containerEnding         atomic.Bool
	disconnected, killed    chan struct{}
	disconnectOnce, killed1 sync.Once
}

func (e *hostExecutor) Start(_ context.Context, c workload.Command) (remoteProcess, error) {
	if e.startErr != nil {
		return nil, e.startErr
	}
	p := &hostProcess{
		cmd: exec.Command(c.Args[0], c.Args[1:]...), exited: make(chan struct{}),
		containerExited: make(chan struct{}), disconnected: make(chan struct{}), killed: make(chan struct{}),
	}
	p.cmd.Env = append(os.Environ(), c.Env...)
	p.cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	if c.TTY {
		master, err := pty.StartWithAttrs(p.cmd, &pty.Winsize{Cols: c.Size.Width, Rows: c.Size.Height}, &syscall.SysProcAttr{Setsid: true, Setctty: true})
		if err != nil {
			return nil, err
		}
		// creack/pty leaves the master in blocking mode, in which Close does not unblock a Read.
		fd, err := syscall.Dup(int(master.Fd()))
		master.Close()
		if err != nil {
			return nil, err
		}
		syscall.CloseOnExec(fd)
		syscall.SetNonblock(fd, true)
		p.stdin = os.NewFile(uintptr(fd), "pty")
		p.stdout = p.stdin
	} else if err := p.pipes(c); err != nil {
		return nil, err
	}
	go func() {
		p.cmd.Wait() //nolint:errcheck // the code is what counts
		p.code = p.cmd.ProcessState.ExitCode()
		if status := p.cmd.ProcessState.Sys().(syscall.WaitStatus); status.Signaled() {
			p.code = 128 + int(status.Signal())
		}
		close(p.exited)
	}()
	e.mu.Lock()
	e.started = append(e.started, p)
	e.mu.Unlock()
	e.t.Cleanup(func() {
		p.Kill()
		<-p.exited
		p.Close()
	})
	return p, nil
}

func (p *hostProcess) pipes(c workload.Command) error {
	for _, s := range []struct {
		wanted bool
		ours   **os.File
		give   func(r, w *os.File) (ours, theirs *os.File)
		set    func(*os.File)
	}{
		{c.Stdin, &p.stdin, func(r, w *os.File) (*os.File, *os.File) { return w, r }, func(f *os.File) { p.cmd.Stdin = f }},
		{c.Stdout, &p.stdout, func(r, w *os.File) (*os.File, *os.File) { return r, w }, func(f *os.File) { p.cmd.Stdout = f }},
		{c.Stderr, &p.stderr, func(r, w *os.File) (*os.File, *os.File) { return r, w }, func(f *os.File) { p.cmd.Stderr = f }},
	} {
		if !s.wanted {
			continue
		}
		r, w, err := os.Pipe()
		if err != nil {
			return err
		}
		ours, theirs := s.give(r, w)
		*s.ours = ours
		s.set(theirs)
		defer theirs.Close()
	}
	return p.cmd.Start()
}

func (p *hostProcess) Stdin() io.WriteCloser {
	p.files.Lock()
	defer p.files.Unlock()
	switch {
	case p.stdin == nil:
		return nil
	case p.stdin == p.stdout:
		return terminalInput{p.stdin}
	}
	return p.stdin
}

// terminalInput sends an end-of-input character instead of closing the terminal.
type terminalInput struct{ *os.File }

func (i terminalInput) Close() error {
	_, err := i.Write([]byte{4})
	return err
}

// output is a pty or pipe. A pty returns EIO when its other end is closed.
type output struct{ *os.File }

func (o output) Read(b []byte) (int, error) {
	n, err := o.File.Read(b)
	if errors.Is(err, syscall.EIO) {
		err = io.EOF
	}
	return n, err
}

func (p *hostProcess) Stdout() io.ReadCloser {
	p.files.Lock()
	defer p.files.Unlock()
	if p.stdout == nil {
		return nil
	}
	return output{p.stdout}
}

func (p *hostProcess) Stderr() io.ReadCloser {
	p.files.Lock()
	defer p.files.Unlock()
	if p.stderr == nil {
		return nil
	}
	return p.stderr
}

func (p *hostProcess) Resize(size workload.Size) error {
	p.files.Lock()
	defer p.files.Unlock()
	if p.stdin == nil || p.stdin != p.stdout || !size.Known() {
		return nil
	}
	raw, err := p.stdin.SyscallConn()
	if err != nil {
		return err
	}
	var sizeErr error
	err = raw.Control(func(fd uintptr) {
		sizeErr = unix.IoctlSetWinsize(int(fd), unix.TIOCSWINSZ, &unix.Winsize{Col: size.Width, Row: size.Height})
	})
	return errors.Join(err, sizeErr)
}

func (p *hostProcess) Exited() <-chan struct{}          { return p.exited }
func (p *hostProcess) ExitCode() int                    { return p.code }
func (p *hostProcess) ContainerExited() <-chan struct{} { return p.containerExited }

func (p *hostProcess) ContainerEnding() bool { return p.containerEnding.Load() }

func (p *hostProcess) StandIn() string { return "" }

func (p *hostProcess) PID() int { return p.cmd.Process.Pid }

func (p *hostProcess) Signal(signal syscall.Signal) error { return p.cmd.Process.Signal(signal) }

func (p *hostProcess) Disconnect() {
	p.disconnectOnce.Do(func() { close(p.disconnected) })
	p.Kill()
}

func (p *hostProcess) Kill() {
	p.killed1.Do(func() {
		close(p.killed)
		syscall.Kill(-p.cmd.Process.Pid, syscall.SIGKILL)
	})
}

func (p *hostProcess) Freeze(files *handover.Files) ([]byte, error) {
	p.files.Lock()
	defer p.files.Unlock()
	if p.stdin != nil && p.stdin == p.stdout {
		return freezeFiles(p, files, p.stdin)
	}
	return freezeFiles(p, files, p.stdin, p.stdout, p.stderr)
}

func (p *hostProcess) thaw(files []*os.File) {
	p.files.Lock()
	defer p.files.Unlock()
	if len(files) == 1 {
		p.stdin, p.stdout = files[0], files[0]
		return
	}
	p.stdin, p.stdout, p.stderr = files[0], files[1], files[2]
}

func (p *hostProcess) Discard() { p.Close() }

func (p *hostProcess) Close() error {
	p.files.Lock()
	defer p.files.Unlock()
	for _, f := range []*os.File{p.stdin, p.stdout, p.stderr} {
		if f != nil {
			f.Close()
		}
	}
	return nil
}

func (e *hostExecutor) count() int {
	e.mu.Lock()
	defer e.mu.Unlock()
	return len(e.started)
}

func (e *hostExecutor) last() *hostProcess {
	e.mu.Lock()
	defer e.mu.Unlock()
	if len(e.started) == 0 {
		e.t.Fatal("no process was started")
	}
	return e.started[len(e.started)-1]
}

// execURL returns the URL of a command with the streams in the options.
func (s *testServer) execURL(e executor, options remotecommand.StreamOptions, args ...string) *url.URL {
	s.t.Helper()
	return s.url(s.Exec(s.localRequest(e, streamsOf(options, args...))))
}

// stream runs a remote command with stock client-go.
func stream(ctx context.Context, t *testing.T, transport string, u *url.URL, options remotecommand.StreamOptions) error {
	t.Helper()
	config := &rest.Config{Host: u.Host}
	executor, err := remotecommand.NewSPDYExecutor(config, http.MethodPost, u)
	if transport == "WebSocket" {
		executor, err = remotecommand.NewWebSocketExecutor(config, http.MethodGet, u.String())
	}
	if err != nil {
		t.Fatal(err)
	}
	ended := make(chan error, 1)
	go func() { ended <- executor.StreamWithContext(ctx, options) }()
	return receive(t, ended, "the end of a "+transport+" session")
}

// receive waits for a value, or until the channel is closed. It may be called from any goroutine.
func receive[T any](t *testing.T, from <-chan T, what string) (value T) {
	t.Helper()
	select {
	case value = <-from:
	case <-time.After(2 * testTimeout):
		t.Errorf("waited in vain for %s", what)
	}
	return value
}

// throughProxies puts upgrade proxies before the URL, like those of kubelet and API server. The one next to a WebSocket
// client translates to SPDY.
func throughProxies(t *testing.T, target *url.URL, hops int, transport string, options remotecommand.StreamOptions) *url.URL {
	for i := range hops {
		upstream := *target
		last := i == hops-1
		server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			if last && transport == "WebSocket" {
				apiserverproxy.NewStreamTranslatorHandler(&upstream, nil, 0, apiserverproxy.Options{
					Stdin: options.Stdin != nil, Stdout: options.Stdout != nil, Stderr: options.Stderr != nil, Tty: options.Tty,
				}).ServeHTTP(w, r)
				return
			}
			proxy.NewUpgradeAwareHandler(&upstream, nil, false, true, proxyError{}).ServeHTTP(w, r)
		}))
		t.Cleanup(server.Close)
		u, err := url.Parse(server.URL)
		if err != nil {
			t.Fatal(err)
		}
		u.Path = "/exec"
		target = u
	}
	return target
}

type proxyError struct{}

func (proxyError) Error(w http.ResponseWriter, _ *http.Request, err error) {
	http.Error(w, err.Error(), http.StatusBadGateway)
}

// eventually waits until a condition becomes true by itself.
func eventually(t *testing.T, what string, condition func() bool) {
	t.Helper()
	deadline := time.Now().Add(testTimeout)
	for !condition() {
		if time.Now().After(deadline) {
			t.Fatalf("%s did not come true in %v", what, testTimeout)
		}
		time.Sleep(5 * time.Millisecond)
	}
}

// webSocket is a WebSocket client that reads messages.
type webSocket struct {
	t    *testing.T
	conn *websocket.Conn
}

func dialWebSocket(t *testing.T, u *url.URL, protocol string) *webSocket {
	t.Helper()
	dialer := websocket.Dialer{Subprotocols: []string{protocol}}
	conn, response, err := dialer.Dial("ws://"+u.Host+u.Path, nil)
	if err != nil {
		t.Fatalf("%v: %+v", err, response)
	}
	response.Body.Close()
	conn.SetReadDeadline(time.Now().Add(testTimeout))
	t.Cleanup(func() { conn.Close() })
	return &webSocket{t, conn}
}

// read returns a message, or nil after an orderly close.
func (w *webSocket) read() []byte {
	w.t.Helper()
	_, message, err := w.conn.ReadMessage()
	if websocket.IsCloseError(err, websocket.CloseNormalClosure) {
		return nil
	}
	if err != nil {
		w.t.Fatal(err)
	}
	return message
}

func (w *webSocket) write(message []byte) {
	w.t.Helper()
	if err := w.conn.WriteMessage(websocket.BinaryMessage, message); err != nil {
		w.t.Fatal(err)
	}
}
