package remotecommand

import (
	"context"
	"net/http"
	"strings"
	"time"

	"github.com/streamshim/streamshim/pkg/session"
	"github.com/streamshim/streamshim/pkg/streaming/internal/lifetime"
	"github.com/streamshim/streamshim/pkg/streaming/internal/spdy"
	"github.com/streamshim/streamshim/pkg/streaming/internal/transport"
	"github.com/streamshim/streamshim/pkg/streaming/internal/websocket"
	"github.com/streamshim/streamshim/pkg/workload"
)

// Accept upgrades the connection of a request and returns its session, for Session.Run. After an error there is no
// session, and the request has been answered.
func Accept(w http.ResponseWriter, r *http.Request, up transport.Upgrade, request *Request, live *session.Session, config Config, terms lifetime.Terms) (*Session, error) {
	config.Waits = config.complete()
	s := &Session{
		config: config, terms: terms, session: live, request: request, start: config.start(live.Kind, request, terms.Buffers),
	}
	var err error
	if up.WebSocket {
		err = s.acceptWebSocket(w, r, websocket.Protocol(up.Protocol))
	} else {
		err = s.acceptSPDY(w, r, up.Protocol)
	}
	if err != nil {
		return nil, err
	}
	return s, nil
}

// acceptSPDY takes the connection over. The client opens one stream for each of those
// that the command wants, and says with the header streamtype which it is.
func (s *Session) acceptSPDY(w http.ResponseWriter, r *http.Request, protocol string) error {
	c := s.request.Command
	network, buffered, err := transport.HijackSPDY(w, protocol)
	if err != nil {
		return err
	}
	ready := make(chan struct{})
	client := &client{
		network: network, protocol: protocolByName(protocol), ready: ready, failureOpened: make(chan workload.Stream, 1),
		answersItself: answersItself(r, false), sendsSize: isKubectl(r),
	}
	expected := map[string]*workload.Stream{transport.StreamError: &client.failure}
	for name, slot := range map[string]struct {
		wanted bool
		stream *workload.Stream
	}{
		transport.StreamStdin:  {c.Stdin, &client.stdin},
		transport.StreamStdout: {c.Stdout, &client.stdout},
		transport.StreamStderr: {c.Stderr && !c.TTY, &client.stderr},
		transport.StreamResize: {c.TTY && client.protocol.resize, &client.resize},
	} {
		if slot.wanted {
			expected[name] = slot.stream
		}
	}
	var onReceipt func(spdy.Receipt)
	if s.config.holdsStatusBack(r, c) {
		client.holdback = newHoldback()
		onReceipt = client.holdback.receipt
	}
	var conn *spdy.Conn
	conn = spdy.NewServer(network, buffered, spdy.Config{
		// A backlog of stdin serves nobody, and one that outgrows the CPU caches costs a third more.
		ConnBuffer: 1 << 20,
		Room:       s.terms.Buffers,
		OnReceipt:  onReceipt,
		// Called by the connection's reader alone, so that it needs no lock; ready publishes the streams.
		OnStream: func(stream *spdy.Stream) {
			name := strings.ToLower(stream.Header().Get(transport.HeaderStreamType))
			slot, ok := expected[name]
			if !ok {
				stream.Reset() //nolint:errcheck // a stream that nobody asked for, or a second one
				return
			}
			delete(expected, name)
			*slot = stream
			if name == transport.StreamError {
				// Before the client knows that it has its streams. It does not wait: nothing else has been sent.
				client.protocol.promiseStatus(stream)
				client.statusRefused = stream.Done()
				client.failureOpened <- stream
			}
			if len(expected) == 0 {
				conn.RefuseStreams()
				close(ready)
			}
		},
	})
	client.Conn = conn
	if client.holdback != nil {
		client.holdback.ask = conn.AskReceipt
	}
	client.farewell = func(ctx context.Context) { transport.AwaitClose(ctx, conn) }
	s.client = client
	return nil
}

// holdsStatusBack tells whether the status waits for the client's client to have read the output. Not where the
// client sends input: its answers to our questions stand behind that on the wire, which is not read while the command
// does not take it, and the command may not because its output waits for the answers.
func (c Config) holdsStatusBack(r *http.Request, command workload.Command) bool {
	return c.StatusWait > 0 && !command.Stdin && !isKubectl(r)
}

// isKubectl tells whether the request is kubectl's own, handed on as it is: its connection is a pipe to
// kubectl, which closes it when it has read everything. Who translates makes a request of his own, without
// these headers.
func isKubectl(r *http.Request) bool { return r.Header.Get("Kubectl-Command") != "" }

// acceptWebSocket upgrades the connection. The channels are there from the start.
func (s *Session) acceptWebSocket(w http.ResponseWriter, r *http.Request, protocol websocket.Protocol) error {
	c := s.request.Command
	conn, err := websocket.Accept(w, r, protocol, websocket.Config{
		Channels: websocket.RemoteCommandChannels(c.Stdin, c.Stdout, c.Stderr && !c.TTY),
		Greeting: true,
		Room:     s.terms.Buffers,
		Patience: max(s.config.InputGrace, time.Second),
	})
	if err != nil {
		return err
	}
	ready := make(chan struct{})
	close(ready)
	client := &client{
		Conn: transport.Channels{ChannelConn: conn}, network: conn.NetConn(),
		protocol:      protocolVersion{name: string(protocol), resize: true, jsonStatus: protocol.StatusVersion() >= 4},
		ready:         ready,
		answersItself: answersItself(r, true), sendsSize: isKubectl(r),
		failure: conn.Channel(websocket.Error),
		// The close handshake is the protocol's end of output: there is no FIN of a channel.
		farewell: func(ctx context.Context) { conn.CloseAndWait(ctx) }, //nolint:errcheck // the session is over either way
	}
	for number, slot := range map[byte]struct {
		wanted bool
		stream *workload.Stream
	}{
		websocket.Stdin:  {c.Stdin, &client.stdin},
		websocket.Stdout: {c.Stdout, &client.stdout},
		websocket.Stderr: {c.Stderr && !c.TTY, &client.stderr},
		websocket.Resize: {c.TTY, &client.resize},
	} {
		if slot.wanted {
			*slot.stream = conn.Channel(number)
		}
	}
	s.client = client
	return nil
}
