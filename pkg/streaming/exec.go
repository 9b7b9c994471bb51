package streaming

import (
	"context"
	"fmt"
	"net"
	"net/http"
	"strings"
	"time"

	"github.com/streamshim/streamshim/pkg/session"
	"github.com/streamshim/streamshim/pkg/streaming/internal/spdy"
	"github.com/streamshim/streamshim/pkg/streaming/internal/websocket"
	"github.com/streamshim/streamshim/pkg/workload"
)

func (s *Server) serveExec(w http.ResponseWriter, r *http.Request, up upgrade, request any) {
	exec := request.(*CommandRequest)
	if exec.Container.Runtime == "" {
		s.serveRemoteCommand(w, r, up, session.Exec, exec, s.relayed(session.Exec, exec, 0, 0))
		return
	}
	start := func(ctx context.Context, c workload.Command, _ *bufferShare) (Process, error) {
		return s.config.Runtime.Start(ctx, exec.Container, c)
	}
	s.serveRemoteCommand(w, r, up, session.Exec, exec, startWhenAllowed(s.config.Starts, exec.info(session.Exec), start))
}

const (
	// detachGrace is how long a container must have been silent, after the client's input has ended, until the
	// client is detached: the answer to the last line is to reach it (cri-tools#269).
	detachGrace = time.Second
	// detachMax is when it is detached in any case.
	detachMax = 10 * time.Second
)

func (s *Server) serveAttach(w http.ResponseWriter, r *http.Request, up upgrade, request any) {
	attach := request.(*CommandRequest)
	// The end of one client's input is the end of the container's only where the container says so.
	// Elsewhere containerd answers it by ending the whole session, which scripts rely on, and so does crictl's
	// ctrl-P ctrl-Q at a terminal. It is passed on once the answer to the last line had time to come.
	stdinGrace := detachGrace
	switch {
	case attach.Command.TTY:
	case attach.Container.StdinOnce:
		stdinGrace = 0
	case s.config.AttachStays:
		stdinGrace = -1
	}
	s.serveRemoteCommand(w, r, up, session.Attach, attach, s.relayed(session.Attach, attach, s.config.AttachBuffer, stdinGrace))
}

// relayed has the upstream serve a request, see startRelay.
func (s *Server) relayed(kind session.Kind, request *CommandRequest, buffer int, stdinGrace time.Duration) startFunc {
	return func(ctx context.Context, c workload.Command, buffers *bufferShare) (Process, error) {
		ctx, cancel := context.WithTimeout(ctx, relayTimeout)
		defer cancel()
		target, err := s.config.Runtime.StreamingURL(ctx, kind, request.Call, request.Trace)
		if err != nil {
			return nil, fmt.Errorf("ask the upstream for its streaming URL: %w", err)
		}
		return startRelay(ctx, target, c, buffer, stdinGrace, buffers)
	}
}

// serveRemoteCommand upgrades the connection and runs the session in a goroutine of its own, so
// that net/http's goroutine and buffers are free while the session lasts.
func (s *Server) serveRemoteCommand(w http.ResponseWriter, r *http.Request, up upgrade, kind session.Kind, request *CommandRequest, start startFunc) {
	info := request.info(kind)
	info.Protocol = strings.TrimSpace(up.name() + " " + up.protocol)
	info.Peer = r.RemoteAddr
	live, err := s.config.Sessions.Begin(s.ctx, info)
	if err != nil {
		writeRefused(w, err)
		return
	}
	rc := remoteCommand{command: request.Command, buffers: s.config.Buffers.share(), start: start, endReason: func(ctx context.Context) string {
		return s.config.Runtime.EndReason(ctx, request.Container.Target)
	}}
	var (
		client  *remoteCommandClient
		network net.Conn
	)
	if up.websocket {
		client, network, err = s.acceptWebSocketRemoteCommand(w, r, websocket.Protocol(up.protocol), rc)
	} else {
		client, network, err = s.acceptSPDYRemoteCommand(w, r, up.protocol, rc)
	}
	if err != nil {
		rc.buffers.Close()
		live.End(clientGone(err))
		return
	}
	live.Connect(client)
	config := s.current()
	s.sessions.Go(func() {
		defer rc.buffers.Close()
		defer s.watch.add(live, client, network)()
		defer limitLifetime(config, live)()
		running := &remoteCommandSession{config: config, session: live, client: client, remoteCommand: rc}
		live.End(running.run())
	})
}

// acceptSPDYRemoteCommand takes the connection over. The client opens one stream for each of those
// that the command wants, and says with the header streamtype which it is.
func (s *Server) acceptSPDYRemoteCommand(w http.ResponseWriter, r *http.Request, protocol string, rc remoteCommand) (*remoteCommandClient, net.Conn, error) {
	c := rc.command
	network, buffered, err := hijackSPDY(w, protocol)
	if err != nil {
		return nil, nil, err
	}
	ready := make(chan struct{})
	client := &remoteCommandClient{
		protocol: remoteCommandProtocolByName(protocol), ready: ready, failureOpened: make(chan workload.Stream, 1),
		answersItself: answersItself(r, false), sendsSize: isKubectl(r),
	}
	expected := map[string]*workload.Stream{streamTypeError: &client.failure}
	for name, s := range map[string]struct {
		wanted bool
		stream *workload.Stream
	}{
		streamTypeStdin:  {c.Stdin, &client.stdin},
		streamTypeStdout: {c.Stdout, &client.stdout},
		streamTypeStderr: {c.Stderr && !c.TTY, &client.stderr},
		streamTypeResize: {c.TTY && client.protocol.resize, &client.resize},
	} {
		if s.wanted {
			expected[name] = s.stream
		}
	}
	var onReceipt func(spdy.Receipt)
	// Not where the client sends input: its answers to our questions stand behind that on the wire, which is not
	// read while the command does not take it, and the command may not because its output waits for the answers.
	if s.config.StatusWait > 0 && !c.Stdin && !isKubectl(r) {
		client.holdback = newHoldback()
		onReceipt = client.holdback.receipt
	}
	var conn *spdy.Conn
	conn = spdy.NewServer(network, buffered, spdy.Config{
		// A backlog of stdin serves nobody, and one that outgrows the CPU caches costs a third more.
		ConnBuffer: 1 << 20,
		Room:       rc.buffers,
		OnReceipt:  onReceipt,
		// Called by the connection's reader alone, so that it needs no lock; ready publishes the streams.
		OnStream: func(stream *spdy.Stream) {
			name := strings.ToLower(stream.Header().Get(headerStreamType))
			slot, ok := expected[name]
			if !ok {
				stream.Reset() //nolint:errcheck // a stream that nobody asked for, or a second one
				return
			}
			delete(expected, name)
			*slot = stream
			if name == streamTypeError {
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
	client.connection = conn
	if client.holdback != nil {
		client.holdback.ask = conn.AskReceipt
	}
	client.farewell = func(ctx context.Context) { awaitClose(ctx, conn) }
	return client, network, nil
}

// isKubectl tells whether the request is kubectl's own, handed on as it is: its connection is a pipe to
// kubectl, which closes it when it has read everything. Who translates makes a request of his own, without
// these headers.
func isKubectl(r *http.Request) bool { return r.Header.Get("Kubectl-Command") != "" }

// awaitClose waits for the client to close its connection. The reader goes on reading and answers
// pings meanwhile; closing first would make the client's kernel throw away what it has not delivered
// (kubernetes#60140). The watcher bounds the wait.
func awaitClose(ctx context.Context, c connection) {
	select {
	case <-c.Done():
	case <-ctx.Done():
	}
}

// acceptWebSocketRemoteCommand upgrades the connection. The channels are there from the start.
func (s *Server) acceptWebSocketRemoteCommand(w http.ResponseWriter, r *http.Request, protocol websocket.Protocol, rc remoteCommand) (*remoteCommandClient, net.Conn, error) {
	c := rc.command
	conn, err := websocket.Accept(w, r, protocol, websocket.Config{
		Channels: websocket.RemoteCommandChannels(c.Stdin, c.Stdout, c.Stderr && !c.TTY),
		Greeting: true,
		Room:     rc.buffers,
		Patience: max(s.config.InputGrace, time.Second),
	})
	if err != nil {
		return nil, nil, err
	}
	ready := make(chan struct{})
	close(ready)
	client := &remoteCommandClient{
		connection:    webSocketConnection{conn},
		protocol:      remoteCommandProtocol{name: string(protocol), resize: true, jsonStatus: protocol.StatusVersion() >= 4},
		ready:         ready,
		answersItself: answersItself(r, true), sendsSize: isKubectl(r),
		failure: conn.Channel(websocket.Error),
		// The close handshake is the protocol's end of output: there is no FIN of a channel.
		farewell: func(ctx context.Context) { conn.CloseAndWait(ctx) }, //nolint:errcheck // the session is over either way
	}
	for number, s := range map[byte]struct {
		wanted bool
		stream *workload.Stream
	}{
		websocket.Stdin:  {c.Stdin, &client.stdin},
		websocket.Stdout: {c.Stdout, &client.stdout},
		websocket.Stderr: {c.Stderr && !c.TTY, &client.stderr},
		websocket.Resize: {c.TTY, &client.resize},
	} {
		if s.wanted {
			*s.stream = conn.Channel(number)
		}
	}
	return client, conn.NetConn(), nil
}

// webSocketConnection is a connection of numbered channels.
type webSocketConnection struct{ *websocket.ChannelConn }

// Close implements connection.
func (c webSocketConnection) Close() error {
	c.CloseNow()
	return nil
}
