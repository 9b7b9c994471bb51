package portforward

import (
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"

	"github.com/streamshim/streamshim/pkg/workload"
)

// The process's first thread belongs to the main goroutine, because it cannot be destroyed: moved to
// another namespace by one of the tests it would stay there.
func init() { runtime.LockOSThread() }

// patience is how long a test waits for what has to happen. Only a failing test waits so long.
const patience = time.Minute

// sandbox is a network namespace bind-mounted to a path, as container runtimes make them.
type sandbox struct {
	t    testing.TB
	path string
	ns   netns.NsHandle
}

// newSandbox makes a network namespace with nothing but loopback.
func newSandbox(t testing.TB) *sandbox {
	t.Helper()
	if os.Getuid() != 0 {
		t.Skip("needs root to make a network namespace")
	}
	s := &sandbox{t: t, path: filepath.Join(t.TempDir(), "netns")}
	if err := os.WriteFile(s.path, nil, 0o444); err != nil {
		t.Fatal(err)
	}
	err := onOwnThread(func() error {
		if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
			return fmt.Errorf("unshare: %w", err)
		}
		if err := loopbackUp(); err != nil {
			return fmt.Errorf("set loopback up: %w", err)
		}
		own := fmt.Sprintf("/proc/self/task/%d/ns/net", unix.Gettid())
		return unix.Mount(own, s.path, "", unix.MS_BIND, "")
	})
	if err != nil {
		t.Fatal(err)
	}
	if s.ns, err = netns.GetFromPath(s.path); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		s.ns.Close()
		s.remove()
	})
	return s
}

// remove does what a runtime does to the namespace of a sandbox that it stops.
func (s *sandbox) remove() {
	unix.Unmount(s.path, unix.MNT_DETACH)
	os.Remove(s.path)
}

// run runs work in the sandbox's namespace.
func (s *sandbox) run(work func() error) {
	s.t.Helper()
	err := onOwnThread(func() error {
		if err := netns.Set(s.ns); err != nil {
			return err
		}
		return work()
	})
	if err != nil {
		s.t.Fatal(err)
	}
}

// addPodAddresses gives the pod an interface with the addresses.
func (s *sandbox) addPodAddresses(addresses ...string) {
	s.t.Helper()
	commands := [][]string{{"link", "add", "eth0", "type", "veth", "peer", "name", "peer0"}}
	for _, address := range addresses {
		command := []string{"addr", "add", address, "dev", "eth0"}
		if net.ParseIP(address).To4() == nil {
			command = append(command, "nodad")
		}
		commands = append(commands, command)
	}
	commands = append(commands, []string{"link", "set", "eth0", "up"}, []string{"link", "set", "peer0", "up"})
	s.run(func() error {
		for _, command := range commands {
			if output, err := exec.Command("ip", command...).CombinedOutput(); err != nil {
				return fmt.Errorf("ip %v: %w: %s", command, err, output)
			}
		}
		return nil
	})
	// The kernel notices by and by that the link is up, and only then makes the route to an IPv6 address.
	for _, address := range addresses {
		waitFor(s.t, "route to "+address, func() (found bool) {
			s.run(func() error {
				output, err := exec.Command("ip", "route", "get", address).CombinedOutput()
				found = err == nil && strings.HasPrefix(string(output), "local ")
				return nil
			})
			return found
		})
	}
}

// listen listens in the sandbox and serves each connection with serve, which owns it.
func (s *sandbox) listen(address string, serve func(*net.TCPConn)) (port uint16) {
	s.t.Helper()
	var listener net.Listener
	s.run(func() (err error) {
		listener, err = net.Listen("tcp", address)
		return err
	})
	return serveOn(s.t, listener, serve)
}

// listenOnHost is listen in this process's own namespace.
func listenOnHost(t testing.TB, address string, serve func(*net.TCPConn)) (port uint16) {
	t.Helper()
	listener, err := net.Listen("tcp", address)
	if err != nil {
		t.Fatal(err)
	}
	return serveOn(t, listener, serve)
}

func serveOn(t testing.TB, listener net.Listener, serve func(*net.TCPConn)) (port uint16) {
	var serving sync.WaitGroup
	serving.Go(func() {
		for {
			conn, err := listener.Accept()
			if err != nil {
				return
			}
			serving.Go(func() { serve(conn.(*net.TCPConn)) })
		}
	})
	t.Cleanup(func() {
		listener.Close()
		serving.Wait()
	})
	return uint16(listener.Addr().(*net.TCPAddr).Port)
}

// listenFull listens in the sandbox with a full queue, so that the next connect hangs.
func (s *sandbox) listenFull() (port uint16) {
	s.t.Helper()
	var listener, queued int
	s.run(func() (err error) {
		if listener, err = unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0); err != nil {
			return err
		}
		address := &unix.SockaddrInet4{Addr: [4]byte{127, 0, 0, 1}}
		if err := errors.Join(unix.Bind(listener, address), unix.Listen(listener, 0)); err != nil {
			return err
		}
		bound, err := unix.Getsockname(listener)
		if err != nil {
			return err
		}
		port = uint16(bound.(*unix.SockaddrInet4).Port)
		if queued, err = unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0); err != nil {
			return err
		}
		return unix.Connect(queued, bound) // a queue of 0 holds one
	})
	s.t.Cleanup(func() {
		unix.Close(queued)
		unix.Close(listener)
	})
	return port
}

// onOwnThread runs work on a thread that is destroyed afterwards.
func onOwnThread(work func() error) error {
	result := make(chan error, 1)
	go func() {
		runtime.LockOSThread()
		result <- work()
	}()
	return <-result
}

func loopbackUp() error {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	request, err := unix.NewIfreq("lo")
	if err != nil {
		return err
	}
	request.SetUint16(unix.IFF_UP)
	return unix.IoctlIfreq(fd, unix.SIOCSIFFLAGS, request)
}

func newWatcher(t testing.TB) *Watcher {
	t.Helper()
	w, err := NewWatcher(slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { w.Close() })
	return w
}

func newForwarder(t testing.TB, path string, config Config) *Forwarder {
	t.Helper()
	f, err := NewForwarder(path, config)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	return f
}

// tcpStream is a Stream whose client is at the other end of a TCP connection.
type tcpStream struct {
	workload.Stream // what forwarding does not need
	conn            *net.TCPConn
	// hold, when not nil, keeps ReadFrom from beginning until it is closed.
	hold chan struct{}

	draining    sync.WaitGroup
	resetOnce   sync.Once
	wasReset    chan struct{}
	readClosed  chan struct{}
	closeReadOn sync.Once
}

// newStream returns a stream and the client at its other end.
func newStream(t testing.TB) (*tcpStream, *net.TCPConn) {
	t.Helper()
	listener, err := net.ListenTCP("tcp", &net.TCPAddr{IP: net.IPv4(127, 0, 0, 1)})
	if err != nil {
		t.Fatal(err)
	}
	defer listener.Close()
	client, err := net.DialTCP("tcp", nil, listener.Addr().(*net.TCPAddr))
	if err != nil {
		t.Fatal(err)
	}
	conn, err := listener.AcceptTCP()
	if err != nil {
		t.Fatal(err)
	}
	s := &tcpStream{conn: conn, wasReset: make(chan struct{}), readClosed: make(chan struct{})}
	t.Cleanup(func() {
		client.Close()
		conn.Close()
		s.draining.Wait()
	})
	client.SetDeadline(time.Now().Add(3 * patience)) // so that a failing test ends
	return s, client
}

func (s *tcpStream) Read(p []byte) (int, error)  { return s.conn.Read(p) }
func (s *tcpStream) Write(p []byte) (int, error) { return s.conn.Write(p) }

// Without the conversions io.Copy would leave the moving to the kernel.
func (s *tcpStream) WriteTo(w io.Writer) (int64, error) {
	return io.Copy(struct{ io.Writer }{w}, struct{ io.Reader }{s.conn})
}

func (s *tcpStream) ReadFrom(r io.Reader) (int64, error) {
	if s.hold != nil {
		<-s.hold
	}
	return io.Copy(struct{ io.Writer }{s.conn}, struct{ io.Reader }{r})
}

func (s *tcpStream) CloseWrite() error { return s.conn.CloseWrite() }

func (s *tcpStream) CloseRead() {
	s.closeReadOn.Do(func() {
		close(s.readClosed)
		s.draining.Go(func() { io.Copy(io.Discard, s.conn) })
	})
}

// AfterReset implements workload.Stream: what a client resets is seen by reading here.
func (s *tcpStream) AfterReset(func()) {}

func (s *tcpStream) Reset() error {
	s.resetOnce.Do(func() { close(s.wasReset) })
	s.conn.SetLinger(0)
	return s.conn.Close()
}

// outcome is what Forward returned.
type outcome struct {
	sent, received int64
	err            error
}

// start forwards a new stream in a goroutine.
func start(t testing.TB, forward func(*tcpStream) (int64, int64, error)) (*tcpStream, *net.TCPConn, chan outcome) {
	t.Helper()
	stream, client := newStream(t)
	done := make(chan outcome, 1)
	go func() {
		sent, received, err := forward(stream)
		done <- outcome{sent, received, err}
	}()
	return stream, client, done
}

// within returns what comes from the channel, and fails the test when nothing does.
func within[T any](t testing.TB, what string, channel <-chan T) (value T) {
	t.Helper()
	select {
	case value = <-channel:
	case <-time.After(patience):
		t.Fatalf("%s: nothing after %v", what, patience)
	}
	return value
}

// is reports whether the channel is closed.
func is(channel <-chan struct{}) bool {
	select {
	case <-channel:
		return true
	default:
		return false
	}
}

// waitFor asks until the answer is yes.
func waitFor(t testing.TB, what string, happened func() bool) {
	t.Helper()
	for end := time.Now().Add(patience); !happened(); time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("%s: not after %v", what, patience)
		}
	}
}

func splitLines(table []byte) (lines [][]string) {
	for line := range strings.Lines(string(table)) {
		lines = append(lines, strings.Fields(line))
	}
	return lines
}

// process is a real process for the part of a sandbox's own, in a network namespace of its own.
func process(t testing.TB) *exec.Cmd {
	t.Helper()
	command := exec.Command("sleep", "1000")
	command.SysProcAttr = &syscall.SysProcAttr{Cloneflags: unix.CLONE_NEWNET}
	if err := command.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		command.Process.Kill()
		command.Wait()
	})
	return command
}

// endedProcess returns the number of a process that is no more.
func endedProcess(t testing.TB) (pid int) {
	t.Helper()
	command := exec.Command("true")
	if err := command.Run(); err != nil {
		t.Fatal(err)
	}
	return command.Process.Pid
}
