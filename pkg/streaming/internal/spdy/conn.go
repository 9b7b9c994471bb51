// Package spdy implements SPDY/3.1 connections as the streaming protocols of Kubernetes use them: both ends,
// without priorities, push or flow control windows.
//
// The parts without I/O have packages of their own: frames (the wire format), control (the queue of control frames), buffer
// (payload on its way) and state (a hand-over). Package direct writes received payload without buffering it. This package
// joins them with sockets, goroutines and deadlines.
//
// Source: https://www.chromium.org/spdy/spdy-protocol/spdy-protocol-draft3-1/. The draft's flow
// control (2.6.8) is left out on purpose: the clients of Kubernetes never send WINDOW_UPDATE and
// ignore ours, so waiting for a window would be waiting for ever. Config.StreamBuffer describes what bounds inbound data
// instead.
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
	// OnStream is called from the read loop for each stream that the peer opens. It must not block. The stream is
	// accepted (SYN_REPLY) when OnStream returns, calls Accept or first writes to the stream, unless it has reset the
	// stream before. From the call on the callee owns the stream. It either reads the stream to its end or calls
	// CloseRead, and calls CloseWrite; or it calls Reset.
	//
	// If OnStream is nil, every stream of the peer is refused.
	OnStream func(*Stream)

	// MaxStreams bounds the streams that are open at once. Further ones are refused. A stream counts until both
	// directions have ended and its data was read or discarded. Default 1024.
	MaxStreams int

	// StreamBuffer bounds the bytes of unread data that each stream may always hold. ConnBuffer bounds what all streams
	// of the connection together may hold beyond that. When both are used up, the connection is not read until the
	// stream whose data comes next is read, so that TCP slows the peer down. Memory is bounded by
	// MaxStreams*StreamBuffer + ConnBuffer. Defaults 64 KiB and 16 MiB.
	StreamBuffer int
	ConnBuffer   int
	// Room is shared with other connections for unread data. While it is full, a stream that holds data gets no more
	// until it is read. If nil, only the limits above hold.
	Room memory.Room
	// Stall bounds how long one stream may block the connection that way (kubernetes#78446). When neither the
	// connection nor the blocking stream was read for so long, one stream is reset: of those that do not move, the one
	// with the most unread data. Zero is never. That is right if all streams serve one process, as with exec: a command
	// may well leave its stdin unread for a minute.
	Stall time.Duration
	// OnStall is called, from the read loop, when a stream is reset for that reason. It must not
	// block. It may be nil.
	OnStall func()
	// Receipts is called with a new connection, before it is served. It returns what slows the connection's streams
	// down. If nil, nothing does.
	Receipts func(*Conn) Receipts
	// OnPanic is called after a panic in one of the connection's own goroutines, or in AfterReset's. If nil, a panic ends
	// the process.
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
	// maxControlFrame bounds the payload of a control frame in bytes. The draft requires at least 8 KiB. It fits the read
	// buffer, so that a control frame is always parsed in place.
	maxControlFrame = 16 << 10
	// closeTimeout bounds how long Close waits for a blocked writer and for its own GOAWAY.
	closeTimeout = 250 * time.Millisecond
)

// headerLimits bound a header block: the number of headers, the bytes of a name or a value, and all bytes when inflated.
var headerLimits = frames.HeaderLimits{Count: 64, Field: 8 << 10, Total: 64 << 10}

// aLongTimeAgo is a deadline that ends a wait at once.
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
	endErr  error // set when no more frames will be read; new streams get it at once
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

// NewServer returns the end of a connection whose peer opens streams with odd ids. conn is the
// connection after the HTTP upgrade, and buffered is what was read from it past the upgrade. The Conn
// then owns conn and closes it in Close. Nobody else may set deadlines on it.
func NewServer(conn net.Conn, buffered []byte, cfg Config) *Conn {
	return newConn(conn, buffered, cfg, true)
}

// NewClient is like NewServer, for the end that opens streams with odd ids itself.
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

// Serve reads frames until the peer is gone, the peer breaks the protocol, ctx is done or Close is called. It returns what
// Err returns. When it returns, every stream has ended. What streams hold can still be read, unless this side has closed the
// connection. The caller still calls Close.
//
// A connection that is not served does not move, so call Serve soon after New.
//
// After Freeze it returns handover.ErrFrozen, and nothing has ended.
func (c *Conn) Serve(ctx context.Context) error {
	c.serving.Store(true)
	defer c.serving.Store(false)
	if c.hasEnded() { // already before the hand-over
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
	// Unblocks writers: nobody reads what they send.
	c.out.fail(c.Err())
	c.headers.Refuse()
	if !stop() {
		<-closed
	}
	return c.Err()
}

// OpenStream opens a stream with the given headers. It does not wait for the peer's SYN_REPLY. Data may be written at once. If
// the peer refuses the stream, the stream is reset.
func (c *Conn) OpenStream(header http.Header) (*Stream, error) {
	s, err := c.out.openStream(header)
	if err != nil {
		return nil, err
	}
	c.out.flush()
	return s, nil
}

// NetConn returns the underlying connection, to query its state. The caller must not read from it or write to it.
func (c *Conn) NetConn() net.Conn { return c.conn }

// Done is closed as soon as the peer is known to be gone, or when Close is called here. The peer is gone when it has sent
// GOAWAY or its connection has ended, which is noticed even while the read loop waits for room. Data that arrived before can
// still be read.
func (c *Conn) Done() <-chan struct{} { return c.done }

// Err returns why Done is closed: ErrPeerClosed, ErrGoAway, ErrPeerReset, ErrClosed, a *ConnectionError, the cause
// of Serve's context, or an error of the network. It is nil before.
func (c *Conn) Err() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.goneErr
}

// Close sends GOAWAY if that is possible within 250 ms, closes the TCP connection, and unblocks every reader and writer. What
// was received and not read is discarded. Further calls do nothing.
func (c *Conn) Close() error {
	c.closeWith(ErrClosed, frames.GoAwayOK)
	return c.closeErr
}

func (c *Conn) closeWith(reason error, status frames.GoAwayStatus) {
	c.closeOnce.Do(func() {
		if !c.beginClosing() {
			return // frozen: State or Discard decides
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

// beginClosing marks the connection as closing. It returns false for a frozen connection.
func (c *Conn) beginClosing() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.frozen.Load() {
		return false
	}
	c.closing.Store(true)
	return true
}

// Ping sends a PING. It neither blocks nor waits for the answer, which shows in LastReceived. While an earlier PING is not
// sent yet, it does nothing. An error means that the connection has ended.
func (c *Conn) Ping() error {
	if err := c.out.failure(); err != nil {
		return err
	}
	c.out.control.Ping()
	c.out.flush()
	return nil
}

// LastActivity returns when payload was last received or sent, or when the connection began. PINGs and empty frames do not
// count (containerd#5563: a PING must not keep an idle session alive).
func (c *Conn) LastActivity() time.Time { return time.Unix(0, c.lastActivity.Load()) }

// LastReceived returns when anything was last received.
func (c *Conn) LastReceived() time.Time { return time.Unix(0, c.lastReceived.Load()) }

// RefuseStreams refuses all further streams of the peer and frees the memory that reading their headers takes, 45 to
// 85 KiB. It cannot be undone.
func (c *Conn) RefuseStreams() {
	c.headers.Refuse()
}

// markGone closes Done. Only the first reason counts.
func (c *Conn) markGone(err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.goneErr == nil {
		c.goneErr = err
		close(c.done)
	}
}

// endStreams ends the receiving side of every stream, and of those that are opened later.
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

// addStream registers a stream, or returns why it cannot.
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

// openStreams returns the registered streams.
func (c *Conn) openStreams() []*Stream {
	c.mu.Lock()
	defer c.mu.Unlock()
	return slices.Collect(maps.Values(c.streams))
}

// forget unregisters a stream that is over and holds no data. Further calls do nothing.
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

// peerOpens reports whether the peer opens streams with this id.
func (c *Conn) peerOpens(id uint32) bool { return (id%2 == 1) == c.peerOdd }
