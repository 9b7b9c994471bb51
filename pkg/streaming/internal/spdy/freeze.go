package spdy

import (
	"errors"
	"os"
	"time"

	"github.com/streamshim/streamshim/pkg/handover"
)

// maxEnded is how many streams a connection remembers that are over, for its state: who held one of them asks it how it
// has ended.
const maxEnded = 16

// Freeze ends all calls that wait on the connection and its streams, Serve too, with handover.ErrFrozen; see
// State. It waits for nobody, and further calls do nothing. A frozen connection is not closed by Close and not by
// Serve's context.
//
// Of calls on a frozen connection's streams, Write takes all of its bytes or none, ReadFrom sends what it has
// read before, and CloseWrite, CloseRead and Reset do what they do; what is not on the wire then is in the state. What
// Read and WriteTo have not given away is there to be read after Resume.
func (c *Conn) Freeze() {
	c.mu.Lock()
	if c.frozen.Load() {
		c.mu.Unlock()
		return
	}
	c.frozen.Store(true)
	close(c.freezing)
	closing := c.closing.Load()
	streams := make([]*Stream, 0, len(c.streams)+len(c.ended))
	for _, s := range c.streams {
		streams = append(streams, s)
	}
	streams = append(streams, c.ended...)
	c.mu.Unlock()

	if !closing { // else its waits end with it
		c.block.freeze()
		c.read.room.interrupt()
	}
	for _, s := range streams {
		s.mu.Lock()
		s.arrived.Broadcast()
		s.mu.Unlock()
	}
}

// Frozen is closed by Freeze.
func (c *Conn) Frozen() <-chan struct{} { return c.freezing }

// held says that nothing is written any more because of Freeze. A connection that closes says goodbye first.
func (c *Conn) held() bool { return c.frozen.Load() && !c.closing.Load() }

// stopped says whether a read or a write has ended because of Freeze.
func (c *Conn) stopped(err error) bool {
	return c.held() && (errors.Is(err, os.ErrDeadlineExceeded) || errors.Is(err, handover.ErrFrozen))
}

// Discard gives a frozen connection up: without State it is closed.
func (c *Conn) Discard() {
	if c.frozen.Load() {
		c.out.fail(ErrClosed)
		if below, ok := c.conn.(interface{ Discard() }); ok {
			below.Discard()
		} else {
			c.conn.Close() //nolint:errcheck // of no use
		}
		c.out.flusher.Wait()
		c.releaseHeaders()
		c.returnRoom()
	}
}

// returnRoom gives back the room of a connection whose streams nobody reads any more.
func (c *Conn) returnRoom() {
	c.mu.Lock()
	streams := make([]*Stream, 0, len(c.streams))
	for _, s := range c.streams {
		streams = append(streams, s)
	}
	c.mu.Unlock()
	for _, s := range streams {
		s.mu.Lock()
		s.readClosed = true
		s.dropLocked()
		s.mu.Unlock()
	}
}

// freeze ends the waits at the socket: the read loop's for more and for room, and a writer's.
func (k *blocker) freeze() {
	k.mu.Lock()
	defer k.mu.Unlock()
	if below, ok := k.c.conn.(interface{ Freeze() }); ok {
		below.Freeze()
	} else {
		k.c.conn.SetDeadline(aLongTimeAgo) //nolint:errcheck // a connection without deadlines is closed already
	}
	if k.raw != nil {
		k.c.waitConn.SetReadDeadline(aLongTimeAgo) //nolint:errcheck // as above
	}
	select {
	case k.kicks <- struct{}{}:
	default:
	}
}

// interrupt ends a wait for room, and all later ones. It may be called from another goroutine.
func (r *room) interrupt() {
	r.stopped.Store(true)
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.epoll != nil {
		r.epoll.SetReadDeadline(time.Unix(1, 0)) //nolint:errcheck // then it waits no longer than it would
	}
}

// accepted takes a frame in that does not go out any more: it is in the state, behind all that was queued before it. Without
// committed, when nobody relies on it yet, it is refused. The write lock is held.
func (w *writer) acceptLocked(s *Stream, b *buffer, fin, committed bool) (int, error) {
	if err := w.failure(); err != nil {
		return 0, err
	}
	if !committed {
		return 0, handover.ErrFrozen
	}
	if err := s.startFrame(fin); err != nil {
		return 0, err
	}
	n := b.end - b.start
	w.deferLocked(s.frame(b, n, fin))
	b.start += n
	w.sent(s, n)
	return n, nil
}

// deferLocked puts bytes behind all that waits to be written.
func (w *writer) deferLocked(p []byte) {
	w.queueMu.Lock()
	defer w.queueMu.Unlock()
	w.unsent = append(append(w.unsent, w.queue...), p...)
	w.queue, w.pingQueued = nil, false
	w.queued.Add(int64(len(p)))
}

// putBack makes a buffer that take has taken the oldest one again.
func (s *Stream) putBack(b *buffer) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if b.start == b.end || s.readClosed || (s.readErr != nil && s.dropped) {
		b.free()
		return
	}
	b.next = s.head
	s.head = b
	if s.tail == nil {
		s.tail = b
	}
	s.takeRoomAnywayLocked(b.size())
	s.conn.remember(s)
}

// putAll is put without a limit, for what was read from the socket when the connection was frozen.
func (s *Stream) putAll(p []byte) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.received.Add(int64(len(p)))
	if s.readErr != nil || s.readClosed {
		return
	}
	s.storeLocked(p)
}

func (s *Stream) storeLocked(p []byte) {
	for len(p) > 0 {
		if s.tail == nil || len(s.tail.spare()) == 0 {
			class := classFor(len(p), receiveClass)
			s.takeRoomAnywayLocked(bufferSizes[class])
			s.appendLocked(newBuffer(class))
		}
		n := copy(s.tail.spare(), p)
		s.tail.end += n
		p = p[n:]
	}
	s.arrived.Signal()
}

// takeRoomAnywayLocked is takeRoomLocked for what is there already.
func (s *Stream) takeRoomAnywayLocked(n int) {
	own := s.conn.cfg.StreamBuffer
	s.conn.borrowed.Add(int64(max(0, s.buffered+n-own) - max(0, s.buffered-own)))
	s.buffered += n
	s.conn.cfg.Room.Take(n)
}

// remember makes a stream known again that has got back data.
func (c *Conn) remember(s *Stream) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.streams[s.id] = s
}
