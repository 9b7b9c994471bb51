package websocket

import (
	"bufio"
	"errors"
	"fmt"
	"math"
	"net"
	"slices"

	"github.com/streamshim/streamshim/pkg/streaming/internal/failure"
	"github.com/streamshim/streamshim/pkg/streaming/internal/websocket/frames"
	"github.com/streamshim/streamshim/pkg/streaming/internal/websocket/inbox"
)

// State is a frozen connection: all that is needed to continue it on the same socket, in this program or in another. It is
// part of the hand-over format, so its fields keep their names and meanings.
type State struct {
	Closed bool // this side has closed the connection, so there is no socket

	// Input is what was read and not parsed yet. Read is where in the client's byte stream it begins.
	Input []byte
	Read  frames.ReadState

	// Output is what is to be written first. It is whole frames, except that part of the first may already be sent.
	Output           []byte
	CloseSent        bool // our Close is in Output or before
	PingDue, PongDue bool
	Pong             []byte // payload of the Pong

	LastReceived, LastActivity int64 // Unix nanoseconds

	Done     *failure.Failure // why the connection is over
	Unwanted *failure.Failure // why writing fails
}

// ChannelsState is the State of a ChannelConn.
type ChannelsState struct {
	Conn     State
	Protocol Protocol
	Over     bool             // reading has ended
	InputEnd *failure.Failure // the error after the data of channels that have not ended by themselves
	Channels []ChannelState

	Receiving bool   // Conn.Read is within a message that is being received
	Header    []byte // the bytes of its header that have arrived
	Payload   bool   // its header is complete, and names Channel
	Channel   int
	Encoded   []byte // base64 payload that is not decoded yet
	Padded    bool   // the base64 payload had its padding, so that nothing may follow
}

// ChannelState is a channel of a ChannelsState.
type ChannelState struct {
	Direction      Direction
	Received, Sent int64
	Unread         []byte // received and not read
	Ended          bool   // the client sends no more
	Discard        bool   // what the client sends is discarded
	WriteClosed    bool   // CloseWrite was called
}

// names are the errors that callers compare with.
var names = failure.NewNames(
	failure.Name{Name: "client-closed", Error: ErrClientClosed},
	failure.Name{Name: "client-vanished", Error: ErrClientVanished},
	failure.Name{Name: "client-reset", Error: ErrClientReset},
	failure.Name{Name: "closed", Error: ErrClosed},
)

// kindViolation is the Failure.Kind of a *frames.Violation.
const kindViolation = "violation"

func writeFailure(err error) *failure.Failure {
	if violation, ok := err.(*frames.Violation); ok { //nolint:errorlint // what wraps one is another error
		return &failure.Failure{Kind: kindViolation, Code: uint32(violation.Code), Text: violation.Reason} //nolint:gosec // a code
	}
	return names.Failure(err)
}

func readFailure(f *failure.Failure) error {
	if f != nil && f.Kind == kindViolation {
		return &frames.Violation{Code: int(f.Code & math.MaxUint16), Reason: f.Text}
	}
	return names.Err(f)
}

// State returns the state of a frozen connection. Serve and all calls on channels must have returned. The connection
// cannot be used after it. The underlying network connection stays open, for its owner to close.
func (c *ChannelConn) State() (ChannelsState, error) {
	base, err := c.state()
	if err != nil {
		return ChannelsState{}, err
	}
	in := c.inbound.State()
	s := ChannelsState{
		Conn: base, Protocol: c.protocol, Over: c.over, InputEnd: writeFailure(in.Err),
		Receiving: in.Receiving, Header: in.Header, Payload: in.Payload, Channel: in.Channel, Encoded: in.Encoded, Padded: in.Padded,
	}
	for i := range c.channels {
		ch, box := &c.channels[i], &in.Channels[i]
		s.Channels = append(s.Channels, ChannelState{
			Direction: ch.direction, Received: box.Received, Sent: ch.sent.Load(), Unread: box.Unread,
			Ended: box.Ended, Discard: box.Discard, WriteClosed: ch.writeClosed.Load(),
		})
	}
	return s, nil
}

// State returns the state of a frozen connection. All calls must have returned. The underlying network connection stays
// open, for its owner to close.
func (t *TunnelConn) State() (State, error) { return t.state() }

func (c *conn) state() (State, error) {
	c.endMu.Lock()
	closed := c.closed
	c.endMu.Unlock()
	if c.serving.Load() || !c.frozen.Load() {
		return State{}, errors.New("websocket: the state of a connection that is not frozen or still served")
	}
	c.writers.Wait()
	s := State{
		Closed: closed, Read: c.in.ReadState, CloseSent: c.closeSent.Load(),
		LastReceived: c.lastReceived.Load(), LastActivity: c.lastActivity.Load(), Done: writeFailure(c.err()),
	}
	s.Input = slices.Clone(c.in.Buffered())
	c.writeLock <- struct{}{}
	s.Output, s.Unwanted = c.unsent, writeFailure(c.writeErr)
	<-c.writeLock
	c.controlMu.Lock()
	s.PingDue, s.PongDue = c.pingDue, c.pongDue
	if c.pongDue {
		s.Pong = slices.Clone(c.pongPayload[:c.pongSize])
	}
	c.controlMu.Unlock()
	return s, nil
}

// Resume continues a connection on its network connection, which the ChannelConn then owns. If the connection was closed,
// network is not used and may be nil. The caller calls Serve soon. config.Channels and config.Greeting are not used. What
// the channels hold counts against the limits, even if it exceeds them.
func Resume(network net.Conn, s ChannelsState, config Config) (*ChannelConn, error) {
	if err := s.check(); err != nil {
		return nil, fmt.Errorf("websocket: resume a connection: %w", err)
	}
	config.Channels = nil
	for i := range s.Channels {
		config.Channels = append(config.Channels, s.Channels[i].Direction)
	}
	c := newChannelConn(s.Protocol, config)
	base, err := resume(network, s.Conn, c.config.MaxMessage)
	if err != nil {
		return nil, err
	}
	c.conn, c.over = base, s.Over
	c.reportPanics(config.OnPanic)
	in := inbox.State{
		Err: readFailure(s.InputEnd), Receiving: s.Receiving, Header: s.Header, Payload: s.Payload, Channel: s.Channel,
		Encoded: s.Encoded, Padded: s.Padded,
	}
	for i := range s.Channels {
		state, ch := &s.Channels[i], &c.channels[i]
		ch.writeClosed.Store(state.WriteClosed)
		ch.sent.Store(state.Sent)
		in.Channels = append(in.Channels, inbox.ChannelState{
			Received: state.Received, Unread: state.Unread, Ended: state.Ended, Discard: state.Discard,
		})
	}
	c.inbound.Resume(in, c.in)
	return c, nil
}

// ResumeTunnel continues a tunnel on its network connection, which the TunnelConn then owns.
func ResumeTunnel(network net.Conn, s State) (*TunnelConn, error) {
	if err := s.check(); err != nil {
		return nil, fmt.Errorf("websocket: resume a tunnel: %w", err)
	}
	base, err := resume(network, s, 0)
	if err != nil {
		return nil, err
	}
	return &TunnelConn{conn: base}, nil
}

// readBuffer is the size of net/http's read buffer.
const readBuffer = 4 << 10

func resume(network net.Conn, s State, limit int64) (*conn, error) {
	if s.Closed {
		closed, other := net.Pipe()
		closed.Close()
		other.Close()
		network = closed
	}
	if network == nil {
		return nil, errors.New("websocket: resume a connection: there is none")
	}
	// Room for twice the input: it is parsed in place, and a frame's header must fit behind it.
	source := bufio.NewReaderSize(&prefixed{network, s.Input}, max(readBuffer, 2*len(s.Input)))
	source.Peek(len(s.Input)) //nolint:errcheck // the bytes are there; this moves them from the prefix to the buffer
	c := newConn(network, source, limit)
	c.in.ReadState = s.Read
	c.unsent, c.writeErr = slices.Clone(s.Output), readFailure(s.Unwanted)
	c.closeSent.Store(s.CloseSent)
	c.pingDue, c.pongDue, c.pongSize = s.PingDue, s.PongDue, copy(c.pongPayload[:], s.Pong)
	c.resumed.Store(true)
	c.lastReceived.Store(s.LastReceived)
	c.lastActivity.Store(s.LastActivity)
	c.closed = s.Closed
	if s.Done != nil {
		c.finish(readFailure(s.Done))
	}
	return c, nil
}

// prefixed is a connection that first returns bytes that were read from it before.
type prefixed struct {
	net.Conn
	prefix []byte
}

// Read implements io.Reader.
func (p *prefixed) Read(b []byte) (int, error) {
	if len(p.prefix) > 0 {
		n := copy(b, p.prefix)
		p.prefix = p.prefix[n:]
		return n, nil
	}
	return p.Conn.Read(b)
}

// check rejects what State never returns.
func (s *ChannelsState) check() error {
	if err := s.Conn.check(); err != nil {
		return err
	}
	known := slices.Contains(supported[RemoteCommand], s.Protocol) || s.Protocol == ChannelUnnamed
	switch {
	case !known:
		return fmt.Errorf("protocol %q is not known", s.Protocol)
	case len(s.Channels) > maxChannels:
		return fmt.Errorf("%d channels", len(s.Channels))
	case len(s.Header) > 3 || len(s.Encoded) > inbox.MaxEncoded:
		return errors.New("too much of a message's beginning")
	case s.Payload && (!s.Receiving || s.Channel < 0 || s.Channel >= len(s.Channels)):
		return fmt.Errorf("a message for channel %d", s.Channel)
	case s.Over && s.Conn.Done == nil:
		return errors.New("an end without a reason")
	}
	for i := range s.Channels {
		channel := &s.Channels[i]
		switch {
		case channel.Direction < Ignore || channel.Direction > ReadWrite:
			return fmt.Errorf("channel %d has direction %d", i, channel.Direction)
		case channel.Received < 0 || channel.Sent < 0:
			return fmt.Errorf("channel %d has moved less than nothing", i)
		}
	}
	return nil
}

func (s *State) check() error {
	switch {
	case s.Read.Remaining > math.MaxInt64 || s.Read.Size > math.MaxInt64:
		return errors.New("a frame that is too large")
	case len(s.Pong) > frames.MaxControlPayload:
		return fmt.Errorf("a Pong of %d bytes", len(s.Pong))
	case s.Closed && s.Done == nil:
		return errors.New("a closed connection without a reason")
	}
	return nil
}
