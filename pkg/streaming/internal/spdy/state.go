package spdy

import (
	"errors"
	"fmt"
	"net"
	"slices"

	"github.com/streamshim/streamshim/pkg/streaming/internal/failure"
	"github.com/streamshim/streamshim/pkg/streaming/internal/spdy/control"
	"github.com/streamshim/streamshim/pkg/streaming/internal/spdy/frames"
	"github.com/streamshim/streamshim/pkg/streaming/internal/spdy/state"
)

// State is the state of a frozen connection. See Conn.State.
type State = state.Conn

// StreamState is the state of a stream in a State.
type StreamState = state.Stream

// names are the errors that callers compare with.
var names = failure.NewNames(
	failure.Name{Name: "closed", Error: ErrClosed},
	failure.Name{Name: "goaway", Error: ErrGoAway},
	failure.Name{Name: "peer-closed", Error: ErrPeerClosed},
	failure.Name{Name: "peer-reset", Error: ErrPeerReset},
)

// Kinds of failures that have no entry in names.
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

// State returns the state of a frozen connection. Serve and all calls on its streams must have returned. It empties the
// connection, which cannot be used any more. The network connection below stays open; its owner closes it.
//
// State fails if the peer's headers cannot be read without those before them.
func (c *Conn) State() (State, error) {
	if c.serving.Load() || (!c.frozen.Load() && !c.closing.Load()) {
		return State{}, errors.New("spdy: the state of a connection that is not frozen or still served")
	}
	c.out.flusher.Wait()
	history, err := c.headers.History()
	if err != nil {
		return State{}, err
	}
	s := State{
		Server: c.peerOdd, Closed: c.closing.Load(),
		Input: c.read.in.Rest(), Remaining: c.read.remaining, Fin: c.read.fin && c.read.remaining > 0,
		LastPeerStream: c.read.lastPeerStream.Load(), RefuseStreams: c.headers.Refuses(), History: history,
		LastActivity: c.lastActivity.Load(), LastReceived: c.lastReceived.Load(),
		Unwanted: writeFailure(c.out.failure()),
	}
	if c.read.remaining > 0 && c.read.stream != nil {
		s.Stream = c.read.stream.id
	}
	c.out.mu.Lock()
	c.out.deferLocked(nil)
	s.Output = c.out.unsent
	c.out.mu.Unlock()
	next := c.out.control.State()
	s.HeadersSent, s.OpenNext, s.PingNext = next.HeadersSent, next.OpenNext, next.PingNext

	c.mu.Lock()
	s.Gone, s.Ended = writeFailure(c.goneErr), writeFailure(c.endErr)
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
	c.headers.Refuse()
	return s, nil
}

func (s *Stream) state() StreamState {
	s.mu.Lock()
	defer s.mu.Unlock()
	written := StreamState{
		ID: s.id, Header: s.header, Received: s.received.Load(), Sent: s.sent.Load(),
		ReadEnd: writeFailure(s.readErr), WriteEnd: writeFailure(s.writeErr),
		Unread: s.unread.Bytes(), ReadClosed: s.readClosed, FinSent: s.localFin, Replied: s.replied, Opened: s.accepted != nil,
	}
	if s.accepted != nil {
		select {
		case <-s.accepted:
			written.Accepted = true
		default:
		}
	}
	s.readClosed = true
	s.dropLocked()
	return written
}

// Resume returns a connection that continues from s on conn. The Conn then owns conn. If the connection was closed, conn is
// not used and may be nil. Call Serve soon, as after New. Stream returns the streams. Their limits come from config, even
// for streams that hold more.
func Resume(conn net.Conn, s State, config Config) (*Conn, error) {
	if err := s.Check(); err != nil {
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
	if s.RefuseStreams {
		c.headers.Refuse()
	} else if len(s.History) > 0 && c.cfg.OnStream != nil {
		c.headers.Resume(s.History)
	}
	c.out.unsent = slices.Clone(s.Output)
	c.out.control.Start(control.State{HeadersSent: s.HeadersSent, OpenNext: s.OpenNext, PingNext: s.PingNext}, len(s.Output))
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

func (c *Conn) resumeStream(from *StreamState) {
	s := newStream(c, from.ID, from.Header)
	if from.Opened {
		s.accepted = make(chan struct{})
		if from.Accepted {
			close(s.accepted)
		}
	}
	c.streams[s.id] = s
	s.putAll(from.Unread)
	s.received.Store(from.Received)
	s.sent.Store(from.Sent)
	s.readErr, s.writeErr = readFailure(from.ReadEnd), readFailure(from.WriteEnd)
	s.readClosed, s.localFin, s.replied = from.ReadClosed, from.FinSent, from.Replied
	s.settle()
}

// Stream returns a stream that is open or has ended a while ago. It returns nil for one that ended long ago or never
// existed.
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
