package websocket

import (
	"bytes"
	"errors"
	"io"
	"math/rand/v2"
	"net/http"
	"net/http/httptest"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/gorilla/websocket"

	"github.com/streamshim/streamshim/pkg/streaming/internal/websocket/frames"
)

// newTunnelServer runs session on each tunnel and then closes the tunnel.
func newTunnelServer(t *testing.T, session func(*TunnelConn)) *testServer {
	s := &testServer{ended: make(chan error, 100)}
	s.Server = httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		tunnel, err := AcceptTunnel(w, r)
		if err != nil {
			t.Errorf("accept: %v", err)
			return
		}
		session(tunnel)
		s.ended <- tunnel.Close()
	}))
	t.Cleanup(s.Close)
	return s
}

func TestTunnelCarriesBytes(t *testing.T) {
	payload := make([]byte, 3<<20)
	rand.NewChaCha8([32]byte{5}).Read(payload)
	s := newTunnelServer(t, func(tunnel *TunnelConn) {
		if _, err := tunnel.Write(payload); err != nil {
			t.Errorf("write: %v", err)
		}
		got, err := io.ReadAll(tunnel)
		if err != nil || !bytes.Equal(got, payload) {
			t.Errorf("read %d of %d bytes, or others: %v", len(got), len(payload), err)
		}
		if n, err := tunnel.Read(make([]byte, 1)); n != 0 || err != io.EOF {
			t.Errorf("read after the end: %d, %v", n, err)
		}
		if tunnel.LocalAddr() == nil || tunnel.RemoteAddr() == nil {
			t.Error("no addresses")
		}
	})
	client := s.dial(t, PortForwardTunnel)
	if client.Subprotocol() != string(PortForwardTunnel) {
		t.Errorf("the answer names %q", client.Subprotocol())
	}
	_, message, err := client.ReadMessage()
	if err != nil || !bytes.Equal(message, payload) {
		t.Errorf("%d bytes in one message, or others: %v", len(message), err)
	}
	for rest := payload; len(rest) > 0; { // boundaries mean nothing
		n := min(len(rest), 1+rand.IntN(100_000))
		client.WriteMessage(websocket.BinaryMessage, rest[:n])
		client.WriteMessage(websocket.BinaryMessage, nil)
		rest = rest[n:]
	}
	client.WriteControl(websocket.CloseMessage, websocket.FormatCloseMessage(CloseNormal, ""), time.Now().Add(patience))
	if _, _, err := client.ReadMessage(); !websocket.IsCloseError(err, CloseNormal) {
		t.Errorf("the end: %v", err)
	}
	s.waitEnded(t)
}

func TestTunnelEnds(t *testing.T) {
	tests := []struct {
		name string
		wire []byte
		want error
	}{
		{"normal Close", clientFrame(frames.OpClose, true, "\x03\xe8"), io.EOF},
		{"no Close", nil, io.ErrUnexpectedEOF},
		{"inside a frame", clientFrame(frames.OpBinary, true, "hello")[:9], io.ErrUnexpectedEOF},
		{"Close with an error", clientFrame(frames.OpClose, true, "\x03\xf3"), ErrClientClosed},
		{"text", clientFrame(frames.OpText, true, "hello"), errors.ErrUnsupported},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			s := newTunnelServer(t, func(tunnel *TunnelConn) {
				_, err := io.Copy(io.Discard, onlyReader{tunnel})
				if test.want == errors.ErrUnsupported {
					var violation *frames.Violation
					if !errors.As(err, &violation) {
						t.Errorf("read: %v", err)
					}
				} else if test.want == io.EOF && err != nil || test.want != io.EOF && !errors.Is(err, test.want) {
					t.Errorf("read: %v, want %v", err, test.want)
				}
				if _, err := tunnel.Write([]byte("x")); err == nil {
					t.Error("a write after the end succeeded")
				}
			})
			client := s.dialRaw(t, PortForwardTunnel)
			client.Write(test.wire)
			client.CloseWrite()
			s.waitEnded(t)
		})
	}
}

type onlyReader struct{ io.Reader }

func TestTunnelDeadlines(t *testing.T) {
	s := newTunnelServer(t, func(tunnel *TunnelConn) {
		tunnel.SetReadDeadline(time.Now().Add(-time.Second))
		for range 2 {
			if _, err := tunnel.Read(make([]byte, 1)); !errors.Is(err, os.ErrDeadlineExceeded) {
				t.Errorf("read: %v", err)
			}
		}
	})
	s.dialRaw(t, PortForwardTunnel)
	s.waitEnded(t)

	s = newTunnelServer(t, func(tunnel *TunnelConn) {
		tunnel.SetDeadline(time.Now().Add(100 * time.Millisecond))
		var err error
		for err == nil { // the client does not read
			_, err = tunnel.Write(make([]byte, 1<<20))
		}
		if !errors.Is(err, os.ErrDeadlineExceeded) {
			t.Errorf("write: %v", err)
		}
		tunnel.SetDeadline(time.Time{})
		if _, err := tunnel.Write([]byte("x")); err == nil {
			t.Error("a write behind a cut frame succeeded")
		}
	})
	s.dialRaw(t, PortForwardTunnel)
	s.waitEnded(t)
}

// TestTunnelEndsInOrder checks that CloseWrite, followed by reading to the end, loses nothing for a client that still
// sends.
func TestTunnelEndsInOrder(t *testing.T) {
	const size = 8 << 20
	s := newTunnelServer(t, func(tunnel *TunnelConn) {
		tunnel.Write(make([]byte, size))
		if err := tunnel.CloseWrite(); err != nil {
			t.Errorf("CloseWrite: %v", err)
		}
		if _, err := tunnel.Write([]byte("x")); !errors.Is(err, errWriteClosed) {
			t.Errorf("write after CloseWrite: %v", err)
		}
		if got, err := io.ReadAll(tunnel); string(got) != "late" || err != nil {
			t.Errorf("read %q, %v", got, err)
		}
	})
	client := s.dial(t, PortForwardTunnel)
	client.WriteMessage(websocket.BinaryMessage, []byte("late"))
	_, message, err := client.ReadMessage()
	if len(message) != size || err != nil {
		t.Errorf("%d bytes arrived: %v", len(message), err)
	}
	if _, _, err := client.ReadMessage(); !websocket.IsCloseError(err, CloseNormal) {
		t.Errorf("the end: %v", err)
	}
	s.waitEnded(t)
}

// TestTunnelAnswersPings checks that pings are answered while a large message is written to a client that reads slowly.
func TestTunnelAnswersPings(t *testing.T) {
	s := newTunnelServer(t, func(tunnel *TunnelConn) {
		written := make(chan struct{})
		go func() {
			defer close(written)
			tunnel.Write([]byte(strings.Repeat("x", 20<<20)))
		}()
		io.Copy(io.Discard, onlyReader{tunnel})
		<-written
	})
	client := s.dial(t, PortForwardTunnel)
	ponged := ""
	client.SetPongHandler(func(payload string) error {
		ponged = payload
		client.WriteControl(websocket.CloseMessage, websocket.FormatCloseMessage(CloseNormal, ""), time.Now().Add(patience))
		return nil
	})
	client.WriteControl(websocket.PingMessage, []byte("1"), time.Now().Add(patience))
	client.WriteControl(websocket.PingMessage, []byte("2"), time.Now().Add(patience))
	for {
		if _, _, err := client.ReadMessage(); err != nil {
			break
		}
	}
	if ponged != "1" && ponged != "2" {
		t.Errorf("the Pong says %q", ponged)
	}
	s.waitEnded(t)
}
