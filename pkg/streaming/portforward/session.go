package portforward

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"runtime/debug"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/streamshim/streamshim/pkg/handover"
	"github.com/streamshim/streamshim/pkg/rescue"
	"github.com/streamshim/streamshim/pkg/session"
	"github.com/streamshim/streamshim/pkg/streaming/internal/bandwidth"
	"github.com/streamshim/streamshim/pkg/streaming/internal/lifetime"
	"github.com/streamshim/streamshim/pkg/streaming/internal/spdy"
	"github.com/streamshim/streamshim/pkg/streaming/internal/transport"
	"github.com/streamshim/streamshim/pkg/workload"
)

// Session is one port-forward session: many connections into one pod over one client
// connection.
type Session struct {
	config    Config
	session   *session.Session
	forwarder Forwarder
	client    transport.Conn
	network   net.Conn // below client
	terms     lifetime.Terms

	bandwidth   *bandwidth.Limit
	connections rescue.Group

	mu      sync.Mutex
	waiting map[string]*connection // pairs of which one stream has come
	open    map[*connection]struct{}
	// What connections that have ended moved, in bytes.
	received, sent int64
	endReason      error     // why the session ends, for the client; nil while it goes on
	told           bool      // a client's error stream has been, or is being, written the reason
	graceEnds      time.Time // for which the client has then to close
	grace          time.Duration

	// legacy are the connections of a WebSocket client that names its ports in the CRI request: one
	// for each port, open from the start.
	isLegacy   bool
	legacy     []*connection
	legacyDone chan struct{} // closed when all of them have ended
	// closeWrite tells the client of legacy that no port has anything more to say, and farewell that all
	// is over, after which it waits for the client to close.
	closeWrite, farewell func(context.Context)

	ctx    context.Context // of the forwards; ends with Run
	cancel context.CancelFunc
	// departure ends when the client has left in order, see input.go.
	departure context.Context
	depart    context.CancelFunc
	served    chan struct{} // closed when nothing more will come from the client
	fewer     chan struct{} // has a value after a connection has ended

	// Of a hand-over, see Freeze and Resume.
	still   chan struct{}           // closed when nothing moves any more in a frozen session
	ended   chan struct{}           // closed when Run has ended otherwise
	result  chan session.Outcome    // how Run is to end when it is still; has room
	resumed *lifetime.TimeoutsState // where the watch stood; nil in a session that begins here
	begun   []*connection           // those to go on with, but for legacy
	limits  *lifetime.Timeouts
}

// connection is one local connection of the client: two streams, one for the bytes and one
// for an error message.
type connection struct {
	port          uint16
	data, failure workload.Stream
	timeout       *time.Timer // until the other stream has come
	expires       time.Time   // when that is over
	// outputEnded is called, once or more, when the pod will say no more. Nil but for legacy ones.
	outputEnded func()
	outputOver  atomic.Bool // it was called

	proceed func(context.Context) (sent, received int64, err error) // of one that goes on; nil to begin with
	frozen  FrozenConnection                                        // nil unless the session was frozen
	unsaid  string                                                  // for the error stream of one that has ended
}

// maxWaiting bounds the streams that wait for their other half: a client that opens and resets streams
// leaves them waiting here although they do not count as open any more.
const maxWaiting = 1024

// Run serves the session from the upgraded connection to its end, or until it is frozen.
func (s *Session) Run() (outcome session.Outcome) {
	defer func() {
		if value := recover(); value != nil {
			outcome = s.crash(&rescue.Panic{Value: value, Stack: debug.Stack()})
		}
	}()
	// Not a child of the session's context: when the session is told to end, the reason comes first
	// and the end of the connections second.
	s.ctx, s.cancel = context.WithCancel(context.WithoutCancel(s.session.Context()))
	s.departure, s.depart = context.WithCancel(s.ctx)
	s.served, s.fewer = make(chan struct{}), make(chan struct{}, 1)
	if s.resumed == nil {
		s.session.SetPhase(session.Running)
		s.limits = lifetime.NewTimeouts(s.terms.Limits, s.session)
	} else {
		s.limits = lifetime.ResumeTimeouts(s.terms.Limits, s.session, *s.resumed)
	}
	s.startLegacy()
	s.startBegun()
	// Not this context: the client is to be told why the session ends.
	s.connections.Go(func() {
		err := s.client.Serve(context.WithoutCancel(s.ctx)) // otherwise seen through Done and Err
		if !errors.Is(err, handover.ErrFrozen) {
			close(s.served)
		}
	})
	outcome = s.serve()
	s.limits.Stop()
	if outcome.Frozen() {
		return s.stand()
	}
	defer close(s.ended)
	s.cancel()
	s.client.Close()   //nolint:errcheck // the session is over
	s.client.Discard() // if it was frozen in the last moment
	s.stopWaiting()
	s.connections.Wait()
	s.discardFrozen()
	s.forwarder.Close() //nolint:errcheck // as above
	return outcome
}

// serve waits for what ends the session.
func (s *Session) serve() session.Outcome {
	for {
		select {
		case <-s.client.Frozen():
			return session.Frozen
		case <-s.client.Done():
			s.finishUploads()
			return s.unlessFrozen(lifetime.ClientGone(s.client.Err()))
		case <-s.forwarder.Gone():
			// kubectl would only notice at its next connection (kubernetes#59816, kubectl#686).
			s.tellAndClose(ErrSandboxGone)
			return s.unlessFrozen(session.Outcome{Reason: "sandbox-gone", ExitCode: -1, Err: ErrSandboxGone})
		case <-s.session.Context().Done():
			outcome := lifetime.Stopped(s.session.Context())
			s.tellAndClose(outcome.Err)
			return s.unlessFrozen(outcome)
		case <-s.legacyDone:
			s.session.SetPhase(session.Lingering)
			s.farewell(s.session.Context())
			return s.unlessFrozen(session.Outcome{Reason: "exited", ExitCode: -1})
		case <-s.limits.C():
			s.limits.Check()
		}
	}
}

// finishUploads lets the pod have what a client has sent that has left in order: all of it, and the FIN, of
// the connections whose end of input has come in. The others are reset. It is bounded by pkg/portforward,
// which sees whether the pod takes anything.
func (s *Session) finishUploads() {
	if !transport.LeftInOrder(s.client.Err()) {
		return
	}
	s.depart()
	served := s.served
	for {
		s.mu.Lock()
		open := len(s.open)
		s.mu.Unlock()
		if open == 0 && served == nil {
			return
		}
		select {
		case <-served:
			served = nil
		case <-s.fewer:
		case <-s.session.Context().Done():
			return
		case <-s.client.Frozen():
			return
		}
	}
}

// forwardedStream is a client's data stream as pkg/portforward sees it. When its client leaves after the end of its
// input, what it has sent goes on to the pod and what the pod says goes nowhere.
type forwardedStream struct {
	workload.Stream
	session    *Session
	connection *connection
}

// outlives tells whether the stream goes on although writing to its client has failed with err.
func (f forwardedStream) outlives(err error) bool {
	if transport.IsReset(err) || !transport.LeftInOrder(f.session.client.Err()) {
		return false
	}
	// As long as not everything has been read the end of input may still be among it.
	return f.InputEnded() || !transport.Closed(f.session.served)
}

// ReadFrom implements Stream.
func (f forwardedStream) ReadFrom(r io.Reader) (int64, error) {
	n, err := f.Stream.ReadFrom(r)
	if err == nil || errors.Is(err, handover.ErrFrozen) || !f.outlives(err) {
		return n, err
	}
	_, err = io.Copy(io.Discard, r)
	return n, err
}

// CloseWrite ends the error stream together with the pod's side: nothing can go wrong any more that the
// client would want to know. Clients up to Kubernetes 1.22 wait for the end of the error stream before
// they pass the pod's EOF on to the local program, which in turn may wait for it to end its own side.
func (f forwardedStream) CloseWrite() error {
	err := f.Stream.CloseWrite()
	f.connection.outputOver.Store(true)
	if f.connection.outputEnded != nil {
		f.connection.outputEnded()
	} else {
		f.connection.failure.CloseWrite() //nolint:errcheck // as with the data stream, seen in the connection
	}
	if err != nil && f.outlives(err) {
		return nil
	}
	return err
}

// AfterLeaving is what pkg/portforward looks for in a stream that may outlive its client.
func (f forwardedStream) AfterLeaving(do func()) (stop func() bool) {
	return context.AfterFunc(f.session.departure, func() { rescue.Call(f.session.panicked, do) })
}

// AfterReset implements workload.Stream: a stream that outlives its client is not reset with it.
func (f forwardedStream) AfterReset(do func()) {
	f.Stream.AfterReset(func() {
		if !f.outlives(f.Err()) {
			do()
		}
	})
}

// startLegacy begins to forward the connections that are open from the start.
func (s *Session) startLegacy() {
	if !s.isLegacy {
		return
	}
	s.legacyDone = make(chan struct{})
	if len(s.legacy) == 0 { // all have ended before a hand-over
		close(s.legacyDone)
		return
	}
	var open, talking atomic.Int32
	open.Store(int32(len(s.legacy))) //nolint:gosec // at most websocket.MaxPorts
	silent := func() {
		// The protocol has no half-close of a port: it takes the last one to tell the client, who answers
		// with the end of its own side.
		s.session.SetPhase(session.Lingering)
		s.closeWrite(s.ctx)
	}
	for _, c := range s.legacy {
		if !c.outputOver.Load() {
			talking.Add(1)
		}
	}
	if talking.Load() == 0 {
		silent()
	}
	for _, c := range s.legacy {
		s.mu.Lock()
		s.open[c] = struct{}{}
		s.mu.Unlock()
		wasOver := c.outputOver.Load()
		c.outputEnded = sync.OnceFunc(func() {
			if !wasOver && talking.Add(-1) == 0 {
				silent()
			}
		})
		s.connections.Go(func() {
			s.forward(c)
			if !c.standsStill() && open.Add(-1) == 0 {
				close(s.legacyDone)
			}
		})
	}
}

// startBegun goes on with the other connections of a session that was resumed.
func (s *Session) startBegun() {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.resumed != nil && s.endReason == nil && s.session.Context().Err() != nil {
		s.endReason = lifetime.Stopped(s.session.Context()).Err
	}
	if s.endReason != nil {
		s.cancel() // as tellAndClose has, or will
	}
	for _, c := range s.begun {
		s.start(c)
	}
	s.begun = nil
}

// onStream pairs a client's streams. It is called by the connection's reader.
func (s *Session) onStream(stream *spdy.Stream) {
	kind := strings.ToLower(stream.Header().Get(transport.HeaderStreamType))
	port, err := strconv.ParseUint(stream.Header().Get(transport.HeaderPort), 10, 16)
	if err != nil || port == 0 || (kind != transport.StreamData && kind != transport.StreamError) {
		s.session.Log().Debug("stream without a usable port or type", "port", stream.Header().Get(transport.HeaderPort), "type", kind)
		stream.Reset() //nolint:errcheck // the client made a mistake; it sees the reset
		return
	}
	id := stream.Header().Get(transport.HeaderRequestID)
	if id == "" {
		// Clients before 1.2 send none: they open the error stream and then the data stream.
		n := stream.ID()
		if kind == transport.StreamData {
			n -= 2
		}
		id = strconv.FormatUint(uint64(n), 10)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	c, ok := s.waiting[id]
	if !ok && len(s.waiting) == maxWaiting {
		stream.Reset() //nolint:errcheck // as above
		return
	}
	if !ok {
		c = &connection{port: uint16(port)}
		s.wait(id, c, s.config.StreamCreation)
	}
	slot := &c.data
	if kind == transport.StreamError {
		slot = &c.failure
	}
	if *slot != nil || c.port != uint16(port) {
		stream.Reset() //nolint:errcheck // as above
		return
	}
	*slot = stream
	stream.Accept() //nolint:errcheck // a client that has gone is noticed in Run
	if c.data != nil && c.failure != nil {
		c.timeout.Stop()
		delete(s.waiting, id)
		s.start(c)
	}
}

// wait gives the other stream of a pair time to come; s.mu is held.
func (s *Session) wait(id string, c *connection, limit time.Duration) {
	c.expires = time.Now().Add(limit)
	c.timeout = time.AfterFunc(limit, func() { rescue.Call(s.panicked, func() { s.abandon(id, c) }) })
	s.waiting[id] = c
}

// start begins to forward; s.mu is held.
func (s *Session) start(c *connection) {
	s.open[c] = struct{}{}
	s.connections.Go(func() { s.forward(c) })
}

// abandon resets half a pair whose other half did not come.
func (s *Session) abandon(id string, c *connection) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.waiting[id] != c || s.isFrozen() {
		return
	}
	delete(s.waiting, id)
	for _, stream := range []workload.Stream{c.data, c.failure} {
		if stream != nil {
			stream.Reset() //nolint:errcheck // the client sees the reset
		}
	}
}

func (s *Session) stopWaiting() {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, c := range s.waiting {
		c.timeout.Stop()
	}
	clear(s.waiting)
}

// ErrSandboxGone is the end of a session whose pod was stopped.
var ErrSandboxGone = errors.New("the pod is gone: its sandbox was stopped")

// forward serves one connection. Whatever becomes of it concerns this connection alone: over SPDY and the
// tunnel the error stream stays empty, because kubectl answers any text there by ending the whole port-forward
// (kubernetes#74551, kubernetes#111825). When the whole port-forward ends, that is what is wanted. The clients
// of the legacy protocol learn of a port that fails in no other way, and keep the others.
func (s *Session) forward(c *connection) {
	if c.unsaid == "" {
		err := s.move(c)
		if s.isFrozen() && errors.As(err, &c.frozen) {
			return
		}
		if panicked := new(rescue.Panic); errors.As(err, &panicked) {
			s.panicked(panicked)
		}
		if err != nil {
			s.session.Log().Debug("forwarded connection failed", "port", c.port, "error", err)
			c.unsaid = s.lastWords(c, err)
		}
	}
	if c.unsaid != "" {
		if _, err := io.WriteString(c.failure, c.unsaid); errors.Is(err, handover.ErrFrozen) {
			return // it is said by whoever resumes
		}
		c.unsaid = ""
	}
	c.failure.CloseRead()
	c.failure.CloseWrite() //nolint:errcheck // a client that has gone is noticed in Run
	received, sent := transport.Transferred(c.data)
	s.mu.Lock()
	delete(s.open, c)
	s.received += received
	s.sent += sent
	s.mu.Unlock()
	if c.outputEnded != nil {
		c.outputEnded()
	}
	select {
	case s.fewer <- struct{}{}:
	default:
	}
}

// standsStill tells whether a connection that was left is to go on.
func (c *connection) standsStill() bool { return c.frozen != nil || c.unsaid != "" }

// lastWords are what the client is told of a connection that has failed, empty for nothing.
func (s *Session) lastWords(c *connection, err error) string {
	s.mu.Lock()
	defer s.mu.Unlock()
	reason := s.endReason
	if reason == nil && transport.Closed(s.forwarder.Gone()) {
		reason = ErrSandboxGone
	}
	var refused interface{ Refused() bool }
	switch {
	case reason != nil:
		s.told = true
		return reason.Error()
	case c.outputEnded != nil, s.config.ReportRefused && errors.As(err, &refused) && refused.Refused():
		return fmt.Sprintf("forwarding port %d failed: %v", c.port, err)
	}
	return ""
}

// forwarded is the client's stream of data as pkg/portforward sees it.
func (s *Session) forwarded(c *connection) workload.Stream {
	return forwardedStream{Stream: s.bandwidth.Stream(c.data), session: s, connection: c}
}

// move moves the bytes of one connection until both of its directions have ended.
func (s *Session) move(c *connection) error {
	if c.proceed != nil {
		_, _, err := c.proceed(s.ctx)
		return err
	}
	if s.config.MayConnect != nil {
		if err := s.config.MayConnect(); err != nil {
			c.data.Reset() //nolint:errcheck // the client sees the reset
			return err
		}
	}
	_, _, err := s.forwarder.Forward(s.ctx, c.port, s.forwarded(c))
	return err
}

// tellAndClose ends all connections, whose error streams tell the client why, and closes. kubectl
// looks at the error stream of a connection once its data stream has ended, and then goes.
func (s *Session) tellAndClose(reason error) {
	s.mu.Lock()
	s.endReason = reason
	told := s.told || len(s.open) > 0
	s.graceEnds = time.Now().Add(s.grace)
	s.mu.Unlock()
	s.cancel()
	if !told {
		return // closing the connection is all that can be said
	}
	ctx, cancel := context.WithTimeout(context.Background(), s.grace)
	defer cancel()
	transport.AwaitClose(ctx, s.client) // the client closes when it reads the message
}

// LastActivity implements session.Connection.
func (s *Session) LastActivity() time.Time { return s.client.LastActivity() }

// Done is closed when the client is known to have gone.
func (s *Session) Done() <-chan struct{} { return s.client.Done() }

// LastReceived is when the client last sent anything, pings included.
func (s *Session) LastReceived() time.Time { return s.client.LastReceived() }

// Close ends the client's connection, and so the session, at once.
func (s *Session) Close() error { return s.client.Close() }

// Transferred implements session.Connection.
func (s *Session) Transferred() (received, sent int64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	received, sent = s.received, s.sent
	for c := range s.open {
		r, w := transport.Transferred(c.data)
		received, sent = received+r, sent+w
	}
	return received, sent
}

// Network is the client's network connection.
func (s *Session) Network() net.Conn { return s.network }

// Connections is how many connections are open, or wait for their second stream.
func (s *Session) Connections() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return len(s.open) + len(s.waiting)
}
