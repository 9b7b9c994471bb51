package remotecommand

import (
	"context"
	"net"
	"os"
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

// client is the client's side of an exec or attach: its connection, and the streams it asked for. The others are nil.
type client struct {
	transport.Conn
	network  net.Conn // below Conn
	protocol protocol.Version
	// ready is closed when all streams are open. They are valid from then on.
	ready                          chan struct{}
	stdin, stdout, stderr, failure workload.Stream // failure is the protocol's error stream
	resize                         workload.Stream
	// failureOpened holds the error stream as soon as it is open, maybe before the others.
	failureOpened chan workload.Stream
	// statusRefused is closed when the client has ended the error stream. It is nil if the protocol has no way to do
	// that.
	statusRefused <-chan struct{}
	// answersItself and sendsSize are known from the request, see firstsize.go. kubectl always sends the size of its
	// terminal.
	answersItself, sendsSize bool
	// holdback decides how long the status waits for the client to read. It is nil if the status does not wait.
	holdback *holdback.Holdback
	// closeAndWait ends the session for the client, after everything was sent. It returns when the client has closed
	// the connection, the context is done, or the connection is frozen.
	closeAndWait func(context.Context)
}

// refusesStatus reports whether the client has reset the error stream. Then it does not want the status, and so has gone,
// even if its connection is still open: proxies keep theirs for a while.
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
	reapTimeout      = 5 * time.Second        // for a killed process to end
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
	upstream  atomic.Pointer[relay.Relay] // the process if the upstream serves it, even after it was closed
	input     *stdin.Input                // nil if the client sends none
	heldInput *os.File
	served    chan struct{} // closed when nothing more will arrive from the client
	terminal  *terminal.Sizes
	outputs   rescue.Group // the copiers of stdout and stderr
	others    rescue.Group // connection reader, stdin, resize, warnings
	drain     drain.Drain
	limits    *lifetime.Timeouts
	cut       cut
	warnings  warnings

	bandwidth *bandwidth.Limit
	withheld  atomic.Bool // output was not sent because it could not be recorded; the session is being ended
}

// newSession returns a new session, for Accept and for Resume.
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

// Run serves the session to its end, from the upgraded connection or from the state that it was resumed from. When it
// returns, the connection is closed and every goroutine of the session has ended. If the outcome's error is
// handover.ErrFrozen, the session has not ended: it continues from the state that Freeze has returned.
func (s *Session) Run() (outcome session.Outcome) {
	defer func() {
		if value := recover(); value != nil {
			outcome = s.crash(rescue.Caught(value))
		}
	}()
	ctx := s.session.Context()
	s.others.Go(func() {
		defer close(s.served)
		// Not cancelled with the session's context: a session that is told to end still has to deliver a status.
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

// goOn restarts the work of a resumed session. For a new session it does nothing.
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
			s.process.Disconnect() // again: its connection may have been frozen the first time
		}
		s.operate()
	}
	for _, warning := range s.warnings.take() {
		s.warn(warning)
	}
}

// halt waits until a frozen session has stopped.
func (s *Session) halt() {
	s.ending.stopWatching()
	s.cut.stop()
	if s.limits != nil {
		s.limits.Stop()
	}
	s.outputs.Wait()
	s.others.Wait()
}

// release releases the resources of a session that has ended.
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

// LastReceived returns when the client last sent anything, pings included.
func (s *Session) LastReceived() time.Time { return s.client.LastReceived() }

// Done is closed when the client is known to have gone. Data that it has sent may still arrive.
func (s *Session) Done() <-chan struct{} { return s.client.Done() }

// Network returns the client's network connection.
func (s *Session) Network() net.Conn { return s.client.network }

// Close ends the client's connection, and so the session, at once.
func (s *Session) Close() error { return s.client.Close() }
