package websocket

import (
	"bufio"
	"context"
	"crypto/sha1" //nolint:gosec // as the protocol has it
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/streamshim/streamshim/pkg/handover"
	"github.com/streamshim/streamshim/pkg/rescue"
	"github.com/streamshim/streamshim/pkg/streaming/internal/socket"
	"github.com/streamshim/streamshim/pkg/streaming/internal/websocket/frames"
)

// Close codes of RFC 6455 section 7.4.1.
const (
	CloseNormal        = frames.CloseNormal
	CloseGoingAway     = frames.CloseGoingAway
	CloseInternalError = frames.CloseInternalError
)

// closeTimeout bounds the steps of a connection's end that have no context of their own: the answer to a client's
// Close, the Close after a protocol violation, and the whole of Close.
const closeTimeout = 2 * time.Second

var (
	// ErrClientClosed means that the client sent Close. It is wrapped if the code is not 1000 or 1001, by which a
	// client reports an error.
	ErrClientClosed = errors.New("websocket: the client closed the connection")
	// ErrClientVanished means that the client sent FIN without a Close.
	ErrClientVanished = fmt.Errorf("websocket: the client went away without a Close: %w", io.ErrUnexpectedEOF)
	// ErrClientReset means that the client's kernel has reset the connection.
	ErrClientReset = errors.New("websocket: the client's connection was reset")
	// ErrClosed means that the connection was closed from our side.
	ErrClosed = fmt.Errorf("websocket: connection closed: %w", net.ErrClosed)

	errWriteClosed = errors.New("websocket: write after CloseWrite, Reset or Close")
)

// conn is one upgraded connection.
type conn struct {
	// Immutable.
	network  net.Conn
	vectored bool // network takes several slices in one system call

	in *frames.Reader // owned by the reading goroutine

	// writeLock has one place. Whoever filled it owns the fields below. It is a channel and not a mutex, so that a
	// wait for it can end with a context.
	writeLock chan struct{}
	writeErr  error       // of the first write that failed; the byte stream is cut there
	unsent    []byte      // what a freeze has held back; sent before everything else
	closeSent atomic.Bool // set with writeLock held, read by all
	headers   [frames.CellsPerBatch * frames.CellHeader]byte
	control   [2 + frames.MaxControlPayload]byte
	vector    [2 * frames.CellsPerBatch][]byte
	buffers   net.Buffers

	// Control frames that wait for the write lock.
	controlMu   sync.Mutex
	pingDue     bool
	pongDue     bool
	pongSize    int
	pongPayload [frames.MaxControlPayload]byte // of the latest Ping; RFC 6455 section 5.5.3 lets us skip others
	released    bool                           // no more control writers may start
	writers     sync.WaitGroup                 // control writers
	onPanic     rescue.Report                  // called after a panic in one of them

	lastReceived atomic.Int64 // Unix nanoseconds
	lastActivity atomic.Int64

	done     chan struct{}
	doneOnce sync.Once
	doneErr  error // valid once done is closed

	endMu    sync.Mutex // makes sure that at most one of closed and frozen is set
	closed   bool
	frozen   atomic.Bool
	freezing chan struct{} // closed with frozen
	serving  atomic.Bool
	resumed  atomic.Bool // resumed, and nothing was written since
}

// accept completes the handshake of a request that Negotiate has checked, and takes the connection over from net/http.
// limit bounds the bytes of a message; 0 is no limit. If accept returns an error, it has answered the request.
func accept(w http.ResponseWriter, r *http.Request, protocol Protocol, limit int64) (*conn, error) {
	network, buffered, err := http.NewResponseController(w).Hijack()
	if err != nil {
		http.Error(w, "this server cannot upgrade the connection", http.StatusInternalServerError)
		return nil, fmt.Errorf("upgrade to WebSocket: %w", err)
	}
	if buffered.Reader.Buffered() == 0 {
		// Bypass net/http's own reader, which takes a lock for each read.
		buffered.Reader.Reset(network)
	}
	network.SetDeadline(time.Time{}) //nolint:errcheck // fails on a closed connection, as the write below
	if _, err := network.Write(handshakeAnswer(r, protocol)); err != nil {
		network.Close()
		return nil, fmt.Errorf("upgrade to WebSocket: %w", err)
	}
	c := newConn(network, buffered.Reader, limit)
	now := time.Now().UnixNano()
	c.lastReceived.Store(now)
	c.lastActivity.Store(now)
	return c, nil
}

func newConn(network net.Conn, source *bufio.Reader, limit int64) *conn {
	c := &conn{
		onPanic:   rescue.Die,
		network:   network,
		writeLock: make(chan struct{}, 1),
		done:      make(chan struct{}),
		freezing:  make(chan struct{}),
	}
	c.in = frames.NewReader(source, uint64(limit), c.receivedControl) //nolint:gosec // not negative
	_, c.vectored = network.(*net.TCPConn)
	return c
}

// handshakeAnswer returns the answer of RFC 6455 section 4.2.2.
func handshakeAnswer(r *http.Request, protocol Protocol) []byte {
	sum := sha1.Sum([]byte(r.Header.Get("Sec-WebSocket-Key") + "258EAFA5-E914-47DA-95CA-C5AB0DC85B11")) //nolint:gosec // as the protocol has it
	answer := "HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Accept: " +
		base64.StdEncoding.EncodeToString(sum[:]) + "\r\n"
	if protocol != ChannelUnnamed {
		answer += "Sec-WebSocket-Protocol: " + string(protocol) + "\r\n"
	}
	return []byte(answer + "\r\n")
}

// receivedControl handles a client's Ping or Pong.
func (c *conn) receivedControl(opcode byte, payload []byte) {
	c.received()
	if opcode == frames.OpPing {
		c.pong(payload)
	}
}

func (c *conn) received() { c.lastReceived.Store(time.Now().UnixNano()) }
func (c *conn) active()   { c.lastActivity.Store(time.Now().UnixNano()) }

// finish sets why the connection is over. Only the first call counts.
func (c *conn) finish(err error) {
	c.doneOnce.Do(func() {
		c.doneErr = err
		close(c.done)
	})
}

func (c *conn) err() error {
	select {
	case <-c.done:
		return c.doneErr
	default:
		return nil
	}
}

// release closes the socket and waits for the control writers. The caller has called finish. It does nothing to a
// frozen connection.
func (c *conn) release() {
	if !c.closeSocket() {
		return
	}
	c.controlMu.Lock()
	c.released = true
	c.controlMu.Unlock()
	c.writers.Wait()
}

// readError ends the connection after a failed read and returns why it is over. If the reason is the client's Close,
// it answers that. It calls before, which may be nil, before it closes done.
func (c *conn) readError(err error, before func(reason error)) error {
	finish := func(reason error) {
		if before != nil {
			before(reason)
		}
		c.finish(reason)
	}
	var closed *frames.CloseFrame
	var violation *frames.Violation
	switch {
	case errors.As(err, &closed):
		reason := ErrClientClosed
		if closed.Code != CloseNormal && closed.Code != CloseGoingAway && closed.Code != frames.CloseNoStatus {
			reason = fmt.Errorf("%w with code %d: %q", ErrClientClosed, closed.Code, closed.Text)
		}
		finish(reason)
		// After finish, because sending may block and all must know that the client is gone.
		c.sendCloseWithin(closeTimeout, closed.Code, "")
		return reason
	case errors.As(err, &violation):
		c.sendCloseWithin(closeTimeout, violation.Code, violation.Reason)
		finish(err)
		c.linger()
		return err
	case errors.Is(err, io.EOF), errors.Is(err, io.ErrUnexpectedEOF):
		reason := c.streamEnd()
		finish(reason)
		return reason
	case errors.Is(err, syscall.ECONNRESET):
		finish(ErrClientReset)
		return ErrClientReset
	case errors.Is(err, net.ErrClosed):
		finish(ErrClosed)
		return c.doneErr
	default:
		err = fmt.Errorf("read from the client: %w", err)
		finish(err)
		return err
	}
}

// streamEnd returns how the client's byte stream has ended, after it was read to its end. The kernel reports a reset
// only once: if it was reported to a write, a read sees the same end as after a FIN.
func (c *conn) streamEnd() error {
	if c.socketDead() {
		// No write blocks any more, so the lock becomes free.
		c.writeLock <- struct{}{}
		err := c.writeErr
		<-c.writeLock
		if errors.Is(err, syscall.ECONNRESET) || c.socketError() == syscall.ECONNRESET {
			return ErrClientReset
		}
	}
	return ErrClientVanished
}

// lingerTimeout bounds linger. net/http uses the same time for the same reason (rstAvoidanceDelay).
const lingerTimeout = 500 * time.Millisecond

// linger reads and discards what the client still sends, so that it receives our Close. Bytes that are unread when the
// socket is closed would make the kernel send RST, which overtakes the Close.
func (c *conn) linger() {
	if half, ok := c.network.(interface{ CloseWrite() error }); ok {
		half.CloseWrite() //nolint:errcheck // the client may have gone
	}
	c.network.SetReadDeadline(time.Now().Add(lingerTimeout))
	if c.frozen.Load() { // Freeze may have set its deadline before this one was set
		return
	}
	io.Copy(io.Discard, c.network) //nolint:errcheck // whatever ends it, the connection is closed next
}

// lock takes the write lock, unless the connection ends first. On a frozen connection it fails, except for committed
// bytes, which write adds to the state.
func (c *conn) lock(committed bool) error {
	select {
	case <-c.done:
		return c.doneErr
	default:
	}
	freezing := c.freezing
	if committed {
		freezing = nil
	}
	select {
	case c.writeLock <- struct{}{}:
		if !committed && c.frozen.Load() {
			c.unlock()
			return handover.ErrFrozen
		}
		return nil
	case <-freezing:
		return handover.ErrFrozen
	case <-c.done:
		return c.doneErr
	}
}

// unlock sends the control frames that are due and releases the write lock. One that becomes due between the two is sent
// by whoever sees it first: its maker, the next owner, or this loop.
func (c *conn) unlock() {
	for {
		c.unlockOnce()
		if !c.controlDue() {
			return
		}
		select {
		case c.writeLock <- struct{}{}:
		default:
			return
		}
	}
}

// unlockOnce releases the write lock also after a panic: the end of the session writes, too.
func (c *conn) unlockOnce() {
	defer func() { <-c.writeLock }()
	c.writeControlFrames()
}

// pong answers a Ping, now or right after the message that is being written. Of several unanswered Pings only the
// latest is answered.
func (c *conn) pong(payload []byte) {
	c.controlMu.Lock()
	c.pongDue = true
	c.pongSize = copy(c.pongPayload[:], payload)
	c.controlMu.Unlock()
	c.startControlWriter()
}

// heartbeat sends an unsolicited Pong, unless the answer to a Ping is due.
func (c *conn) heartbeat() {
	c.controlMu.Lock()
	if !c.pongDue {
		c.pongDue = true
		c.pongSize = 0
	}
	c.controlMu.Unlock()
	c.startControlWriter()
}

// ping sends a Ping frame, now or right after the message that is being written.
func (c *conn) ping() {
	c.controlMu.Lock()
	c.pingDue = true
	c.controlMu.Unlock()
	c.startControlWriter()
}

// reportPanics sets the function that is called after a panic in a control writer. Call it before the connection is
// served. nil changes nothing.
func (c *conn) reportPanics(to rescue.Report) {
	if to != nil {
		c.onPanic = to
	}
}

// startControlWriter sends the control frames that are due in a goroutine, unless the owner of the write lock will.
// Neither the read loop nor a caller of Ping may block on a client that does not read. There is at most one such
// goroutine, because it owns the write lock, and release waits for it.
func (c *conn) startControlWriter() {
	select {
	case c.writeLock <- struct{}{}:
	default:
		return
	}
	c.controlMu.Lock()
	none := c.released || c.frozen.Load()
	if !none {
		c.writers.Add(1)
	}
	c.controlMu.Unlock()
	if none {
		<-c.writeLock
		return
	}
	rescue.Go(c.onPanic, func() {
		defer c.writers.Done()
		c.unlock()
	})
}

// writeHeldUp starts to write what a freeze has held back. It does nothing unless the connection was just resumed.
func (c *conn) writeHeldUp() {
	if c.resumed.Load() && c.resumed.CompareAndSwap(true, false) {
		c.startControlWriter()
	}
}

func (c *conn) controlDue() bool {
	c.controlMu.Lock()
	defer c.controlMu.Unlock()
	return c.pingDue || c.pongDue
}

// writeControlFrames sends what a freeze has held back, and the Ping and Pong that are due. Called with writeLock held.
func (c *conn) writeControlFrames() {
	c.writeUnsent()
	c.controlMu.Lock()
	ping, pong := c.pingDue, c.pongDue
	c.pingDue, c.pongDue = false, false
	payload := c.control[2 : 2+copy(c.control[2:], c.pongPayload[:c.pongSize])]
	c.controlMu.Unlock()
	if pong {
		frames.PutHeader(c.control[:], frames.OpPong, len(payload))
		c.write(c.control[:2+len(payload)]) //nolint:errcheck // the reader notices a connection that cannot be written to
	}
	if ping {
		frames.PutHeader(c.control[:], frames.OpPing, 0)
		c.write(c.control[:2]) //nolint:errcheck // as above
	}
}

// write writes whole frames. What a freeze keeps it from writing goes into unsent. Called with writeLock held. A failed
// write ends the connection, because it is unknown how much of the frame was sent.
func (c *conn) write(frames []byte) error {
	if err := c.writable(); err != nil {
		return err
	}
	n := 0
	var err error
	if !c.frozen.Load() {
		n, err = c.network.Write(frames)
	}
	return c.wrote(err, frames[n:])
}

// writeUnsent writes unsent, until the connection is frozen again.
func (c *conn) writeUnsent() {
	if len(c.unsent) == 0 || c.writeErr != nil || c.frozen.Load() {
		return
	}
	n, err := c.network.Write(c.unsent)
	if c.unsent = c.unsent[n:]; len(c.unsent) == 0 {
		c.unsent = nil
	}
	c.wrote(err) //nolint:errcheck // it is kept
}

// writeVector is like write, for frames in the first n slices of vector. It does not copy the payload.
func (c *conn) writeVector(n int) error {
	err := c.writable()
	if err == nil {
		c.buffers = c.vector[:n]
		if !c.frozen.Load() {
			_, err = c.buffers.WriteTo(c.network)
		}
		err = c.wrote(err, c.buffers...)
	}
	clear(c.vector[:n])
	return err
}

func (c *conn) writable() error {
	c.writeUnsent()
	if c.writeErr != nil {
		return c.writeErr
	}
	if c.closeSent.Load() {
		return errWriteClosed
	}
	return nil
}

// wrote handles the result of a write: it keeps rest in unsent after a freeze, and the error in writeErr.
func (c *conn) wrote(err error, rest ...[]byte) error {
	if err == nil && !c.frozen.Load() {
		return nil
	}
	if err == nil || c.stopped(err) {
		for _, p := range rest {
			c.unsent = append(c.unsent, p...)
		}
		return nil
	}
	if errors.Is(err, net.ErrClosed) {
		c.writeErr = ErrClosed
	} else {
		c.writeErr = fmt.Errorf("write to the client: %w", err)
	}
	return c.writeErr
}

// writeClose sends a Close frame, unless one was sent. The context bounds the wait for the write lock and the write. A
// write that it ends cuts the byte stream.
func (c *conn) writeClose(ctx context.Context, frame []byte) error {
	// lock would fail: after the client's Close, done is closed, but our answer is still due.
	select {
	case c.writeLock <- struct{}{}:
	case <-ctx.Done():
		return fmt.Errorf("send Close: %w", context.Cause(ctx))
	}
	defer c.unlock()
	if c.closeSent.Load() {
		return nil
	}
	stop := context.AfterFunc(ctx, func() {
		c.network.SetWriteDeadline(time.Unix(1, 0))
	})
	defer stop()
	err := c.write(frame)
	c.closeSent.Store(true)
	if err != nil {
		return fmt.Errorf("send Close: %w", err)
	}
	return nil
}

// sendClose sends a Close frame with a code and a reason, of which at most 123 bytes are sent.
func (c *conn) sendClose(ctx context.Context, code int, reason string) error {
	frame := make([]byte, 2+frames.MaxControlPayload)
	return c.writeClose(ctx, frame[:frames.PutClose(frame, code, reason)])
}

// sendCloseWithin tries to send a Close frame on a connection that ends in any case.
func (c *conn) sendCloseWithin(timeout time.Duration, code int, reason string) {
	ctx, cancel := context.WithTimeout(context.Background(), timeout)
	defer cancel()
	_ = c.sendClose(ctx, code, reason)
}

// peerEnd asks the kernel how the client has ended the connection, without reading. It returns ErrClientVanished for a
// FIN, ErrClientReset for a reset, and nil while the connection is open. It is for a read loop that has no room: it
// sees a FIN behind unread data, and that data can still be read.
func (c *conn) peerEnd() (end error) {
	socket.Control(c.network, func(fd int) {
		switch socket.PeerEnd(fd) {
		case socket.Dead:
			end = c.streamEnd()
		case socket.Closed:
			end = ErrClientVanished
		}
	})
	return end
}

// socketDead reports whether the socket is closed in both directions.
func (c *conn) socketDead() (dead bool) {
	socket.Control(c.network, func(fd int) {
		info, err := unix.GetsockoptTCPInfo(fd, unix.IPPROTO_TCP, unix.TCP_INFO)
		dead = err == nil && info.State == unix.BPF_TCP_CLOSE
	})
	return dead
}

// allAcknowledged reports whether the peer's kernel has acknowledged everything that was written.
func allAcknowledged(c net.Conn) bool {
	n, known := socket.Unacknowledged(c)
	return known && n == 0
}

// socketError returns and clears the socket's pending error.
func (c *conn) socketError() (reset error) {
	socket.Control(c.network, func(fd int) { reset = socket.TakeError(fd) })
	return reset
}
