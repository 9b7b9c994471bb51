package streaming

import (
	"bufio"
	"bytes"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"strings"
	"testing"
	"time"

	"github.com/gorilla/websocket"
	"github.com/moby/spdystream/spdy"
)

// rawClient is a SPDY client that the test drives frame by frame, to play clients of any age and malicious ones. It has no
// goroutines, so all goroutines are the server's.
type rawClient struct {
	t        testing.TB
	conn     net.Conn
	framer   *spdy.Framer
	response *http.Response
	nextID   spdy.StreamId
	streams  map[spdy.StreamId]*rawStream // those that the test still follows
	pongs    int
	ended    error // of reading
}

// rawStream is what was received on a stream.
type rawStream struct {
	data    []byte
	replied bool
	fin     bool
	reset   spdy.RstStreamStatus // 0 if it was not reset
}

// upgradeRequest returns the head of an upgrade as a client sends it, with these header lines.
func upgradeRequest(method string, u *url.URL, lines ...string) []byte {
	return fmt.Appendf(nil, "%s %s HTTP/1.1\r\nHost: %s\r\n%s\r\n\r\n", method, u.Path, u.Host, strings.Join(lines, "\r\n"))
}

// spdyLines returns the header lines of today's clients, for these protocols.
func spdyLines(protocols ...string) []string {
	lines := []string{"Connection: Upgrade", "Upgrade: SPDY/3.1"}
	for _, p := range protocols {
		lines = append(lines, headerProtocolVersion+": "+p)
	}
	return lines
}

// dialRaw sends the head and reads the answer, which need not be an upgrade.
func dialRaw(t testing.TB, u *url.URL, head []byte) *rawClient {
	t.Helper()
	conn, err := net.Dial("tcp", u.Host)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	conn.SetDeadline(time.Now().Add(testTimeout))
	if _, err := conn.Write(head); err != nil {
		t.Fatal(err)
	}
	reader := bufio.NewReaderSize(conn, 512)
	response, err := http.ReadResponse(reader, nil)
	if err != nil {
		t.Fatal(err)
	}
	c := newRawClient(t, conn, struct {
		io.Writer
		io.Reader
	}{conn, reader})
	c.response = response
	return c
}

// dialForward begins a port-forward over SPDY, or else through the tunnel over WebSocket.
func dialForward(t testing.TB, u *url.URL, transport string) *rawClient {
	t.Helper()
	if transport != "SPDY" {
		return dialTunnel(t, u)
	}
	return dialRaw(t, u, upgradeRequest(http.MethodPost, u, spdyLines(portForwardProtocol)...))
}

// dialTunnel is like dialRaw, through the tunnel of port-forward over WebSocket.
func dialTunnel(t testing.TB, u *url.URL) *rawClient {
	t.Helper()
	dialer := websocket.Dialer{Subprotocols: []string{"SPDY/3.1+portforward.k8s.io"}}
	ws, response, err := dialer.Dial("ws://"+u.Host+u.Path, nil)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { ws.Close() })
	conn := ws.NetConn()
	conn.SetDeadline(time.Now().Add(testTimeout))
	c := newRawClient(t, conn, &tunnelClient{ws: ws})
	c.response = response
	return c
}

// tunnelClient is a byte stream in WebSocket messages.
type tunnelClient struct {
	ws      *websocket.Conn
	message io.Reader
}

func (c *tunnelClient) Write(p []byte) (int, error) {
	return len(p), c.ws.WriteMessage(websocket.BinaryMessage, p)
}

func (c *tunnelClient) Read(p []byte) (int, error) {
	for {
		if c.message == nil {
			_, message, err := c.ws.NextReader()
			if err != nil {
				return 0, err
			}
			c.message = message
		}
		n, err := c.message.Read(p)
		if err == io.EOF {
			c.message = nil
			err = nil
		}
		if n > 0 || err != nil {
			return n, err
		}
	}
}

func newRawClient(t testing.TB, conn net.Conn, wire io.ReadWriter) *rawClient {
	t.Helper()
	framer, err := spdy.NewFramer(wire, wire)
	if err != nil {
		t.Fatal(err)
	}
	return &rawClient{t: t, conn: conn, framer: framer, nextID: 1, streams: map[spdy.StreamId]*rawStream{}}
}

// open opens a stream with these headers, alternately names and values. It does not wait for the reply.
func (c *rawClient) open(pairs ...string) spdy.StreamId {
	c.t.Helper()
	header := http.Header{}
	for i := 0; i < len(pairs); i += 2 {
		header[pairs[i]] = append(header[pairs[i]], pairs[i+1])
	}
	id := c.nextID
	c.nextID += 2
	c.streams[id] = &rawStream{}
	c.write(&spdy.SynStreamFrame{StreamId: id, Headers: header})
	return id
}

// openPair opens the two streams of a forwarded connection.
func (c *rawClient) openPair(port, request string) (data, failure spdy.StreamId) {
	c.t.Helper()
	pairs := []string{headerPort, port}
	if request != "" {
		pairs = append(pairs, headerRequestID, request)
	}
	failure = c.open(append([]string{headerStreamType, streamTypeError}, pairs...)...)
	c.send(failure, "", true)
	data = c.open(append([]string{headerStreamType, streamTypeData}, pairs...)...)
	return data, failure
}

func (c *rawClient) write(frame spdy.Frame) {
	c.t.Helper()
	if err := c.framer.WriteFrame(frame); err != nil {
		c.t.Fatal(err)
	}
}

func (c *rawClient) send(id spdy.StreamId, data string, fin bool) {
	c.t.Helper()
	frame := &spdy.DataFrame{StreamId: id, Data: []byte(data)}
	if fin {
		frame.Flags = spdy.DataFlagFin
	}
	c.write(frame)
}

func (c *rawClient) reset(id spdy.StreamId) {
	c.t.Helper()
	c.write(&spdy.RstStreamFrame{StreamId: id, Status: spdy.Cancel})
}

// read reads one frame. It returns false at the end of the connection.
func (c *rawClient) read() bool {
	frame, err := c.framer.ReadFrame()
	if err != nil {
		c.ended = err
		return false
	}
	switch f := frame.(type) {
	case *spdy.SynReplyFrame:
		if s := c.streams[f.StreamId]; s != nil {
			s.replied = true
		}
	case *spdy.RstStreamFrame:
		if s := c.streams[f.StreamId]; s != nil {
			s.reset = f.Status
		}
	case *spdy.DataFrame:
		if s := c.streams[f.StreamId]; s != nil {
			s.data = append(s.data, f.Data...)
			s.fin = s.fin || f.Flags&spdy.DataFlagFin != 0
		}
	case *spdy.PingFrame:
		c.pongs++
	}
	return true
}

// until reads frames until the condition is true.
func (c *rawClient) until(what string, condition func() bool) {
	c.t.Helper()
	for !condition() {
		if !c.read() {
			c.t.Fatalf("waiting for %s: %v", what, c.ended)
		}
	}
}

// finished waits for the end of a stream and returns what was received on it.
func (c *rawClient) finished(id spdy.StreamId) string {
	c.t.Helper()
	s := c.streams[id]
	c.until(fmt.Sprintf("the end of stream %d", id), func() bool { return s.fin || s.reset != 0 })
	return string(s.data)
}

// remoteCommandStreams opens the streams of a command by type, in the order of client-go.
func (c *rawClient) remoteCommandStreams(types ...string) map[string]spdy.StreamId {
	c.t.Helper()
	ids := map[string]spdy.StreamId{}
	for _, kind := range types {
		ids[kind] = c.open(headerStreamType, kind)
	}
	return ids
}

// body reads the answer to a request that was not upgraded.
func (c *rawClient) body() string {
	c.t.Helper()
	defer c.response.Body.Close()
	var b bytes.Buffer
	if _, err := b.ReadFrom(c.response.Body); err != nil {
		c.t.Fatal(err)
	}
	return b.String()
}

// ping sends a PING. read counts the answers.
func (c *rawClient) ping() {
	c.t.Helper()
	c.write(&spdy.PingFrame{Id: 1})
}
