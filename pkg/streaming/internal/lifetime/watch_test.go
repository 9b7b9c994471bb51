package lifetime

import (
	"errors"
	"log/slog"
	"net"
	"runtime"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/streamshim/streamshim/internal/testutil"
	"github.com/streamshim/streamshim/pkg/session"
	"github.com/streamshim/streamshim/pkg/streaming/event"
)

// watchedFake is a client that does what the test tells it to.
type watchedFake struct {
	received, sent int64
	lastReceived   time.Time
	closed         bool
}

func (f *watchedFake) Transferred() (received, sent int64) { return f.received, f.sent }
func (f *watchedFake) LastActivity() time.Time             { return time.Time{} }
func (f *watchedFake) LastReceived() time.Time             { return f.lastReceived }
func (f *watchedFake) Done() <-chan struct{}               { return nil }
func (f *watchedFake) Close() error {
	f.closed = true
	return nil
}

// TestLingerIsBoundedByLackOfProgress checks that a finished session waits for its client while anything moves, and for
// LingerIdle after that (kubernetes#60140): neither for a fixed time nor for ever.
func TestLingerIsBoundedByLackOfProgress(t *testing.T) {
	const limit = 10 * time.Minute
	sessions := session.NewRegistry(slog.New(slog.DiscardHandler))
	live, err := sessions.Begin(t.Context(), session.Info{Kind: session.Exec})
	if err != nil {
		t.Fatal(err)
	}
	defer live.End(session.Outcome{})
	events := map[event.Event]int{}
	w := NewWatcher(WatchConfig{LingerIdle: limit, PeerSilence: time.Hour, Observe: func(e event.Event) { events[e]++ }})
	client := &watchedFake{lastReceived: time.Now()}
	peer, network := net.Pipe()
	defer peer.Close()
	defer network.Close()
	now := time.Now()
	entry := &watchedSession{session: live, client: client, network: network, since: now}
	look := func(after time.Duration) bool {
		now = now.Add(after)
		w.look(entry, now)
		return client.closed
	}

	live.SetPhase(session.Running)
	if look(100 * limit) {
		t.Fatal("a session whose command runs was ended")
	}
	live.SetPhase(session.Lingering)
	look(time.Second) // takes the first look
	for _, progress := range []func(){
		func() { client.sent++ },
		func() { client.received++ },
		func() { client.lastReceived = client.lastReceived.Add(time.Second) }, // a ping
	} {
		if look(limit - time.Second) {
			t.Fatal("ended before its time")
		}
		progress()
		if look(time.Second) {
			t.Fatal("ended in spite of progress")
		}
	}
	if look(limit - time.Second) {
		t.Fatal("ended before its time")
	}
	if !look(time.Second) || events[event.LingerCut] != 1 {
		t.Errorf("not ended without progress; events %v", events)
	}
}

// TestPeerIsDead distinguishes a client whose network is gone from one that does not read, and from one to which nothing is
// sent.
func TestPeerIsDead(t *testing.T) {
	const limit = 300 * time.Millisecond
	network := newLoneNetwork(t)
	silent, _ := network.connect(t)
	reading, _ := network.connect(t)
	if _, err := reading.Write([]byte("taken")); err != nil {
		t.Fatal(err)
	}
	testutil.Eventually(t, "nobody owes anything", func() bool { return !peerIsDead(silent, 0) && !peerIsDead(reading, 0) })
	unread, _ := network.connect(t)
	unread.SetWriteDeadline(time.Now().Add(time.Second))
	for { // until its window is closed
		if _, err := unread.Write(make([]byte, 64<<10)); err != nil {
			break
		}
	}
	// The kernel does not answer the first probes, because they come too fast.
	testutil.Eventually(t, "a client that does not read owes nothing either", func() bool { return !peerIsDead(unread, 0) })
	network.cut(t)
	if _, err := reading.Write([]byte("lost")); err != nil {
		t.Fatal(err)
	}
	testutil.Eventually(t, "the client that owes an acknowledgement is dead", func() bool { return peerIsDead(reading, limit) })
	testutil.Eventually(t, "the client that owes an answer to a probe of its window is dead", func() bool { return peerIsDead(unread, limit) })
	if peerIsDead(silent, limit) {
		t.Error("a client that owes nothing is taken for dead") // TCP keepalive is for such a client
	}
}

// loneNetwork is a network namespace with only its loopback, which can be cut.
type loneNetwork struct {
	listener *net.TCPListener
	dial     func() (net.Conn, error)
	control  int // a socket in it
}

func newLoneNetwork(t *testing.T) *loneNetwork {
	t.Helper()
	network := &loneNetwork{}
	inside, answers := make(chan func() error), make(chan error)
	go func() {
		runtime.LockOSThread() // never unlocked, so the thread ends with the goroutine
		for work := range inside {
			answers <- work()
		}
	}()
	do := func(work func() error) error {
		inside <- work
		return <-answers
	}
	err := do(func() (err error) {
		if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
			return err
		}
		if network.control, err = unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0); err != nil {
			return err
		}
		if err := network.setLoopback(unix.IFF_UP); err != nil {
			return err
		}
		listener, err := net.Listen("tcp4", "127.0.0.1:0")
		if err == nil {
			network.listener = listener.(*net.TCPListener)
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	network.dial = func() (conn net.Conn, err error) {
		err = do(func() (err error) {
			conn, err = net.Dial("tcp4", network.listener.Addr().String())
			return err
		})
		return conn, err
	}
	t.Cleanup(func() {
		close(inside)
		network.listener.Close()
		unix.Close(network.control)
	})
	return network
}

func (n *loneNetwork) setLoopback(flags uint16) error {
	request, err := unix.NewIfreq("lo")
	if err != nil {
		return err
	}
	request.SetUint16(flags)
	return unix.IoctlIfreq(n.control, unix.SIOCSIFFLAGS, request)
}

// cut drops every packet from now on.
func (n *loneNetwork) cut(t *testing.T) {
	t.Helper()
	if err := n.setLoopback(0); err != nil {
		t.Fatal(err)
	}
}

func (n *loneNetwork) connect(t *testing.T) (ours, clients net.Conn) {
	t.Helper()
	clients, dialErr := n.dial()
	ours, err := n.listener.Accept()
	if err := errors.Join(dialErr, err); err != nil {
		t.Fatal(err)
	}
	for _, conn := range []net.Conn{ours, clients} {
		conn.(*net.TCPConn).SetLinger(0) // nobody waits for what is lost
		t.Cleanup(func() { conn.Close() })
	}
	return ours, clients
}
