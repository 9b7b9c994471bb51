package spdy

import (
	"errors"
	"maps"
	"os"
	"slices"
	"time"

	"github.com/streamshim/streamshim/pkg/handover"
	"github.com/streamshim/streamshim/pkg/streaming/internal/spdy/buffer"
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
	streams := append(slices.Collect(maps.Values(c.streams)), c.ended...)
	c.mu.Unlock()

	if !closing { // else its waits end with it
		if below, ok := c.conn.(interface{ Freeze() }); ok {
			below.Freeze()
		} else {
			c.conn.SetDeadline(aLongTimeAgo) //nolint:errcheck // a connection without deadlines is closed already
		}
		c.block.waiter.Interrupt()
		c.read.room.Interrupt()
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
		c.headers.Refuse()
		c.returnRoom()
	}
}

// returnRoom gives back the room of a connection whose streams nobody reads any more.
func (c *Conn) returnRoom() {
	for _, s := range c.openStreams() {
		s.mu.Lock()
		s.readClosed = true
		s.dropLocked()
		s.mu.Unlock()
	}
}

// acceptedLocked takes a frame in that does not go out any more: it is in the state, behind all that was queued before it. Without
// committed, when nobody relies on it yet, it is refused. The write lock is held.
func (w *writer) acceptLocked(s *Stream, b *buffer.Buffer, fin, committed bool) (int, error) {
	if err := w.failure(); err != nil {
		return 0, err
	}
	if !committed {
		return 0, handover.ErrFrozen
	}
	if err := s.startFrame(fin); err != nil {
		return 0, err
	}
	n := b.Len()
	w.deferLocked(s.frame(b, n, fin))
	b.Advance(n)
	w.sent(s, n)
	return n, nil
}

// deferLocked puts bytes behind all that waits to be written.
func (w *writer) deferLocked(p []byte) {
	w.unsent = append(append(w.unsent, w.control.Take()...), p...)
	w.control.Held(len(p))
}

// putBack puts a buffer back that take has returned, as the oldest.
func (s *Stream) putBack(b *buffer.Buffer) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if b.Len() == 0 || s.readClosed || (s.readErr != nil && s.dropped) {
		b.Free()
		return
	}
	s.unread.PutBack(b)
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
	if s.unread.Empty() {
		s.moved.Store(time.Now().UnixNano())
	}
	s.unread.AppendAll(p)
	s.arrived.Signal()
}

// remember makes a stream known again that has got back data.
func (c *Conn) remember(s *Stream) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.streams[s.id] = s
}
