package streaming

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"os"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	"k8s.io/client-go/tools/remotecommand"

	"github.com/streamshim/streamshim/internal/testutil"
	"github.com/streamshim/streamshim/pkg/handover"
	"github.com/streamshim/streamshim/pkg/session"
	"github.com/streamshim/streamshim/pkg/workload"
)

// What a session may cost at most.
const (
	maxExecGoroutines       = 5
	maxConnectionGoroutines = 2
	maxIdleTerminalMemory   = 80 << 10 // of the 100 KiB, what this process may hold; the rest is the kernel's
)

// idleProcess is a process that does nothing until it is told that its client has gone. It costs only its pipes.
type idleProcess struct {
	stdin, stdout  [2]*os.File // read end, write end
	exited         chan struct{}
	endOnce        sync.Once
	resized        chan struct{} // has room for one
	disconnectedBy func()        // may be nil
}

func newIdleProcess() (*idleProcess, error) {
	p := &idleProcess{exited: make(chan struct{}), resized: make(chan struct{}, 1)}
	for _, pipe := range []*[2]*os.File{&p.stdin, &p.stdout} {
		r, w, err := os.Pipe()
		if err != nil {
			return nil, err
		}
		*pipe = [2]*os.File{r, w}
	}
	return p, nil
}

func (p *idleProcess) Stdin() io.WriteCloser { return p.stdin[1] }
func (p *idleProcess) Stdout() io.ReadCloser { return p.stdout[0] }
func (p *idleProcess) Stderr() io.ReadCloser { return nil }
func (p *idleProcess) Resize(workload.Size) error {
	select {
	case p.resized <- struct{}{}:
	default:
	}
	return nil
}
func (p *idleProcess) Exited() <-chan struct{}          { return p.exited }
func (p *idleProcess) ExitCode() int                    { return 0 }
func (p *idleProcess) ContainerExited() <-chan struct{} { return nil }
func (p *idleProcess) ContainerEnding() bool            { return false }
func (p *idleProcess) StandIn() string                  { return "" }
func (p *idleProcess) PID() int                         { return 0 }
func (p *idleProcess) Signal(syscall.Signal) error      { return session.ErrNotSupported }
func (p *idleProcess) Kill()                            { p.Disconnect() }
func (p *idleProcess) Disconnect() {
	p.endOnce.Do(func() {
		if p.disconnectedBy != nil {
			p.disconnectedBy()
		}
		p.stdout[1].Close()
		close(p.exited)
	})
}

func (p *idleProcess) Freeze(files *handover.Files) ([]byte, error) {
	return freezeFiles(p, files, p.stdin[0], p.stdin[1], p.stdout[0], p.stdout[1])
}

func (p *idleProcess) thaw(files []*os.File) {
	p.stdin, p.stdout = [2]*os.File{files[0], files[1]}, [2]*os.File{files[2], files[3]}
}

func (p *idleProcess) Discard() { p.Close() }

func (p *idleProcess) Close() error {
	for _, f := range []*os.File{p.stdin[0], p.stdin[1], p.stdout[0], p.stdout[1]} {
		f.Close()
	}
	return nil
}

// executorFunc is a function that implements executor.
type executorFunc func(workload.Command) (remoteProcess, error)

func (f executorFunc) Start(_ context.Context, c workload.Command) (remoteProcess, error) {
	return f(c)
}

// ourGoroutines counts the goroutines with a function of the product on their stack.
func ourGoroutines() int {
	stacks := make([]byte, 1<<20)
	for {
		n := runtime.Stack(stacks, true)
		if n < len(stacks) {
			stacks = stacks[:n]
			break
		}
		stacks = make([]byte, 2*len(stacks))
	}
	count := 0
	for goroutine := range strings.SplitSeq(string(stacks), "\n\n") {
		lines := strings.Split(goroutine, "\n")
		for i := 1; i+1 < len(lines); i += 2 {
			if strings.Contains(lines[i], "github.com/streamshim/streamshim/pkg/") && !strings.Contains(lines[i+1], "_test.go:") {
				count++
				break
			}
		}
	}
	return count
}

// settled waits until a count no longer changes.
func settled(t *testing.T, count func() int) int {
	t.Helper()
	last, same := count(), 0
	eventually(t, "a steady count", func() bool {
		now := count()
		if now != last {
			last, same = now, 0
		}
		same++
		return same > 20
	})
	return last
}

// upgradeWebSocket returns the head of an upgrade to WebSocket.
func upgradeWebSocket(u *url.URL, protocol string) []byte {
	return upgradeRequest(http.MethodGet, u, "Connection: Upgrade", "Upgrade: websocket", "Sec-WebSocket-Version: 13",
		"Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==", "Sec-WebSocket-Protocol: "+protocol)
}

// startRaw starts a command for a client without goroutines, and sends the first size of its terminal.
func startRaw(t *testing.T, transport string, u *url.URL, c workload.Command) net.Conn {
	t.Helper()
	if transport == "WebSocket" {
		raw := dialRaw(t, u, upgradeWebSocket(u, "v5.channel.k8s.io"))
		if c.TTY {
			raw.conn.Write(maskedMessage("\x04{\"Width\":80,\"Height\":24}"))
		}
		return raw.conn
	}
	raw := dialRaw(t, u, upgradeRequest(http.MethodPost, u, spdyLines("v4.channel.k8s.io")...))
	types := []string{streamTypeError, streamTypeStdin, streamTypeStdout}
	if c.TTY {
		types = append(types, streamTypeResize)
	} else {
		types = append(types, streamTypeStderr)
	}
	ids := raw.remoteCommandStreams(types...)
	if c.TTY {
		raw.send(ids[streamTypeResize], `{"Width":80,"Height":24}`, false)
	}
	return raw.conn
}

// maskedMessage returns a short binary message as a WebSocket client sends it, with a mask of zero.
func maskedMessage(payload string) []byte {
	return append([]byte{0x82, 0x80 | byte(len(payload)), 0, 0, 0, 0}, payload...)
}

func TestGoroutinesOfAnExecSession(t *testing.T) {
	forEachTransport(t, func(t *testing.T, transport string) {
		for _, tty := range []bool{false, true} {
			s := startServer(t, Config{})
			const sessions = 5
			before := settled(t, ourGoroutines)
			executor := &hostExecutor{t: t}
			options := remotecommand.StreamOptions{Stdin: strings.NewReader(""), Stdout: io.Discard, Tty: tty}
			if !tty {
				options.Stderr = io.Discard
			}
			for range sessions {
				startRaw(t, transport, s.execURL(executor, options, "sleep", "600"), workload.Command{TTY: tty})
			}
			eventually(t, "the commands' start", func() bool { return executor.count() == sessions })
			added := settled(t, ourGoroutines) - before
			t.Logf("terminal %v: %d goroutines in %d sessions", tty, added, sessions)
			if added > maxExecGoroutines*sessions || added < 2*sessions {
				t.Errorf("%d goroutines in %d sessions, want at most %d each", added, sessions, maxExecGoroutines)
			}
		}
	})
}

func TestGoroutinesOfAForwardedConnection(t *testing.T) {
	forEachTransport(t, func(t *testing.T, transport string) {
		s := startServer(t, Config{})
		port := pod(t, func(c *net.TCPConn) { io.Copy(c, c) })
		u := s.portForwardURL(make(chan struct{}))
		c := dialForward(t, u, transport)
		const connections = 40
		before := settled(t, ourGoroutines)
		for i := range connections {
			data, _ := c.openPair(strconv.Itoa(port), strconv.Itoa(i))
			c.send(data, "x", false)
			c.until("the echo", func() bool { return len(c.streams[data].data) == 1 })
		}
		added := settled(t, ourGoroutines) - before
		t.Logf("%d goroutines for %d connections", added, connections)
		if added > maxConnectionGoroutines*connections || added < connections {
			t.Errorf("%d goroutines for %d connections, want at most %d each", added, connections, maxConnectionGoroutines)
		}
	})
}

// TestIdleTerminalIsSmall measures how much memory of this process an idle session with a terminal holds.
// test/integration/exec measures what the kernel holds, sockets and a pty, on a real node.
func TestIdleTerminalIsSmall(t *testing.T) {
	testutil.Slow(t)
	const sessions = 100
	forEachTransport(t, func(t *testing.T, transport string) {
		s := startServer(t, Config{})
		started := make(chan *idleProcess, sessions)
		executor := executorFunc(func(workload.Command) (remoteProcess, error) {
			p, err := newIdleProcess()
			if err == nil {
				started <- p
			}
			return p, err
		})
		options := remotecommand.StreamOptions{Stdin: strings.NewReader(""), Stdout: io.Discard, Tty: true}
		open := func() net.Conn {
			conn := startRaw(t, transport, s.execURL(executor, options, "sh"), workload.Command{TTY: true})
			p := receive(t, started, "the command's start")
			// The session was used: it has transferred a line of input and its answer.
			if _, err := fmt.Fprint(p.stdout[1], strings.Repeat("output", 1000)); err != nil {
				t.Fatal(err)
			}
			if _, err := io.ReadFull(conn, make([]byte, 6000)); err != nil {
				t.Fatal(err)
			}
			return conn
		}
		open()
		before := memoryInUse()
		conns := make([]net.Conn, sessions)
		for i := range conns {
			conns[i] = open()
		}
		each := (memoryInUse() - before) / sessions
		t.Logf("%d bytes of heap and stacks for each session", each)
		if each > maxIdleTerminalMemory {
			t.Errorf("an idle session with a terminal holds %d bytes, want at most %d", each, maxIdleTerminalMemory)
		}
		if got := len(s.config.Sessions.List()); got != sessions+1 {
			t.Errorf("%d sessions live", got)
		}
	})
}

// memoryInUse returns the size of heap and stacks after two collections, which empty the pools. Each collection also halves
// stacks that were deep for a moment.
func memoryInUse() int64 {
	var m runtime.MemStats
	for range 8 {
		runtime.GC()
	}
	runtime.ReadMemStats(&m)
	return int64(m.HeapAlloc + m.StackInuse) //nolint:gosec // far from the limits
}

// TestOpenAndDropThousands checks that a client that opens and drops connections costs a bounded amount, whatever it leaves
// unfinished.
func TestOpenAndDropThousands(t *testing.T) {
	testutil.Slow(t)
	const pairs, most = 1500, 3 << 20 // a pair that stays takes some KiB
	s := startServer(t, Config{})
	port := strconv.Itoa(pod(t, answer))
	nobody := strconv.Itoa(unusedPort(t))
	busy := strconv.Itoa(neverAccepts(t))
	for name, drop := range map[string]func(c *rawClient, i int){
		"half pairs": func(c *rawClient, i int) {
			c.reset(c.open(headerStreamType, streamTypeError, headerPort, port, headerRequestID, strconv.Itoa(i)))
		},
		"half pairs left open": func(c *rawClient, i int) {
			c.open(headerStreamType, streamTypeError, headerPort, port, headerRequestID, strconv.Itoa(i))
		},
		"refused": func(c *rawClient, i int) {
			data, _ := c.openPair(nobody, strconv.Itoa(i))
			c.reset(data)
		},
		"dialled": func(c *rawClient, i int) {
			data, _ := c.openPair(busy, strconv.Itoa(i))
			c.reset(data)
		},
	} {
		t.Run(name, func(t *testing.T) {
			u := s.portForwardURL(make(chan struct{}))
			c := dialForward(t, u, "SPDY")
			goroutines := settled(t, ourGoroutines)
			before := memoryInUse()
			for i := range pairs {
				drop(c, i)
				if i%500 == 499 { // reads the answers, so that the server does not give the client up
					pongs := c.pongs
					c.ping()
					c.until("the pong", func() bool { return c.pongs > pongs })
					clear(c.streams)
				}
			}
			grown := memoryInUse() - before
			t.Logf("%d bytes more, %d goroutines more", grown, settled(t, ourGoroutines)-goroutines)
			if grown > most {
				t.Errorf("%d connections, opened and dropped, hold %d bytes", pairs, grown)
			}
			if n := settled(t, ourGoroutines) - goroutines; n > 0 {
				t.Errorf("%d goroutines more", n)
			}
			c.conn.Close()
			eventually(t, "the session's end", func() bool { return len(s.config.Sessions.List()) == 0 })
		})
	}
}

// neverAccepts returns a port that keeps clients waiting: its queue of connections is full.
func neverAccepts(t *testing.T) (port int) {
	t.Helper()
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Close(fd) })
	if err := errors.Join(unix.Bind(fd, &unix.SockaddrInet4{Addr: [4]byte{127, 0, 0, 1}}), unix.Listen(fd, 0)); err != nil {
		t.Fatal(err)
	}
	address, err := unix.Getsockname(fd)
	if err != nil {
		t.Fatal(err)
	}
	port = address.(*unix.SockaddrInet4).Port
	for {
		conn, err := net.DialTimeout("tcp", net.JoinHostPort("127.0.0.1", strconv.Itoa(port)), 200*time.Millisecond)
		if err != nil {
			return port
		}
		t.Cleanup(func() { conn.Close() })
	}
}

// TestSilentPeersAreLetGo checks that a peer that connects and sends nothing, or stops halfway, does not stay for ever.
func TestSilentPeersAreLetGo(t *testing.T) {
	s := startServer(t, Config{
		Commands:     commandConfig{Waits: commandWaits{StreamCreation: 200 * time.Millisecond}},
		PortForwards: forwardConfig{StreamCreation: 200 * time.Millisecond},
		Settings:     Settings{IdleTimeout: map[session.Kind]time.Duration{session.PortForward: 5 * time.Second}},
	})
	run := s.execURL(&hostExecutor{t: t}, remotecommand.StreamOptions{Stdout: io.Discard}, "true")
	c := dialRaw(t, run, upgradeRequest(http.MethodPost, run, spdyLines("v4.channel.k8s.io")...))
	for c.read() {
	}
	forward := s.portForwardURL(make(chan struct{}))
	c = dialRaw(t, forward, upgradeRequest(http.MethodPost, forward, spdyLines(portForwardProtocol)...))
	half := c.open(headerStreamType, streamTypeError, headerPort, "80", headerRequestID, "1")
	for c.streams[half].reset == 0 && c.read() {
	}
	if c.streams[half].reset == 0 {
		t.Error("half a connection was not reset")
	}
	for c.read() { // until the session has been idle for too long
	}
}
