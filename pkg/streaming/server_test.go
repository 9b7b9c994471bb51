package streaming

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"k8s.io/client-go/tools/remotecommand"

	"github.com/streamshim/streamshim/internal/testutil/leak"
	"github.com/streamshim/streamshim/pkg/session"
	"github.com/streamshim/streamshim/pkg/streaming/internal/status"
	"github.com/streamshim/streamshim/pkg/workload"
)

// startHastyServer is like startServer, with HTTP limits that a test can wait for: each limit that is set is a hundredth of
// the usual one, and the others stay off.
func startHastyServer(t *testing.T) *testServer {
	t.Helper()
	leak.Check(t)
	config := ordinary(Config{Log: slog.New(slog.DiscardHandler)})
	config.Sessions = session.NewRegistry(config.Log)
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	s := newTestServer(t, config, listener.Addr())
	for _, limit := range []*time.Duration{&s.http.ReadHeaderTimeout, &s.http.ReadTimeout, &s.http.WriteTimeout, &s.http.IdleTimeout} {
		*limit /= 100
	}
	go func() { s.served <- s.Serve(listener) }()
	t.Cleanup(s.stop)
	return s
}

func (s *testServer) dial(t *testing.T) net.Conn {
	t.Helper()
	conn, err := net.Dial("tcp", s.base.Host)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	conn.SetDeadline(time.Now().Add(testTimeout))
	return conn
}

// TestSlowRequestsAreLetGo checks that a client that never finishes a request or never reads an answer is disconnected
// (slow loris), whatever part of the request is slow.
func TestSlowRequestsAreLetGo(t *testing.T) {
	s := startHastyServer(t)
	const head = "POST /exec/nothing HTTP/1.1\r\nHost: localhost\r\n"
	for name, send := range map[string]func(net.Conn){
		"nothing":     func(net.Conn) {},
		"half a head": func(c net.Conn) { io.WriteString(c, head) },
		"a head that goes on and on": func(c net.Conn) {
			io.WriteString(c, head)
			for i := 0; ; i++ {
				if _, err := fmt.Fprintf(c, "X-%d: x\r\n", i); err != nil {
					return
				}
				time.Sleep(10 * time.Millisecond) // the pace of a slow client
			}
		},
		"a body that does not come":    func(c net.Conn) { io.WriteString(c, head+"Content-Length: 1000\r\n\r\n") },
		"a body without an end":        func(c net.Conn) { io.WriteString(c, head+"Transfer-Encoding: chunked\r\n\r\n1\r\nx\r\n") },
		"nothing after the first time": func(c net.Conn) { io.WriteString(c, head+"Content-Length: 0\r\n\r\n") },
		"answers that nobody ever reads": func(c net.Conn) {
			requests := strings.Repeat(head+"Content-Length: 0\r\n\r\n", 1000)
			for {
				if _, err := io.WriteString(c, requests); err != nil {
					return
				}
			}
		},
	} {
		t.Run(name, func(t *testing.T) {
			conn := s.dial(t)
			closed := make(chan struct{})
			go func() { // only the server ends the loops above
				defer close(closed)
				send(conn)
			}()
			if strings.HasPrefix(name, "answers") {
				<-closed
				return
			}
			if _, err := io.Copy(io.Discard, conn); isTimeout(err) {
				t.Error("the connection is kept for ever")
			}
			conn.Close()
			<-closed
		})
	}
	eventually(t, "no connection is left", func() bool { return s.plain.count() == 0 })
}

// TestLargeRequestIsRefused checks that the head of a request is bounded.
func TestLargeRequestIsRefused(t *testing.T) {
	s := startServer(t, Config{})
	for size, want := range map[int]string{maxHeaderBytes / 2: "HTTP/1.1 404 ", 2 * maxHeaderBytes: "HTTP/1.1 431 "} {
		conn := s.dial(t)
		fmt.Fprintf(conn, "GET /exec/nothing HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nX: %s\r\n\r\n", strings.Repeat("x", size))
		answer := make([]byte, len(want))
		if _, err := io.ReadFull(conn, answer); err != nil || string(answer) != want {
			t.Errorf("head of %d bytes: %q, %v; want %q", size, answer, err, want)
		}
	}
}

func isTimeout(err error) bool {
	timeout, ok := err.(net.Error)
	return ok && timeout.Timeout()
}

// TestPlainConnectionsAreBounded checks that connections without an upgrade are bounded, and that a client with a token is
// served all the same.
func TestPlainConnectionsAreBounded(t *testing.T) {
	const limit = 10
	s := startServer(t, Config{})
	s.plain.mu.Lock()
	s.plain.max = limit
	s.plain.mu.Unlock()
	executor := &hostExecutor{t: t}
	options := remotecommand.StreamOptions{Stdin: strings.NewReader(""), Stdout: io.Discard, Stderr: io.Discard}
	var idle []net.Conn
	for i := range 3 * limit {
		idle = append(idle, s.dial(t)) // sends nothing
		if i%limit == 0 {
			startRaw(t, "SPDY", s.execURL(executor, options, "sleep", "600"), workload.Command{})
		}
		if n := s.plain.count(); n > limit {
			t.Fatalf("%d connections that are not upgraded", n)
		}
	}
	for _, conn := range idle[:2*limit] {
		if _, err := conn.Read(make([]byte, 1)); err == nil || isTimeout(err) {
			t.Errorf("an old connection was not closed: %v", err)
		}
	}
	eventually(t, "the commands run", func() bool { return executor.count() == 3 })
	if n := len(s.config.Sessions.List()); n != 3 {
		t.Errorf("%d sessions live", n)
	}
}

// TestListenerFails checks that a listener that fails is opened again at the same address. Until then no URLs are issued,
// because nobody would serve them.
func TestListenerFails(t *testing.T) {
	leak.Check(t)
	config := ordinary(Config{Log: slog.New(slog.DiscardHandler)})
	config.Sessions = session.NewRegistry(config.Log)
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	address := listener.Addr().String()
	s := newTestServer(t, config, listener.Addr())
	go func() { s.served <- s.Serve(listener) }()
	t.Cleanup(s.stop)
	eventually := func(what string, condition func() bool) {
		t.Helper()
		for deadline := time.Now().Add(testTimeout); !condition(); time.Sleep(10 * time.Millisecond) {
			if time.Now().After(deadline) {
				t.Fatalf("waited in vain: %s", what)
			}
		}
	}
	request := func() error {
		_, err := s.Exec(s.localRequest(&hostExecutor{t: t}, workload.Command{Args: []string{"true"}}))
		return err
	}
	if err := request(); err != nil {
		t.Fatal(err)
	}
	listener.Close()
	other, err := net.Listen("tcp", address) // so that it cannot be opened again at once
	if err != nil {
		t.Fatal(err)
	}
	eventually("no URLs are given out", func() bool { return errors.Is(request(), ErrNotListening) })
	other.Close()
	eventually("URLs are given out again", func() bool { return request() == nil })
	var out bytes.Buffer
	options := remotecommand.StreamOptions{Stdout: &out}
	u := s.execURL(&hostExecutor{t: t}, options, "echo", "hello")
	if err := stream(t.Context(), t, "SPDY", u, options); err != nil || out.String() != "hello\n" {
		t.Errorf("%q, %v", &out, err)
	}

	// Shutdown does not wait for a listener that cannot be opened.
	s2 := NewServer(config, other.Addr())
	closed, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	closed.Close()
	served := make(chan error, 1)
	go func() { served <- s2.Serve(closed) }()
	ended, cancel := context.WithCancel(t.Context())
	cancel()
	s2.Shutdown(ended)
	if err := receive(t, served, "Serve to return"); err != nil {
		t.Error(err)
	}
}

// TestOnlyLocalStartsTakeTurns checks that a hung upstream, which keeps attaches and relayed commands from starting, does
// not keep local commands from starting.
func TestOnlyLocalStartsTakeTurns(t *testing.T) {
	gate := &countingGate{}
	upstream, s := startServer(t, Config{}), startServer(t, Config{Commands: commandConfig{Starts: gate}})
	executor := &hostExecutor{t: t}
	var out bytes.Buffer
	options := remotecommand.StreamOptions{Stdout: &out}
	u := s.relayedURL(upstream.execURL(executor, options, "echo", "relayed"), options)
	if err := stream(t.Context(), t, "SPDY", u, options); err != nil || out.String() != "relayed\n" {
		t.Errorf("%q, %v", &out, err)
	}
	if n := gate.turns.Load(); n != 0 {
		t.Errorf("a relayed command took %d turns", n)
	}
	if err := stream(t.Context(), t, "SPDY", s.execURL(executor, options, "echo", "local"), options); err != nil {
		t.Error(err)
	}
	if n := gate.turns.Load(); n != 1 {
		t.Errorf("a local command took %d turns", n)
	}
}

type countingGate struct{ turns atomic.Int32 }

func (g *countingGate) Acquire(context.Context, session.Info) (func(), error) {
	g.turns.Add(1)
	return func() {}, nil
}

// TestRefusalsAreShown checks that stock clients show why a request is refused, in full. client-go takes plain text with a
// colon and a space for YAML and shows nothing.
func TestRefusalsAreShown(t *testing.T) {
	for code, message := range map[int]string{
		http.StatusInternalServerError: "port-forward into the pod: open namespace: permission denied",
		http.StatusBadRequest:          "none of the protocol versions offered is spoken here: offered [\"v9\"]",
	} {
		server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { status.WriteError(w, code, message) }))
		u, err := url.Parse(server.URL + "/exec/x")
		if err != nil {
			t.Fatal(err)
		}
		for _, transport := range transports {
			err := stream(t.Context(), t, transport, u, remotecommand.StreamOptions{Stdout: io.Discard})
			if err == nil || !strings.Contains(err.Error(), message) {
				t.Errorf("%s: %v", transport, err)
			}
		}
		server.Close()
	}
}

// TestNoPlainTextAnswers checks that no file answers a request in plain text, except where no client-go reads it.
func TestNoPlainTextAnswers(t *testing.T) {
	files, err := filepath.Glob("*.go")
	if err != nil || len(files) == 0 {
		t.Fatal(files, err)
	}
	for _, file := range files {
		text, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		if !strings.HasSuffix(file, "_test.go") && bytes.Contains(text, []byte("http.Error(")) {
			t.Errorf("%s: use writeError", file)
		}
	}
}
