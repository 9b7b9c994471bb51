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

// version is State.Version; it changes when an older program cannot go on with what this one writes.
const version = 1

// State is a frozen connection, see Conn. It is written to a hand-over's state, so its fields keep their names
// and meanings.
type State struct {
	Version    int
	Descriptor handover.Descriptor // of the socket; none when the connection was closed

	// One of SPDY and Channels; Tunnel together with SPDY.
	SPDY     *spdy.State
	Tunnel   *websocket.State
	Channels *websocket.ChannelsState
}

// ErrTLS is why a connection cannot be handed over: what a TLS library knows of it cannot be taken out.
var ErrTLS = errors.New("a connection with TLS cannot be handed over")

// Streams is a connection of streams, also in a tunnel, at either end.
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

// ResumeConfig is what a connection is served with, as at its start: the part for its transport is used. Of
// websocket.Config the channels and the greeting are not used.
type ResumeConfig struct {
	SPDY     spdy.Config
	Channels websocket.Config
}

// Resumed is a connection that goes on where it was frozen.
type Resumed struct {
	Conn    Conn     // to be served
	Network net.Conn // below Conn, to ask about its state

	// One of these is Conn, the other nil.
	SPDY     *spdy.Conn
	Channels *websocket.ChannelConn
}

// Stream is a stream by its StreamID; nil when it is long over, or never was.
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

// StreamID names a stream of a connection for Resumed.Stream: one that came from the connection itself, and not what was
// put around it. It is 0 for nil.
func StreamID(s workload.Stream) uint32 {
	if s == nil {
		return 0
	}
	return s.(interface{ ID() uint32 }).ID()
}

// Validate says why Resume would not know a state, nil when it does as far as can be told without touching anything.
func (s State) Validate() error {
	if s.Version != version {
		return fmt.Errorf("the state of a connection has version %d, known is %d", s.Version, version)
	}
	return nil
}

// Resume goes on with a connection. Its network connection is taken out of files, and closed again after an error.
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
