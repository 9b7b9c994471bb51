package transport

import (
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"syscall"

	"github.com/streamshim/streamshim/pkg/handover"
	"github.com/streamshim/streamshim/pkg/streaming/internal/spdy"
	"github.com/streamshim/streamshim/pkg/streaming/internal/websocket"
	"github.com/streamshim/streamshim/pkg/workload"
)

// version is State.Version. It changes when an older program cannot resume what this one writes.
const version = 1

// State is a frozen connection, see Conn. It is part of the hand-over format, so its fields keep their names and
// meanings.
type State struct {
	Version    int
	Descriptor handover.Descriptor // of the socket; none when the connection was closed

	// One of SPDY and Channels; Tunnel together with SPDY.
	SPDY     *spdy.State
	Tunnel   *websocket.State
	Channels *websocket.ChannelsState
}

// ErrTLS means that a connection cannot be handed over because the TLS library's state cannot be extracted.
var ErrTLS = errors.New("a connection with TLS cannot be handed over")

// Streams is a SPDY connection, also one in a tunnel, at either end.
type Streams struct{ *spdy.Conn }

// Portable implements Conn.
func (c Streams) Portable() error {
	network := c.NetConn()
	if tunnel, ok := network.(*websocket.TunnelConn); ok {
		network = tunnel.NetConn()
	}
	return portable(network)
}

// State implements Conn.
func (c Streams) State(files *handover.Files) (State, error) {
	tunnel, _ := c.NetConn().(*websocket.TunnelConn)
	state, err := c.Conn.State()
	s := State{Version: version, SPDY: &state}
	if err == nil && tunnel != nil && !state.Closed {
		var below websocket.State
		below, err = tunnel.State()
		s.Tunnel = &below
	}
	network := c.NetConn()
	if tunnel != nil {
		network = tunnel.NetConn()
	}
	if err == nil && !state.Closed && (s.Tunnel == nil || !s.Tunnel.Closed) {
		s.Descriptor, err = keep(files, network)
	}
	if err != nil {
		c.Discard()
		return State{}, err
	}
	network.Close() //nolint:errcheck // files has a duplicate
	return s, nil
}

// Portable implements Conn.
func (c Channels) Portable() error { return portable(c.NetConn()) }

// State implements Conn.
func (c Channels) State(files *handover.Files) (State, error) {
	state, err := c.ChannelConn.State()
	s := State{Version: version, Channels: &state}
	if err == nil && !state.Conn.Closed {
		s.Descriptor, err = keep(files, c.NetConn())
	}
	if err != nil {
		c.Discard()
		return State{}, err
	}
	c.NetConn().Close() //nolint:errcheck // files has a duplicate
	return s, nil
}

func portable(network net.Conn) error {
	if _, ok := network.(*tls.Conn); ok {
		return ErrTLS
	}
	if _, ok := network.(syscall.Conn); !ok {
		return fmt.Errorf("a connection that is no socket cannot be handed over: %T", network)
	}
	return nil
}

func keep(files *handover.Files, network net.Conn) (handover.Descriptor, error) {
	if err := portable(network); err != nil {
		return 0, err
	}
	return files.Keep(network.(syscall.Conn))
}

// ResumeConfig configures a resumed connection as at its start. Only the part for its transport is used.
// websocket.Config.Channels and Greeting are not used.
type ResumeConfig struct {
	SPDY     spdy.Config
	Channels websocket.Config
}

// Resumed is a connection that continues where it was frozen.
type Resumed struct {
	Conn    Conn     // to be served
	Network net.Conn // the network connection below Conn

	// One of these is Conn, the other nil.
	SPDY     *spdy.Conn
	Channels *websocket.ChannelConn
}

// Stream returns the stream with this StreamID, or nil if the connection does not know it any more, or never did.
func (r *Resumed) Stream(id uint32) workload.Stream {
	if r.SPDY != nil {
		if s := r.SPDY.Stream(id); s != nil {
			return s
		}
		return nil
	}
	if id > 0xff {
		return nil
	}
	if c := r.Channels.Channel(byte(id)); c != nil {
		return c
	}
	return nil
}

// StreamID returns the id of a stream for Resumed.Stream. The stream must be the connection's own, not a wrapper. The id of
// nil is 0.
func StreamID(s workload.Stream) uint32 {
	if s == nil {
		return 0
	}
	return s.(interface{ ID() uint32 }).ID()
}

// Validate returns why Resume would reject a state, as far as that can be known without changing anything.
func (s State) Validate() error {
	if s.Version != version {
		return fmt.Errorf("the state of a connection has version %d, known is %d", s.Version, version)
	}
	return nil
}

// Resume continues a connection. It takes the network connection out of files, and closes it after an error.
func Resume(s State, files *handover.Files, config ResumeConfig) (*Resumed, error) {
	if err := s.Validate(); err != nil {
		return nil, err
	}
	var network net.Conn
	if s.Descriptor != 0 {
		var err error
		if network, err = files.TakeConn(s.Descriptor); err != nil {
			return nil, err
		}
	}
	r, err := resume(s, network, config)
	if err != nil && network != nil {
		network.Close() //nolint:errcheck // of no use
	}
	return r, err
}

func resume(s State, network net.Conn, config ResumeConfig) (*Resumed, error) {
	switch {
	case s.Channels != nil:
		conn, err := websocket.Resume(network, *s.Channels, config.Channels)
		if err != nil {
			return nil, err
		}
		return &Resumed{Conn: Channels{conn}, Network: conn.NetConn(), Channels: conn}, nil
	case s.SPDY != nil:
		below := network
		if s.Tunnel != nil {
			tunnel, err := websocket.ResumeTunnel(network, *s.Tunnel)
			if err != nil {
				return nil, err
			}
			tunnel.ReportPanics(config.SPDY.OnPanic)
			network, below = tunnel.NetConn(), tunnel
		}
		conn, err := spdy.Resume(below, *s.SPDY, config.SPDY)
		if err != nil {
			return nil, err
		}
		if network == nil {
			network = conn.NetConn()
		}
		return &Resumed{Conn: Streams{conn}, Network: network, SPDY: conn}, nil
	}
	return nil, errors.New("the state of a connection without a transport")
}
