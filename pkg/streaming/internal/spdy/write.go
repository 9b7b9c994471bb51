package spdy

import (
	"errors"
	"fmt"
	"net/http"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"github.com/streamshim/streamshim/pkg/handover"
	"github.com/streamshim/streamshim/pkg/rescue"
	"github.com/streamshim/streamshim/pkg/streaming/internal/socket"
	"github.com/streamshim/streamshim/pkg/streaming/internal/spdy/buffer"
	"github.com/streamshim/streamshim/pkg/streaming/internal/spdy/control"
	"github.com/streamshim/streamshim/pkg/streaming/internal/spdy/frames"
)

// sharedFrame bounds the payload of a data frame while several streams send.
const sharedFrame = 64 << 10

// writer owns the sending half of the connection.
//
// The holder of the write lock writes the queue of control frames before data. So the read loop never waits for a peer that
// does not read.
type writer struct {
	c *Conn

	senders atomic.Int32          // calls that write data now, on any stream
	failed  atomic.Pointer[error] // why nothing can be written any more
	control control.Queue

	mu     sync.Mutex // the write lock: held for one frame
	unsent []byte     // taken out of control, maybe partly written; on a frozen connection all that is still to be written
	last   uint32     // the stream of the last data frame

	flushMu  sync.Mutex
	flushing bool // the flusher runs
	closed   bool // no flusher may be started any more
	// flusher is the only goroutine that a connection may have of its own. It runs while the socket is full or is not a
	// plain socket. It ends when the queue is empty. Close ends it by closing the connection, and waits for it.
	flusher rescue.Group

	tryWrite func(fd uintptr) bool // (*writer).writeSocket, made once
	n        int                   // its result, under mu
	err      error
}

func (w *writer) init(c *Conn) {
	w.c = c
	w.tryWrite = w.writeSocket
	w.flusher.Report = c.cfg.OnPanic
}

// fail ends all writes, those in progress too.
func (w *writer) fail(err error) {
	w.failed.CompareAndSwap(nil, &err)
	w.c.conn.SetWriteDeadline(aLongTimeAgo)
}

func (w *writer) failure() error {
	if err := w.failed.Load(); err != nil {
		return *err
	}
	return nil
}

// openStream takes the next stream id and queues the SYN_STREAM.
func (w *writer) openStream(header http.Header) (s *Stream, err error) {
	c := w.c
	err = w.control.Open(header, maxControlFrame, func(id uint32) error {
		if c.frozen.Load() {
			return handover.ErrFrozen
		}
		s = newStream(c, id, header)
		s.replied = true // a reply is due only to the peer's streams
		s.accepted = make(chan struct{})
		return c.addStream(s)
	})
	if err == control.ErrNoStreamID {
		err = ErrTooManyStreams
	}
	if err != nil {
		return nil, err
	}
	return s, nil
}

// probe sends a frame that the peer does not answer, unless other frames are waiting to be sent.
func (w *writer) probe() {
	if w.control.Waiting() == 0 {
		w.control.Add(control.BestEffort, frames.AppendEmptySettings) //nolint:errcheck // best effort
	}
	w.flush()
}

// flush has the queue written without waiting: by itself if the socket takes it at once, by the holder of the write lock
// after unlocking, or by the flusher.
func (w *writer) flush() {
	for w.control.Waiting() > 0 && w.failed.Load() == nil && !w.c.held() {
		if w.c.socket == nil {
			w.startFlusher()
			return
		}
		if !w.mu.TryLock() {
			return // the holder flushes after unlocking
		}
		written := func() bool {
			defer w.mu.Unlock()
			return w.writeQueueLocked(false)
		}()
		if !written {
			w.startFlusher()
			return
		}
	}
}

func (w *writer) unlock() {
	w.mu.Unlock()
	w.flush()
}

func (w *writer) startFlusher() {
	w.flushMu.Lock()
	defer w.flushMu.Unlock()
	if w.flushing || w.closed || w.c.held() {
		return
	}
	w.flushing = true
	w.flusher.Go(w.runFlusher)
}

// writeQueue releases the lock even if it panics.
func (w *writer) writeQueue() {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.writeQueueLocked(true)
}

func (w *writer) runFlusher() {
	for {
		w.writeQueue()

		w.flushMu.Lock()
		if w.control.Waiting() == 0 || w.failed.Load() != nil || w.c.held() {
			w.flushing = false
			w.flushMu.Unlock()
			return
		}
		w.flushMu.Unlock()
	}
}

// writeQueueLocked writes the queue, and reports whether it has written all of it. It writes all if it may block and the
// connection is not frozen. The caller holds the write lock.
func (w *writer) writeQueueLocked(block bool) bool {
	for {
		if w.failed.Load() != nil {
			return true
		}
		if w.c.held() {
			return false
		}
		if len(w.unsent) == 0 {
			w.unsent = w.control.Take()
			if len(w.unsent) == 0 {
				return true
			}
		}
		var n int
		var err error
		if block {
			n, err = w.c.conn.Write(w.unsent)
		} else {
			n, err = w.writeNow()
		}
		w.unsent = w.unsent[n:]
		w.control.Wrote(n)
		if err != nil && w.c.stopped(err) {
			return false
		}
		if err != nil {
			w.failLocked(err)
			return true
		}
		if len(w.unsent) > 0 {
			return false
		}
	}
}

// writeNow writes as much of unsent as the socket takes at once.
func (w *writer) writeNow() (int, error) {
	if err := w.c.socket.Write(w.tryWrite); err != nil {
		return 0, err
	}
	if w.err == unix.EAGAIN {
		return 0, nil
	}
	return w.n, w.err
}

func (w *writer) writeSocket(fd uintptr) bool {
	w.n, w.err = socket.Write(fd, w.unsent)
	return true
}

// failLocked records a failed write. If the peer's end is known already, its error explains the failure better.
func (w *writer) failLocked(err error) {
	switch {
	case errors.Is(err, unix.EPIPE): // the peer had closed before, and answered what was sent to it with RST
		err = fmt.Errorf("%w: %w", ErrPeerClosed, err)
	case errors.Is(err, unix.ECONNRESET):
		err = ErrPeerReset
	}
	w.c.markGone(err)
	err = w.c.Err()
	w.failed.CompareAndSwap(nil, &err)
}

// send writes the payload of b as one frame, or as several if other streams want to write too. It advances b past what was
// written. With fin the last frame carries FIN. The caller is counted in senders. On a frozen connection it sends nothing.
// If committed, or if a part was sent, it takes b over into the state.
func (w *writer) send(s *Stream, b *buffer.Buffer, fin, committed bool) (sent int, err error) {
	if err := s.Accept(); err != nil {
		return 0, err
	}
	for {
		room := 0
		if b.Len() > 0 {
			room = w.c.awaitReceipts(s)
		}
		n, err := w.sendFrame(s, b, room, fin, committed || sent > 0)
		sent += n
		if err != nil || b.Len() == 0 {
			return sent, err
		}
	}
}

func (w *writer) sendFrame(s *Stream, b *buffer.Buffer, room int, fin, committed bool) (int, error) {
	w.mu.Lock()
	defer w.unlock() // also after a panic: the end of the session writes, too
	return w.sendFrameLocked(s, b, room, fin, committed)
}

// sendFrameLocked sends one frame of at most room bytes.
func (w *writer) sendFrameLocked(s *Stream, b *buffer.Buffer, room int, fin, committed bool) (int, error) {
	if w.c.closing.Load() {
		return 0, w.c.Err()
	}
	if !w.writeQueueLocked(true) {
		return w.acceptLocked(s, b, fin, committed)
	}
	if err := w.failure(); err != nil {
		return 0, err
	}
	// Checked under the write lock, so that nothing is sent on a stream after its RST_STREAM.
	if err := s.startFrame(fin); err != nil {
		return 0, err
	}
	n := min(b.Len(), room)
	// A stream that sends what it reads is not counted in senders while it reads. Then w.last shows that there is another stream.
	if w.senders.Load() > 1 || w.last != s.id {
		n = min(n, sharedFrame)
	}
	w.last = s.id
	frame := s.frame(b, n, fin)
	if written, err := w.c.conn.Write(frame); err != nil && w.c.stopped(err) {
		// Ahead of the queue, which has grown since: the beginning of the frame may have been sent.
		w.unsent = append(w.unsent, frame[written:]...)
		w.control.Held(len(frame) - written)
	} else if err != nil {
		w.failLocked(err)
		return 0, w.failure()
	}
	b.Advance(n)
	w.sent(s, n)
	return n, nil
}

// frame puts a header before the first n bytes of b's payload. It overwrites the end of what was sent before.
func (s *Stream) frame(b *buffer.Buffer, n int, fin bool) []byte {
	var flags byte
	if fin && n == b.Len() {
		flags = frames.FlagFin
	}
	frame := b.Frame(n)
	frames.PutDataHeader(frame, s.id, flags, n)
	return frame
}

// sent counts payload that the connection has taken.
func (w *writer) sent(s *Stream, n int) {
	if n > 0 {
		s.sent.Add(int64(n))
		w.c.lastActivity.Store(time.Now().UnixNano())
		w.c.noteSent(n)
	}
}

// goAway writes GOAWAY as the last frame, if that is possible within closeTimeout.
func (w *writer) goAway(status frames.GoAwayStatus, lastGood uint32) {
	w.flushMu.Lock()
	w.closed = true
	w.flushMu.Unlock()
	// The deadline unblocks a holder of the lock. Those that wait for the lock see c.closing.
	if err := w.c.conn.SetWriteDeadline(time.Now().Add(closeTimeout)); err != nil {
		return
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	w.control.Add(control.Unlimited, func(b []byte) []byte { return frames.AppendGoAway(b, lastGood, status) }) //nolint:errcheck // best effort: the connection is about to be closed
	w.writeQueueLocked(true)
}
