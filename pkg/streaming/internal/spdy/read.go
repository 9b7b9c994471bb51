package spdy

import (
	"errors"
	"fmt"
	"io"
	"net/http"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"github.com/streamshim/streamshim/pkg/handover"
	"github.com/streamshim/streamshim/pkg/streaming/internal/spdy/frames"
)

// plainReadSize is the read buffer of a connection that is no plain socket, such as TLS, where a
// buffer has to be held while nothing comes. TLS keeps a record of 16 KiB itself, so a small buffer
// costs no system calls.
const plainReadSize = 4 << 10

// reader is the read loop's state. Except for lastPeerStream it is owned by the goroutine of Serve.
type reader struct {
	c *Conn

	lastPeerStream atomic.Uint32 // the highest stream id that the peer has used

	partial []byte  // bytes of an incomplete frame, while no buffer is held
	buf     *buffer // pooled; nil while there is nothing to read
	end     int     // bytes in buf.data
	plain   []byte  // instead of buf where the connection is no plain socket
	now     int64   // Unix nanoseconds of the last read

	// The data frame whose payload comes next.
	stream    *Stream // nil: the payload is dropped
	remaining int
	fin       bool

	gather   bool // payload goes to gathered, see gather.go
	gathered *Stream
	pieces   [][]byte // in buf, of gathered
	room     room

	tryRead func(fd uintptr) bool // (*reader).readSocket, made once
	n       int                   // its result
	err     error
}

func (r *reader) init(c *Conn, buffered []byte) {
	r.c = c
	r.partial = append(r.partial, buffered...)
	r.tryRead = r.readSocket
}

// readFrames is the read loop.
func (c *Conn) readFrames() error {
	r := &c.read
	defer r.drop()
	defer r.room.close()
	r.now = time.Now().UnixNano()
	rest, err := r.parse(r.partial)
	if err == nil {
		err = r.flushGathered()
	}
	r.partial = append([]byte(nil), rest...)
	for err == nil && !c.frozen.Load() {
		c.out.flush()
		err = r.fill()
	}
	if c.frozen.Load() && (err == nil || c.stopped(err)) {
		r.park()
		return handover.ErrFrozen
	}
	return err
}

// park keeps what was read and not understood yet, for the state.
func (r *reader) park() {
	if r.buf != nil {
		r.partial = append([]byte(nil), r.buf.data[:r.end]...)
	}
	r.drop()
}

// fill reads once and handles the frames that have become complete.
func (r *reader) fill() error {
	p, err := r.read()
	if err == nil && len(p) == 0 {
		err = io.EOF
	}
	if err != nil {
		if err == io.EOF {
			return ErrPeerClosed
		}
		if errors.Is(err, unix.ECONNRESET) {
			return ErrPeerReset
		}
		if r.c.stopped(err) {
			return err
		}
		return fmt.Errorf("spdy: reading from the peer: %w", err)
	}
	r.now = time.Now().UnixNano()
	r.c.lastReceived.Store(r.now)
	rest, err := r.parse(p)
	if err == nil {
		err = r.flushGathered()
	}
	if err != nil {
		return err
	}
	if r.c.frozen.Load() {
		r.partial = append([]byte(nil), rest...)
		r.drop()
		return nil
	}
	r.keep(rest)
	return nil
}

// read returns what is there, behind what keep has kept. The bytes are valid until keep.
func (r *reader) read() ([]byte, error) {
	if r.c.socket == nil {
		return r.readPlain()
	}
	if err := r.c.socket.Read(r.tryRead); err != nil {
		return nil, err
	}
	if r.err != nil || r.n == 0 {
		return nil, r.err
	}
	r.end += r.n
	return r.buf.data[:r.end], nil
}

// readSocket is one attempt to read. A buffer is taken for the attempt and given back when there is
// nothing: a connection that waits holds none.
func (r *reader) readSocket(fd uintptr) bool {
	if r.buf == nil {
		r.buf = newBuffer(r.class())
		r.end = copy(r.buf.data, r.partial)
		r.partial = nil
	}
	r.n, r.err = readFD(fd, r.buf.data[r.end:])
	if r.err == unix.EAGAIN {
		if r.end > 0 {
			r.partial = append([]byte(nil), r.buf.data[:r.end]...)
		}
		r.drop()
		return false
	}
	return true
}

// class is that of the buffer to read into. Not more than a little of control frames is to be read at once:
// their answers take room in a queue.
func (r *reader) class() int {
	if r.gather {
		return largestClass
	}
	return receiveClass
}

func (r *reader) readPlain() ([]byte, error) {
	if r.plain == nil {
		r.plain = make([]byte, plainReadSize)
	}
	n, err := r.c.conn.Read(r.plain)
	if n == 0 {
		return nil, err // an error that comes with bytes comes again
	}
	if len(r.partial) == 0 {
		return r.plain[:n], nil
	}
	r.partial = append(r.partial, r.plain[:n]...)
	return r.partial, nil
}

// keep stores the incomplete frame at the end of what was read until more comes.
func (r *reader) keep(rest []byte) {
	if r.buf != nil {
		if old := r.buf; old.class != r.class() {
			r.buf = newBuffer(r.class())
			defer old.free()
		}
		r.end = copy(r.buf.data, rest)
		return
	}
	if len(rest) == 0 {
		r.partial = nil
		return
	}
	r.partial = append(r.partial[:0], rest...)
}

func (r *reader) drop() {
	if r.buf != nil {
		r.buf.free()
		r.buf, r.end = nil, 0
	}
}

// parse handles the frames in p and returns the incomplete one at its end. Payload of data frames
// is handed on as it comes; control frames are handled when they are complete. On a frozen connection it returns all
// that it has not begun with.
func (r *reader) parse(p []byte) ([]byte, error) {
	for len(p) > 0 {
		if r.c.frozen.Load() {
			return p, nil
		}
		if r.remaining > 0 {
			n := min(len(p), r.remaining)
			if err := r.deliver(p[:n]); err != nil {
				return nil, err
			}
			p = p[n:]
			r.remaining -= n
			if r.remaining == 0 {
				r.endData()
			}
			continue
		}
		if len(p) < frames.HeaderLen {
			return p, nil
		}
		h := frames.ParseHeader(p)
		if !h.Control {
			if err := r.startData(h); err != nil {
				return nil, err
			}
			p = p[frames.HeaderLen:]
			continue
		}
		r.gather = false
		if err := r.flushGathered(); err != nil {
			return nil, err
		}
		if h.Version != frames.ProtocolVersion {
			return nil, frames.ProtocolErrorf("control frame of SPDY version %d", h.Version)
		}
		if h.Length > r.c.cfg.MaxControlFrame {
			return nil, frames.ProtocolErrorf("control frame of %d bytes, limit %d", h.Length, r.c.cfg.MaxControlFrame)
		}
		if len(p) < frames.HeaderLen+h.Length {
			return p, nil
		}
		if err := r.handleControl(h, p[frames.HeaderLen:frames.HeaderLen+h.Length]); err != nil {
			return nil, err
		}
		p = p[frames.HeaderLen+h.Length:]
		// One buffer may hold more frames than their answers may take in the queue.
		if r.c.out.answers() > maxBestEffort {
			r.c.out.flush()
		}
	}
	return nil, nil
}

func (r *reader) startData(h frames.Header) error {
	if h.StreamID == 0 {
		return frames.ProtocolErrorf("data for stream 0")
	}
	s := r.c.findStream(h.StreamID)
	switch {
	case s == nil && !r.wasOpened(h.StreamID):
		// The draft wants a stream error and lets the connection live (2.2.2).
		r.c.out.enqueue(bestEffort, func(b []byte) []byte { //nolint:errcheck // a connection that cannot be written to is noticed by its reader
			return frames.AppendRstStream(b, h.StreamID, ResetInvalidStream)
		})
	case s != nil && h.Length > 0 && s.InputEnded():
		s.reset(ResetStreamAlreadyClosed, "data after FIN") //nolint:errcheck // as above
		s = nil
	}
	r.stream, r.remaining, r.fin = s, h.Length, h.Flags&frames.FlagFin != 0
	large := r.c.socket != nil && s != nil && h.Length >= gatherMin
	// What has been gathered comes before this frame, unless it is gathered too.
	if s != r.gathered || !large || r.fin || len(r.pieces) == maxPieces {
		if err := r.flushGathered(); err != nil {
			return err
		}
	}
	if large && len(r.pieces) == 0 {
		s.awaitCaughtUp()
	}
	r.gather = large && !r.fin && (len(r.pieces) > 0 || s.gathers())
	r.gathered = s
	if r.remaining == 0 {
		r.endData()
	}
	return nil
}

// wasOpened says whether there has been a stream of this id. Frames for one that is over are late,
// or crossed our RST_STREAM on the way, and are ignored.
func (r *reader) wasOpened(id uint32) bool {
	if r.c.peerOpens(id) {
		return id <= r.lastPeerStream.Load()
	}
	r.c.mu.Lock()
	defer r.c.mu.Unlock()
	return id < r.c.openNext
}

// deliver hands payload to the stream of the frame, and waits if the stream has no room.
func (r *reader) deliver(p []byte) error {
	if r.stream == nil {
		return nil
	}
	r.c.lastActivity.Store(r.now)
	if r.gather {
		r.pieces = append(r.pieces, p)
		return nil
	}
	return r.store(r.stream, p)
}

// store is deliver for payload that is not gathered, or could not be written.
func (r *reader) store(s *Stream, p []byte) error {
	for {
		p = p[s.put(p):]
		if len(p) == 0 {
			return nil
		}
		if err := r.c.block.wait(s); err == handover.ErrFrozen {
			s.putAll(p)
			return nil
		} else if err != nil {
			return err
		}
		r.now = time.Now().UnixNano()
	}
}

func (r *reader) endData() {
	if r.stream != nil && r.fin {
		r.stream.peerFin()
	}
	r.stream = nil
}

func (r *reader) handleControl(h frames.Header, payload []byte) error {
	c := r.c
	switch h.Kind {
	case frames.TypeSynStream:
		return r.handleSynStream(h.Flags, payload)
	case frames.TypeSynReply, frames.TypeHeaders:
		return r.handleReplyOrHeaders(h.Kind, h.Flags, payload)
	case frames.TypeRstStream:
		id, status, err := frames.ParseRstStream(payload)
		if err != nil {
			return err
		}
		if s := c.findStream(id); s != nil {
			s.peerReset(status)
		}
	case frames.TypeSettings:
		return frames.CheckSettings(payload)
	case frames.TypePing:
		id, err := frames.ParsePing(payload)
		if err != nil {
			return err
		}
		// Pings of the peer have the parity of its streams; the others answer ours (2.6.5).
		if c.peerOpens(id) {
			c.out.enqueue(bestEffort, func(b []byte) []byte { return frames.AppendPing(b, id) }) //nolint:errcheck // as above
		} else {
			c.pingAnswered(id)
		}
	case frames.TypeGoAway:
		if _, _, err := frames.ParseGoAway(payload); err != nil {
			return err
		}
		c.markGone(ErrGoAway)
	case frames.TypeWindowUpdate:
		return frames.CheckWindowUpdate(payload)
	}
	// Control frames of other types are to be ignored (2.2.1).
	return nil
}

func (r *reader) handleSynStream(flags byte, payload []byte) error {
	c := r.c
	id, block, err := frames.ParseSynStream(payload)
	if err != nil {
		return err
	}
	if id == 0 || !c.peerOpens(id) {
		return frames.ProtocolErrorf("SYN_STREAM with stream id %d, which is not the peer's to open", id)
	}
	header, refused, fault := r.readHeaders(block)
	if fault != nil && !frames.IsHeaderFault(fault) {
		return &ConnectionError{Status: frames.GoAwayProtocolError, Reason: fault.Error()}
	}
	if id <= r.lastPeerStream.Load() {
		if s := c.findStream(id); s != nil {
			s.reset(ResetProtocolError, "opened twice") //nolint:errcheck // as above
			return nil
		}
		return frames.ProtocolErrorf("SYN_STREAM with stream id %d after %d", id, r.lastPeerStream.Load())
	}
	r.lastPeerStream.Store(id)
	if fault != nil {
		return r.refuse(id, ResetProtocolError)
	}
	if refused {
		return r.refuse(id, ResetRefusedStream)
	}

	s := newStream(c, id, header)
	s.localFin = flags&frames.FlagUnidirectional != 0
	s.replied = s.localFin
	if flags&frames.FlagFin != 0 {
		s.readErr = io.EOF
	}
	switch err := c.addStream(s); {
	case err == ErrTooManyStreams:
		return r.refuse(id, ResetRefusedStream)
	case err != nil:
		return err
	}
	c.cfg.OnStream(s)
	s.settle() // it may have come complete: one way, and without data
	if err := c.out.overflow(); err != nil {
		return err // a stream that OnStream resets is forgotten at once: MaxStreams does not bound these answers
	}
	return s.accept()
}

// readHeaders reads a header block if streams are accepted at all. Once they are not, there will
// never be a block to understand, and the inflater may fall behind.
func (r *reader) readHeaders(block []byte) (header http.Header, refused bool, err error) {
	c := r.c
	c.headersMu.Lock()
	defer c.headersMu.Unlock()
	if c.cfg.OnStream == nil || c.refusing.Load() {
		return nil, true, nil
	}
	if c.headers == nil {
		c.headers = frames.TakeHeaderReader()
	}
	header, err = c.headers.Read(block, frames.HeaderLimits{
		Count: c.cfg.MaxHeaders, Field: c.cfg.MaxHeaderField, Total: c.cfg.MaxHeaderBytes,
	})
	return header, false, err
}

func (r *reader) refuse(id uint32, status ResetStatus) error {
	return r.c.out.enqueue(mustSend, func(b []byte) []byte { return frames.AppendRstStream(b, id, status) })
}

// handleReplyOrHeaders reads SYN_REPLY and HEADERS for the sake of the inflater and of FIN: the
// protocols of Kubernetes put nothing into them.
func (r *reader) handleReplyOrHeaders(kind uint16, flags byte, payload []byte) error {
	id, block, err := frames.ParseReplyOrHeaders(payload)
	if err != nil {
		return err
	}
	_, _, fault := r.readHeaders(block)
	if fault != nil && !frames.IsHeaderFault(fault) {
		return &ConnectionError{Status: frames.GoAwayProtocolError, Reason: fault.Error()}
	}
	s := r.c.findStream(id)
	if s == nil {
		return nil
	}
	if fault != nil {
		s.reset(ResetProtocolError, fault.Error()) //nolint:errcheck // as above
		return nil
	}
	if kind == frames.TypeSynReply {
		s.peerAccepted()
	}
	if flags&frames.FlagFin != 0 {
		s.peerFin()
	}
	return nil
}
