package streaming

import (
	"fmt"
	"io"
	"log/slog"
	"net"
	"strings"
	"testing"
	"time"

	"k8s.io/client-go/tools/remotecommand"

	"github.com/streamshim/streamshim/pkg/session"
	"github.com/streamshim/streamshim/test/leak"
)

// startHastyServer is startServer with HTTP limits that a test need not wait for long: those that are
// set are a hundredth of what they are, those that are not stay so.
func startHastyServer(t *testing.T) *testServer {
	t.Helper()
	leak.Check(t)
	config := ordinary(Config{Log: slog.New(slog.DiscardHandler)})
	config.Sessions = session.NewRegistry(config.Log)
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	s := &testServer{Server: NewServer(config, listener.Addr()), t: t, served: make(chan error, 1)}
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

// A client that never finishes a request, or never takes an answer, is let go (slow loris), whatever
// part of the request it is slow with.
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
			go func() { // what ends the sending loops above is the server
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

// A request head has its limit.
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

// Connections that are not upgraded are bounded, and whoever has a token is served all the same.
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
		idle = append(idle, s.dial(t)) // says nothing
		if i%limit == 0 {
			startRaw(t, "SPDY", s.execURL(executor, options, "sleep", "600"), Command{})
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
