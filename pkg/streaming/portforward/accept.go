package portforward

import (
	"cmp"
	"context"
	"fmt"
	"math"
	"net"
	"net/http"

	"github.com/streamshim/streamshim/pkg/session"
	"github.com/streamshim/streamshim/pkg/streaming/event"
	"github.com/streamshim/streamshim/pkg/streaming/internal/bandwidth"
	"github.com/streamshim/streamshim/pkg/streaming/internal/lifetime"
	"github.com/streamshim/streamshim/pkg/streaming/internal/spdy"
	"github.com/streamshim/streamshim/pkg/streaming/internal/status"
	"github.com/streamshim/streamshim/pkg/streaming/internal/transport"
	"github.com/streamshim/streamshim/pkg/streaming/internal/websocket"
)

// Accept opens the pod, upgrades the connection of a request and returns its session, for Session.Run. If it returns no
// session, the outcome says why, and the request was answered.
func Accept(w http.ResponseWriter, r *http.Request, up transport.Upgrade, request *Request, live *session.Session, config Config, terms lifetime.Terms) (*Session, session.Outcome) {
	forwarder, err := config.Pods.Forwarder(request.Sandbox)
	if err != nil {
		status.WriteError(w, http.StatusInternalServerError, "port-forward into the pod: "+err.Error())
		return nil, session.Outcome{Reason: "start-failed", ExitCode: -1, Err: err}
	}
	s := newSession(config, live, terms)
	s.forwarder = forwarder
	s.network, err = s.accept(w, r, up, request.Ports)
	if err != nil {
		forwarder.Close() //nolint:errcheck // of no use
		return nil, lifetime.ClientGone(err)
	}
	s.limitBandwidth()
	return s, session.Outcome{}
}

func newSession(config Config, live *session.Session, terms lifetime.Terms) *Session {
	config.StreamCreation = cmp.Or(config.StreamCreation, streamCreation)
	s := &Session{
		config: config, terms: terms, session: live, grace: lifetime.ShutdownGrace,
		waiting: make(map[string]*connection), open: make(map[*connection]struct{}),
		still: make(chan struct{}), ended: make(chan struct{}), result: make(chan session.Outcome, 1),
	}
	s.connections.Report = s.panicked
	return s
}

func (s *Session) limitBandwidth() {
	s.bandwidth = bandwidth.New(s.terms.Bandwidth, s.client.Done(), s.client.Frozen())
}

func (s *Session) spdyConfig() spdy.Config {
	return spdy.Config{
		OnStream: s.onStream, Room: s.terms.Buffers, Stall: s.config.Stall, OnStall: func() { s.terms.Observe(event.StreamStalled) },
		OnPanic: s.panicked,
	}
}

func (s *Session) channelsConfig() websocket.Config {
	return websocket.Config{Room: s.terms.Buffers, OnPanic: s.panicked}
}

// accept upgrades the connection to the transport that was negotiated. Run is the first to read from it.
func (s *Session) accept(w http.ResponseWriter, r *http.Request, up transport.Upgrade, ports []int32) (net.Conn, error) {
	if !up.WebSocket {
		network, buffered, err := transport.HijackSPDY(w, up.Protocol)
		if err == nil {
			s.client = transport.Streams{Conn: spdy.NewServer(network, buffered, s.spdyConfig())}
		}
		return network, err
	}
	protocol := websocket.Protocol(up.Protocol)
	if protocol.Tunnel() {
		tunnel, err := websocket.AcceptTunnel(w, r)
		if err != nil {
			return nil, err
		}
		tunnel.ReportPanics(s.panicked)
		s.client = transport.Streams{Conn: spdy.NewServer(tunnel, nil, s.spdyConfig())}
		return tunnel.NetConn(), nil
	}
	named := make([]uint16, 0, len(ports))
	for _, port := range ports {
		if port <= 0 || port > math.MaxUint16 {
			err := fmt.Errorf("%d is no port", port)
			status.WriteError(w, http.StatusBadRequest, err.Error())
			return nil, err
		}
		named = append(named, uint16(port))
	}
	conn, channels, err := websocket.AcceptPortForward(w, r, protocol, named, s.channelsConfig())
	if err != nil {
		return nil, err
	}
	s.client = transport.Channels{ChannelConn: conn}
	s.useChannels(conn)
	s.isLegacy = true
	for _, c := range channels {
		s.legacy = append(s.legacy, &connection{port: c.Port, data: c.Data, failure: c.Error})
	}
	return conn.NetConn(), nil
}

// useChannels sets how a session without SPDY closes its connection.
func (s *Session) useChannels(conn *websocket.ChannelConn) {
	s.closeWrite = func(ctx context.Context) {
		s.connections.Go(func() { conn.CloseWrite(ctx) }) //nolint:errcheck // a client that has gone is noticed in Run
	}
	s.closeAndWait = func(ctx context.Context) { conn.CloseAndWait(ctx) } //nolint:errcheck // the session is over either way
}
