package spdy

// Where payload goes into a TCP connection whose stream's reader waits, the read loop reads much at once and
// writes the payload of all the frames in it with one system call.

// maxPieces bounds how many frames are written at once.
const maxPieces = 64

// gathers says whether the read loop may gather the stream's payload at this time.
func (s *Stream) gathers() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.direct != nil && s.head == nil && !s.direct.pipe
}

// flushGathered hands on what was gathered. It has to be done before anything else that came later is handled,
// and before the buffer is used again.
func (r *reader) flushGathered() error {
	s, pieces := r.gathered, r.pieces
	if len(pieces) == 0 {
		return nil
	}
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
		if len(pieces) > 0 && !(full && s.awaitDirect()) {
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

// writePieces writes as much as possible directly, which may be nothing, and says whether there may be room
// for the rest later.
func (s *Stream) writePieces(pieces [][]byte) (n int, full bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.direct == nil || s.head != nil || s.readErr != nil || s.readClosed {
		return 0, false
	}
	n = s.direct.writePieces(pieces)
	s.noteDirectLocked(n)
	return n, !s.direct.failed
}
