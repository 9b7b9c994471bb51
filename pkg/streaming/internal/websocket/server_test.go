package websocket

import (
	"context"
	"crypto/tls"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/gorilla/websocket"
	"go.uber.org/goleak"

	"github.com/streamshim/streamshim/pkg/handover"
	"github.com/streamshim/streamshim/pkg/streaming/internal/websocket/frames"
)

func TestMain(m *testing.M) {
	code := m.Run()
	if code == 0 {
		// spdystream waits a second for a reader of the error of a close.
		if err := goleak.Find(goleak.IgnoreTopFunction("github.com/moby/spdystream.(*Connection).shutdown")); err != nil {
			fmt.Fprintln(os.Stderr, err)
			code = 1
		}
	}
	os.Exit(code)
}

// patience bounds the wait for what must happen. No test that passes waits that long.
const patience = 2 * time.Minute

// testServer is an HTTP server that accepts channel connections and plays a session on each.
type testServer struct {
	*httptest.Server
	// ended receives Serve's error for each connection, after its session has returned.
	ended chan error
}

// newTestServer runs session beside Serve on each connection. The session ends the connection, or returns when it is over.
func newTestServer(t testing.TB, config Config, session func(*ChannelConn)) *testServer {
	t.Helper()
	s := &testServer{ended: make(chan error, 1000)}
	var handlers sync.WaitGroup
	var mu sync.Mutex
	var accepted []*ChannelConn
	s.Server = httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		handlers.Add(1)
		defer handlers.Done()
		protocol, err := Negotiate(r, RemoteCommand)
		if err != nil {
			status := http.StatusInternalServerError
			if refused, ok := err.(*HandshakeError); ok {
				status = refused.StatusCode
			}
			http.Error(w, err.Error(), status)
			return
		}
		c, err := Accept(w, r, protocol, config)
		if err != nil {
			s.ended <- err // the client left before the greeting
			return
		}
		mu.Lock()
		accepted = append(accepted, c)
		mu.Unlock()
		finished := make(chan struct{})
		go func() {
			defer close(finished)
			session(c)
		}()
		err = c.Serve(context.Background())
		select {
		case <-c.Done():
		default:
			if err != handover.ErrFrozen {
				t.Error("Serve returned before Done was closed")
			}
		}
		<-finished
		s.ended <- err
	}))
	t.Cleanup(func() {
		s.Close()
		mu.Lock()
		for _, c := range accepted { // a test that has failed may leave some
			c.CloseNow()
		}
		mu.Unlock()
		handlers.Wait()
	})
	return s
}

// waitEnded returns Serve's error of the next connection that is over.
func (s *testServer) waitEnded(t testing.TB) error {
	t.Helper()
	select {
	case err := <-s.ended:
		return err
	case <-time.After(patience):
		t.Fatal("the connection does not end")
		return nil
	}
}

// dial connects with gorilla's client.
func (s *testServer) dial(t testing.TB, offers ...Protocol) *websocket.Conn {
	t.Helper()
	dialer := websocket.Dialer{}
	for _, offer := range offers {
		dialer.Subprotocols = append(dialer.Subprotocols, string(offer))
	}
	client, response, err := dialer.Dial("ws"+strings.TrimPrefix(s.URL, "http"), nil)
	if err != nil {
		t.Fatalf("dial: %v (%v)", err, response)
	}
	t.Cleanup(func() { client.Close() })
	client.SetReadDeadline(time.Now().Add(patience))
	return client
}

const rawHandshake = "GET / HTTP/1.1\r\nHost: %s\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n" +
	"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\nSec-WebSocket-Protocol: %s\r\n\r\n"

// dialRaw connects and upgrades by hand. It returns the TCP connection after the head of the answer.
func (s *testServer) dialRaw(t testing.TB, protocol Protocol) *net.TCPConn {
	t.Helper()
	client := s.dialTCP(t)
	if _, err := fmt.Fprintf(client, rawHandshake, s.Listener.Addr(), protocol); err != nil {
		t.Fatal(err)
	}
	skipHead(t, client)
	return client
}

func (s *testServer) dialTCP(t testing.TB) *net.TCPConn {
	t.Helper()
	client, err := net.Dial("tcp", s.Listener.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { client.Close() })
	return client.(*net.TCPConn)
}

func skipHead(t testing.TB, r io.Reader) {
	t.Helper()
	var head []byte
	for !strings.HasSuffix(string(head), "\r\n\r\n") {
		b := make([]byte, 1)
		if _, err := io.ReadFull(r, b); err != nil {
			t.Fatalf("read the handshake's answer: %v after %q", err, head)
		}
		head = append(head, b[0])
	}
	if !strings.HasPrefix(string(head), "HTTP/1.1 101 ") {
		t.Fatalf("not upgraded: %q", head)
	}
}

// clientFrame returns a masked frame. The mask is zero, so that the payload is readable.
func clientFrame(opcode byte, final bool, payload string) []byte {
	b := make([]byte, frames.MaxHeader)
	b = b[:frames.PutHeader(b, opcode, len(payload))]
	if !final {
		b[0] &^= frames.Final
	}
	b[1] |= 0x80
	b = append(b, 0, 0, 0, 0)
	return append(b, payload...)
}

// readMessage reads the client's next message and checks its channel.
func readMessage(t testing.TB, client *websocket.Conn, channel byte) string {
	t.Helper()
	_, message, err := client.ReadMessage()
	if err != nil {
		t.Fatalf("read a message: %v", err)
	}
	if len(message) == 0 || message[0] != channel {
		t.Fatalf("got message %.20q, want one on channel %d", message, channel)
	}
	return string(message[1:])
}

// echo sends stdin back on stdout until the end of stdin, then a status, and ends in order.
func echo(c *ChannelConn) {
	if _, err := io.Copy(c.Channel(Stdout), c.Channel(Stdin)); err != nil {
		<-c.Done()
		return
	}
	io.WriteString(c.Channel(Error), `{"status":"Success"}`)
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	c.CloseAndWait(ctx)
}

// untilDone leaves the connection alone.
func untilDone(c *ChannelConn) { <-c.Done() }

// newTLSServer serves the handler of the plain server over TLS.
func newTLSServer(t testing.TB, plain *testServer) (*httptest.Server, *tls.Config) {
	s := httptest.NewTLSServer(plain.Config.Handler)
	t.Cleanup(s.Close)
	return s, s.Client().Transport.(*http.Transport).TLSClientConfig
}

// protocols are those with channels.
var protocols = []Protocol{ChannelUnnamed, ChannelV1, ChannelV1Base64, ChannelV4, ChannelV4Base64, ChannelV5}

// halfClose is the first byte of a v5 client's half-close.
const halfClose = 255

// wireFrame is a frame that the server has sent.
type wireFrame struct {
	opcode  byte
	payload []byte
}
