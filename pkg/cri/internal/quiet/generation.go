package quiet

import (
	"context"
	"errors"
	"net"
	"sync"
	"time"

	"google.golang.org/grpc"
)

// generation is a gRPC server between two quiet moments. gRPC tells its clients to leave (GOAWAY) only when it
// shuts down for good. So serving again, after a failed hand-over or when calls take too long to end, needs a new
// one.
type generation struct {
	grpc    *grpc.Server
	conns   chan net.Conn
	closed  chan struct{} // closed when gRPC must accept nothing more
	close   sync.Once
	served  chan struct{} // closed when grpc.Serve has returned
	drained chan struct{} // closed when the last connection has ended after drain

	mu      sync.Mutex
	waiting int           // connections that gRPC has not begun to handle
	begun   chan struct{} // closed when waiting is 0; nil unless someone waits
}

func (s *Server) newGeneration() *generation {
	g := &generation{
		grpc: s.new(), conns: make(chan net.Conn), closed: make(chan struct{}),
		served: make(chan struct{}), drained: make(chan struct{}),
	}
	go func() {
		defer close(g.served)
		g.grpc.Serve(g) //nolint:errcheck // ends with the generation; its Accept does not fail before
	}()
	return g
}

// Accept implements net.Listener for gRPC.
func (g *generation) Accept() (net.Conn, error) {
	select {
	case conn := <-g.conns:
		return conn, nil
	case <-g.closed:
		return nil, net.ErrClosed
	}
}

// Close implements net.Listener. The real listener is the Server's.
func (g *generation) Close() error {
	g.close.Do(func() { close(g.closed) })
	return nil
}

func (g *generation) Addr() net.Addr { return &net.UnixAddr{Name: "cri", Net: "unix"} }

// generationConn tells its generation when gRPC begins to handle it, which sets a deadline for the handshake.
// GracefulStop would close a connection that was accepted but not begun, and its client's call would fail.
type generationConn struct {
	net.Conn
	generation *generation
	once       sync.Once
}

func (c *generationConn) SetDeadline(t time.Time) error {
	c.once.Do(c.generation.begin)
	return c.Conn.SetDeadline(t)
}

func (c *generationConn) Close() error {
	c.once.Do(c.generation.begin)
	return c.Conn.Close()
}

func (g *generation) count(conn net.Conn) net.Conn {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.waiting++
	return &generationConn{Conn: conn, generation: g}
}

func (g *generation) begin() {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.waiting--; g.waiting == 0 && g.begun != nil {
		close(g.begun)
		g.begun = nil
	}
}

// awaitBegun waits until gRPC has begun to handle all connections.
func (g *generation) awaitBegun(ctx context.Context) {
	g.mu.Lock()
	if g.waiting == 0 {
		g.mu.Unlock()
		return
	}
	if g.begun == nil {
		g.begun = make(chan struct{})
	}
	begun := g.begun
	g.mu.Unlock()
	select {
	case <-begun:
	case <-ctx.Done():
	}
}

// drain tells clients to make new calls elsewhere, and lets calls in progress finish.
func (g *generation) drain() {
	go func() {
		defer close(g.drained)
		g.grpc.GracefulStop()
		<-g.served
	}()
}

// stop breaks off the calls in progress. drain must have been called before.
func (g *generation) stop() {
	g.grpc.Stop()
	<-g.drained
}

// Serve answers calls until Shutdown, then returns nil. It closes the listener.
func (s *Server) Serve(listener net.Listener) error {
	defer listener.Close() //nolint:errcheck // Shutdown has closed it
	if !s.begin(listener) {
		return nil
	}
	const least, most = 5 * time.Millisecond, time.Second
	pause := least
	for {
		conn, err := listener.Accept()
		var temporary interface{ Temporary() bool }
		switch {
		case err == nil:
			pause = least
			s.give(conn)
		case s.stopping.Err() != nil:
			return nil
		case errors.As(err, &temporary) && temporary.Temporary(): // no free descriptor
			timer := time.NewTimer(pause)
			select {
			case <-timer.C:
			case <-s.stopping.Done():
			}
			timer.Stop()
			pause = min(2*pause, most)
		default:
			return err
		}
	}
}

// begin takes the listener, unless the server was shut down.
func (s *Server) begin(listener net.Listener) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.stopping.Err() != nil {
		return false
	}
	s.listener = listener
	if s.current == nil {
		s.current = s.newGeneration()
	}
	return true
}

// give passes a connection to the current generation. After Shutdown there is none, and it closes the connection.
func (s *Server) give(conn net.Conn) {
	s.mu.Lock()
	g := s.current
	s.mu.Unlock()
	if g != nil {
		conn = g.count(conn)
		select {
		case g.conns <- conn:
			return
		case <-g.closed:
		}
	}
	conn.Close()
}

// Shutdown stops accepting calls and waits for those in progress until ctx is done, then breaks them off. Watches
// such as GetContainerEvents never end by themselves.
func (s *Server) Shutdown(ctx context.Context) {
	s.stop()
	s.mu.Lock()
	listener, g := s.listener, s.current
	s.current = nil
	draining := s.draining
	s.draining = nil
	s.mu.Unlock()
	if listener != nil {
		listener.Close()
	}
	if g != nil {
		g.drain()
		draining = append(draining, g)
	}
	for _, g := range draining {
		select {
		case <-g.drained:
		case <-ctx.Done():
			g.stop()
		}
	}
}
