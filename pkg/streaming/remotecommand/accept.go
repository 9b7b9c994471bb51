package remotecommand

import (
	"context"
	"net/http"
	"strings"
	"time"

	"github.com/streamshim/streamshim/pkg/session"
	"github.com/streamshim/streamshim/pkg/streaming/internal/holdback"
	"github.com/streamshim/streamshim/pkg/streaming/internal/lifetime"
	"github.com/streamshim/streamshim/pkg/streaming/internal/spdy"
	"github.com/streamshim/streamshim/pkg/streaming/internal/transport"
	"github.com/streamshim/streamshim/pkg/streaming/internal/websocket"
	"github.com/streamshim/streamshim/pkg/streaming/remotecommand/internal/protocol"
	"github.com/streamshim/streamshim/pkg/workload"
)

// ProtocolNames returns the protocol versions that are spoken over SPDY, the best first.
func ProtocolNames() []string { return protocol.Names() }

// Accept upgrades the connection of a request and returns its session, for Session.Run. If it returns an error, it has
// answered the request.
func Accept(w http.ResponseWriter, r *http.Request, up transport.Upgrade, request *Request, live *session.Session, config Config, terms lifetime.Terms) (*Session, error) {
	s := newSession(request, live, config, terms)
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

// acceptSPDY takes the connection over. The client opens one stream for each stream of the command, and names it in the
// header streamtype.
func (s *Session) acceptSPDY(w http.ResponseWriter, r *http.Request, version string) error {
	network, buffered, err := transport.HijackSPDY(w, version)
	if err != nil {
		return err
	}
	s.client = &client{
		network: network, protocol: protocol.ByName(version), ready: make(chan struct{}), failureOpened: make(chan workload.Stream, 1),
		answersItself: answersItself(r, false), sendsSize: isKubectl(r),
	}
	if s.config.holdsStatusBack(r, s.request.Command) {
		s.client.holdback = holdback.New()
	}
	opener := s.newOpener()
	opener.serve(spdy.NewServer(network, buffered, s.spdyConfig(opener)))
	return nil
}

// spdyConfig returns the configuration of the client's SPDY connection.
func (s *Session) spdyConfig(opener *opener) spdy.Config {
	config := spdy.Config{
		// A large backlog of stdin has no use. If it does not fit into the CPU caches, it costs a third more.
		ConnBuffer: 1 << 20,
		Room:       s.terms.Buffers,
		OnStream:   opener.opened,
		OnPanic:    s.panicked,
	}
	if h := s.client.holdback; h != nil {
		config.Receipts = func(c *spdy.Conn) spdy.Receipts {
			h.Attach(c)
			return h
		}
	}
	return config
}

// slots returns where the streams of the command are kept, by name.
func (s *Session) slots() map[string]*workload.Stream {
	c, client := s.request.Command, s.client
	slots := map[string]*workload.Stream{transport.StreamError: &client.failure}
	for name, slot := range map[string]struct {
		wanted bool
		stream *workload.Stream
	}{
		transport.StreamStdin:  {c.Stdin, &client.stdin},
		transport.StreamStdout: {c.Stdout, &client.stdout},
		transport.StreamStderr: {c.Stderr && !c.TTY, &client.stderr},
		transport.StreamResize: {c.TTY && client.protocol.Resize, &client.resize},
	} {
		if slot.wanted {
			slots[name] = slot.stream
		}
	}
	return slots
}

// opener receives the streams that the client opens. Only the connection's read loop calls it, so it needs no lock. Closing
// ready publishes the streams.
type opener struct {
	client   *client
	conn     *spdy.Conn
	expected map[string]*workload.Stream
}

// newOpener returns an opener that expects the streams that are not open yet.
func (s *Session) newOpener() *opener {
	o := &opener{client: s.client, expected: s.slots()}
	for name, slot := range o.expected {
		if *slot != nil {
			delete(o.expected, name)
		}
	}
	return o
}

// serve sets the connection. It is called before the connection is served.
func (o *opener) serve(conn *spdy.Conn) {
	o.conn = conn
	o.client.Conn = transport.Streams{Conn: conn}
	o.client.closeAndWait = func(ctx context.Context) { transport.AwaitClose(ctx, o.client.Conn) }
}

func (o *opener) opened(stream *spdy.Stream) {
	name := strings.ToLower(stream.Header().Get(transport.HeaderStreamType))
	slot, ok := o.expected[name]
	if !ok {
		stream.Reset() //nolint:errcheck // an unknown stream, or a second one of its kind
		return
	}
	delete(o.expected, name)
	*slot = stream
	if name == transport.StreamError {
		// Before the client knows that its streams are open. This does not block, because nothing else was sent.
		o.client.protocol.PromiseStatus(stream)
		o.client.statusRefused = stream.Done()
		o.client.failureOpened <- stream
	}
	if len(o.expected) == 0 {
		o.conn.RefuseStreams()
		close(o.client.ready)
	}
}

// holdsStatusBack reports whether the status waits for the reader behind a translator. It does not wait if the client
// sends input, because that could deadlock: the answers to our PINGs are behind the input, the input is not read while the
// command does not read it, and the command may not read it because its output waits for the answers.
func (c Config) holdsStatusBack(r *http.Request, command workload.Command) bool {
	return c.StatusWait > 0 && !command.Stdin && !isKubectl(r)
}

// isKubectl reports whether kubectl itself has made the request. Then the connection leads straight to kubectl, which
// closes it when it has read everything. A translator sends a new request, without this header.
func isKubectl(r *http.Request) bool { return r.Header.Get("Kubectl-Command") != "" }

// acceptWebSocket upgrades the connection. The channels are open from the start.
func (s *Session) acceptWebSocket(w http.ResponseWriter, r *http.Request, version websocket.Protocol) error {
	c := s.request.Command
	config := s.channelConfig()
	config.Channels, config.Greeting = websocket.RemoteCommandChannels(c.Stdin, c.Stdout, c.Stderr && !c.TTY), true
	conn, err := websocket.Accept(w, r, version, config)
	if err != nil {
		return err
	}
	s.client = &client{
		Conn: transport.Channels{ChannelConn: conn}, network: conn.NetConn(), ready: make(chan struct{}),
		protocol:      protocol.Version{Name: string(version), Resize: true, JSONStatus: version.StatusVersion() >= 4},
		answersItself: answersItself(r, true), sendsSize: isKubectl(r), closeAndWait: closeHandshake(conn),
	}
	for name, slot := range s.slots() {
		*slot = conn.Channel(channels[name])
	}
	close(s.client.ready)
	return nil
}

// channelConfig returns the configuration of the client's WebSocket channels.
func (s *Session) channelConfig() websocket.Config {
	return websocket.Config{Room: s.terms.Buffers, Patience: max(s.config.InputGrace, time.Second), OnPanic: s.panicked}
}

// channels are the numbers of the streams over WebSocket.
var channels = map[string]byte{
	transport.StreamStdin: websocket.Stdin, transport.StreamStdout: websocket.Stdout, transport.StreamStderr: websocket.Stderr,
	transport.StreamError: websocket.Error, transport.StreamResize: websocket.Resize,
}

// closeHandshake returns a function that does the close handshake. It is how the protocol ends output, because a channel has
// no FIN.
func closeHandshake(conn *websocket.ChannelConn) func(context.Context) {
	return func(ctx context.Context) { conn.CloseAndWait(ctx) } //nolint:errcheck // the session is over either way
}
