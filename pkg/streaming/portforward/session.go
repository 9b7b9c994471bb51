package portforward

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
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

// Session is one port-forward session: many connections into one pod over one client connection.
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
	waiting map[string]*connection // pairs whose second stream is missing
	open    map[*connection]struct{}
	// Bytes moved by connections that have ended.
	received, sent int64
	endReason      error     // why the session ends, for the client; nil while it runs
	told           bool      // endReason was written, or is being written, to an error stream
	graceEnds      time.Time // until when the client may then close
	grace          time.Duration

	// legacy are the connections of a WebSocket client whose CRI request names its ports: one for each port, open
	// from the start.
	isLegacy   bool
	legacy     []*connection
	legacyDone chan struct{} // closed when all of them have ended
	// closeWrite tells a legacy client that no port will send anything more. closeAndWait ends the session and
	// waits for the client to close.
	closeWrite, closeAndWait func(context.Context)

	ctx    context.Context // of the forwards; ends with Run
	cancel context.CancelFunc
	// departure ends when the client has left in order, see finishUploads.
	departure context.Context
	depart    context.CancelFunc
	served    chan struct{} // closed when nothing more will arrive from the client
	fewer     chan struct{} // has a value after a connection has ended

	// For a hand-over, see Freeze and Resume.
	still   chan struct{}           // closed when a frozen session has stopped
	ended   chan struct{}           // closed when Run has ended without a freeze
	result  chan session.Outcome    // how Run ends after still is closed; buffered
	resumed *lifetime.TimeoutsState // nil in a session that begins here
	begun   []*connection           // connections to continue, without legacy ones
	limits  *lifetime.Timeouts
}

// connection is one local connection of the client. It has two streams, one for the bytes and one for an error message.
type connection struct {
	port          uint16
	data, failure workload.Stream
	timeout       *time.Timer // for the second stream
	expires       time.Time   // when timeout fires
	// outputEnded is called, once or more, when the pod will send no more. It is set for legacy connections only.
	outputEnded func()
	outputOver  atomic.Bool // the pod will send no more

	proceed func(context.Context) (sent, received int64, err error) // continues a resumed connection; nil for a new one
	frozen  FrozenConnection                                        // nil unless the session was frozen
	unsaid  string                                                  // message that is still to be written to the error stream
}

// maxWaiting bounds the streams that wait for the second one of their pair. A client that opens and resets streams leaves
// them waiting here although they do not count as open any more.
const maxWaiting = 1024

// Run serves the session from the upgraded connection to its end, or until it is frozen.
func (s *Session) Run() (outcome session.Outcome) {
	defer func() {
		if value := recover(); value != nil {
			outcome = s.crash(rescue.Caught(value))
		}
	}()
	// Not cancelled with the session's context: the client is told why the session ends before its connections end.
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
	s.connections.Go(func() {
		// Not cancelled with s.ctx, so that the client can still be told why the session ends.
		err := s.client.Serve(context.WithoutCancel(s.ctx)) // Done and Err report other errors
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
	s.client.Discard() // in case it was frozen meanwhile
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
			// Otherwise kubectl would only notice at its next connection (kubernetes#59816, kubectl#686).
			s.tellAndClose(ErrSandboxGone)
			return s.unlessFrozen(session.Outcome{Reason: "sandbox-gone", ExitCode: -1, Err: ErrSandboxGone})
		case <-s.session.Context().Done():
			outcome := lifetime.Stopped(s.session.Context())
			s.tellAndClose(outcome.Err)
			return s.unlessFrozen(outcome)
		case <-s.legacyDone:
			s.session.SetPhase(session.Lingering)
			s.closeAndWait(s.session.Context())
			return s.unlessFrozen(session.Outcome{Reason: "exited", ExitCode: -1})
		case <-s.limits.C():
			s.limits.Check()
		}
	}
}

// finishUploads delivers what a client that has left in order had sent. Connections whose end of input has arrived
// deliver all of it, and the FIN. The others are reset. pkg/portforward bounds the wait, because it sees whether the pod
// reads.
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

// forwardedStream is a client's data stream as pkg/portforward sees it. When the client leaves after the end of its
// input, the input is still delivered to the pod, and the pod's output is discarded.
type forwardedStream struct {
	workload.Stream
	session    *Session
	connection *connection
}

// outlives reports whether the stream continues although writing to its client has failed with err.
func (f forwardedStream) outlives(err error) bool {
	if transport.IsReset(err) || !transport.LeftInOrder(f.session.client.Err()) {
		return false
	}
	// While not everything was read, the end of the input may still arrive.
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

// CloseWrite ends the error stream together with the pod's output, because no error that concerns the client can follow.
// Clients up to Kubernetes 1.22 wait for the end of the error stream before they pass the pod's EOF on to the local
// program, which may in turn wait for that EOF to end its own side.
func (f forwardedStream) CloseWrite() error {
	err := f.Stream.CloseWrite()
	f.connection.outputOver.Store(true)
	if f.connection.outputEnded != nil {
		f.connection.outputEnded()
	} else {
		f.connection.failure.CloseWrite() //nolint:errcheck // the connection reports it, as for the data stream
	}
	if err != nil && f.outlives(err) {
		return nil
	}
	return err
}

// AfterLeaving calls do when the client has left. pkg/portforward uses it for streams that may outlive their client.
func (f forwardedStream) AfterLeaving(do func()) (stop func() bool) {
	return context.AfterFunc(f.session.departure, func() { rescue.Call(f.session.panicked, do) })
}

// AfterReset implements workload.Stream. A stream that outlives its client is not reset with it.
func (f forwardedStream) AfterReset(do func()) {
	f.Stream.AfterReset(func() {
		if !f.outlives(f.Err()) {
			do()
		}
	})
}

// startLegacy starts to forward the connections that are open from the start.
func (s *Session) startLegacy() {
	if !s.isLegacy {
		return
	}
	s.legacyDone = make(chan struct{})
	if len(s.legacy) == 0 { // all had ended before a hand-over
		close(s.legacyDone)
		return
	}
	var open, talking atomic.Int32
	open.Store(int32(len(s.legacy))) //nolint:gosec // at most websocket.MaxPorts
	silent := func() {
		// The protocol cannot half-close one port. So the client is told when the last one has ended. It then ends
		// its own side.
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
			if !c.willResume() && open.Add(-1) == 0 {
				close(s.legacyDone)
			}
		})
	}
}

// startBegun continues the connections of a resumed session that are not legacy ones.
func (s *Session) startBegun() {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.resumed != nil && s.endReason == nil && s.session.Context().Err() != nil {
		s.endReason = lifetime.Stopped(s.session.Context()).Err
	}
	if s.endReason != nil {
		s.cancel() // as in tellAndClose
	}
	for _, c := range s.begun {
		s.start(c)
	}
	s.begun = nil
}

// onStream pairs a client's streams. The connection's read loop calls it.
func (s *Session) onStream(stream *spdy.Stream) {
	kind := strings.ToLower(stream.Header().Get(transport.HeaderStreamType))
	port, err := strconv.ParseUint(stream.Header().Get(transport.HeaderPort), 10, 16)
	if err != nil || port == 0 || (kind != transport.StreamData && kind != transport.StreamError) {
		s.session.Log().Debug("stream without a usable port or type", "port", stream.Header().Get(transport.HeaderPort), "type", kind)
		stream.Reset() //nolint:errcheck // the client sees the reset
		return
	}
	id := stream.Header().Get(transport.HeaderRequestID)
	if id == "" {
		// Clients before Kubernetes 1.2 send none. They open the error stream and then the data stream.
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

// wait starts the timeout for the second stream of a pair. Called with mu held.
func (s *Session) wait(id string, c *connection, limit time.Duration) {
	c.expires = time.Now().Add(limit)
	c.timeout = time.AfterFunc(limit, func() { rescue.Call(s.panicked, func() { s.abandon(id, c) }) })
	s.waiting[id] = c
}

// start starts to forward a connection. Called with mu held.
func (s *Session) start(c *connection) {
	s.open[c] = struct{}{}
	s.connections.Go(func() { s.forward(c) })
}

// abandon resets the first stream of a pair whose second one did not arrive.
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

// ErrSandboxGone ends a session whose pod was stopped.
var ErrSandboxGone = errors.New("the pod is gone: its sandbox was stopped")

// forward serves one connection. Its failure concerns this connection only. So over SPDY and the tunnel the error stream
// stays empty, because any text there makes kubectl end the whole port-forward (kubernetes#74551, kubernetes#111825).
// When the whole port-forward ends, the reason is written there. Legacy clients get each failure on the error stream:
// they have no other way to learn of it, and keep their other ports.
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
			c.unsaid = s.errorMessage(c, err)
		}
	}
	if c.unsaid != "" {
		if _, err := io.WriteString(c.failure, c.unsaid); errors.Is(err, handover.ErrFrozen) {
			return // the next program writes it
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

// willResume reports whether forward has left the connection for the next program to continue.
func (c *connection) willResume() bool { return c.frozen != nil || c.unsaid != "" }

// errorMessage returns what to write to the error stream of a connection that has failed. It may be empty.
func (s *Session) errorMessage(c *connection, err error) string {
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

// forwarded returns the client's data stream for pkg/portforward.
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

// tellAndClose ends all connections, writes the reason to their error streams, and waits for the client to close. kubectl
// reads the error stream of a connection when its data stream has ended, and then leaves.
func (s *Session) tellAndClose(reason error) {
	s.mu.Lock()
	s.endReason = reason
	told := s.told || len(s.open) > 0
	s.graceEnds = time.Now().Add(s.grace)
	s.mu.Unlock()
	s.cancel()
	if !told {
		return // no error stream is open
	}
	ctx, cancel := context.WithTimeout(context.Background(), s.grace)
	defer cancel()
	transport.AwaitClose(ctx, s.client)
}

// LastActivity implements session.Connection.
func (s *Session) LastActivity() time.Time { return s.client.LastActivity() }

// Done is closed when the client is known to have gone.
func (s *Session) Done() <-chan struct{} { return s.client.Done() }

// LastReceived returns when the client last sent anything, pings included.
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

// Network returns the client's network connection.
func (s *Session) Network() net.Conn { return s.network }

// Connections returns how many connections are open or wait for their second stream.
func (s *Session) Connections() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return len(s.open) + len(s.waiting)
}
