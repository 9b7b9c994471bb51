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

// maxEnded bounds the ended streams that a connection remembers for its state, which says how they have ended.
const maxEnded = 16

// Freeze ends all calls that wait on the connection and its streams, including Serve, with handover.ErrFrozen; see State.
// It does not wait for them. Further calls do nothing. Close and the end of Serve's context do not close a frozen
// connection.
//
// On the streams of a frozen connection, Write takes all of its bytes or none, ReadFrom sends what it has read, and
// CloseWrite, CloseRead and Reset work as before. Bytes that are not on the wire by then are in the state. Bytes that Read
// and WriteTo have not passed on can be read after Resume.
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

	if !closing { // closing ends all waits too
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

// held reports whether writes are held back because of Freeze. A connection that is closing still sends its GOAWAY.
func (c *Conn) held() bool { return c.frozen.Load() && !c.closing.Load() }

// stopped reports whether a read or a write has ended because of Freeze.
func (c *Conn) stopped(err error) bool {
	return c.held() && (errors.Is(err, os.ErrDeadlineExceeded) || errors.Is(err, handover.ErrFrozen))
}

// Discard closes a frozen connection whose State is not wanted.
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

// returnRoom releases the room of a connection whose streams nobody reads any more.
func (c *Conn) returnRoom() {
	for _, s := range c.openStreams() {
		func() {
			s.mu.Lock()
			defer s.mu.Unlock()
			s.readClosed = true
			s.dropLocked()
		}()
	}
}

// acceptLocked accepts a frame on a frozen connection: it becomes part of the state, after everything that was queued before.
// A frame that is not committed is refused. Called with the write lock held.
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

// deferLocked adds bytes after everything that waits to be written.
func (w *writer) deferLocked(p []byte) {
	w.unsent = append(append(w.unsent, w.control.Take()...), p...)
	w.control.Held(len(p))
}

// putBack returns a buffer from take, as the oldest.
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

// putAll is like put without a limit, for what was read from the socket when the connection was frozen.
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

// remember registers a stream again that has got data back.
func (c *Conn) remember(s *Stream) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.streams[s.id] = s
}
