package lifetime

import (
	"context"
	"net"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/streamshim/streamshim/pkg/rescue"
	"github.com/streamshim/streamshim/pkg/session"
	"github.com/streamshim/streamshim/pkg/streaming/event"
	"github.com/streamshim/streamshim/pkg/streaming/internal/socket"
	"github.com/streamshim/streamshim/pkg/streaming/internal/transport"
)

const watchInterval = 5 * time.Second

// TCP keepalive of clients' connections. A client whose network is gone is noticed within
// keepAliveIdle + keepAliveCount*keepAliveInterval = 45 s, even if nothing is sent.
const (
	keepAliveIdle     = 15 * time.Second
	keepAliveInterval = 5 * time.Second
	keepAliveCount    = 6
)

// WatchConfig configures a Watcher.
type WatchConfig struct {
	// LingerIdle is how long a finished session waits, without any progress, for the client to read
	// what is left and to close the connection.
	LingerIdle time.Duration
	// PeerSilence is how long the network may stay silent while an answer is due. After that the client is
	// considered gone.
	PeerSilence time.Duration
	// Observe is called for each client that is disconnected.
	Observe func(event.Event)
}

// Watcher checks all sessions every few seconds. It disconnects a client whose network is gone while data is on its
// way, and the client of a finished session that makes no progress. One goroutine serves all sessions.
type Watcher struct {
	config WatchConfig

	mu      sync.Mutex
	watched map[*watchedSession]struct{}
}

// Client is the client's side of a session.
type Client interface {
	session.Connection
	LastReceived() time.Time
	// Done is closed when the client is known to have gone. Data that it has sent may still arrive.
	Done() <-chan struct{}
	Close() error
}

// watchedSession is one session's entry. The second group of fields belongs to the watcher's goroutine.
type watchedSession struct {
	session *session.Session
	client  Client
	network net.Conn

	progress progress
	since    time.Time // when progress was last seen to change
}

// progress is everything that changes when a client reads what it was sent.
type progress struct {
	received, sent int64
	lastReceived   time.Time
	unsent         int // bytes that the peer's kernel has not acknowledged
}

// NewWatcher returns a watcher. The caller calls Run.
func NewWatcher(c WatchConfig) *Watcher {
	return &Watcher{config: c, watched: make(map[*watchedSession]struct{})}
}

// Add watches a session until the returned function is called.
func (w *Watcher) Add(s *session.Session, client Client, network net.Conn) (remove func()) {
	setKeepAlive(network)
	entry := &watchedSession{session: s, client: client, network: network, since: time.Now()}
	w.mu.Lock()
	w.watched[entry] = struct{}{}
	w.mu.Unlock()
	return func() {
		w.mu.Lock()
		delete(w.watched, entry)
		w.mu.Unlock()
	}
}

// Run checks the sessions until the context is done.
func (w *Watcher) Run(ctx context.Context) {
	ticker := time.NewTicker(watchInterval)
	defer ticker.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case now := <-ticker.C:
			w.mu.Lock()
			entries := make([]*watchedSession, 0, len(w.watched))
			for e := range w.watched {
				entries = append(entries, e)
			}
			w.mu.Unlock()
			for _, e := range entries {
				rescue.Call(func(p *rescue.Panic) { w.panicked(e, p) }, func() { w.look(e, now) })
			}
		}
	}
}

// panicked ends a session whose check has panicked. The session is not checked again.
func (w *Watcher) panicked(e *watchedSession, p *rescue.Panic) {
	Panic(e.session, Terms{Observe: w.config.Observe}, e.network, p)
	w.mu.Lock()
	defer w.mu.Unlock()
	delete(w.watched, e)
}

func (w *Watcher) look(e *watchedSession, now time.Time) {
	if transport.Closed(e.client.Done()) {
		return
	}
	if peerIsDead(e.network, w.config.PeerSilence) {
		e.session.Log().Debug("client does not answer any more", "limit", w.config.PeerSilence)
		w.config.Observe(event.PeerDead)
		e.client.Close() //nolint:errcheck // the session sees the end of the connection
		return
	}
	if e.session.Phase() != session.Lingering {
		e.since = now
		return
	}
	unsent, _ := socket.Unacknowledged(e.network) // 0 if unknown
	p := progress{lastReceived: e.client.LastReceived(), unsent: unsent}
	p.received, p.sent = e.client.Transferred()
	if p != e.progress {
		e.progress, e.since = p, now
	} else if now.Sub(e.since) >= w.config.LingerIdle {
		e.session.Log().Debug("finished session makes no progress", "limit", w.config.LingerIdle)
		w.config.Observe(event.LingerCut)
		e.client.Close() //nolint:errcheck // as above
	}
}

func setKeepAlive(c net.Conn) {
	if tcp, ok := c.(*net.TCPConn); ok {
		tcp.SetKeepAliveConfig(net.KeepAliveConfig{ //nolint:errcheck // a dead peer is then noticed later
			Enable: true, Idle: keepAliveIdle, Interval: keepAliveInterval, Count: keepAliveCount,
		})
		socket.Control(tcp, func(fd int) {
			// Otherwise probes of a closed window back off to two minutes. Linux 6.15 and later have this option.
			unix.SetsockoptInt(fd, unix.IPPROTO_TCP, tcpRTOMaxMs, int(maxProbeInterval/time.Millisecond)) //nolint:errcheck // older kernels do not know it
		})
	}
}

const (
	tcpRTOMaxMs      = 44 // TCP_RTO_MAX_MS, include/uapi/linux/tcp.h; not in x/sys yet
	maxProbeInterval = 10 * time.Second
)

// peerIsDead reports whether the client's kernel has owed an answer for longer than the limit. The kernel of a client
// that merely does not read does answer: it acknowledges the probes of the closed window. TCP_USER_TIMEOUT is not used
// because it would end such connections too.
func peerIsDead(c net.Conn, limit time.Duration) bool {
	tcp, ok := c.(*net.TCPConn)
	if !ok {
		return false
	}
	dead := false
	socket.Control(tcp, func(fd int) {
		info, err := unix.GetsockoptTCPInfo(fd, unix.IPPROTO_TCP, unix.TCP_INFO)
		if err != nil {
			return
		}
		owed := info.Unacked > 0 || info.Probes > 0
		silent := time.Duration(info.Last_ack_recv) * time.Millisecond
		dead = owed && silent >= limit
	})
	return dead
}
