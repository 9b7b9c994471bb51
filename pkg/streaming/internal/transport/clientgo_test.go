package transport

import (
	"context"
	"io"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"testing"

	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/remotecommand"

	"github.com/streamshim/streamshim/pkg/streaming/internal/spdy"
	"github.com/streamshim/streamshim/pkg/streaming/internal/websocket"
	"github.com/streamshim/streamshim/pkg/workload"
)

// TestHandOverWithClientGo runs cat with stock client-go and hands its connection over again and again.
func TestHandOverWithClientGo(t *testing.T) {
	for _, kind := range []string{"SPDY", "WebSocket"} {
		t.Run(kind, func(t *testing.T) {
			leaks(t)
			s := newSession(t)
			cat := &line{outEnded: make(chan struct{})} // stdin is stdout
			ready := make(chan workload.Stream, 1)      // receives the error stream
			server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				if kind == "SPDY" {
					serveSPDYExec(t, w, s, cat, ready)
				} else {
					serveWebSocketExec(t, w, r, s, cat, ready)
				}
			}))
			defer server.Close()
			address, err := url.Parse(server.URL)
			if err != nil {
				t.Fatal(err)
			}
			config := &rest.Config{Host: server.URL}
			executor, err := remotecommand.NewSPDYExecutor(config, http.MethodPost, address)
			if kind == "WebSocket" {
				executor, err = remotecommand.NewWebSocketExecutor(config, http.MethodGet, server.URL)
			}
			if err != nil {
				t.Fatal(err)
			}
			stop := make(chan struct{})
			bytes := newFlow(false)
			stdinR, stdinW := io.Pipe()
			stdoutR, stdoutW := io.Pipe()
			go func() { bytes.pour(t, stdinW, stop); stdinW.Close() }()
			drained := make(chan struct{})
			go func() { defer close(drained); bytes.drain(t, stdoutR) }()
			ended := make(chan error, 1)
			go func() {
				err := executor.StreamWithContext(t.Context(), remotecommand.StreamOptions{Stdin: stdinR, Stdout: stdoutW})
				stdoutW.Close()
				ended <- err
			}()
			failure := StreamID(<-ready)
			s.handOvers()
			close(stop)
			await(t, cat.outEnded, "the end of stdout")
			s.mu.Lock()
			stream := s.streamOf(failure)
			s.mu.Unlock()
			io.WriteString(stream, `{"metadata":{},"status":"Success"}`)
			stream.CloseWrite()
			if channels, ok := s.conn.(Channels); ok {
				if err := channels.CloseAndWait(context.Background()); err != nil {
					t.Error(err)
				}
			}
			if err := <-ended; err != nil {
				t.Errorf("the client's end: %v", err)
			}
			await(t, drained, "stdout")
			bytes.check(t, "through cat")
			s.end()
		})
	}
}

func (s *session) streamOf(id uint32) workload.Stream {
	switch conn := s.conn.(type) {
	case Streams:
		return conn.Stream(id)
	case Channels:
		return conn.Channel(byte(id)) //nolint:gosec // a channel's
	}
	return nil
}

// addCat connects stdin and stdout.
func addCat(t *testing.T, s *session, cat *line, stdin, stdout workload.Stream) {
	r, w, err := os.Pipe()
	if err != nil {
		t.Error(err)
		return
	}
	cat.out = r
	s.add(stdin, &line{in: w})
	s.add(stdout, cat)
}

func serveSPDYExec(t *testing.T, w http.ResponseWriter, s *session, cat *line, ready chan<- workload.Stream) {
	network, buffered, err := HijackSPDY(w, "v4.channel.k8s.io")
	if err != nil {
		t.Error(err)
		return
	}
	streams := map[string]*spdy.Stream{}
	s.config.SPDY = spdy.Config{OnStream: func(stream *spdy.Stream) {
		streams[stream.Header().Get("streamtype")] = stream
		if len(streams) == 3 {
			addCat(t, s, cat, streams[StreamStdin], streams[StreamStdout])
			ready <- streams[StreamError]
		}
	}}
	s.serve(Streams{spdy.NewServer(network, buffered, s.config.SPDY)})
}

func serveWebSocketExec(t *testing.T, w http.ResponseWriter, r *http.Request, s *session, cat *line, ready chan<- workload.Stream) {
	s.config.Channels = websocket.Config{Channels: websocket.RemoteCommandChannels(true, true, false), Greeting: true}
	conn, err := websocket.Accept(w, r, websocket.ChannelV5, s.config.Channels)
	if err != nil {
		t.Error(err)
		return
	}
	addCat(t, s, cat, conn.Channel(websocket.Stdin), conn.Channel(websocket.Stdout))
	s.serve(Channels{conn})
	ready <- conn.Channel(websocket.Error)
}
