// Package criosocket shares a Unix socket between gRPC and HTTP as CRI-O does: by the content type of a
// connection's first request, which for gRPC must be exactly "application/grpc". Another connection is
// closed unread, which its peer sees as a reset. Tests use it as an upstream's socket, because containerd's own
// accepts what CRI-O's rejects.
package criosocket

import (
	"bytes"
	"errors"
	"io"
	"net"
	"strings"
	"sync"
	"time"

	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"
)

// firstRequestTimeout bounds the wait for a connection's first request, on a busy machine.
const firstRequestTimeout = time.Minute

// maxFirstRequest bounds the bytes that are read to find a connection's server.
const maxFirstRequest = 1 << 20

// Socket is a shared Unix socket. Servers accept from GRPC and HTTP; Close ends both.
type Socket struct {
	listener net.Listener
	grpc     *listener
	http     *listener
	done     chan struct{}
	group    sync.WaitGroup

	mu      sync.Mutex
	pending map[net.Conn]struct{} // nil after Close
}

// Listen creates the socket. The caller closes it, after the servers that accept from it.
func Listen(path string) (*Socket, error) {
	l, err := net.Listen("unix", path)
	if err != nil {
		return nil, err
	}
	s := &Socket{listener: l, done: make(chan struct{}), pending: map[net.Conn]struct{}{}}
	s.grpc, s.http = newListener(s), newListener(s)
	s.group.Go(s.accept)
	return s, nil
}

// GRPC returns the listener for the gRPC server.
func (s *Socket) GRPC() net.Listener { return s.grpc }

// HTTP returns the listener for the HTTP/1 server.
func (s *Socket) HTTP() net.Listener { return s.http }

// Close removes the socket and ends connections that no server has accepted. It may be called more than once.
func (s *Socket) Close() error {
	s.mu.Lock()
	if s.pending == nil {
		s.mu.Unlock()
		return nil
	}
	for conn := range s.pending {
		conn.Close()
	}
	s.pending = nil
	s.mu.Unlock()
	close(s.done)
	err := s.listener.Close()
	s.group.Wait()
	return err
}

func (s *Socket) accept() {
	for {
		conn, err := s.listener.Accept()
		if err != nil {
			return
		}
		s.mu.Lock()
		open := s.pending != nil
		if open {
			s.pending[conn] = struct{}{}
			s.group.Go(func() { s.hand(conn) })
		}
		s.mu.Unlock()
		if !open {
			conn.Close()
		}
	}
}

// hand passes a connection to its server, with what was read of it.
func (s *Socket) hand(conn net.Conn) {
	conn.SetReadDeadline(time.Now().Add(firstRequestTimeout))
	var read bytes.Buffer
	to := s.sort(conn, io.TeeReader(io.LimitReader(conn, maxFirstRequest), &read))
	conn.SetReadDeadline(time.Time{})
	s.mu.Lock()
	delete(s.pending, conn)
	s.mu.Unlock()
	if to == nil {
		conn.Close()
		return
	}
	select {
	case to.conns <- &replayed{Conn: conn, first: &read}:
	case <-to.closed:
		conn.Close()
	case <-s.done:
		conn.Close()
	}
}

// sort reads up to the end of the first request's headers and returns the connection's server, or nil if there is none.
func (s *Socket) sort(conn io.Writer, from io.Reader) *listener {
	preface := make([]byte, len(http2.ClientPreface))
	if _, err := io.ReadFull(from, preface); err != nil {
		return nil
	}
	if string(preface) != http2.ClientPreface {
		if method, _, found := strings.Cut(string(preface), " "); found && (method == "GET" || method == "POST" || method == "PUT" || method == "DELETE") {
			return s.http
		}
		return nil
	}
	framer := http2.NewFramer(conn, from)
	framer.ReadMetaHeaders = hpack.NewDecoder(4096, nil)
	for {
		frame, err := framer.ReadFrame()
		if err != nil {
			return nil
		}
		switch f := frame.(type) {
		case *http2.SettingsFrame:
			// Clients wait for the server's settings before they send a request.
			if !f.IsAck() && framer.WriteSettings() != nil {
				return nil
			}
		case *http2.MetaHeadersFrame:
			for _, field := range f.RegularFields() {
				if field.Name == "content-type" && field.Value == "application/grpc" {
					return s.grpc
				}
			}
			return nil
		}
	}
}

// replayed is a connection that first returns what was read from it before.
type replayed struct {
	net.Conn
	first *bytes.Buffer
}

func (r *replayed) Read(p []byte) (int, error) {
	if r.first.Len() > 0 {
		return r.first.Read(p)
	}
	return r.Conn.Read(p)
}

// listener is a server's part of a Socket.
type listener struct {
	socket *Socket
	conns  chan net.Conn
	once   sync.Once
	closed chan struct{}
}

func newListener(s *Socket) *listener {
	return &listener{socket: s, conns: make(chan net.Conn), closed: make(chan struct{})}
}

var errClosed = errors.New("criosocket: the listener is closed")

func (l *listener) Accept() (net.Conn, error) {
	select {
	case conn := <-l.conns:
		return conn, nil
	case <-l.closed:
	case <-l.socket.done:
	}
	return nil, errClosed
}

func (l *listener) Close() error {
	l.once.Do(func() { close(l.closed) })
	return nil
}

func (l *listener) Addr() net.Addr { return l.socket.listener.Addr() }
