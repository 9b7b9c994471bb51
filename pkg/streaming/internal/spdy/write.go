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
	"github.com/streamshim/streamshim/pkg/streaming/internal/spdy/frames"
)

const (
	// sharedFrame is the largest payload of a data frame while several streams send.
	sharedFrame = 64 << 10

	// Control frames wait in a queue while somebody else writes. Past maxBestEffort bytes PING is
	// not answered any more; a peer that provokes maxMustSend bytes of answers without reading them
	// loses the connection. A thousand streams take some 26 KiB.
	maxBestEffort = 16 << 10
	maxMustSend   = 64 << 10
)

// priority says what becomes of a control frame when the queue is full.
type priority int

const (
	bestEffort priority = iota // dropped
	mustSend                   // the connection is closed
	unlimited                  // queued all the same: no more of them than open streams, or bounded by overflow
)

// writer owns the sending half of the connection.
//
// Control frames go into a queue, without waiting for anybody, and the queue is written by whoever
// has or gets the write lock, ahead of data. So the read loop never waits for a peer that does not
// read.
type writer struct {
	c *Conn

	senders atomic.Int32          // calls that write data now, on any stream
	failed  atomic.Pointer[error] // nothing can be written any more
	queued  atomic.Int64          // bytes in queue and unsent
	carried atomic.Int64          // of these, what was there when the connection was resumed: payload too

	mu     sync.Mutex // the write lock: held for one frame
	unsent []byte     // taken off the queue, partly written perhaps; on a frozen connection whatever is to be written
	last   uint32     // the stream of the last data frame

	queueMu    sync.Mutex
	queue      []byte
	zlibOpen   bool   // the first header block of our direction is in the queue or behind it
	pingQueued bool   // a PING of ours is in the queue
	pingNext   uint32 // its next id
	flushing   bool   // the flusher runs
	closed     bool   // no flusher is to be started any more

	// flusher is the one goroutine a connection may have of its own, while the socket is full or is
	// no plain socket. It ends when the queue is empty; Close ends it by closing the connection, and
	// waits.
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

// fail ends all writing, also that in progress.
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

// enqueue appends control frames to the queue. It does not write; see flush.
func (w *writer) enqueue(p priority, build func([]byte) []byte) error {
	w.queueMu.Lock()
	defer w.queueMu.Unlock()
	return w.enqueueLocked(p, build)
}

func (w *writer) enqueueLocked(p priority, build func([]byte) []byte) error {
	if p == bestEffort && w.answers() > maxBestEffort {
		return nil
	}
	if p == mustSend {
		if err := w.overflow(); err != nil {
			return err
		}
	}
	before := len(w.queue)
	w.queue = build(w.queue)
	w.queued.Add(int64(len(w.queue) - before))
	return nil
}

// overflow is the end of a peer that provokes answers and does not read them.
func (w *writer) overflow() error {
	if queued := w.answers(); queued > maxMustSend {
		return frames.ProtocolErrorf("does not read the answers to its frames, %d bytes wait", queued)
	}
	return nil
}

// answers is how many bytes of control frames wait.
func (w *writer) answers() int64 { return w.queued.Load() - w.carried.Load() }

// reply queues the SYN_REPLY for a stream.
func (w *writer) reply(id uint32) error {
	w.queueMu.Lock()
	defer w.queueMu.Unlock()
	return w.enqueueLocked(mustSend, func(b []byte) []byte {
		if w.zlibOpen {
			return frames.AppendSynReply(b, id, 0, frames.EmptyHeaderBlock)
		}
		w.zlibOpen = true
		return frames.AppendSynReply(b, id, 0, frames.AppendHeaderBlock(nil, true, nil))
	})
}

// openStream takes the next stream id and queues the SYN_STREAM, both at once, as ids have to leave
// in order.
func (w *writer) openStream(header http.Header) (*Stream, error) {
	w.queueMu.Lock()
	defer w.queueMu.Unlock()
	c := w.c
	if c.frozen.Load() {
		return nil, handover.ErrFrozen
	}
	c.mu.Lock()
	id := c.openNext
	c.mu.Unlock()
	if id > frames.MaxStreamID {
		return nil, ErrTooManyStreams
	}
	block := frames.AppendHeaderBlock(nil, !w.zlibOpen, header)
	if len(block)+10 > maxControlFrame {
		return nil, fmt.Errorf("spdy: opening a stream: its headers take %d bytes, limit %d", len(block), maxControlFrame-10)
	}
	s := newStream(c, id, header)
	s.replied = true // nothing to reply to
	s.accepted = make(chan struct{})
	if err := c.addStream(s); err != nil {
		return nil, err
	}
	if err := w.enqueueLocked(mustSend, func(b []byte) []byte { return frames.AppendSynStream(b, id, 0, block) }); err != nil {
		c.removeStream(id)
		return nil, err
	}
	w.zlibOpen = true
	c.mu.Lock()
	c.openNext = id + 2
	c.mu.Unlock()
	return s, nil
}

func (w *writer) ping() error {
	if err := w.failure(); err != nil {
		return err
	}
	w.queueMu.Lock()
	defer w.queueMu.Unlock()
	if w.pingQueued {
		return nil
	}
	w.pingQueued = true
	id := w.nextPingLocked(1)
	return w.enqueueLocked(unlimited, func(b []byte) []byte { return frames.AppendPing(b, id) })
}

// nextPingLocked takes the next n ids for PINGs, in steps of two, and returns the first.
func (w *writer) nextPingLocked(n int) uint32 {
	first, step := w.pingNext, 2*uint32(n)
	if first+step > frames.MaxStreamID {
		first = 2 - first%2
	}
	w.pingNext = first + step
	return first
}

// probe sends something that nobody answers, if nothing else waits to be sent.
func (w *writer) probe() {
	if w.queued.Load() == 0 {
		w.enqueue(bestEffort, frames.AppendEmptySettings) //nolint:errcheck // best effort
	}
	w.flush()
}

// flush gets the queue on its way without waiting: here if the socket takes it at once, by the
// holder of the write lock when it is done, or by the flusher.
func (w *writer) flush() {
	for w.queued.Load() > 0 && w.failed.Load() == nil && !w.c.held() {
		if w.c.socket == nil {
			w.startFlusher()
			return
		}
		if !w.mu.TryLock() {
			return // the holder flushes after unlocking
		}
		written := w.writeQueueLocked(false)
		w.mu.Unlock()
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
	w.queueMu.Lock()
	defer w.queueMu.Unlock()
	if w.flushing || w.closed || w.c.held() {
		return
	}
	w.flushing = true
	w.flusher.Go(w.runFlusher)
}

// writeQueue lets go of the lock also when it panics.
func (w *writer) writeQueue() {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.writeQueueLocked(true)
}

func (w *writer) runFlusher() {
	for {
		w.writeQueue()

		w.queueMu.Lock()
		if w.queued.Load() == 0 || w.failed.Load() != nil || w.c.held() {
			w.flushing = false
			w.queueMu.Unlock()
			return
		}
		w.queueMu.Unlock()
	}
}

// writeQueueLocked writes the queue, all of it if it may block and the connection is not frozen, and says whether it
// has. The write lock is held.
func (w *writer) writeQueueLocked(block bool) bool {
	for {
		if w.failed.Load() != nil {
			return true
		}
		if w.c.held() {
			return false
		}
		if len(w.unsent) == 0 {
			w.takeQueueLocked()
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
		w.queued.Add(-int64(n))
		if carried := w.carried.Load(); carried > 0 {
			w.carried.Store(max(0, carried-int64(n)))
		}
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

func (w *writer) takeQueueLocked() {
	w.queueMu.Lock()
	defer w.queueMu.Unlock()
	w.unsent, w.queue = w.queue, nil
	w.pingQueued = false
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
	w.n, w.err = writeFD(fd, w.unsent)
	return true
}

// failLocked notes a failed write. What was known before about the peer's end explains it better.
func (w *writer) failLocked(err error) {
	switch {
	case errors.Is(err, unix.EPIPE): // the peer had closed before: what was sent to it was answered with RST
		err = fmt.Errorf("%w: %w", ErrPeerClosed, err)
	case errors.Is(err, unix.ECONNRESET):
		err = ErrPeerReset
	}
	w.c.markGone(err)
	err = w.c.Err()
	w.failed.CompareAndSwap(nil, &err)
}

// send writes the payload of b as one frame or, when others want to write too, as several. It
// advances b past what was written. With fin the last frame carries FIN. The caller is counted in
// senders. On a frozen connection nothing is sent: with committed, or when a part was sent, b is taken in for the state.
func (w *writer) send(s *Stream, b *buffer, fin, committed bool) (sent int, err error) {
	if err := s.accept(); err != nil {
		return 0, err
	}
	for {
		room := 0
		if b.end > b.start {
			room = w.c.awaitReceipts(s)
		}
		w.mu.Lock()
		n, err := w.sendFrameLocked(s, b, room, fin, committed || sent > 0)
		w.unlock()
		sent += n
		if err != nil || b.start == b.end {
			return sent, err
		}
	}
}

// sendFrameLocked sends one frame, of no more than room bytes.
func (w *writer) sendFrameLocked(s *Stream, b *buffer, room int, fin, committed bool) (int, error) {
	if w.c.closing.Load() {
		return 0, w.c.Err()
	}
	if !w.writeQueueLocked(true) {
		return w.acceptLocked(s, b, fin, committed)
	}
	if err := w.failure(); err != nil {
		return 0, err
	}
	// Under the write lock: after a RST_STREAM nothing more is sent on the stream.
	if err := s.startFrame(fin); err != nil {
		return 0, err
	}
	n := min(b.end-b.start, room)
	// A stream that sends what it reads is no sender while it reads. That it was there shows in the
	// frame before.
	if w.senders.Load() > 1 || w.last != s.id {
		n = min(n, sharedFrame)
	}
	w.last = s.id
	frame := s.frame(b, n, fin)
	if written, err := w.c.conn.Write(frame); err != nil && w.c.stopped(err) {
		// Before the queue, which has grown since: the frame's beginning may be on the wire.
		w.unsent = append(w.unsent, frame[written:]...)
		w.queued.Add(int64(len(frame) - written))
	} else if err != nil {
		w.failLocked(err)
		return 0, w.failure()
	}
	b.start += n
	w.sent(s, n)
	return n, nil
}

// frame puts a header in front of the first n bytes of b's payload, over the end of what was sent before.
func (s *Stream) frame(b *buffer, n int, fin bool) []byte {
	var flags byte
	if fin && n == b.end-b.start {
		flags = frames.FlagFin
	}
	frame := b.data[b.start-frames.HeaderLen : b.start+n]
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

// goAway writes GOAWAY as the last frame, if that can be done within closeTimeout.
func (w *writer) goAway(status frames.GoAwayStatus, lastGood uint32) {
	w.queueMu.Lock()
	w.closed = true
	w.queueMu.Unlock()
	// The deadline ends the write of a stuck holder of the lock; those in line see c.closing.
	if err := w.c.conn.SetWriteDeadline(time.Now().Add(closeTimeout)); err != nil {
		return
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	w.enqueue(unlimited, func(b []byte) []byte { return frames.AppendGoAway(b, lastGood, status) }) //nolint:errcheck // best effort: the connection is about to be closed
	w.writeQueueLocked(true)
}
