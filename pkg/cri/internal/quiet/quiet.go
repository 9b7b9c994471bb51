// Package quiet provides a gRPC server that can reach points at which no call is in progress, and serve again from
// there.
package quiet

import (
	"context"
	"errors"
	"net"
	"sync"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// Limits of Quiesce.
const (
	// quietPatience is how long to wait for a moment without any call. A node with many probes has none.
	quietPatience = time.Second
	// shortCall is the age up to which calls in progress are expected to end soon, because most calls are short.
	// On a machine where all take longer, it grows to half of the time that Quiesce has waited.
	shortCall = 100 * time.Millisecond
	// drainPatience is how long new calls may have to wait for those in progress. It grows by a quarter of the
	// time that Quiesce has waited, up to maxDrainPatience: a call that waits is better than one that is broken
	// off.
	drainPatience    = 300 * time.Millisecond
	maxDrainPatience = 5 * time.Second
	// silentPatience is how long a client that waits for no call may take to answer a GOAWAY. On a busy machine its
	// next call may be on the way, and would be broken off.
	silentPatience = 2 * time.Second
	// beginPatience is how long gRPC may take to notice new connections.
	beginPatience = time.Second
	// watchPause delays the end of a watch that arrives while the others are being ended: its client has not read
	// the GOAWAY yet.
	watchPause = 50 * time.Millisecond
)

// ErrReplaced ends watches and, after the limit, other calls.
var ErrReplaced = status.Error(codes.Unavailable, "streamshim is being replaced by another version: call again")

// calls tracks the calls in progress.
type calls struct {
	mu      sync.Mutex
	under   map[*call]struct{}
	ending  bool          // watches are being ended
	changed chan struct{} // closed when a call ends; nil unless someone waits
}

type call struct {
	began time.Time
	watch context.CancelCauseFunc // set for watches, which never end by themselves
}

func (c *calls) add(added *call) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.under[added] = struct{}{}
}

func (c *calls) remove(removed *call) {
	c.mu.Lock()
	defer c.mu.Unlock()
	delete(c.under, removed)
	if c.changed != nil {
		close(c.changed)
		c.changed = nil
	}
}

// look returns the number of calls in progress apart from watches, the age of the oldest, and a channel that is
// closed when one ends.
func (c *calls) look(now time.Time) (n int, oldest time.Duration, changed <-chan struct{}) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for call := range c.under {
		if call.watch == nil {
			n++
			oldest = max(oldest, now.Sub(call.began))
		}
	}
	if c.changed == nil {
		c.changed = make(chan struct{})
	}
	return n, oldest, c.changed
}

// setEnding(true) ends all watches, including new ones. setEnding(false) allows watches again.
func (c *calls) setEnding(ending bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.ending = ending
	if !ending {
		return
	}
	for call := range c.under {
		if call.watch != nil {
			call.watch(ErrReplaced)
		}
	}
}

func (c *calls) areEnding() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.ending
}

// awaitShort waits until no call is in progress or, after a while, only short ones. It gives up when the context
// is done.
func (c *calls) awaitShort(ctx context.Context, start time.Time) {
	for {
		now := time.Now()
		waited := now.Sub(start)
		n, oldest, changed := c.look(now)
		if n == 0 || waited > quietPatience && oldest < max(shortCall, waited/2) {
			return
		}
		tick := time.NewTimer(shortCall / 4)
		select {
		case <-changed:
		case <-tick.C:
		case <-ctx.Done():
			tick.Stop()
			return
		}
		tick.Stop()
	}
}

// pausable is a listener as Quiesce needs it, such as a handover.Listener.
type pausable interface {
	Pause()
	Resume()
}

// Server serves with one gRPC server after another. Its methods are safe for concurrent use.
type Server struct {
	new      func() *grpc.Server
	calls    calls
	stopping context.Context //nolint:containedctx // done at Shutdown
	stop     context.CancelFunc

	mu       sync.Mutex
	listener net.Listener
	current  *generation   // nil before Serve, while quiescent, and after Shutdown
	draining []*generation // generations with calls still in progress
}

// NewServer returns a server that creates its gRPC servers with makeServer. Each call must go through Counted or
// Watched.
func NewServer(makeServer func() *grpc.Server) *Server {
	s := &Server{new: makeServer}
	s.calls.under = map[*call]struct{}{}
	s.stopping, s.stop = context.WithCancel(context.Background())
	return s
}

// Quiesce brings the server to a point where no call is in progress and new connections wait in the listener's
// queue: for Resume, or for another program that has the same socket. Until then it serves calls with only brief
// pauses. It waits for a moment when only short calls are in progress and then drains them. When ctx is done, it
// drains at once and breaks off calls that outlast the limit: they end as Unavailable, as watches do at once. It
// fails if the listener cannot be paused; the server then keeps serving.
func (s *Server) Quiesce(ctx context.Context) error {
	s.mu.Lock()
	listener, ok := s.listener.(pausable)
	s.mu.Unlock()
	if !ok {
		return errors.New("the server has no listener that can be paused")
	}
	start := time.Now()
	for {
		s.calls.awaitShort(ctx, start)
		last := ctx.Err() != nil
		if err := s.pause(listener); err != nil {
			s.Resume()
			return err
		}
		if s.awaitDrained(min(drainPatience+time.Since(start)/4, maxDrainPatience), last) {
			return nil
		}
		s.Resume()
	}
}

// pause stops accepting and tells clients to make new calls elsewhere.
func (s *Server) pause(listener pausable) error {
	ctx, cancel := context.WithTimeout(context.Background(), beginPatience)
	defer cancel()
	listener.Pause()
	s.mu.Lock()
	g := s.current
	s.mu.Unlock()
	if g == nil {
		return errors.New("the server is not serving")
	}
	g.awaitBegun(ctx)
	g.drain()
	s.mu.Lock()
	s.current = nil
	s.draining = append(s.draining, g)
	s.mu.Unlock()
	s.calls.setEnding(true)
	return nil
}

// awaitDrained waits until the calls of all draining generations have ended. After patience it breaks off what is
// left if cut is set, and otherwise returns false if there are calls in progress. Clients that have none, and do not
// answer, are disconnected after silentPatience.
func (s *Server) awaitDrained(patience time.Duration, cut bool) bool {
	begin := time.Now()
	timer := time.NewTimer(patience)
	defer timer.Stop()
	for {
		s.mu.Lock()
		if len(s.draining) == 0 {
			s.mu.Unlock()
			return true
		}
		g := s.draining[0]
		s.mu.Unlock()
		select {
		case <-g.drained:
		case <-timer.C:
			// A client that does not answer, and waits for nothing, must not hold up others.
			n, _, _ := s.calls.look(time.Now())
			if n > 0 && !cut {
				return false
			}
			if left := silentPatience - time.Since(begin); n == 0 && left > 0 {
				timer.Reset(min(left, patience))
				continue
			}
			timer.Reset(0)
			g.stop()
		}
		s.mu.Lock()
		if len(s.draining) > 0 && s.draining[0] == g {
			s.draining = s.draining[1:]
		}
		s.mu.Unlock()
	}
}

// Resume serves again after Quiesce.
func (s *Server) Resume() {
	s.calls.setEnding(false)
	s.mu.Lock()
	if s.stopping.Err() == nil && s.current == nil {
		s.current = s.newGeneration()
	}
	listener, ok := s.listener.(pausable)
	s.mu.Unlock()
	if ok {
		listener.Resume()
	}
}

// Calls returns the number of calls in progress, apart from watches.
func (s *Server) Calls() int {
	n, _, _ := s.calls.look(time.Now())
	return n
}

// Counted runs a unary call, or a stream that ends by itself, and counts it as in progress.
func (s *Server) Counted(f func() error) error {
	c := &call{began: time.Now()}
	s.calls.add(c)
	defer s.calls.remove(c)
	return f()
}

// Watched runs a watch, which Quiesce ends.
func (s *Server) Watched(stream grpc.ServerStream, f func(grpc.ServerStream) error) error {
	ctx, cancel := context.WithCancelCause(stream.Context())
	defer cancel(nil)
	c := &call{began: time.Now(), watch: cancel}
	s.calls.add(c)
	defer s.calls.remove(c)
	if s.calls.areEnding() {
		timer := time.NewTimer(watchPause)
		defer timer.Stop()
		select {
		case <-timer.C:
		case <-stream.Context().Done():
		}
		return ErrReplaced
	}
	err := f(&streamWithContext{stream, ctx})
	if context.Cause(ctx) == ErrReplaced {
		return ErrReplaced
	}
	return err
}

type streamWithContext struct {
	grpc.ServerStream
	ctx context.Context //nolint:containedctx // required by the interface
}

func (s *streamWithContext) Context() context.Context { return s.ctx }
