package spdy

import (
	"bytes"
	"context"
	"errors"
	"io"
	"math/rand/v2"
	"net"
	"sync"
	"testing"

	"github.com/streamshim/streamshim/internal/testutil"
)

// sessionServer serves one connection. It reads every stream to its end and then answers "done".
type sessionServer struct {
	*Conn
	wg   sync.WaitGroup
	mu   sync.Mutex
	data map[uint32]string
	errs map[uint32]error
}

func newSessionServer(conn net.Conn) *sessionServer {
	srv := &sessionServer{data: map[uint32]string{}, errs: map[uint32]error{}}
	srv.Conn = NewServer(conn, nil, Config{OnStream: func(s *Stream) {
		srv.wg.Go(func() {
			p, err := io.ReadAll(s)
			srv.mu.Lock()
			srv.data[s.ID()], srv.errs[s.ID()] = string(p), err
			srv.mu.Unlock()
			s.Write([]byte("done"))
			s.CloseWrite()
		})
	}})
	return srv
}

func checkSession(t *testing.T, srv *sessionServer) {
	t.Helper()
	checkStreams(t, srv)
	if !errors.Is(srv.Err(), ErrGoAway) {
		t.Errorf("connection ended with %v", srv.Err())
	}
}

func checkStreams(t *testing.T, srv *sessionServer) {
	t.Helper()
	var reset *ResetError
	for id, want := range map[uint32]string{1: "", 3: "hello world!", 5: "", 7: "lost"} {
		if got := srv.data[id]; got != want {
			t.Errorf("stream %d: got %q, want %q", id, got, want)
		}
	}
	if srv.errs[3] != nil || !errors.As(srv.errs[7], &reset) {
		t.Errorf("ends: %v, %v", srv.errs[3], srv.errs[7])
	}
}

// TestSessionInPieces sends the recorded session in pieces of every size, over a socket and over a net.Pipe, which is not a
// socket and delivers each piece by itself.
func TestSessionInPieces(t *testing.T) {
	session := recordedSession()
	kinds := map[string]func(t *testing.T) (server, client net.Conn){
		"tcp":  func(t *testing.T) (net.Conn, net.Conn) { return testutil.TCPPair(t) },
		"pipe": func(t *testing.T) (net.Conn, net.Conn) { return net.Pipe() },
	}
	cuts := map[string]func() int{
		"single": func() int { return 1 },
		"three":  func() int { return 3 },
		"random": func() int { return 1 + rand.IntN(40) },
		"whole":  func() int { return len(session) },
	}
	for kind, connect := range kinds {
		for name, cut := range cuts {
			t.Run(kind+"/"+name, func(t *testing.T) {
				server, client := connect(t)
				srv := newSessionServer(server)
				ended := make(chan error, 1)
				go func() { ended <- srv.Serve(context.Background()) }()
				goDo(t, func() { io.Copy(io.Discard, client) })
				for rest := session; len(rest) > 0; {
					n := min(len(rest), cut())
					if _, err := client.Write(rest[:n]); err != nil {
						t.Fatal(err)
					}
					rest = rest[n:]
				}
				testutil.Receive(t, "GOAWAY", srv.Done())
				client.Close()
				testutil.Receive(t, "the end of Serve", ended)
				srv.wg.Wait()
				checkSession(t, srv)
				srv.Close()
			})
		}
	}
}

// TestSessionCutAnywhere ends the connection after every byte of the session, by FIN and by RST. Nothing may hang or leak.
// Streams that were complete must be complete.
func TestSessionCutAnywhere(t *testing.T) {
	session := recordedSession()
	for cut := range len(session) + 1 {
		for _, hard := range []bool{false, true} {
			server, client := testutil.TCPPair(t)
			srv := newSessionServer(server)
			ended := make(chan error, 1)
			go func() { ended <- srv.Serve(context.Background()) }()
			client.Write(session[:cut])
			if hard {
				client.SetLinger(0)
				client.Close()
			} else { // if it left unread what the server sends, the kernel would turn its close into RST
				goDo(t, func() { io.Copy(io.Discard, client) })
				client.CloseWrite()
			}
			testutil.Receive(t, "the end of Serve", ended)
			testutil.Receive(t, "Done", srv.Done())
			finished := make(chan struct{})
			go func() { srv.wg.Wait(); close(finished) }()
			testutil.Receive(t, "the streams", finished)
			srv.Close()
			if !hard && cut == len(session) {
				checkStreams(t, srv) // an answer may have reached the closed connection before its GOAWAY was read
			}
			if got := srv.data[3]; srv.errs[3] == nil && got != "" && got != "hello world!" {
				t.Errorf("cut at %d: stream 3 ended well with %q", cut, got)
			}
			server.Close()
		}
	}
}

// TestSessionBuffered passes each prefix of the session as what was read before the upgrade was done.
func TestSessionBuffered(t *testing.T) {
	session := recordedSession()
	for n := 0; n <= len(session); n += 7 {
		server, client := testutil.TCPPair(t)
		srv := newSessionServer(server)
		srv.read.init(srv.Conn, bytes.Clone(session[:n]))
		goDo(t, func() { io.Copy(io.Discard, client) })
		go client.Write(session[n:])
		ended := make(chan error, 1)
		go func() { ended <- srv.Serve(context.Background()) }()
		testutil.Receive(t, "GOAWAY", srv.Done())
		client.Close()
		testutil.Receive(t, "the end of Serve", ended)
		srv.wg.Wait()
		checkSession(t, srv)
		srv.Close()
	}
}
