package websocket_test

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"strconv"
	"sync"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/portforward"
	"k8s.io/client-go/tools/remotecommand"
	"k8s.io/client-go/util/exec"
	"k8s.io/streaming/pkg/httpstream"
	"k8s.io/streaming/pkg/httpstream/spdy"

	"github.com/streamshim/streamshim/pkg/streaming/internal/websocket"
	"github.com/streamshim/streamshim/pkg/workload"
)

// A Channel implements what the sessions of the streaming server use.
var _ workload.Stream = (*websocket.Channel)(nil)

// serve runs an HTTP server whose handlers have returned when the test ends.
func serve(t *testing.T, handler http.HandlerFunc) *httptest.Server {
	var handlers sync.WaitGroup
	s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		handlers.Add(1)
		defer handlers.Done()
		handler(w, r)
	}))
	t.Cleanup(func() {
		s.Close()
		handlers.Wait()
	})
	return s
}

// execServer plays a process on the channels of each connection. process returns its exit code.
func execServer(t *testing.T, stdin, stdout, stderr bool, process func(*websocket.ChannelConn) int) *httptest.Server {
	return serve(t, func(w http.ResponseWriter, r *http.Request) {
		protocol, err := websocket.Negotiate(r, websocket.RemoteCommand)
		if err != nil {
			t.Errorf("negotiate: %v", err)
			return
		}
		if protocol != websocket.ChannelV5 {
			t.Errorf("client-go speaks %q", protocol)
		}
		c, err := websocket.Accept(w, r, protocol, websocket.Config{
			Channels: websocket.RemoteCommandChannels(stdin, stdout, stderr),
			Greeting: true,
		})
		if err != nil {
			t.Errorf("accept: %v", err)
			return
		}
		finished := make(chan struct{})
		go func() {
			defer close(finished)
			code := process(c)
			status := `{"metadata":{},"status":"Success"}`
			if code != 0 {
				status = fmt.Sprintf(`{"metadata":{},"status":"Failure","reason":"NonZeroExitCode","message":"exit %d",`+
					`"details":{"causes":[{"reason":"ExitCode","message":"%d"}]}}`, code, code)
			}
			for _, channel := range []byte{websocket.Stdout, websocket.Stderr} {
				c.Channel(channel).CloseWrite()
			}
			io.WriteString(c.Channel(websocket.Error), status)
			ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
			defer cancel()
			if err := c.CloseAndWait(ctx); err != nil && c.Err() == nil {
				t.Errorf("CloseAndWait: %v", err)
			}
		}()
		if err := c.Serve(context.Background()); err != nil {
			t.Errorf("Serve: %v", err)
		}
		<-finished
	})
}

func stream(t *testing.T, s *httptest.Server, options remotecommand.StreamOptions) error {
	t.Helper()
	executor, err := remotecommand.NewWebSocketExecutor(&rest.Config{Host: s.URL}, http.MethodGet, s.URL)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	return executor.StreamWithContext(ctx, options)
}

func TestClientGoExecCat(t *testing.T) {
	input := make([]byte, 10<<20)
	rand.NewChaCha8([32]byte{3}).Read(input)
	s := execServer(t, true, true, true, func(c *websocket.ChannelConn) int {
		if _, err := io.Copy(c.Channel(websocket.Stdout), c.Channel(websocket.Stdin)); err != nil {
			t.Errorf("cat: %v", err)
		}
		io.WriteString(c.Channel(websocket.Stderr), "cat: done")
		return 0
	})
	var stdout, stderr bytes.Buffer
	err := stream(t, s, remotecommand.StreamOptions{Stdin: bytes.NewReader(input), Stdout: &stdout, Stderr: &stderr})
	if err != nil {
		t.Errorf("exec: %v", err)
	}
	if sha256.Sum256(stdout.Bytes()) != sha256.Sum256(input) {
		t.Errorf("%d of %d bytes came back, or others", stdout.Len(), len(input))
	}
	if stderr.String() != "cat: done" {
		t.Errorf("stderr is %q", stderr.String())
	}
}

func TestClientGoExecExitCode(t *testing.T) {
	s := execServer(t, false, true, false, func(c *websocket.ChannelConn) int {
		io.WriteString(c.Channel(websocket.Stdout), "out")
		return 42
	})
	var stdout bytes.Buffer
	err := stream(t, s, remotecommand.StreamOptions{Stdout: &stdout})
	var exit exec.CodeExitError
	if !errors.As(err, &exit) || exit.Code != 42 {
		t.Errorf("got error %v, want exit code 42", err)
	}
	if stdout.String() != "out" {
		t.Errorf("stdout is %q", stdout.String())
	}
}

// sizes is a terminal that has each size once.
type sizes chan remotecommand.TerminalSize

func (s sizes) Next() *remotecommand.TerminalSize {
	size, ok := <-s
	if !ok {
		return nil
	}
	return &size
}

func TestClientGoExecTerminal(t *testing.T) {
	s := execServer(t, true, true, false, func(c *websocket.ChannelConn) int {
		decoder := json.NewDecoder(c.Channel(websocket.Resize))
		for range 2 {
			var size remotecommand.TerminalSize
			if err := decoder.Decode(&size); err != nil {
				t.Errorf("resize: %v", err)
			}
			fmt.Fprintf(c.Channel(websocket.Stdout), "%dx%d ", size.Width, size.Height)
		}
		return 0
	})
	terminal := make(sizes, 2)
	terminal <- remotecommand.TerminalSize{Width: 80, Height: 24}
	terminal <- remotecommand.TerminalSize{Width: 132, Height: 43}
	close(terminal)
	stdin, typing := io.Pipe() // nobody types
	defer typing.Close()
	var stdout bytes.Buffer
	err := stream(t, s, remotecommand.StreamOptions{Stdin: stdin, Stdout: &stdout, Tty: true, TerminalSizeQueue: terminal})
	if err != nil {
		t.Errorf("exec: %v", err)
	}
	if stdout.String() != "80x24 132x43 " {
		t.Errorf("stdout is %q", stdout.String())
	}
}

// TestClientGoPortForwardTunnel runs the stock SPDY server in the tunnel, with client-go at the other end, and sends 4 MiB
// through each of several streams.
func TestClientGoPortForwardTunnel(t *testing.T) {
	s := serve(t, func(w http.ResponseWriter, r *http.Request) {
		protocol, err := websocket.Negotiate(r, websocket.PortForward)
		if err != nil || !protocol.Tunnel() {
			t.Errorf("negotiated %q: %v", protocol, err)
			return
		}
		tunnel, err := websocket.AcceptTunnel(w, r)
		if err != nil {
			t.Errorf("accept: %v", err)
			return
		}
		defer tunnel.Close()
		var streams sync.WaitGroup
		connection, err := spdy.NewServerConnection(tunnel, func(stream httpstream.Stream, replied <-chan struct{}) error {
			streams.Go(func() {
				<-replied
				if stream.Headers().Get(corev1.StreamType) == corev1.StreamTypeData {
					io.Copy(stream, stream)
				}
				stream.Close()
			})
			return nil
		})
		if err != nil {
			t.Errorf("SPDY server: %v", err)
			return
		}
		<-connection.CloseChan()
		connection.Close()
		streams.Wait()
	})
	address, err := url.Parse(s.URL)
	if err != nil {
		t.Fatal(err)
	}
	dialer, err := portforward.NewSPDYOverWebsocketDialer(address, &rest.Config{Host: s.URL})
	if err != nil {
		t.Fatal(err)
	}
	ready, stop := make(chan struct{}), make(chan struct{})
	forwarder, err := portforward.NewOnAddresses(dialer, []string{"127.0.0.1"}, []string{"0:80"}, stop, ready, io.Discard, io.Discard)
	if err != nil {
		t.Fatal(err)
	}
	ended := make(chan error)
	go func() { ended <- forwarder.ForwardPorts() }()
	select {
	case <-ready:
	case err := <-ended:
		t.Fatalf("port-forward: %v", err)
	}
	ports, err := forwarder.GetPorts()
	if err != nil {
		t.Fatal(err)
	}
	payload := make([]byte, 4<<20)
	rand.NewChaCha8([32]byte{4}).Read(payload)
	var connections sync.WaitGroup
	for range 3 {
		connections.Go(func() {
			connection, err := net.Dial("tcp", net.JoinHostPort("127.0.0.1", strconv.Itoa(int(ports[0].Local))))
			if err != nil {
				t.Error(err)
				return
			}
			defer connection.Close()
			go func() {
				connection.Write(payload)
				connection.(*net.TCPConn).CloseWrite()
			}()
			echoed, err := io.ReadAll(connection)
			if err != nil || !bytes.Equal(echoed, payload) {
				t.Errorf("%d of %d bytes came back, or others: %v", len(echoed), len(payload), err)
			}
		})
	}
	connections.Wait()
	close(stop)
	if err := <-ended; err != nil {
		t.Errorf("port-forward: %v", err)
	}
}
