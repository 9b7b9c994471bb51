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

// blockedPiece is how much WriteTo writes at once while the read loop waits for room. It tells a slow reader from one that
// does not read.
const blockedPiece = 4 << 10

// Stream is one bidirectional stream. One goroutine may read while another writes. All other methods may be called at any
// time from any goroutine.
type Stream struct {
	conn   *Conn
	id     uint32
	header http.Header
	done   chan struct{}

	received, sent atomic.Int64
	moved          atomic.Int64 // Unix nanoseconds: when data was last taken or began to wait

	mu         sync.Mutex
	arrived    sync.Cond // something to read, or the end
	unread     buffer.Queue
	readErr    error         // what follows the data: io.EOF after FIN, a *ResetError, or why the connection has ended
	readClosed bool          // CloseRead was called
	dropped    bool          // a reset or our Close has discarded the data
	writeErr   error         // a *ResetError, or why the connection has ended
	localFin   bool          // we have sent FIN
	replied    bool          // SYN_REPLY is queued, or must not be sent
	over       bool          // done is closed
	accepted   chan struct{} // closed when the peer's SYN_REPLY arrives; nil if the peer opened the stream
	afterReset func()        // see AfterReset; nil once called

	direct   *direct.Writer // what WriteTo writes to, while it waits for data
	writesTo *direct.Writer // what WriteTo writes to, also while it is busy
	caughtUp chan struct{}  // closed when WriteTo waits for data again; nil unless the read loop waits for that
	slow     bool           // the wait for caughtUp has timed out, and WriteTo has taken nothing since
	directed int64          // bytes that the read loop has written to writesTo
}

func newStream(c *Conn, id uint32, header http.Header) *Stream {
	s := &Stream{conn: c, id: id, header: header, done: make(chan struct{}), unread: buffer.NewQueue(&c.limits)}
	s.arrived.L = &s.mu
	s.moved.Store(time.Now().UnixNano())
	return s
}

// ID returns the stream's id on the wire.
func (s *Stream) ID() uint32 { return s.id }

// Header returns the headers that the stream was opened with. The caller must not change them.
func (s *Stream) Header() http.Header { return s.header }

// Received returns how many bytes of payload were received, read or not.
func (s *Stream) Received() int64 { return s.received.Load() }

// Sent returns how many bytes of payload were written to the connection.
func (s *Stream) Sent() int64 { return s.sent.Load() }

// Done is closed when both directions have ended: by FIN, by a reset from either side, or with the connection. There may
// still be data to read.
func (s *Stream) Done() <-chan struct{} { return s.done }

// AfterReset calls f, in a goroutine of its own, when either side resets the stream or when the connection ends. If that
// has happened already, it calls f at once. It does not call f for a stream that ends by FIN in both directions. It is for
// callers that cannot see the reset because they are busy, such as writing to somebody who does not read. A second f
// replaces the first.
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

// Err returns how a stream that is Done has ended: a *ResetError, the connection's error, or nil for FIN in both
// directions. Before Done it is nil.
func (s *Stream) Err() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.writeErr
}

// Read reads what was received, and waits for the first byte. It returns all data that was received before the end of the
// stream. Then it returns io.EOF after the peer's FIN, a *ResetError after a reset, or the reason why the connection is
// gone. While the connection is frozen, it returns handover.ErrFrozen instead of data.
func (s *Stream) Read(p []byte) (int, error) {
	if len(p) == 0 {
		return 0, nil
	}
	n, err := s.read(p)
	if err == nil {
		s.madeRoom()
	}
	return n, err
}

func (s *Stream) read(p []byte) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock() // as everywhere here also after a panic, behind which the session still ends
	if err := s.awaitLocked(); err != nil {
		return 0, err
	}
	n := s.unread.Read(p)
	s.settleLocked()
	return n, nil
}

// WriteTo writes all that is received to w, up to 64 KiB with one write, until the peer's FIN. It returns the errors that
// Read returns, without io.EOF. When w fails, the data of that write is lost. But on a frozen connection what w has not
// taken can still be read; and if w fails because its deadline has passed, the error is handover.ErrFrozen.
//
// The goroutine of Conn.Serve also writes to w while WriteTo has nothing to write, if w is a non-blocking *os.File or
// *net.TCPConn, or has a method DirectFile() *os.File, whose file is then written to. Nobody else may write there until
// WriteTo returns.
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

// frozenError returns the error of a call that a freeze has ended. It is handover.ErrFrozen unless something else has
// happened.
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

// take waits for data and takes the oldest buffer out of the stream. While it waits, the read loop writes as much as
// possible directly.
func (s *Stream) take(directly *direct.Writer) (*buffer.Buffer, error) {
	b, err := s.takeOne(directly)
	if err == nil {
		s.madeRoom()
	}
	return b, err
}

func (s *Stream) takeOne(directly *direct.Writer) (*buffer.Buffer, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.direct, s.slow = directly, false
	if s.unread.Empty() && s.caughtUp != nil {
		close(s.caughtUp)
		s.caughtUp = nil
	}
	err := s.awaitLocked()
	s.direct = nil
	if err != nil {
		return nil, err
	}
	b := s.unread.Take()
	s.settleLocked()
	return b, nil
}

// awaitLocked waits until there is data. If there will be none, it returns why.
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

// put stores as much of p as there is room for, and returns how much that is. A stream that takes no more data discards it.
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

// noteDirectLocked counts what the read loop itself has written.
func (s *Stream) noteDirectLocked(n int) {
	if n > 0 {
		s.directed += int64(n)
		s.received.Add(int64(n))
		s.moved.Store(time.Now().UnixNano())
	}
}

// hasRoom reports whether put would store anything.
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

// Write sends p. It returns when the connection has taken it all. It fails with ErrWriteClosed after CloseWrite, with a
// *ResetError after a reset, or with the reason why the connection is gone. If the connection is frozen meanwhile, either
// all of p is taken, or nothing and the error is handover.ErrFrozen.
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

// ReadFrom sends what it reads from r until the end of r, with one read and one write for up to 1 MiB. It sends no FIN. If
// r has SyscallConn, as a pipe, a terminal or a TCP connection has, it is read directly, and no memory is held while there
// is nothing to read. Such a reader must not have a buffer of its own. ReadFrom ends with r or when a write fails. To end
// it earlier, close r. On a frozen connection it returns handover.ErrFrozen, but not before a read of r has returned: set
// r's deadline to end that read.
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

// CloseWrite sends FIN. Like Write it waits until the connection has taken it. Further calls do nothing.
func (s *Stream) CloseWrite() error {
	b := buffer.New(0)
	defer b.Free()
	_, err := s.send(b, true, true)
	if errors.Is(err, ErrWriteClosed) {
		return nil
	}
	return err
}

// CloseRead discards what is buffered and what the peer still sends. The peer is not told.
func (s *Stream) CloseRead() {
	func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		s.readClosed = true
		s.dropLocked()
		s.settleLocked()
		s.arrived.Broadcast()
	}()
	s.madeRoom()
}

// Reset ends both directions at once, discards what is buffered, and sends RST_STREAM (CANCEL) unless the stream has ended
// already. Within Config.OnStream it refuses the stream. It does not block.
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

// WaitAccepted waits for the peer's SYN_REPLY to a stream that was opened here. It returns the error of the context, the
// stream or the connection, or handover.ErrFrozen.
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
		return // a reply to a stream that the peer has opened
	}
	select {
	case <-s.accepted:
	default:
		close(s.accepted)
	}
}

// Accept queues the SYN_REPLY if it is still due, so that a later Reset ends an accepted stream instead of refusing it. The
// stock client-go tells the two apart: for a data stream that was refused it keeps a goroutine for ever. Accept does not
// block.
func (s *Stream) Accept() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.replied {
		return nil
	}
	s.replied = true
	return s.conn.out.control.Reply(s.id)
}

// startFrame returns an error if no data frame may be sent. It records FIN.
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

// InputEnded reports whether the peer's FIN was received. There may still be data to read.
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

// connEnded ends the stream because the connection is gone. If discard is set, it discards unread data.
func (s *Stream) connEnded(err error, discard bool) {
	if discard {
		s.discard(err)
	}
	s.end(err, err)
}

// discard drops unread data. Read returns err instead.
func (s *Stream) discard(err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if !s.unread.Empty() {
		s.dropLocked()
		s.readErr = err
	}
}

// end records the end of reading and, unless writeErr is nil, of writing. The first end counts: after FIN and RST_STREAM a
// reader still gets all data and io.EOF.
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

// settleLocked closes done when both directions have ended. It unregisters the stream when it holds no data either.
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
