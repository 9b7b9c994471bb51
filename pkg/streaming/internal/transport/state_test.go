package transport

import (
	"context"
	"crypto/tls"
	"errors"
	"io"
	"net"
	"net/http"
	"reflect"
	"testing"
	"time"

	"github.com/streamshim/streamshim/internal/testutil"
	"github.com/streamshim/streamshim/pkg/handover"
	"github.com/streamshim/streamshim/pkg/streaming/internal/spdy"
	"github.com/streamshim/streamshim/pkg/streaming/internal/websocket"
)

// kinds returns connections of each kind, with their clients' sockets.
func kinds(t *testing.T) map[string]func() (Conn, io.ReadCloser) {
	t.Helper()
	return map[string]func() (Conn, io.ReadCloser){
		"SPDY": func() (Conn, io.ReadCloser) {
			client, network := testutil.TCPPair(t)
			return Streams{spdy.NewServer(network, nil, spdy.Config{})}, client
		},
		"tunnel": func() (Conn, io.ReadCloser) {
			accepted := make(chan *websocket.TunnelConn, 1)
			client := upgraded(t, websocket.PortForwardTunnel, func(w http.ResponseWriter, r *http.Request) {
				tunnel, err := websocket.AcceptTunnel(w, r)
				if err != nil {
					t.Error(err)
				}
				accepted <- tunnel
			})
			return Streams{spdy.NewServer(<-accepted, nil, spdy.Config{})}, client.NetConn()
		},
		"channels": func() (Conn, io.ReadCloser) {
			accepted := make(chan *websocket.ChannelConn, 1)
			client := upgraded(t, websocket.ChannelV5, func(w http.ResponseWriter, r *http.Request) {
				conn, err := websocket.Accept(w, r, websocket.ChannelV5, websocket.Config{Channels: websocket.RemoteCommandChannels(true, true, false)})
				if err != nil {
					t.Error(err)
				}
				accepted <- conn
			})
			return Channels{<-accepted}, client.NetConn()
		},
	}
}

// freeze serves a connection for a moment and freezes it.
func freeze(t *testing.T, conn Conn) {
	t.Helper()
	served := make(chan struct{})
	go func() {
		defer close(served)
		if err := conn.Serve(context.Background()); err != handover.ErrFrozen {
			t.Errorf("Serve: %v", err)
		}
	}()
	conn.Freeze()
	await(t, conn.Frozen(), "the freeze")
	await(t, served, "Serve")
}

// TestDiscard checks that a state that nobody takes, or a connection that is discarded, leaves no descriptor, and that the
// client sees the end.
func TestDiscard(t *testing.T) {
	for name := range kinds(t) {
		for _, what := range []string{"discard", "state", "resume"} {
			t.Run(name+", "+what, func(t *testing.T) {
				conn, client := kinds(t)[name]()
				leaks(t)
				freeze(t, conn)
				files := handover.NewFiles()
				switch what {
				case "discard":
					conn.Discard()
				default:
					state, err := conn.State(files)
					if err != nil {
						t.Fatal(err)
					}
					if what == "resume" {
						// A damaged state: the descriptor that was taken must be closed.
						if state.SPDY != nil {
							state.SPDY.OpenNext = 0
						} else {
							state.Channels.Protocol = "none"
						}
						if _, err := Resume(state, files, ResumeConfig{}); err == nil {
							t.Error("it was resumed")
						}
					}
					files.Close()
				}
				if _, err := io.Copy(io.Discard, client); err != nil {
					t.Errorf("the client's end: %v", err)
				}
				client.Close()
			})
		}
	}
}

// TestEachFieldOfAState checks that no field of a state can be left out.
func TestEachFieldOfAState(t *testing.T) {
	noticed := map[string]bool{}
	of := reflect.TypeFor[State]()
	for name := range kinds(t) {
		for i := range of.NumField() {
			conn, client := kinds(t)[name]()
			freeze(t, conn)
			files := handover.NewFiles()
			state, err := conn.State(files)
			if err != nil {
				t.Fatal(err)
			}
			field := reflect.ValueOf(&state).Elem().Field(i)
			zero := field.IsZero()
			field.SetZero()
			resumed, err := Resume(state, files, ResumeConfig{})
			switch {
			case err != nil:
				noticed[of.Field(i).Name] = noticed[of.Field(i).Name] || !zero
			case zero:
				freeze(t, resumed.Conn)
				resumed.Conn.Discard()
			default:
				// Without the tunnel SPDY uses the socket itself.
				noticed[of.Field(i).Name] = noticed[of.Field(i).Name] || resumed.SPDY != nil && resumed.SPDY.NetConn() == resumed.Network && name == "tunnel"
				resumed.Conn.Close()
			}
			files.Close()
			client.Close()
		}
	}
	for i := range of.NumField() {
		if name := of.Field(i).Name; !noticed[name] {
			t.Errorf("nobody misses %s", name)
		}
	}
}

// TestStateOfAnotherVersion checks that a state of another version, or an empty one, is an error.
func TestStateOfAnotherVersion(t *testing.T) {
	for _, s := range []State{{Version: version + 1}, {Version: version}, {Version: version, Descriptor: 12345}} {
		if _, err := Resume(s, handover.NewFiles(), ResumeConfig{}); err == nil {
			t.Errorf("%+v was resumed", s)
		}
	}
}

// TestTLSIsNotPortable checks that TLS connections are refused: the state inside a TLS library cannot be extracted.
func TestTLSIsNotPortable(t *testing.T) {
	client, network := testutil.TCPPair(t)
	conn := Streams{spdy.NewClient(tls.Client(network, &tls.Config{ServerName: "x"}), nil, spdy.Config{})}
	if err := conn.Portable(); !errors.Is(err, ErrTLS) {
		t.Errorf("portable: %v", err)
	}
	conn.Freeze()
	if _, err := conn.State(handover.NewFiles()); !errors.Is(err, ErrTLS) {
		t.Errorf("its state: %v", err)
	}
	client.SetReadDeadline(time.Now().Add(testTimeout))
	if _, err := io.Copy(io.Discard, client); err != nil && !errors.Is(err, net.ErrClosed) {
		t.Errorf("the client's end: %v", err)
	}
	client.Close()
}

// TestStreamID checks that streams are named by their connection's ids.
func TestStreamID(t *testing.T) {
	if StreamID(nil) != 0 {
		t.Error("nil has a name")
	}
	conn, client := kinds(t)["channels"]()
	channels := conn.(Channels)
	if id := StreamID(channels.Channel(3)); id != 3 {
		t.Errorf("channel 3 is %d", id)
	}
	freeze(t, conn)
	files := handover.NewFiles()
	state, err := conn.State(files)
	if err != nil {
		t.Fatal(err)
	}
	resumed, err := Resume(state, files, ResumeConfig{})
	if err != nil {
		t.Fatal(err)
	}
	if resumed.Stream(3) == nil || resumed.Stream(200) != nil || resumed.Stream(1<<20) != nil {
		t.Error("streams of a resumed connection")
	}
	resumed.Conn.Close()
	client.Close()
}
