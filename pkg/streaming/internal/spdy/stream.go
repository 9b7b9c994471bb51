package spdy

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"github.com/streamshim/streamshim/pkg/handover"
	"github.com/streamshim/streamshim/pkg/rescue"
	"github.com/streamshim/streamshim/pkg/streaming/internal/spdy/buffer"
	"github.com/streamshim/streamshim/pkg/streaming/internal/spdy/control"
	"github.com/streamshim/streamshim/pkg/streaming/internal/spdy/direct"
)

// blockedPiece is how much WriteTo writes at once while the read loop waits for room, so that a slow
// reader is told from one that stands still.
const blockedPiece = 4 << 10

// Stream is one bidirectional stream. Reading and writing may go on at once from two goroutines;
// all other methods may be called at any time from any goroutine.
type Stream struct {
	conn   *Conn
	id     uint32
	header http.Header
	done   chan struct{}

	received, sent atomic.Int64
	moved          atomic.Int64 // Unix nanoseconds: when data was last taken, or began to wait

	mu         sync.Mutex
	arrived    sync.Cond // something to read, or the end
	unread     buffer.Queue
	readErr    error         // what follows the data: io.EOF after FIN, a *ResetError, or the connection's end
	readClosed bool          // CloseRead was called
	dropped    bool          // a reset or our Close has thrown the data away
	writeErr   error         // a *ResetError or the connection's end
	localFin   bool          // we have sent FIN
	replied    bool          // SYN_REPLY is queued, or not to be sent
	over       bool          // done is closed
	accepted   chan struct{} // closed with the peer's SYN_REPLY; nil where the peer opened the stream
	afterReset func()        // see AfterReset; nil once called

	direct   *direct.Writer // where WriteTo, which waits for data, would write it
	writesTo *direct.Writer // the same, also while WriteTo is busy
	caughtUp chan struct{}  // closed when WriteTo waits for data again; nil unless the read loop waits for that
	slow     bool           // the wait for that has timed out, and WriteTo has taken nothing since
	directed int64          // bytes that the read loop has written there
}

func newStream(c *Conn, id uint32, header http.Header) *Stream {
	s := &Stream{conn: c, id: id, header: header, done: make(chan struct{}), unread: buffer.NewQueue(&c.limits)}
	s.arrived.L = &s.mu
	s.moved.Store(time.Now().UnixNano())
	return s
}

// ID is the stream's number on the wire.
func (s *Stream) ID() uint32 { return s.id }

// Header returns the headers that the stream was opened with; it must not be changed.
func (s *Stream) Header() http.Header { return s.header }

// Received is how many bytes of payload have come in, read or not.
func (s *Stream) Received() int64 { return s.received.Load() }

// Sent is how many bytes of payload were written to the connection.
func (s *Stream) Sent() int64 { return s.sent.Load() }

// Done is closed when both directions have ended: by FIN, by a reset from either side, or with the
// connection. There may still be data to read.
func (s *Stream) Done() <-chan struct{} { return s.done }

// AfterReset has f called, in a goroutine of its own, when the stream is reset by either side or ends
// with its connection, at once if that has happened. It is not called for a stream that ends by FIN in
// both directions. It is for those who do not see the reset because they are busy elsewhere, such as
// writing to somebody who does not read. There is one f; a second replaces it.
func (s *Stream) AfterReset(f func()) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.afterReset = f
	s.notifyResetLocked()
}

func (s *Stream) notifyResetLocked() {
	if s.writeErr != nil && s.afterReset != nil {
		rescue.Go(s.conn.cfg.OnPanic, s.afterReset)
		s.afterReset = nil
	}
}

// Err says how a stream that is Done has ended: a *ResetError, the connection's error, or nil for
// FIN in both directions. It is nil also before.
func (s *Stream) Err() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.writeErr
}

// Read reads what has come, waiting for the first byte. The data that came before the end of the
// stream is always read first. Then follows io.EOF after the peer's FIN, a *ResetError after a
// reset, or the reason why the connection is gone. While the connection is frozen, handover.ErrFrozen comes instead of data.
func (s *Stream) Read(p []byte) (int, error) {
	if len(p) == 0 {
		return 0, nil
	}
	s.mu.Lock()
	if err := s.awaitLocked(); err != nil {
		s.mu.Unlock()
		return 0, err
	}
	n := s.unread.Read(p)
	s.settleLocked()
	s.mu.Unlock()
	s.madeRoom()
	return n, nil
}

// WriteTo writes all that comes to w, up to 64 KiB with one write, until the peer's FIN. For the
// rest of what it returns see Read. When w fails, the data of that write is lost, but on a frozen connection: there what w
// has not taken stays to be read, and when w fails because its deadline has passed the error is handover.ErrFrozen.
//
// A non-blocking *os.File or *net.TCPConn, or the file of a writer with a method DirectFile() *os.File, is also
// written by the goroutine of Conn.Serve, while
// WriteTo itself has nothing to write; nobody else may write to it until WriteTo returns.
func (s *Stream) WriteTo(w io.Writer) (written int64, err error) {
	directly := direct.To(w)
	s.mu.Lock()
	s.writesTo = directly
	s.mu.Unlock()
	defer func() {
		s.mu.Lock()
		s.writesTo = nil
		written += s.directed
		s.directed = 0
		s.mu.Unlock()
	}()
	for {
		b, err := s.take(directly)
		if directly != nil && directly.Err() != nil && (err == nil || err == handover.ErrFrozen) {
			if err == nil {
				b.Free()
			}
			err = directly.Err()
		}
		if err == io.EOF {
			return written, nil
		}
		if err != nil {
			return written, err
		}
		n, err := s.writeBuffer(w, b)
		written += int64(n)
		if err != nil && (s.conn.frozen.Load() || errors.Is(err, handover.ErrFrozen)) {
			s.putBack(b)
			return written, frozenError(err)
		}
		b.Free()
		if err != nil {
			return written, err
		}
	}
}

// frozenError is what a call returns that was ended by a freeze: another error only when something else has happened.
func frozenError(err error) error {
	if errors.Is(err, os.ErrDeadlineExceeded) || errors.Is(err, io.ErrShortWrite) || errors.Is(err, handover.ErrFrozen) {
		return handover.ErrFrozen
	}
	return err
}

func (s *Stream) writeBuffer(w io.Writer, b *buffer.Buffer) (written int, err error) {
	for b.Len() > 0 {
		p := b.Payload()
		if len(p) > blockedPiece && s.conn.block.waiter.Waiting() {
			p = p[:blockedPiece]
		}
		n, err := w.Write(p)
		b.Advance(n)
		written += n
		if err == nil && n < len(p) {
			err = io.ErrShortWrite
		}
		if err != nil {
			return written, err
		}
		s.moved.Store(time.Now().UnixNano())
	}
	return written, nil
}

// take waits for data and takes the oldest buffer of it out of the stream. Data that comes while it
// waits is written directly as far as possible.
func (s *Stream) take(directly *direct.Writer) (*buffer.Buffer, error) {
	s.mu.Lock()
	s.direct, s.slow = directly, false
	if s.unread.Empty() && s.caughtUp != nil {
		close(s.caughtUp)
		s.caughtUp = nil
	}
	err := s.awaitLocked()
	s.direct = nil
	if err != nil {
		s.mu.Unlock()
		return nil, err
	}
	b := s.unread.Take()
	s.settleLocked()
	s.mu.Unlock()
	s.madeRoom()
	return b, nil
}

// awaitLocked waits until there is data, and returns the stream's end if there will be none.
func (s *Stream) awaitLocked() error {
	for s.unread.Empty() && s.readErr == nil && !s.readClosed && !s.conn.frozen.Load() {
		s.arrived.Wait()
	}
	switch {
	case s.readClosed:
		return ErrReadClosed
	case s.unread.Empty() && s.readErr != nil:
		return s.readErr
	case s.conn.frozen.Load():
		return handover.ErrFrozen
	}
	return nil
}

func (s *Stream) dropLocked() {
	s.dropped = true
	if !s.unread.Empty() {
		s.unread.Drop()
		s.settleLocked()
	}
}

func (s *Stream) madeRoom() {
	s.moved.Store(time.Now().UnixNano())
	s.conn.block.waiter.Wake()
}

// put stores as much of p as there is room for, and returns how much. A stream that wants no more data discards it.
func (s *Stream) put(p []byte) int {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.readErr != nil || s.readClosed {
		s.received.Add(int64(len(p)))
		return len(p)
	}
	stored := 0
	if s.direct != nil && s.unread.Empty() {
		stored = s.direct.Write(p)
		s.noteDirectLocked(stored)
		if stored == len(p) {
			return stored
		}
	}
	if s.unread.Empty() {
		s.moved.Store(time.Now().UnixNano())
	}
	n := s.unread.Append(p[stored:])
	s.received.Add(int64(n))
	s.arrived.Signal()
	return stored + n
}

// noteDirectLocked counts what the read loop has written itself.
func (s *Stream) noteDirectLocked(n int) {
	if n > 0 {
		s.directed += int64(n)
		s.received.Add(int64(n))
		s.moved.Store(time.Now().UnixNano())
	}
}

// hasRoom says whether put would store something.
func (s *Stream) hasRoom() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.readErr != nil || s.readClosed || s.unread.HasRoom()
}

func (s *Stream) held() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.unread.Held()
}

func (s *Stream) lastMoved() time.Time { return time.Unix(0, s.moved.Load()) }

// Write sends p. It returns when the connection has taken it all, and fails with ErrWriteClosed
// after CloseWrite, a *ResetError after a reset, or the reason why the connection is gone. The connection may be frozen
// meanwhile: then all of p is taken, or nothing and the error is handover.ErrFrozen.
func (s *Stream) Write(p []byte) (int, error) {
	s.conn.out.senders.Add(1)
	defer s.conn.out.senders.Add(-1)
	written := 0
	for written < len(p) {
		b := buffer.New(len(p) - written)
		b.Append(p[written:])
		n, err := s.conn.out.send(s, b, false, written > 0)
		b.Free()
		written += n
		if err != nil {
			return written, err
		}
	}
	return written, nil
}

func (s *Stream) send(b *buffer.Buffer, fin, committed bool) (int, error) {
	s.conn.out.senders.Add(1)
	defer s.conn.out.senders.Add(-1)
	return s.conn.out.send(s, b, fin, committed)
}

// ReadFrom sends what r gives until its end, with one read and one write for up to 1 MiB. It sends
// no FIN. A reader with SyscallConn, such as a pipe, a terminal or a TCP connection, is read
// directly, and while it has nothing no memory is held; such a reader must not have a buffer of its
// own. ReadFrom ends with r or when a write fails: to end it earlier, close r. When the connection is frozen it ends with
// handover.ErrFrozen, but not before a read of r has returned: r's deadline ends it.
func (s *Stream) ReadFrom(r io.Reader) (int64, error) {
	source := buffer.NewSource(r)
	var sent int64
	for {
		if s.conn.frozen.Load() {
			return sent, handover.ErrFrozen
		}
		b, readErr := source.Read()
		if b != nil {
			n, err := s.send(b, false, true)
			b.Free()
			sent += int64(n)
			if err != nil {
				return sent, err
			}
		}
		if readErr == io.EOF {
			return sent, nil
		}
		if readErr != nil && (s.conn.frozen.Load() || errors.Is(readErr, handover.ErrFrozen)) {
			if err := frozenError(readErr); err == handover.ErrFrozen {
				return sent, err
			}
		}
		if readErr != nil {
			return sent, fmt.Errorf("spdy: reading what is to be sent: %w", readErr)
		}
	}
}

// CloseWrite sends FIN: nothing more will be sent. Like Write it waits for the connection to take
// it. Further calls do nothing.
func (s *Stream) CloseWrite() error {
	b := buffer.New(0)
	defer b.Free()
	_, err := s.send(b, true, true)
	if errors.Is(err, ErrWriteClosed) {
		return nil
	}
	return err
}

// CloseRead discards what is buffered and what the peer still sends, without telling it.
func (s *Stream) CloseRead() {
	s.mu.Lock()
	s.readClosed = true
	s.dropLocked()
	s.settleLocked()
	s.arrived.Broadcast()
	s.mu.Unlock()
	s.madeRoom()
}

// Reset ends both directions at once, discards what is buffered, and sends RST_STREAM (CANCEL)
// unless the stream has ended anyway. Called within Config.OnStream it refuses the stream. It does
// not block.
func (s *Stream) Reset() error { return s.reset(ResetCancel, "") }

func (s *Stream) reset(status ResetStatus, reason string) error {
	err := s.resetLocally(&ResetError{Status: status, Reason: reason})
	s.madeRoom()
	s.conn.out.flush()
	return err
}

func (s *Stream) resetLocally(reset *ResetError) (err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.readErr == nil || !s.unread.Empty() {
		s.dropLocked()
		s.readErr = reset
	}
	if !s.over {
		s.writeErr = reset
		s.replied = true
		err = s.conn.out.control.Reset(control.Unlimited, s.id, reset.Status)
	}
	s.notifyResetLocked()
	s.settleLocked()
	s.arrived.Broadcast()
	return err
}

// WaitAccepted waits for the peer's SYN_REPLY to a stream that was opened here. The error is the
// context's, the stream's or the connection's, or handover.ErrFrozen.
func (s *Stream) WaitAccepted(ctx context.Context) error {
	s.mu.Lock()
	accepted := s.accepted
	s.mu.Unlock()
	select {
	case <-accepted:
		return nil
	default:
	}
	select {
	case <-accepted:
		return nil
	case <-s.done:
		return s.Err()
	case <-s.conn.done:
		return s.conn.Err()
	case <-s.conn.freezing:
		return handover.ErrFrozen
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

func (s *Stream) peerAccepted() {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.accepted == nil {
		return // a reply to a stream of the peer's own
	}
	select {
	case <-s.accepted:
	default:
		close(s.accepted)
	}
}

// Accept queues the SYN_REPLY, if it is still due, so that a Reset from now on ends an accepted stream
// instead of refusing it. To the stock client-go the two are not the same: for a data stream that was
// refused it keeps a goroutine for ever. It does not block.
func (s *Stream) Accept() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.replied {
		return nil
	}
	s.replied = true
	return s.conn.out.control.Reply(s.id)
}

// startFrame says whether a data frame may be sent, and notes FIN.
func (s *Stream) startFrame(fin bool) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.writeErr != nil {
		return s.writeErr
	}
	if s.localFin {
		return ErrWriteClosed
	}
	if fin {
		s.localFin = true
		s.settleLocked()
	}
	return nil
}

// InputEnded says that the peer's FIN has come, although there may still be data to read.
func (s *Stream) InputEnded() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.readErr == io.EOF
}

func (s *Stream) peerFin() { s.end(io.EOF, nil) }

func (s *Stream) peerReset(status ResetStatus) {
	err := &ResetError{Status: status, Remote: true}
	s.end(err, err)
}

// connEnded is told that the connection is gone.
func (s *Stream) connEnded(err error, discard bool) {
	if discard {
		s.mu.Lock()
		if !s.unread.Empty() {
			s.dropLocked()
			s.readErr = err
		}
		s.mu.Unlock()
	}
	s.end(err, err)
}

// end notes the end of reading and, if not nil, of writing. What ended first stays: after FIN and
// RST_STREAM a reader still sees all data and io.EOF.
func (s *Stream) end(readErr, writeErr error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.readErr == nil {
		s.readErr = readErr
	}
	if s.writeErr == nil && !s.over {
		s.writeErr = writeErr
	}
	s.notifyResetLocked()
	s.settleLocked()
	s.arrived.Broadcast()
}

func (s *Stream) settle() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.settleLocked()
}

// settleLocked closes done when both directions have ended, and makes the connection forget the
// stream once it holds no data either.
func (s *Stream) settleLocked() {
	if s.readErr == nil || (s.writeErr == nil && !s.localFin) {
		return
	}
	if !s.over {
		s.over = true
		close(s.done)
	}
	if s.unread.Empty() {
		s.conn.forget(s)
	}
}
