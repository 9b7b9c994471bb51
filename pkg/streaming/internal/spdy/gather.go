package spdy

import "time"

// A client that uploads sends data frame after data frame. If their payload goes to a pipe or a TCP connection, and the
// stream's reader waits, the read loop reads much at once and writes the payload of all frames in it with one system call.
//
// At any time one goroutine owns the destination, under Stream.mu:
//
//	                 Stream.direct is set and nothing is buffered
//	              ┌──────────────────────────────────────────────────► pipe or TCP (direct/)
//	read loop ────┤ WriteTo waits: the loop writes, for up to directWait if it is full
//	              │
//	              │ else: the loop appends            WriteTo takes, and clears Stream.direct
//	              └──────────────────► buffers ──────────────────────► pipe or TCP, or any other writer
//	                 none left (block.go): the loop waits, and the connection is not read
//
// WriteTo passes the destination to the loop by setting Stream.direct before it waits for data, and takes it back by
// clearing it before it takes a buffer. The loop writes nothing directly while a buffer is left, so that bytes stay in order.

const (
	// gatherMin is the smallest payload that is worth the larger reads.
	gatherMin = 16 << 10
	// maxPieces bounds how many frames are written at once.
	maxPieces = 64
	// directWait bounds how long the read loop waits for a full destination until everything that it has read is
	// written. A destination that is read makes room much sooner. After it the payload goes to the stream's buffers, as for
	// any slow reader, and the read loop handles what else the client sends, such as pings. See also mayWait.
	directWait = 20 * time.Millisecond
)

// gathers reports whether the read loop may gather the stream's payload now.
func (s *Stream) gathers() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.direct != nil && s.unread.Empty()
}

// flushGathered writes what was gathered, or stores it in the stream's buffers. It must be called before anything that arrived
// later is handled, and before the buffer is used again.
func (r *reader) flushGathered() error {
	s, pieces := r.gathered, r.pieces
	if len(pieces) == 0 {
		return nil
	}
	var deadline time.Time // for all waits together
	for len(pieces) > 0 {
		n, full := s.writePieces(pieces)
		for n > 0 {
			taken := min(n, len(pieces[0]))
			pieces[0] = pieces[0][taken:]
			n -= taken
			if len(pieces[0]) == 0 {
				pieces = pieces[1:]
			}
		}
		if len(pieces) == 0 {
			break
		}
		if deadline.IsZero() {
			deadline = time.Now().Add(directWait)
		}
		if !full || !r.awaitDirect(s, time.Until(deadline)) {
			break
		}
	}
	r.pieces = r.pieces[:0]
	for _, p := range pieces {
		if err := r.store(s, p); err != nil {
			return err
		}
	}
	return nil
}

// writePieces writes as much as possible directly, which may be nothing. full reports whether there may be room for the rest
// later.
func (s *Stream) writePieces(pieces [][]byte) (n int, full bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.direct == nil || !s.unread.Empty() || s.readErr != nil || s.readClosed {
		return 0, false
	}
	n = s.direct.WritePieces(pieces)
	s.noteDirectLocked(n)
	return n, !s.direct.Failed()
}

// awaitDirect waits for room in the destination of the stream's WriteTo, and reports whether there is room.
func (r *reader) awaitDirect(s *Stream, limit time.Duration) bool {
	if s.conn.frozen.Load() || !s.conn.mayWait() {
		return false
	}
	s.mu.Lock()
	to := s.direct
	s.mu.Unlock()
	return to != nil && r.room.Await(to, limit)
}

// awaitCaughtUp waits until WriteTo has written what is buffered, so that the next data can be written directly. Otherwise all
// data of a client that sends faster than the process reads would go through the buffers.
func (s *Stream) awaitCaughtUp() {
	s.mu.Lock()
	if s.writesTo == nil || s.slow || s.unread.Empty() || s.readErr != nil || s.readClosed || !s.conn.mayWait() {
		s.mu.Unlock()
		return
	}
	caughtUp := make(chan struct{})
	s.caughtUp = caughtUp
	s.mu.Unlock()
	timeout := time.NewTimer(directWait)
	defer timeout.Stop()
	select {
	case <-caughtUp:
	case <-s.conn.freezing:
	case <-timeout.C:
		s.mu.Lock()
		s.caughtUp, s.slow = nil, true
		s.mu.Unlock()
	}
}

// mayWait reports whether the read loop may wait for one stream. It may if nothing else suffers: all streams serve one
// process, or one forwarded connection, which has two streams.
func (c *Conn) mayWait() bool {
	if c.cfg.Stall == 0 {
		return true
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	return len(c.streams) <= 2
}
