package remotecommand

import (
	"context"
	"net"
	"os"
	"runtime/debug"
	"sync/atomic"
	"time"

	"github.com/streamshim/streamshim/pkg/rescue"
	"github.com/streamshim/streamshim/pkg/session"
	"github.com/streamshim/streamshim/pkg/streaming/internal/bandwidth"
	"github.com/streamshim/streamshim/pkg/streaming/internal/holdback"
	"github.com/streamshim/streamshim/pkg/streaming/internal/lifetime"
	"github.com/streamshim/streamshim/pkg/streaming/internal/transport"
	"github.com/streamshim/streamshim/pkg/streaming/remotecommand/internal/drain"
	"github.com/streamshim/streamshim/pkg/streaming/remotecommand/internal/protocol"
	"github.com/streamshim/streamshim/pkg/streaming/remotecommand/internal/relay"
	"github.com/streamshim/streamshim/pkg/streaming/remotecommand/internal/stdin"
	"github.com/streamshim/streamshim/pkg/streaming/remotecommand/internal/terminal"
	"github.com/streamshim/streamshim/pkg/workload"
)

// client is the client's side of an exec or attach: its connection and the streams it
// asked for, nil those it did not.
type client struct {
	transport.Conn
	network  net.Conn // below Conn
	protocol protocol.Version
	// ready is closed when all streams are there; they are valid from then on.
	ready                          chan struct{}
	stdin, stdout, stderr, failure workload.Stream // failure is the protocol's error stream
	resize                         workload.Stream
	// failureOpened holds the error stream as soon as it is there, before the others may be.
	failureOpened chan workload.Stream
	// statusRefused is closed when the error stream has ended from the client's side; nil where a
	// client cannot end it.
	statusRefused <-chan struct{}
	// answersItself and sendsSize are what is known of the client from its request: see firstsize.go.
	// kubectl sends the size of its terminal in any case.
	answersItself, sendsSize bool
	// holdback says how long the status is to wait for the client to read; nil where it need not.
	holdback *holdback.Holdback
	// closeAndWait tells the client that the session is over, after everything was sent, and returns
	// when the client has closed the connection, the context is done, or the connection is frozen.
	closeAndWait func(context.Context)
}

// refusesStatus tells whether the client has reset the error stream: it does not want to know how the
// command ends, and so has gone, whatever becomes of its connection. Proxies keep theirs for a while.
func (c *client) refusesStatus() bool { return transport.ResetByClient(c.failure.Err()) }

// Transferred implements session.Connection.
func (c *client) Transferred() (received, sent int64) {
	select {
	case <-c.ready:
		return transport.Transferred(c.stdin, c.stdout, c.stderr, c.resize)
	default:
		return 0, 0
	}
}

// Waits within one session that are not configuration.
const (
	reapTimeout      = 5 * time.Second        // for a killed process to be gone
	endReasonTimeout = 5 * time.Second        // to learn why a container ended
	containerEndWait = 200 * time.Millisecond // between a process killed with its container and the beginning of the container's end
	minStatusHeld    = time.Second            // from when on a status counts as held back
	exitCodeKilled   = 128 + 9
)

// Session is one exec or attach session while it runs.
type Session struct {
	config  Config
	terms   lifetime.Terms
	session *session.Session
	client  *client
	request *Request
	start   startFunc

	at       phase
	deadline time.Time // of the phase, see Session.limit
	ending   ending
	freezer  *freezer

	process   Process                     // nil before it runs and after it was closed
	upstream  atomic.Pointer[relay.Relay] // the process, also when it was closed, where the upstream serves it
	input     *stdin.Input                // nil where the client sends none
	heldInput *os.File
	served    chan struct{} // closed when nothing more will come from the client
	terminal  *terminal.Sizes
	outputs   rescue.Group // the copiers of stdout and stderr
	others    rescue.Group // connection reader, stdin, resize, warnings
	drain     drain.Drain
	limits    *lifetime.Timeouts
	cut       cut
	warnings  warnings

	bandwidth *bandwidth.Limit
	withheld  atomic.Bool // output that could not be recorded and so was not sent; the session is stopped
}

// newSession is what a session that begins and one that goes on have in common.
func newSession(request *Request, live *session.Session, config Config, terms lifetime.Terms) *Session {
	config.Waits = config.complete()
	s := &Session{
		config: config, terms: terms, session: live, request: request,
		at: opening, freezer: newFreezer(), served: make(chan struct{}),
	}
	s.start = config.start(live.Kind, request, terms.Buffers, s.panicked)
	s.outputs.Report, s.others.Report = s.panicked, s.panicked
	s.terminal = terminal.New(live.Taps.Resize)
	s.drain.Config = drain.Config{Idle: config.DrainIdle, Observe: terms.Observe, Unwanted: s.outputUnwanted}
	s.cut.close = func() { s.client.Close() } //nolint:errcheck // seen through Done
	s.cut.report = s.panicked
	return s
}

// Run serves the session, from the upgraded connection or from the state that it was resumed from, to its end. When
// it returns, the connection is closed and every goroutine of the session has ended. Where the outcome's error is
// handover.ErrFrozen the session has not ended: it goes on from the state that Freeze has returned.
func (s *Session) Run() (outcome session.Outcome) {
	defer func() {
		if value := recover(); value != nil {
			outcome = s.crash(&rescue.Panic{Value: value, Stack: debug.Stack()})
		}
	}()
	ctx := s.session.Context()
	s.others.Go(func() {
		defer close(s.served)
		// Not the session's context: a session that is told to end still has a status to deliver.
		s.client.Serve(context.WithoutCancel(ctx)) //nolint:errcheck // seen through Done and Err
	})
	s.goOn(ctx)
	for s.at != over {
		if !s.freezer.proceed(s.at) {
			s.halt()
			outcome := s.freezer.halted()
			if !outcome.Frozen() {
				s.abandon()
				s.release()
			}
			return outcome
		}
		at := s.step(ctx)
		if at != s.at {
			s.at, s.deadline = at, time.Time{}
		}
	}
	s.release()
	s.freezer.end()
	return s.ending.outcome
}

// goOn begins again what a session does that was resumed; one that is new does nothing of it yet.
func (s *Session) goOn(ctx context.Context) {
	s.cut.resume()
	if s.ending.cutsAfterStop {
		s.cutAfterStop(ctx)
	}
	if s.at != opening && s.at != sizing {
		s.followSizes()
	}
	if s.process != nil {
		if _, relayed := s.process.(*relay.Relay); relayed && (s.ending.stopped || s.at == following) {
			s.process.Disconnect() // again: it closes a connection, which may have been frozen at the time
		}
		s.operate()
	}
	for _, warning := range s.warnings.take() {
		s.warn(warning)
	}
}

// halt waits until nothing of a frozen session moves any more.
func (s *Session) halt() {
	s.ending.stopWatching()
	s.cut.stop()
	if s.limits != nil {
		s.limits.Stop()
	}
	s.outputs.Wait()
	s.others.Wait()
}

// release ends what a session has left when it ends.
func (s *Session) release() {
	s.ending.stopWatching()
	s.cut.stop()
	if s.limits != nil {
		s.limits.Stop()
	}
	if s.heldInput != nil {
		s.heldInput.Close() //nolint:errcheck // a pipe's end
	}
	if s.input != nil {
		s.input.Close()
	}
	s.client.Close() //nolint:errcheck // the session is over
	s.others.Wait()
}

// Transferred implements session.Connection.
func (s *Session) Transferred() (received, sent int64) { return s.client.Transferred() }

// LastActivity implements session.Connection.
func (s *Session) LastActivity() time.Time { return s.client.LastActivity() }

// LastReceived is when the client last sent anything, pings included.
func (s *Session) LastReceived() time.Time { return s.client.LastReceived() }

// Done is closed when the client is known to have gone. What it has sent may still be on its way.
func (s *Session) Done() <-chan struct{} { return s.client.Done() }

// Network is the client's network connection.
func (s *Session) Network() net.Conn { return s.client.network }

// Close ends the client's connection, and so the session, at once.
func (s *Session) Close() error { return s.client.Close() }
