package transport

import (
	"context"
	"crypto/sha256"
	"encoding/base64"
	"encoding/binary"
	"errors"
	"hash"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	gorilla "github.com/gorilla/websocket"
	"github.com/moby/spdystream"

	"github.com/streamshim/streamshim/internal/testutil"
	"github.com/streamshim/streamshim/internal/testutil/leak"
	"github.com/streamshim/streamshim/pkg/handover"
	"github.com/streamshim/streamshim/pkg/streaming/internal/holdback"
	"github.com/streamshim/streamshim/pkg/streaming/internal/spdy"
	"github.com/streamshim/streamshim/pkg/streaming/internal/websocket"
	"github.com/streamshim/streamshim/pkg/workload"
)

// testTimeout only bounds tests that would hang.
const testTimeout = 2 * time.Minute

var longAgo = time.Unix(1, 0)

// session plays a session: it moves bytes between the streams of a connection and pipes, and is handed over again and
// again.
type session struct {
	t      *testing.T
	config ResumeConfig

	mu     sync.Mutex
	conn   Conn
	lines  map[uint32]*line
	frozen bool
	group  sync.WaitGroup // Serve and the lines

	longest time.Duration // that a freeze has taken
	states  int           // bytes of the largest state
}

// line is one stream. Without in the client sends nothing on it, without out it receives nothing.
type line struct {
	stream  workload.Stream
	in, out *os.File
	plain   bool // in is not written to directly

	outEnded chan struct{} // closed after the last byte of out
}

func newSession(t *testing.T) *session { return &session{t: t, lines: map[uint32]*line{}} }

// add starts a stream, or leaves that to the next resume.
func (s *session) add(stream workload.Stream, l *line) {
	s.mu.Lock()
	defer s.mu.Unlock()
	l.stream = stream
	s.lines[StreamID(stream)] = l
	if !s.frozen {
		s.start(l)
	}
}

func (s *session) serve(conn Conn) {
	s.conn = conn
	s.group.Go(func() { conn.Serve(context.Background()) })
}

func (s *session) start(l *line) {
	if l.in != nil {
		s.group.Go(func() {
			var to io.Writer = l.in
			if l.plain {
				to = struct{ io.Writer }{l.in}
			}
			switch _, err := l.stream.WriteTo(to); err {
			case handover.ErrFrozen:
			case nil:
				l.in.Close()
				l.in = nil
			default:
				s.t.Errorf("WriteTo of stream %d: %v", StreamID(l.stream), err)
			}
		})
	}
	if l.out != nil {
		s.group.Go(func() {
			switch _, err := l.stream.ReadFrom(l.out); err {
			case handover.ErrFrozen:
			case nil:
				l.stream.CloseWrite()
				l.out.Close()
				l.out = nil
				close(l.outEnded)
			default:
				s.t.Errorf("ReadFrom of stream %d: %v", StreamID(l.stream), err)
			}
		})
	}
}

func wait(t *testing.T, group *sync.WaitGroup, what string) {
	t.Helper()
	done := make(chan struct{})
	go func() { group.Wait(); close(done) }()
	await(t, done, what)
}

func await(t *testing.T, done <-chan struct{}, what string) {
	t.Helper()
	select {
	case <-done:
	case <-time.After(testTimeout):
		t.Fatalf("timed out waiting for %s", what)
	}
}

// handOver freezes, encodes the state, decodes it, and continues.
func (s *session) handOver() {
	s.t.Helper()
	s.mu.Lock()
	s.frozen = true
	began := time.Now()
	s.conn.Freeze()
	s.conn.Freeze()
	for _, l := range s.lines {
		if l.in != nil {
			l.in.SetWriteDeadline(longAgo)
		}
		if l.out != nil {
			l.out.SetReadDeadline(longAgo)
		}
	}
	s.mu.Unlock()
	wait(s.t, &s.group, "calls on a frozen connection")
	s.longest = max(s.longest, time.Since(began))
	s.conn.Close() // as a session does with defer

	files := handover.NewFiles()
	state, err := s.conn.State(files)
	if err != nil {
		s.t.Fatal(err)
	}
	state, files = throughMemory(s.t, state, files, &s.states)
	resumed, err := Resume(state, files, s.config)
	if err != nil {
		s.t.Fatal(err)
	}
	files.Close()
	s.mu.Lock()
	defer s.mu.Unlock()
	s.frozen = false
	for id, l := range s.lines {
		l.stream = resumed.Stream(id)
		if l.in != nil {
			l.in.SetWriteDeadline(time.Time{})
		}
		if l.out != nil {
			l.out.SetReadDeadline(time.Time{})
		}
		if l.stream == nil && (l.in != nil || l.out != nil) {
			s.t.Fatalf("stream %d is lost", id)
		}
		s.start(l)
	}
	s.serve(resumed.Conn)
}

// throughMemory returns a state as the next program decodes it.
func throughMemory(t *testing.T, state State, files *handover.Files, largest *int) (State, *handover.Files) {
	t.Helper()
	encoded, err := handover.Encode(state)
	if err != nil {
		t.Fatal(err)
	}
	*largest = max(*largest, len(encoded))
	descriptors, err := files.Inherit()
	if err != nil {
		t.Fatal(err)
	}
	files, err = handover.Inherited(descriptors)
	if err != nil {
		t.Fatal(err)
	}
	var decoded State
	if err := handover.Decode(encoded, &decoded); err != nil {
		t.Fatal(err)
	}
	return decoded, files
}

// end waits until everything has ended by itself.
func (s *session) end() {
	s.t.Helper()
	wait(s.t, &s.group, "the end of the session")
	s.conn.Close()
	s.t.Logf("the longest freeze took %v, the largest state %d bytes", s.longest, s.states)
}

// flow is the bytes of one direction: made here, and compared where they arrive.
type flow struct {
	sent, received hash.Hash
	n, m           int64
	slow           bool // the reader pauses now and then
}

func newFlow(slow bool) *flow {
	return &flow{sent: sha256.New(), received: sha256.New(), slow: slow}
}

// pour writes pieces of all sizes until stop is closed.
func (f *flow) pour(t *testing.T, w io.Writer, stop <-chan struct{}) {
	chunk := make([]byte, 64<<10)
	for {
		select {
		case <-stop:
			return
		default:
		}
		size := 1 + rand.IntN(1<<(1+rand.IntN(16)))
		p := chunk[:min(size, len(chunk))]
		for i := 0; i+8 <= len(p); i += 8 {
			binary.LittleEndian.PutUint64(p[i:], rand.Uint64())
		}
		f.sent.Write(p)
		f.n += int64(len(p))
		if _, err := w.Write(p); err != nil {
			t.Errorf("write: %v", err)
			return
		}
	}
}

// drain reads to the end.
func (f *flow) drain(t *testing.T, r io.Reader) {
	p := make([]byte, 64<<10)
	for {
		n, err := r.Read(p)
		f.received.Write(p[:n])
		f.m += int64(n)
		if err == io.EOF {
			return
		}
		if err != nil {
			t.Errorf("read: %v", err)
			return
		}
		if f.slow && rand.IntN(8) == 0 {
			time.Sleep(time.Millisecond)
		}
	}
}

func (f *flow) check(t *testing.T, name string) {
	t.Helper()
	if f.n != f.m || string(f.sent.Sum(nil)) != string(f.received.Sum(nil)) {
		t.Errorf("%s: %d bytes were sent, %d came, or others", name, f.n, f.m)
	}
	if f.n == 0 {
		t.Errorf("%s: nothing was sent", name)
	}
}

// duplex is a stream with both flows: the pipes at the session's side, and what happens with them.
type duplex struct {
	up, down *flow
	name     string
	line     *line
	inR      *os.File // the other ends of the line's pipes
	outW     *os.File
}

func newDuplex(t *testing.T, name string, slowUp, slowDown, plain bool) *duplex {
	d := &duplex{name: name, up: newFlow(slowUp), down: newFlow(slowDown), line: &line{plain: plain, outEnded: make(chan struct{})}}
	d.inR, d.line.in = testutil.Pipe(t)
	d.line.out, d.outW = testutil.Pipe(t)
	return d
}

func (d *duplex) onlyUp() {
	d.line.out.Close()
	d.outW.Close()
	d.line.out, d.outW = nil, nil
}

func (d *duplex) onlyDown() {
	d.line.in.Close()
	d.inR.Close()
	d.line.in, d.inR = nil, nil
}

// run plays the process at the session's side.
func (d *duplex) run(t *testing.T, group *sync.WaitGroup, stop <-chan struct{}) {
	d.runUp(t, group)
	d.runDown(t, group, stop)
}

func (d *duplex) runUp(t *testing.T, group *sync.WaitGroup) {
	if d.inR != nil {
		group.Go(func() {
			d.up.drain(t, d.inR)
			d.inR.Close()
		})
	}
}

func (d *duplex) runDown(t *testing.T, group *sync.WaitGroup, stop <-chan struct{}) {
	if d.outW != nil {
		group.Go(func() {
			d.down.pour(t, d.outW, stop)
			d.outW.Close()
		})
	}
}

func (d *duplex) check(t *testing.T) {
	t.Helper()
	if d.inR != nil {
		d.up.check(t, d.name+", to the session")
	}
	if d.outW != nil {
		d.down.check(t, d.name+", from the session")
	}
}

// count is the number of hand-overs of a test.
func count() int {
	if testing.Short() {
		return 10
	}
	return 40
}

// handOvers hands over at random moments.
func (s *session) handOvers() {
	for range count() {
		time.Sleep(rand.N(15 * time.Millisecond))
		s.handOver()
	}
}

func header(name string) http.Header { return http.Header{"Streamtype": {name}} }

// threeStreams returns a stream of each kind.
func threeStreams(t *testing.T) map[string]*duplex {
	return map[string]*duplex{
		"0": newDuplex(t, "both fast", false, false, false),
		"1": newDuplex(t, "slow to the session", true, false, true),
		"2": newDuplex(t, "slow from the session", false, true, false),
	}
}

// mobyFlows runs the flows of a spdystream stream.
func mobyFlows(t *testing.T, clients *sync.WaitGroup, stream *spdystream.Stream, d *duplex, stop <-chan struct{}) {
	clients.Go(func() {
		d.up.pour(t, stream, stop)
		stream.Close()
	})
	clients.Go(func() { d.down.drain(t, stream) })
}

// servedSPDY hands over a server whose client is spdystream.
func servedSPDY(t *testing.T, network net.Conn, config spdy.Config, client net.Conn) {
	s := newSession(t)
	streams := threeStreams(t)
	config.OnStream = func(stream *spdy.Stream) {
		s.add(stream, streams[stream.Header().Get("streamtype")].line)
	}
	s.config.SPDY = config
	s.serve(Streams{spdy.NewServer(network, nil, config)})

	peer, err := spdystream.NewConnection(client, false)
	if err != nil {
		t.Fatal(err)
	}
	var served, others sync.WaitGroup
	served.Go(func() { peer.Serve(spdystream.NoOpStreamHandler) })
	stop := make(chan struct{})
	handingOver := make(chan struct{})
	go func() {
		defer close(handingOver)
		s.handOvers()
	}()
	for name, d := range streams {
		d.run(t, &others, stop)
		stream, err := peer.CreateStream(header(name), nil, false)
		if err != nil {
			t.Fatal(err)
		}
		mobyFlows(t, &others, stream, d, stop)
	}
	await(t, handingOver, "the hand-overs")
	close(stop)
	wait(t, &others, "the flows")
	for _, d := range streams {
		d.check(t)
	}
	peer.Close()
	client.Close()
	wait(t, &served, "the client's end")
	s.end()
	if err := s.conn.Err(); !LeftInOrder(err) {
		t.Errorf("the client has left: %v", err)
	}
}

func leaks(t *testing.T) {
	leak.Check(t)
}

func TestHandOverSPDY(t *testing.T) {
	leaks(t)
	client, network := testutil.TCPPair(t)
	servedSPDY(t, network, spdy.Config{}, client)
}

func TestHandOverSPDYWithReceipts(t *testing.T) {
	leaks(t)
	client, network := testutil.TCPPair(t)
	servedSPDY(t, network, spdy.Config{Receipts: func(c *spdy.Conn) spdy.Receipts {
		h := holdback.New()
		h.Attach(c)
		return h
	}}, client)
}

// TestHandOverSPDYWithoutRoom hands over a session with little room, whose connection is often not read.
func TestHandOverSPDYWithoutRoom(t *testing.T) {
	leaks(t)
	client, network := testutil.TCPPair(t)
	servedSPDY(t, network, spdy.Config{StreamBuffer: 1, ConnBuffer: 1, Stall: time.Hour}, client)
}

// TestHandOverSPDYClient hands over our client's end, which the relay to the runtime has.
func TestHandOverSPDYClient(t *testing.T) {
	leaks(t)
	network, server := testutil.TCPPair(t)
	s := newSession(t)
	streams := threeStreams(t)
	stop := make(chan struct{})
	var served, others sync.WaitGroup
	peer, err := spdystream.NewConnection(server, true)
	if err != nil {
		t.Fatal(err)
	}
	served.Go(func() {
		peer.Serve(func(stream *spdystream.Stream) {
			stream.SendReply(http.Header{}, false)
			mobyFlows(t, &others, stream, streams[stream.Headers().Get("streamtype")], stop)
		})
	})
	conn := spdy.NewClient(network, nil, spdy.Config{})
	s.serve(Streams{conn})
	for name, d := range streams {
		d.run(t, &others, stop)
		stream, err := conn.OpenStream(header(name))
		if err != nil {
			t.Fatal(err)
		}
		if err := stream.WaitAccepted(t.Context()); err != nil {
			t.Fatal(err)
		}
		s.add(stream, d.line)
	}
	s.handOvers()
	close(stop)
	wait(t, &others, "the flows")
	for _, d := range streams {
		d.check(t)
	}
	peer.Close()
	server.Close()
	wait(t, &served, "the peer's end")
	s.end()
}

// upgraded returns a WebSocket client connected to a handler. The handler owns the connection until it returns.
func upgraded(t *testing.T, protocol websocket.Protocol, handler http.HandlerFunc) *gorilla.Conn {
	t.Helper()
	var handlers sync.WaitGroup
	s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		handlers.Add(1)
		defer handlers.Done()
		handler(w, r)
	}))
	dialer := gorilla.Dialer{}
	if protocol != "" {
		dialer.Subprotocols = []string{string(protocol)}
	}
	client, _, err := dialer.Dial("ws"+strings.TrimPrefix(s.URL, "http"), nil)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		client.Close()
		wait(t, &handlers, "the handlers")
		s.Close()
	})
	return client
}

// tunnelled is a client's byte stream in a tunnel.
type tunnelled struct {
	*gorilla.Conn
	message io.Reader
}

func (c *tunnelled) Read(p []byte) (int, error) {
	for {
		if c.message == nil {
			_, r, err := c.NextReader()
			if err != nil {
				return 0, err
			}
			c.message = r
		}
		n, err := c.message.Read(p)
		if err == io.EOF {
			c.message, err = nil, nil
		}
		if n > 0 || err != nil {
			return n, err
		}
	}
}

func (c *tunnelled) Write(p []byte) (int, error) {
	return len(p), c.WriteMessage(gorilla.BinaryMessage, p)
}

func (c *tunnelled) SetDeadline(at time.Time) error {
	return errors.Join(c.SetReadDeadline(at), c.SetWriteDeadline(at))
}

func TestHandOverTunnel(t *testing.T) {
	leaks(t)
	accepted := make(chan *websocket.TunnelConn, 1)
	client := upgraded(t, websocket.PortForwardTunnel, func(w http.ResponseWriter, r *http.Request) {
		tunnel, err := websocket.AcceptTunnel(w, r)
		if err != nil {
			t.Error(err)
			return
		}
		accepted <- tunnel
	})
	servedSPDY(t, <-accepted, spdy.Config{}, &tunnelled{Conn: client})
}

// channelWriter sends messages, some of them in fragments with pings between.
type channelWriter struct {
	t       *testing.T
	mu      *sync.Mutex
	conn    *gorilla.Conn
	channel byte
	base64  bool
}

func (c channelWriter) Write(p []byte) (int, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	kind, message := gorilla.BinaryMessage, append([]byte{c.channel}, p...)
	if c.base64 {
		kind, message = gorilla.TextMessage, append([]byte{'0' + c.channel}, base64.StdEncoding.EncodeToString(p)...)
	}
	w, err := c.conn.NextWriter(kind)
	if err != nil {
		return 0, err
	}
	// gorilla sends what is longer than its buffer in fragments.
	if _, err := w.Write(message[:len(message)/2]); err != nil {
		return 0, err
	}
	if rand.IntN(4) == 0 {
		c.conn.WriteControl(gorilla.PingMessage, []byte("are you there?"), time.Time{})
	}
	if _, err := w.Write(message[len(message)/2:]); err != nil {
		return 0, err
	}
	return len(p), w.Close()
}

func TestHandOverChannels(t *testing.T) {
	for _, protocol := range []websocket.Protocol{
		websocket.ChannelV5, websocket.ChannelV4, websocket.ChannelV4Base64, websocket.ChannelV1, websocket.ChannelV1Base64, websocket.ChannelUnnamed,
	} {
		t.Run("protocol "+string(protocol), func(t *testing.T) {
			leaks(t)
			config := websocket.Config{Channels: websocket.RemoteCommandChannels(true, true, true), Greeting: true}
			accepted := make(chan *websocket.ChannelConn, 1)
			client := upgraded(t, protocol, func(w http.ResponseWriter, r *http.Request) {
				conn, err := websocket.Accept(w, r, protocol, config)
				if err != nil {
					t.Error(err)
					return
				}
				accepted <- conn
			})
			conn := <-accepted
			s := newSession(t)
			s.config.Channels = config
			s.serve(Channels{conn})
			stdin, stdout, stderr := newDuplex(t, "stdin", true, false, false), newDuplex(t, "stdout", false, false, false), newDuplex(t, "stderr", false, true, false)
			stdin.onlyUp()
			stdout.onlyDown()
			stderr.onlyDown()
			stop := make(chan struct{})
			var others, drained, reader sync.WaitGroup
			for number, d := range []*duplex{websocket.Stdin: stdin, websocket.Stdout: stdout, websocket.Stderr: stderr} {
				s.add(conn.Channel(byte(number)), d.line) //nolint:gosec // small
				d.runUp(t, &drained)
				d.runDown(t, &others, stop)
			}
			var writing sync.Mutex
			others.Go(func() {
				stdin.up.pour(t, channelWriter{t, &writing, client, websocket.Stdin, protocol.Base64()}, stop)
				if protocol.HalfClose() {
					client.WriteMessage(gorilla.BinaryMessage, []byte{255, websocket.Stdin})
				}
			})
			pongs := 0
			client.SetPongHandler(func(string) error { pongs++; return nil })
			reader.Go(func() {
				for {
					_, message, err := client.ReadMessage()
					if err != nil {
						if !gorilla.IsCloseError(err, gorilla.CloseNormalClosure) {
							t.Errorf("the client's end: %v", err)
						}
						return
					}
					channel, payload := message[0], message[1:]
					if protocol.Base64() {
						channel -= '0'
						var err error
						if payload, err = base64.StdEncoding.DecodeString(string(payload)); err != nil {
							t.Error(err)
						}
					}
					d := map[byte]*duplex{websocket.Stdout: stdout, websocket.Stderr: stderr}[channel]
					if d == nil {
						t.Errorf("a message on channel %d", channel)
						return
					}
					d.down.received.Write(payload)
					d.down.m += int64(len(payload))
				}
			})
			s.handOvers()
			close(stop)
			await(t, stdout.line.outEnded, "the end of stdout")
			await(t, stderr.line.outEnded, "the end of stderr")
			wait(t, &others, "the flows")
			if !protocol.HalfClose() { // its end of input is its Close
				client.WriteControl(gorilla.CloseMessage, gorilla.FormatCloseMessage(gorilla.CloseNormalClosure, ""), time.Now().Add(testTimeout))
			}
			wait(t, &drained, "stdin")
			if protocol.HalfClose() {
				if err := s.conn.(Channels).CloseAndWait(t.Context()); err != nil {
					t.Error(err)
				}
			}
			wait(t, &reader, "the client")
			s.end()
			for _, d := range []*duplex{stdin, stdout, stderr} {
				d.check(t)
			}
			if pongs == 0 {
				t.Error("no ping was answered")
			}
		})
	}
}
