package spdy

import (
	"errors"
	"fmt"
	"net"
	"net/http"
	"slices"

	"github.com/streamshim/streamshim/pkg/streaming/internal/failure"
	"github.com/streamshim/streamshim/pkg/streaming/internal/spdy/frames"
)

// State is a frozen connection: all that is needed to go on with it on the same socket, in this program or in
// another. Receipts are not in it: they begin anew, and answers to PINGs from before are ignored.
//
// It is written to a hand-over's state, so its fields keep their names and meanings.
type State struct {
	Server bool // the peer opens odd streams
	Closed bool // this side has closed the connection: there is no socket

	// Input is what was read and not understood yet. Before it may come the rest of a data frame's payload.
	Input     []byte
	Stream    uint32 // of that data frame; 0: its payload is dropped
	Remaining int    // bytes of it that are still to come
	Fin       bool   // it has FIN

	// Output is what is to be written first: whole frames, but perhaps for the beginning of the first.
	Output []byte

	LastPeerStream uint32 // the highest id that the peer has used
	OpenNext       uint32 // the id of our next stream
	PingNext       uint32 // and of our next PING
	HeadersSent    bool   // the zlib stream of our direction has begun
	RefuseStreams  bool   // see Conn.RefuseStreams
	// History is the end of what was inflated of the peer's headers, the frames.Dictionary included. Empty: the first
	// header block is still to come.
	History []byte

	LastActivity, LastReceived int64 // Unix nanoseconds

	Gone     *failure.Failure // what Conn.Err says
	Ended    *failure.Failure // why no frame is read any more
	Unwanted *failure.Failure // why nothing can be written any more

	Streams []StreamState
}

// StreamState is a stream of a State.
type StreamState struct {
	ID             uint32
	Header         http.Header
	Received, Sent int64
	Unread         []byte           // received and not read
	ReadEnd        *failure.Failure // what follows the data
	WriteEnd       *failure.Failure
	ReadClosed     bool // CloseRead was called
	FinSent        bool // FIN is in Output or before
	Replied        bool // SYN_REPLY is in Output or before, or is not to be sent
	Opened         bool // by this side
	Accepted       bool // of those, the peer has replied
}

// names are the errors that others look for.
var names = failure.NewNames(
	failure.Name{Name: "closed", Error: ErrClosed},
	failure.Name{Name: "goaway", Error: ErrGoAway},
	failure.Name{Name: "peer-closed", Error: ErrPeerClosed},
	failure.Name{Name: "peer-reset", Error: ErrPeerReset},
)

// Kinds of failures that are no names.
const (
	kindReset = "reset" // a *ResetError
	kindFault = "fault" // a *ConnectionError
)

func writeFailure(err error) *failure.Failure {
	switch err := err.(type) { //nolint:errorlint // what wraps one is another error
	case *ResetError:
		return &failure.Failure{Kind: kindReset, Code: uint32(err.Status), Remote: err.Remote, Text: err.Reason}
	case *ConnectionError:
		return &failure.Failure{Kind: kindFault, Code: uint32(err.Status), Text: err.Reason}
	}
	return names.Failure(err)
}

func readFailure(f *failure.Failure) error {
	switch {
	case f == nil:
	case f.Kind == kindReset:
		return &ResetError{Status: ResetStatus(f.Code), Remote: f.Remote, Reason: f.Text}
	case f.Kind == kindFault:
		return &ConnectionError{Status: frames.GoAwayStatus(f.Code), Reason: f.Text}
	}
	return names.Err(f)
}

// State returns the state of a frozen connection, whose Serve and whose streams' calls have all returned. With it
// the connection is emptied and can do nothing more. The network connection below stays open, for its owner to close.
//
// It fails where the peer's headers cannot be understood without their past.
func (c *Conn) State() (State, error) {
	if c.serving.Load() || (!c.frozen.Load() && !c.closing.Load()) {
		return State{}, errors.New("spdy: the state of a connection that is not frozen or still served")
	}
	c.out.flusher.Wait()
	history, err := c.history()
	if err != nil {
		return State{}, err
	}
	s := State{
		Server: c.peerOdd, Closed: c.closing.Load(),
		Input: c.read.partial, Remaining: c.read.remaining, Fin: c.read.fin && c.read.remaining > 0,
		LastPeerStream: c.read.lastPeerStream.Load(), RefuseStreams: c.refusing.Load(), History: history,
		LastActivity: c.lastActivity.Load(), LastReceived: c.lastReceived.Load(),
		Unwanted: writeFailure(c.out.failure()),
	}
	if c.read.remaining > 0 && c.read.stream != nil {
		s.Stream = c.read.stream.id
	}
	c.out.mu.Lock()
	c.out.deferLocked(nil)
	s.Output = c.out.unsent
	s.HeadersSent, s.PingNext = c.out.zlibOpen, c.out.pingNext
	c.out.mu.Unlock()

	c.mu.Lock()
	s.OpenNext, s.Gone, s.Ended = c.openNext, writeFailure(c.goneErr), writeFailure(c.endErr)
	streams := make(map[uint32]*Stream, len(c.streams)+len(c.ended))
	for _, stream := range c.ended {
		streams[stream.id] = stream
	}
	for id, stream := range c.streams {
		streams[id] = stream
	}
	c.mu.Unlock()
	for _, stream := range streams {
		s.Streams = append(s.Streams, stream.state())
	}
	slices.SortFunc(s.Streams, func(a, b StreamState) int { return int(a.ID) - int(b.ID) })
	c.releaseHeaders()
	return s, nil
}

// history is State.History.
func (c *Conn) history() ([]byte, error) {
	c.headersMu.Lock()
	defer c.headersMu.Unlock()
	if c.headers == nil {
		return nil, nil
	}
	return c.headers.History()
}

func (s *Stream) state() StreamState {
	s.mu.Lock()
	defer s.mu.Unlock()
	state := StreamState{
		ID: s.id, Header: s.header, Received: s.received.Load(), Sent: s.sent.Load(),
		ReadEnd: writeFailure(s.readErr), WriteEnd: writeFailure(s.writeErr),
		ReadClosed: s.readClosed, FinSent: s.localFin, Replied: s.replied, Opened: s.accepted != nil,
	}
	if s.accepted != nil {
		select {
		case <-s.accepted:
			state.Accepted = true
		default:
		}
	}
	for b := s.head; b != nil; b = b.next {
		state.Unread = append(state.Unread, b.payload()...)
	}
	s.readClosed = true
	s.dropLocked()
	return state
}

// Resume goes on with a connection on its network connection, which the Conn owns from now on; it is not used, and may be
// nil, when the connection was closed. Serve is to be called soon, as after New. The streams are to be had by
// Stream; their limits are taken again from config, even where they hold more.
func Resume(conn net.Conn, s State, config Config) (*Conn, error) {
	if err := s.check(); err != nil {
		return nil, fmt.Errorf("spdy: resume a connection: %w", err)
	}
	if s.Closed || conn == nil {
		if !s.Closed {
			return nil, errors.New("spdy: resume a connection: there is none")
		}
		closed, other := net.Pipe()
		closed.Close() //nolint:errcheck // cannot fail
		other.Close()  //nolint:errcheck // as above
		conn = closed
	}
	c := newConn(conn, s.Input, config, s.Server)
	c.read.remaining, c.read.fin = s.Remaining, s.Fin
	c.read.lastPeerStream.Store(s.LastPeerStream)
	c.refusing.Store(s.RefuseStreams)
	if len(s.History) > 0 && !s.RefuseStreams && c.cfg.OnStream != nil {
		c.headers = frames.ResumeHeaderReader(s.History)
	}
	c.out.unsent = slices.Clone(s.Output)
	c.out.queued.Store(int64(len(s.Output)))
	c.out.carried.Store(int64(len(s.Output)))
	c.out.zlibOpen, c.out.pingNext = s.HeadersSent, s.PingNext
	c.openNext = s.OpenNext
	c.lastActivity.Store(s.LastActivity)
	c.lastReceived.Store(s.LastReceived)
	for i := range s.Streams {
		c.resumeStream(&s.Streams[i])
	}
	c.read.stream = c.streams[s.Stream]
	c.endErr = readFailure(s.Ended)
	if s.Gone != nil {
		c.markGone(readFailure(s.Gone))
	}
	if s.Unwanted != nil {
		unwanted := readFailure(s.Unwanted)
		c.out.failed.Store(&unwanted)
	}
	return c, nil
}

func (c *Conn) resumeStream(state *StreamState) {
	s := newStream(c, state.ID, state.Header)
	if state.Opened {
		s.accepted = make(chan struct{})
		if state.Accepted {
			close(s.accepted)
		}
	}
	c.streams[s.id] = s
	s.putAll(state.Unread)
	s.received.Store(state.Received)
	s.sent.Store(state.Sent)
	s.readErr, s.writeErr = readFailure(state.ReadEnd), readFailure(state.WriteEnd)
	s.readClosed, s.localFin, s.replied = state.ReadClosed, state.FinSent, state.Replied
	s.settle()
}

// Stream is a stream that is open, or was a while ago; nil when it is long over, or never was.
func (c *Conn) Stream(id uint32) *Stream {
	c.mu.Lock()
	defer c.mu.Unlock()
	if s := c.streams[id]; s != nil {
		return s
	}
	for _, s := range c.ended {
		if s.id == id {
			return s
		}
	}
	return nil
}

// check refuses what State never returns.
func (s *State) check() error {
	first := uint32(1)
	if s.Server {
		first = 2
	}
	switch {
	case s.Remaining < 0 || s.Remaining > frames.MaxLen:
		return fmt.Errorf("a data frame with %d bytes left", s.Remaining)
	case s.LastPeerStream > frames.MaxStreamID:
		return fmt.Errorf("stream id %d", s.LastPeerStream)
	case s.OpenNext < first || s.OpenNext > frames.MaxStreamID+2 || s.OpenNext%2 != first%2:
		return fmt.Errorf("next stream id %d", s.OpenNext)
	case s.PingNext < first || s.PingNext > frames.MaxStreamID+2 || s.PingNext%2 != first%2:
		return fmt.Errorf("next PING id %d", s.PingNext)
	case len(s.History) > frames.HistorySize:
		return fmt.Errorf("%d bytes of header text", len(s.History))
	case s.Closed && s.Gone == nil, s.Ended != nil && s.Gone == nil:
		return errors.New("an end without a reason")
	}
	seen := make(map[uint32]bool, len(s.Streams))
	for i := range s.Streams {
		stream := &s.Streams[i]
		ours := stream.ID%2 == first%2
		switch {
		case stream.ID == 0 || stream.ID > frames.MaxStreamID || seen[stream.ID]:
			return fmt.Errorf("stream %d is none, or is there twice", stream.ID)
		case ours && stream.ID >= s.OpenNext, !ours && stream.ID > s.LastPeerStream:
			return fmt.Errorf("stream %d was never opened", stream.ID)
		case ours != stream.Opened:
			return fmt.Errorf("stream %d was opened by the wrong side", stream.ID)
		case stream.Received < 0 || stream.Sent < 0:
			return fmt.Errorf("stream %d has moved less than nothing", stream.ID)
		}
		seen[stream.ID] = true
	}
	return nil
}
