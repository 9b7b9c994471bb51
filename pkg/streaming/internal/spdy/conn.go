// Package spdy is a SPDY/3.1 connection as the streaming protocols of Kubernetes use it: both ends,
// no priorities, no push, no flow control windows.
//
// The protocol without I/O stands in packages of its own: frames (the wire), control (the queue of control frames), buffer
// (payload on its way) and state (a hand-over); direct writes received payload at once. What is here joins
// them with sockets, goroutines and deadlines.
//
// Source: https://www.chromium.org/spdy/spdy-protocol/spdy-protocol-draft3-1/. The draft's flow
// control (2.6.8) is left out on purpose: the clients of Kubernetes never send WINDOW_UPDATE and
// ignore ours, so whoever waits for a window waits for ever. What bounds inbound data instead is
// described at Config.StreamBuffer.
package spdy

import (
	"cmp"
	"context"
	"errors"
	"maps"
	"net"
	"net/http"
	"slices"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/streamshim/streamshim/pkg/handover"
	"github.com/streamshim/streamshim/pkg/rescue"
	"github.com/streamshim/streamshim/pkg/streaming/internal/memory"
	"github.com/streamshim/streamshim/pkg/streaming/internal/socket"
	"github.com/streamshim/streamshim/pkg/streaming/internal/spdy/buffer"
	"github.com/streamshim/streamshim/pkg/streaming/internal/spdy/control"
	"github.com/streamshim/streamshim/pkg/streaming/internal/spdy/frames"
)

// Config has the callback and the limits of a connection. Zero limits take the defaults.
type Config struct {
	// OnStream is called for each stream that the peer opens, from the read loop, and must not
	// block. The stream is accepted (SYN_REPLY) when OnStream returns, calls Accept or first writes
	// to the stream, unless it has reset the stream by then. From the call on the stream belongs to the
	// callee, who reads it to its end or calls CloseRead, and calls CloseWrite; or calls Reset.
	//
	// With a nil OnStream every stream of the peer is refused.
	OnStream func(*Stream)

	// MaxStreams limits the streams that are open at once; further ones are refused. A stream
	// counts until both directions have ended and its data was read or discarded. Default 1024.
	MaxStreams int

	// StreamBuffer is how many bytes of unread data each stream may hold in any case, and
	// ConnBuffer how many more all streams of the connection together. Once both are used up, the
	// connection is not read any more until the stream whose data comes next is read: TCP then
	// slows the peer down. Memory is bounded by MaxStreams*StreamBuffer + ConnBuffer. Defaults
	// 64 KiB and 16 MiB.
	StreamBuffer int
	ConnBuffer   int
	// Room is what this connection shares with others for unread data. While it is full, a stream that holds
	// some already gets no more until it is read. Nil: only the limits above.
	Room memory.Room
	// Stall bounds how long one stream can hold up the connection that way (kubernetes#78446):
	// when the connection has not been read for so long, and the stream in the way was not read
	// either, the stream with most unread data among those that stand still is reset. Zero: never,
	// which is right where all streams serve one process, as with exec: there a command that does not
	// read its stdin for a minute is nothing unusual.
	Stall time.Duration
	// OnStall is called, from the read loop, when a stream is reset for that reason. It must not
	// block. May be nil.
	OnStall func()
	// Receipts is called with a new connection, before it is served, and returns what slows its streams down. Nil, the
	// default, slows nothing.
	Receipts func(*Conn) Receipts
	// OnPanic is told of a panic in a goroutine of the connection's own, or in AfterReset's. Nil ends the process.
	OnPanic rescue.Report
}

func (c Config) withDefaults() Config {
	c.MaxStreams = cmp.Or(c.MaxStreams, 1024)
	c.StreamBuffer = cmp.Or(c.StreamBuffer, 64<<10)
	c.ConnBuffer = cmp.Or(c.ConnBuffer, 16<<20)
	if c.Room == nil {
		c.Room = memory.Unshared{}
	}
	if c.OnPanic == nil {
		c.OnPanic = rescue.Die
	}
	return c
}

const (
	// maxControlFrame limits the payload of a control frame in bytes; the draft wants 8 KiB at least. It fits the read
	// buffer, so that a control frame is always parsed in place.
	maxControlFrame = 16 << 10
	// closeTimeout bounds how long Close waits for a writer in a blocked socket and for its own
	// GOAWAY.
	closeTimeout = 250 * time.Millisecond
)

// headerLimits are those of a header block: headers, bytes of a name or a value, and of all when inflated.
var headerLimits = frames.HeaderLimits{Count: 64, Field: 8 << 10, Total: 64 << 10}

// aLongTimeAgo as a deadline ends a wait at once.
var aLongTimeAgo = time.Unix(1, 0)

// Conn is one SPDY connection. All methods may be called from any goroutine, Serve only once.
type Conn struct {
	// Immutable.
	cfg      Config
	conn     net.Conn
	socket   syscall.RawConn // of conn, for reading and writing without parking a buffer; may be nil
	peerOdd  bool            // the peer opens odd streams, as clients do
	done     chan struct{}   // closed by markGone
	freezing chan struct{}   // closed by Freeze

	lastActivity atomic.Int64 // Unix nanoseconds
	lastReceived atomic.Int64 // Unix nanoseconds
	closing      atomic.Bool  // our Close has begun; set with mu held
	frozen       atomic.Bool  // Freeze was called; set with mu held, and closing is not set after it
	serving      atomic.Bool

	mu      sync.Mutex
	goneErr error // why done is closed
	endErr  error // set when no frame will be read any more; new streams get it at once
	streams map[uint32]*Stream
	ended   []*Stream // the last that have left streams, at most maxEnded

	read  reader  // owned by the goroutine of Serve
	block blocker // the read loop waiting for room

	headers frames.PeerHeaders

	out writer

	limits buffer.Limits // of what streams hold unread

	receipts Receipts // nil: none

	closeOnce sync.Once
	closeErr  error
}

// NewServer makes the end of a connection whose peer opens streams with odd ids. conn is the
// connection after the HTTP upgrade, and buffered what was read from it past the upgrade. The Conn
// owns conn from now on and closes it in Close; nobody else may set deadlines on it.
func NewServer(conn net.Conn, buffered []byte, cfg Config) *Conn {
	return newConn(conn, buffered, cfg, true)
}

// NewClient is NewServer for the end that opens streams with odd ids itself.
func NewClient(conn net.Conn, buffered []byte, cfg Config) *Conn {
	return newConn(conn, buffered, cfg, false)
}

func newConn(conn net.Conn, buffered []byte, cfg Config, server bool) *Conn {
	c := &Conn{
		cfg:      cfg.withDefaults(),
		conn:     conn,
		socket:   socket.Raw(conn),
		peerOdd:  server,
		done:     make(chan struct{}),
		freezing: make(chan struct{}),
		streams:  make(map[uint32]*Stream),
	}
	first := uint32(1)
	if server {
		first = 2
	}
	c.out.control.Start(control.State{OpenNext: first, PingNext: first}, 0)
	c.headers.Limits = headerLimits
	c.limits.Stream, c.limits.Conn, c.limits.Room = c.cfg.StreamBuffer, c.cfg.ConnBuffer, c.cfg.Room
	c.read.init(c, buffered)
	c.block.init(c)
	c.out.init(c)
	if cfg.Receipts != nil {
		c.receipts = cfg.Receipts(c)
	}
	now := time.Now().UnixNano()
	c.lastActivity.Store(now)
	c.lastReceived.Store(now)
	return c
}

// Serve reads frames until the peer is gone, the peer breaks the protocol, ctx is done or Close is
// called, and returns what Err returns. When it returns, every stream has ended, and what they
// hold can still be read unless this side closed the connection. Close is still to be called.
//
// A connection that is not served does not move: Serve is to be called soon after New.
//
// After Freeze it returns handover.ErrFrozen, and nothing has ended.
func (c *Conn) Serve(ctx context.Context) error {
	c.serving.Store(true)
	defer c.serving.Store(false)
	if c.hasEnded() { // before it was resumed
		return c.Err()
	}
	closed := make(chan struct{})
	stop := context.AfterFunc(ctx, func() {
		defer close(closed)
		rescue.Call(c.cfg.OnPanic, func() { c.closeWith(context.Cause(ctx), frames.GoAwayOK) })
	})
	err := c.readFrames()
	if err == handover.ErrFrozen {
		if !stop() {
			<-closed
		}
		return err
	}
	var fault *ConnectionError
	if errors.As(err, &fault) {
		c.closeWith(fault, fault.Status)
	}
	c.markGone(err)
	c.endStreams(c.Err(), false)
	// Nobody is there to read what a writer may be stuck with.
	c.out.fail(c.Err())
	c.headers.Refuse()
	if !stop() {
		<-closed
	}
	return c.Err()
}

// OpenStream opens a stream with the given headers. It does not wait for the peer's SYN_REPLY:
// data may be written at once, and a refusal shows as a reset.
func (c *Conn) OpenStream(header http.Header) (*Stream, error) {
	s, err := c.out.openStream(header)
	if err != nil {
		return nil, err
	}
	c.out.flush()
	return s, nil
}

// NetConn is the connection underneath, to ask it about its state; bytes must not be read from it or
// written to it.
func (c *Conn) NetConn() net.Conn { return c.conn }

// Done is closed as soon as the peer is known to be gone: its connection has ended, also when the
// read loop waits for room at that time, or it has said so with GOAWAY; or when Close is called
// here. Data that came before can still be read.
func (c *Conn) Done() <-chan struct{} { return c.done }

// Err says why Done is closed: ErrPeerClosed, ErrGoAway, ErrPeerReset, ErrClosed, a *ConnectionError, the cause
// of Serve's context, or an error of the network. It is nil before.
func (c *Conn) Err() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.goneErr
}

// Close says GOAWAY as far as that is possible within 250 ms, closes the TCP connection, and wakes
// every reader and writer. What was received and not read is dropped. Further calls do nothing.
func (c *Conn) Close() error {
	c.closeWith(ErrClosed, frames.GoAwayOK)
	return c.closeErr
}

func (c *Conn) closeWith(reason error, status frames.GoAwayStatus) {
	c.closeOnce.Do(func() {
		if !c.beginClosing() {
			return // whoever has frozen it decides
		}
		c.markGone(reason)
		c.endStreams(reason, true)
		c.out.goAway(status, c.read.lastPeerStream.Load())
		c.closeErr = c.conn.Close()
		c.block.waiter.Wake()
		c.out.fail(reason)
		c.out.flusher.Wait()
	})
}

// beginClosing fails on a frozen connection.
func (c *Conn) beginClosing() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.frozen.Load() {
		return false
	}
	c.closing.Store(true)
	return true
}

// Ping sends a PING and returns without waiting for the answer, which shows in LastReceived. It
// does not block; while an earlier PING has not left, it does nothing. An error means that the
// connection has ended.
func (c *Conn) Ping() error {
	if err := c.out.failure(); err != nil {
		return err
	}
	c.out.control.Ping()
	c.out.flush()
	return nil
}

// LastActivity is when payload last came or went: not PING, not empty frames. It begins with the
// connection (containerd#5563: a PING must not keep an idle session alive).
func (c *Conn) LastActivity() time.Time { return time.Unix(0, c.lastActivity.Load()) }

// LastReceived is when anything last came from the peer.
func (c *Conn) LastReceived() time.Time { return time.Unix(0, c.lastReceived.Load()) }

// RefuseStreams refuses all further streams of the peer and frees the memory that reading their headers takes, 45 to
// 85 KiB. It cannot be undone.
func (c *Conn) RefuseStreams() {
	c.headers.Refuse()
}

// markGone closes Done, the first time with its reason.
func (c *Conn) markGone(err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.goneErr == nil {
		c.goneErr = err
		close(c.done)
	}
}

// endStreams tells every stream, and those that are opened later, that nothing more will arrive.
func (c *Conn) endStreams(err error, discard bool) {
	c.mu.Lock()
	if c.endErr == nil {
		c.endErr = err
	}
	c.mu.Unlock()
	for _, s := range c.openStreams() {
		s.connEnded(err, discard)
	}
}

// addStream makes a stream known, or says why it cannot be.
func (c *Conn) addStream(s *Stream) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.endErr != nil {
		return c.endErr
	}
	if len(c.streams) >= c.cfg.MaxStreams {
		return ErrTooManyStreams
	}
	c.streams[s.id] = s
	return nil
}

func (c *Conn) hasEnded() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.endErr != nil
}

func (c *Conn) findStream(id uint32) *Stream {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.streams[id]
}

// openStreams returns the streams that are not forgotten.
func (c *Conn) openStreams() []*Stream {
	c.mu.Lock()
	defer c.mu.Unlock()
	return slices.Collect(maps.Values(c.streams))
}

// forget removes a stream that is over and holds no data. Further calls do nothing.
func (c *Conn) forget(s *Stream) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.streams[s.id] != s {
		return
	}
	delete(c.streams, s.id)
	if len(c.ended) == maxEnded {
		c.ended = append(c.ended[:0], c.ended[1:]...)
	}
	c.ended = append(c.ended, s)
}

// peerOpens says whether streams with this id are the peer's to open.
func (c *Conn) peerOpens(id uint32) bool { return (id%2 == 1) == c.peerOdd }
