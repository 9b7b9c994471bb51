package portforward

import (
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"

	"github.com/streamshim/streamshim/internal/testutil"
	"github.com/streamshim/streamshim/internal/testutil/leak"
	"github.com/streamshim/streamshim/pkg/workload"
)

func TestForwardRefused(t *testing.T) {
	leak.Check(t)
	pod := newSandbox(t)
	f := newForwarder(t, pod.path, Config{})
	stream, client := newStream(t)
	sent, received, err := f.Forward(t.Context(), 8080, stream)
	if refused := (*RefusedError)(nil); !errors.As(err, &refused) || sent != 0 || received != 0 {
		t.Errorf("%d, %d, %v, want a RefusedError", sent, received, err)
	}
	if _, err := client.Read(make([]byte, 1)); !errors.Is(err, unix.ECONNRESET) {
		t.Errorf("the client saw %v, want a reset", err)
	}
}

func TestForwardHostNetwork(t *testing.T) {
	leak.Check(t)
	port := listenOnHost(t, "127.0.0.1:0", echo)
	sandbox := process(t)
	f := newForwarder(t, "", Config{Watcher: newWatcher(t), SandboxPID: sandbox.Process.Pid})
	forward := func(s *tcpStream) (int64, int64, error) { return f.Forward(t.Context(), port, s) }

	_, client, done := start(t, forward)
	io.WriteString(client, "hello")
	client.CloseWrite()
	if got, err := io.ReadAll(client); string(got) != "hello" || err != nil {
		t.Errorf("the client read %q, %v", got, err)
	}
	checkOutcome(t, done, 5, 5, nil)

	_, client, done = start(t, forward)
	io.WriteString(client, "hello")
	io.ReadFull(client, make([]byte, 5))
	sandbox.Process.Kill() // and not waited for: dead is enough
	within(t, "Gone", f.Gone())
	checkOutcome(t, done, 5, 5, ErrSandboxGone)
	if _, err := f.Dial(t.Context(), port); !errors.Is(err, ErrSandboxGone) {
		t.Errorf("error %v, want ErrSandboxGone", err)
	}
}

// The ways in which a sandbox goes, and how soon that has to be known.
func TestGone(t *testing.T) {
	testutil.Slow(t)
	for _, each := range []struct {
		name string
		// begin makes a sandbox that listens at the port and the way to end it.
		begin func(t *testing.T) (f *Forwarder, port uint16, end func())
		limit time.Duration
	}{
		{"namespace removed", func(t *testing.T) (*Forwarder, uint16, func()) {
			pod := newSandbox(t)
			f := newForwarder(t, pod.path, Config{Watcher: newWatcher(t)})
			return f, pod.listen("127.0.0.1:0", echo), pod.remove
		}, lookInterval / 2}, // so not by looking
		{"folder of the namespace removed", func(t *testing.T) (*Forwarder, uint16, func()) {
			pod := newSandbox(t)
			f := newForwarder(t, pod.path, Config{Watcher: newWatcher(t)})
			return f, pod.listen("127.0.0.1:0", echo), func() {
				pod.remove()
				os.RemoveAll(filepath.Dir(pod.path))
			}
		}, lookInterval / 2},
		{"namespace removed, its folder reached by a symbolic link", func(t *testing.T) (*Forwarder, uint16, func()) {
			pod := newSandbox(t)
			link := filepath.Join(t.TempDir(), "run") // as /var/run is one
			if err := os.Symlink(filepath.Dir(pod.path), link); err != nil {
				t.Fatal(err)
			}
			f := newForwarder(t, filepath.Join(link, "netns"), Config{Watcher: newWatcher(t)})
			return f, pod.listen("127.0.0.1:0", echo), pod.remove
		}, lookInterval / 2},
		{"namespace unmounted only", func(t *testing.T) (*Forwarder, uint16, func()) {
			pod := newSandbox(t)
			f := newForwarder(t, pod.path, Config{Watcher: newWatcher(t)})
			return f, pod.listen("127.0.0.1:0", echo), func() { unix.Unmount(pod.path, unix.MNT_DETACH) }
		}, 3 * lookInterval},
		{"namespace removed, no inotify", func(t *testing.T) (*Forwarder, uint16, func()) {
			never, err := unix.Eventfd(0, unix.EFD_CLOEXEC|unix.EFD_NONBLOCK)
			if err != nil {
				t.Fatal(err)
			}
			watcher := startWatcher(os.NewFile(uintptr(never), "never readable"), true)
			t.Cleanup(func() { watcher.Close() })
			pod := newSandbox(t)
			f := newForwarder(t, pod.path, Config{Watcher: watcher})
			return f, pod.listen("127.0.0.1:0", echo), pod.remove
		}, lookInterval / 2},
		{"process ended", func(t *testing.T) (*Forwarder, uint16, func()) {
			pod := newSandbox(t)
			sandbox := process(t)
			f := newForwarder(t, pod.path, Config{SandboxPID: sandbox.Process.Pid})
			return f, pod.listen("127.0.0.1:0", echo), func() { sandbox.Process.Kill() }
		}, lookInterval / 2},
		{"process ended, its namespace below /proc", func(t *testing.T) (*Forwarder, uint16, func()) {
			sandbox := process(t)
			path := fmt.Sprintf("/proc/%d/ns/net", sandbox.Process.Pid)
			pod := sandboxAt(t, path)
			pod.run(loopbackUp)
			f := newForwarder(t, path, Config{Watcher: newWatcher(t)})
			return f, pod.listen("127.0.0.1:0", echo), func() {
				sandbox.Process.Kill()
				sandbox.Process.Wait()
			}
		}, lookInterval / 2},
	} {
		t.Run(each.name, func(t *testing.T) {
			leak.Check(t)
			f, port, end := each.begin(t)
			stream, client, done := start(t, func(s *tcpStream) (int64, int64, error) {
				return f.Forward(t.Context(), port, s)
			})
			io.WriteString(client, "ping")
			if _, err := io.ReadFull(client, make([]byte, 4)); err != nil {
				t.Fatal(err)
			}
			if is(f.Gone()) {
				t.Fatal("gone before its time")
			}
			end()
			select {
			case <-f.Gone():
			case <-time.After(each.limit):
				t.Fatalf("not gone after %v", each.limit)
			}
			checkOutcome(t, done, 4, 4, ErrSandboxGone)
			if !is(stream.wasReset) {
				t.Error("the stream was not reset")
			}
			if _, err := f.Dial(t.Context(), port); !errors.Is(err, ErrSandboxGone) {
				t.Errorf("error %v, want ErrSandboxGone", err)
			}
			if f.pod.file != nil {
				if _, err := f.pod.file.Stat(); !errors.Is(err, os.ErrClosed) {
					t.Error("the namespace is kept open, which keeps it alive")
				}
			}
		})
	}
}

// sandboxAt is for a namespace that exists already.
func sandboxAt(t *testing.T, path string) *sandbox {
	t.Helper()
	ns, err := netns.GetFromPath(path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { ns.Close() })
	return &sandbox{t: t, path: path, ns: ns}
}

func TestGoneDuringDial(t *testing.T) {
	leak.Check(t)
	pod := newSandbox(t)
	port := pod.listenFull()
	f := newForwarder(t, pod.path, Config{
		Dialer:  Dialer{TryTimeout: time.Hour, TotalTimeout: time.Hour},
		Watcher: newWatcher(t),
	})
	_, _, done := start(t, func(s *tcpStream) (int64, int64, error) { return f.Forward(t.Context(), port, s) })
	pod.waitForConnecting(port)
	pod.remove()
	checkOutcome(t, done, 0, 0, ErrSandboxGone)
}

// Without any watch the next dial finds out.
func TestDialFindsSandboxGone(t *testing.T) {
	leak.Check(t)
	pod := newSandbox(t)
	port := pod.listen("127.0.0.1:0", echo)
	f := newForwarder(t, pod.path, Config{})
	pod.remove()
	if _, err := f.Dial(t.Context(), port); !errors.Is(err, ErrSandboxGone) {
		t.Errorf("error %v, want ErrSandboxGone", err)
	}
	within(t, "Gone", f.Gone())
}

func TestNewForwarderSandboxGone(t *testing.T) {
	leak.Check(t)
	if _, err := NewForwarder(t.TempDir()+"/netns", Config{}); !errors.Is(err, ErrSandboxGone) {
		t.Errorf("error %v, want ErrSandboxGone", err)
	}
	if _, err := NewForwarder("", Config{SandboxPID: endedProcess(t)}); !errors.Is(err, ErrSandboxGone) {
		t.Errorf("error %v, want ErrSandboxGone", err)
	}
}

func TestCloseEndsForwards(t *testing.T) {
	leak.Check(t)
	pod := newSandbox(t)
	port := pod.listen("127.0.0.1:0", echo)
	f := newForwarder(t, pod.path, Config{Watcher: newWatcher(t), SandboxPID: process(t).Process.Pid})
	stream, client, done := start(t, func(s *tcpStream) (int64, int64, error) { return f.Forward(t.Context(), port, s) })
	io.WriteString(client, "ping")
	io.ReadFull(client, make([]byte, 4))
	f.Close()
	checkOutcome(t, done, 4, 4, ErrClosed)
	if !is(stream.wasReset) {
		t.Error("the stream was not reset")
	}
	if _, err := f.Dial(t.Context(), port); !errors.Is(err, ErrClosed) {
		t.Errorf("error %v, want ErrClosed", err)
	}
	if is(f.Gone()) {
		t.Error("closing made the sandbox gone")
	}
	f.Close()
}

// One Watcher serves many sandboxes, in one folder or several.
func TestWatcherServesManySandboxes(t *testing.T) {
	leak.Check(t)
	watcher := newWatcher(t)
	type watched struct {
		pod *sandbox
		f   *Forwarder
	}
	var all []watched
	for range 10 {
		pod := newSandbox(t)
		all = append(all, watched{pod, newForwarder(t, pod.path, Config{Watcher: watcher})})
	}
	second := newForwarder(t, all[3].pod.path, Config{Watcher: watcher})
	all[2].f.Close()
	for i, each := range all {
		if i%2 == 1 {
			each.pod.remove()
			within(t, "Gone", each.f.Gone())
		}
	}
	within(t, "Gone of the second forwarder", second.Gone())
	for i, each := range all {
		if i%2 == 0 && is(each.f.Gone()) {
			t.Errorf("sandbox %d is gone", i)
		}
		each.f.Close()
	}
	watcher.mu.Lock()
	defer watcher.mu.Unlock()
	if len(watcher.watched)+len(watcher.folders)+watcher.polled != 0 {
		t.Errorf("still watched: %v in %v, %d polled", watcher.watched, watcher.folders, watcher.polled)
	}
}

// What a thousand connections of every kind of end leave behind is for leak.Check to find out:
// goroutines, descriptors, threads in the pod's namespace.
func TestThousandConnections(t *testing.T) {
	leak.Check(t)
	pod := newSandbox(t)
	echoing := pod.listen("127.0.0.1:0", echo)
	resetting := pod.listen("[::1]:0", func(conn *net.TCPConn) {
		io.ReadFull(conn, make([]byte, 4))
		reset(conn)
	})
	closing := pod.listen("127.0.0.1:0", func(conn *net.TCPConn) { conn.Close() })
	f := newForwarder(t, pod.path, Config{Watcher: newWatcher(t)})

	const total, atOnce = 1000, 50
	kinds := []func() error{
		func() error { // echo with half-close
			stream, client := newStream(t)
			defer client.Close()
			done := make(chan error, 1)
			go func() {
				_, _, err := f.Forward(t.Context(), echoing, stream)
				done <- err
			}()
			io.WriteString(client, "hello")
			client.CloseWrite()
			got, err := io.ReadAll(client)
			if string(got) != "hello" {
				err = errors.Join(err, fmt.Errorf("echo %q", got))
			}
			return errors.Join(err, <-done)
		},
		func() error { // reset by the pod
			stream, client := newStream(t)
			defer client.Close()
			io.WriteString(client, "ping")
			_, _, err := f.Forward(t.Context(), resetting, stream)
			return expect(err, ErrResetByPod)
		},
		func() error { // reset by the client
			stream, client := newStream(t)
			reset(client)
			_, _, err := f.Forward(t.Context(), echoing, stream)
			return expect(err, ErrResetByClient)
		},
		func() error { // refused
			stream, client := newStream(t)
			defer client.Close()
			_, _, err := f.Forward(t.Context(), 1, stream)
			return expect(err, unix.ECONNREFUSED)
		},
		func() error { // the pod closes first
			stream, client := newStream(t)
			defer client.Close()
			client.CloseWrite()
			_, _, err := f.Forward(t.Context(), closing, stream)
			return err
		},
	}
	turn := make(chan int)
	var running sync.WaitGroup
	for range atOnce {
		running.Go(func() {
			for i := range turn {
				if err := kinds[i%len(kinds)](); err != nil {
					t.Errorf("connection %d: %v", i, err)
				}
			}
		})
	}
	for i := range total {
		turn <- i
	}
	close(turn)
	running.Wait()
}

func expect(err, want error) error {
	if !errors.Is(err, want) {
		return fmt.Errorf("error %v, want %v", err, want)
	}
	return nil
}

// spliceStream leaves the moving to the kernel, as the cheapest of all transports would.
type spliceStream struct{ *tcpStream }

func (s spliceStream) WriteTo(w io.Writer) (int64, error)  { return io.Copy(w, s.conn) }
func (s spliceStream) ReadFrom(r io.Reader) (int64, error) { return s.conn.ReadFrom(r) }

func BenchmarkForward(b *testing.B) {
	const chunk = 256 << 10
	source := func(conn *net.TCPConn) { // sends until it is closed
		defer conn.Close()
		for data := make([]byte, chunk); ; {
			if _, err := conn.Write(data); err != nil {
				return
			}
		}
	}
	pod := newSandbox(b)
	port := pod.listen("127.0.0.1:0", source)
	f := newForwarder(b, pod.path, Config{})
	read := func(b *testing.B, client *net.TCPConn) {
		b.SetBytes(chunk)
		buffer := make([]byte, chunk)
		for b.Loop() {
			if _, err := io.ReadFull(client, buffer); err != nil {
				b.Fatal(err)
			}
		}
		reset(client)
	}
	forwarded := func(asStream func(*tcpStream) workload.Stream) func(b *testing.B) {
		return func(b *testing.B) {
			_, client, done := start(b, func(s *tcpStream) (int64, int64, error) {
				return f.Forward(b.Context(), port, asStream(s))
			})
			read(b, client)
			<-done
		}
	}
	b.Run("spliced", forwarded(func(s *tcpStream) workload.Stream { return spliceStream{s} }))
	b.Run("copied", forwarded(func(s *tcpStream) workload.Stream { return s }))
	b.Run("plain io.Copy, spliced", func(b *testing.B) {
		conn, err := f.Dial(b.Context(), port)
		if err != nil {
			b.Fatal(err)
		}
		stream, client := newStream(b)
		done := make(chan struct{})
		go func() {
			defer close(done)
			io.Copy(stream.conn, conn)
			reset(conn)
		}()
		read(b, client)
		<-done
	})
}

func BenchmarkForwardConnection(b *testing.B) {
	pod := newSandbox(b)
	port := pod.listen("127.0.0.1:0", func(conn *net.TCPConn) {
		io.Copy(io.Discard, conn)
		reset(conn)
	})
	f := newForwarder(b, pod.path, Config{})
	for b.Loop() {
		f.Forward(b.Context(), port, emptyStream{})
	}
}

// emptyStream is a client that has nothing to say.
type emptyStream struct {
	workload.Stream // what forwarding does not need
}

func (emptyStream) Read([]byte) (int, error)            { return 0, io.EOF }
func (emptyStream) Write(p []byte) (int, error)         { return len(p), nil }
func (emptyStream) WriteTo(io.Writer) (int64, error)    { return 0, nil }
func (emptyStream) ReadFrom(r io.Reader) (int64, error) { return io.Copy(io.Discard, r) }
func (emptyStream) CloseWrite() error                   { return nil }
func (emptyStream) CloseRead()                          {}
func (emptyStream) Reset() error                        { return nil }
func (emptyStream) AfterReset(func())                   {}
