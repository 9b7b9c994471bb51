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
	"github.com/streamshim/streamshim/pkg/streaming/internal/spdy/buffer"
	"github.com/streamshim/streamshim/pkg/streaming/internal/spdy/control"
	"github.com/streamshim/streamshim/pkg/streaming/internal/spdy/direct"
	"github.com/streamshim/streamshim/pkg/streaming/internal/spdy/frames"
)

// reader is the state of the read loop. The goroutine of Serve owns it, except for lastPeerStream.
type reader struct {
	c *Conn

	lastPeerStream atomic.Uint32 // the highest stream id that the peer has used

	in  buffer.Input
	now int64 // Unix nanoseconds of the last read

	// The data frame whose payload is received next.
	stream    *Stream // nil: the payload is discarded
	remaining int
	fin       bool

	gather   bool // payload goes to gathered, see gather.go
	gathered *Stream
	pieces   [][]byte      // in buf, of gathered
	room     direct.Waiter // for the pipe or connection that gathered goes to
}

func (r *reader) init(c *Conn, buffered []byte) {
	r.c = c
	r.in.Init(c.conn, c.socket, buffered)
}

// readFrames is the read loop.
func (c *Conn) readFrames() error {
	r := &c.read
	defer r.in.Release()
	defer r.room.Close()
	r.now = time.Now().UnixNano()
	rest, err := r.parse(r.in.Rest())
	if err == nil {
		err = r.flushGathered()
	}
	r.in.Park(rest)
	for err == nil && !c.frozen.Load() {
		c.out.flush()
		err = r.fill()
	}
	if c.frozen.Load() && (err == nil || c.stopped(err)) {
		r.in.ParkKept()
		return handover.ErrFrozen
	}
	return err
}

// fill reads once and handles the frames that are complete then.
func (r *reader) fill() error {
	// Read control frames in small portions: their answers take room in a queue.
	p, err := r.in.Read(r.gather)
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
		r.in.Park(rest)
		return nil
	}
	r.in.Keep(rest, r.gather)
	return nil
}

// parse handles the frames in p and returns the incomplete one at its end. It delivers the payload of data frames as it is
// received. It handles control frames when they are complete. On a frozen connection it returns all that it has not
// handled.
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
		if h.Length > maxControlFrame {
			return nil, frames.ProtocolErrorf("control frame of %d bytes, limit %d", h.Length, maxControlFrame)
		}
		if len(p) < frames.HeaderLen+h.Length {
			return p, nil
		}
		if err := r.handleControl(h, p[frames.HeaderLen:frames.HeaderLen+h.Length]); err != nil {
			return nil, err
		}
		p = p[frames.HeaderLen+h.Length:]
		// The answers to all frames of one buffer may exceed what the queue may hold.
		if r.c.out.control.Answers() > control.MaxBestEffort {
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
		// The draft asks for a stream error and keeps the connection (2.2.2).
		r.c.out.control.Reset(control.BestEffort, h.StreamID, ResetInvalidStream) //nolint:errcheck // a connection that cannot be written to is noticed by its reader
	case s != nil && h.Length > 0 && s.InputEnded():
		s.reset(ResetStreamAlreadyClosed, "data after FIN") //nolint:errcheck // as above
		s = nil
	}
	r.stream, r.remaining, r.fin = s, h.Length, h.Flags&frames.FlagFin != 0
	large := r.c.socket != nil && s != nil && h.Length >= gatherMin
	// Gathered payload is written before this frame, unless this frame is gathered too.
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

// wasOpened reports whether a stream with this id was ever opened. Frames for a stream that is over are ignored: they are
// late, or were sent before our RST_STREAM arrived.
func (r *reader) wasOpened(id uint32) bool {
	if r.c.peerOpens(id) {
		return id <= r.lastPeerStream.Load()
	}
	return r.c.out.control.Opened(id)
}

// deliver passes payload to the stream of the frame. It waits while the stream has no room.
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

// store delivers payload that is not gathered or could not be written.
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
		// PINGs of the peer have the parity of its streams. Other PINGs answer ours (2.6.5).
		if c.peerOpens(id) {
			c.out.control.Add(control.BestEffort, func(b []byte) []byte { return frames.AppendPing(b, id) }) //nolint:errcheck // as above
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
	// The draft asks to ignore control frames of other types (2.2.1).
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
	s.settle() // it may be over already: unidirectional, and without data
	if err := c.out.control.Overflow(); err != nil {
		return err // a stream that OnStream resets is forgotten at once, so MaxStreams does not bound these answers
	}
	return s.Accept()
}

// readHeaders reads a header block, unless all streams are refused.
func (r *reader) readHeaders(block []byte) (header http.Header, refused bool, err error) {
	if r.c.cfg.OnStream == nil {
		return nil, true, nil
	}
	return r.c.headers.Read(block)
}

func (r *reader) refuse(id uint32, status ResetStatus) error {
	return r.c.out.control.Reset(control.MustSend, id, status)
}

// handleReplyOrHeaders handles SYN_REPLY and HEADERS. It reads their headers only to keep the inflater in step: the
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
