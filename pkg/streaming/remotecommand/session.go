package remotecommand

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"github.com/streamshim/streamshim/pkg/session"
	"github.com/streamshim/streamshim/pkg/streaming/internal/bandwidth"
	"github.com/streamshim/streamshim/pkg/streaming/internal/lifetime"
	"github.com/streamshim/streamshim/pkg/streaming/internal/socket"
	"github.com/streamshim/streamshim/pkg/streaming/internal/status"
	"github.com/streamshim/streamshim/pkg/streaming/internal/transport"
	"github.com/streamshim/streamshim/pkg/workload"
)

// client is the client's side of an exec or attach: its connection and the streams it
// asked for, nil those it did not.
type client struct {
	transport.Conn
	network  net.Conn // below Conn
	protocol protocolVersion
	// ready is closed when all streams are there; they are valid from then on.
	ready                          <-chan struct{}
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
	holdback *holdback
	// farewell tells the client that the session is over, after everything was sent, and returns
	// when the client has closed the connection or the context is done.
	farewell func(context.Context)
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

	process  Process
	input    *input        // nil where the client sends none
	served   chan struct{} // closed when nothing more will come from the client
	terminal terminal
	outputs  sync.WaitGroup // the copiers of stdout and stderr
	others   sync.WaitGroup // connection reader, stdin, resize, warnings
	drain    drain

	bandwidth *bandwidth.Limit
	withheld  atomic.Bool // output that could not be recorded and so was not sent; the session is stopped
}

// Run serves the session from the upgraded connection to its end. When it returns, the connection
// is closed and every goroutine of the session has ended.
func (s *Session) Run() session.Outcome {
	ctx := s.session.Context()
	// Not the session's context: a session that is told to end still has a status to deliver.
	s.served = make(chan struct{})
	s.others.Go(func() {
		defer close(s.served)
		s.client.Serve(context.WithoutCancel(ctx)) //nolint:errcheck // seen through Done and Err
	})
	defer s.others.Wait()
	defer s.client.Close() //nolint:errcheck // the session is over
	defer func() {
		if s.input != nil {
			s.input.close()
		}
	}()

	if outcome, ok := s.waitForStreams(ctx); !ok {
		return outcome
	}
	command := s.request.Command
	command.Size = s.firstSize(ctx)
	process, err := s.start(ctx, command)
	if err != nil {
		return s.startFailed(ctx, err)
	}
	s.process = process
	s.session.SetHelper(process.StandIn())
	s.session.SetPhase(session.Running)
	s.beginOperating(process)
	s.terminal.attach(s.announcingSizes(process))
	s.copyStreams()
	return s.wait(ctx)
}

// waitForStreams returns false, and how the session ended, if the client did not open its streams.
func (s *Session) waitForStreams(ctx context.Context) (session.Outcome, bool) {
	timeout := time.NewTimer(s.config.StreamCreation)
	defer timeout.Stop()
	select {
	case <-s.client.ready:
		return session.Outcome{}, true
	case <-s.client.Done():
		// It may have said all it has to say, in one breath.
		if transport.Closed(s.client.ready) && s.hasInputToFinish() {
			return session.Outcome{}, true
		}
		return lifetime.ClientGone(s.client.Err()), false
	case <-ctx.Done():
		outcome := lifetime.Stopped(ctx)
		s.sayNotStarted(status.Ended(outcome.Err.Error()))
		return outcome, false
	case <-timeout.C:
		err := fmt.Errorf("the client did not open all streams of the command within %v", s.config.StreamCreation)
		s.sayNotStarted(status.InternalError(err.Error()))
		return session.Outcome{Reason: "no-streams", ExitCode: -1, Err: err}, false
	}
}

// sayNotStarted gives a client whose streams are not all there a status, if it has opened the stream
// for it: an error stream that ends empty counts as success (kubectl#1208).
func (s *Session) sayNotStarted(result *status.Status) {
	select {
	case failure := <-s.client.failureOpened:
		failure.Write(result.Encode(s.client.protocol.jsonStatus)) //nolint:errcheck // best effort
		failure.CloseWrite()                                       //nolint:errcheck // as above
		ctx, cancel := context.WithTimeout(context.Background(), lifetime.ShutdownGrace)
		defer cancel()
		s.client.farewell(ctx)
	default:
	}
}

// startFailed tells the client why the command did not start: a command that is not there is the
// user's mistake and gets a line on stderr and an exit code as a shell would give it, anything else
// is an internal error (kubernetes#40820).
func (s *Session) startFailed(ctx context.Context, err error) session.Outcome {
	outcome := session.Outcome{Reason: "start-failed", ExitCode: -1, Err: err}
	if ctx.Err() != nil {
		outcome = lifetime.Stopped(ctx)
		s.sayEnd(ctx, status.Ended(outcome.Err.Error()))
		return outcome
	}
	var refused *session.RefusedError
	if errors.As(err, &refused) {
		outcome.Reason = "refused"
		s.sayEnd(ctx, status.Refused(refused))
		return outcome
	}
	var exit interface{ ExitCode() int }
	if !errors.As(err, &exit) {
		s.sayEnd(ctx, status.InternalError("error executing command in container: "+err.Error()))
		return outcome
	}
	outcome.ExitCode, outcome.Err = exit.ExitCode(), nil // its text names the command, which is not for the log
	line, to := err.Error()+"\n", s.client.stderr
	if s.request.Command.TTY {
		line, to = err.Error()+"\r\n", s.client.stdout
	}
	if to != nil {
		io.WriteString(to, line) //nolint:errcheck // a client that has gone is noticed in sayEnd
	}
	s.sayEnd(ctx, status.Exit(outcome.ExitCode, err.Error()))
	return outcome
}

func (s *Session) copyStreams() {
	if stdin := s.process.Stdin(); stdin != nil && s.client.stdin != nil {
		s.input = copyInput(&s.others, stdin, s.operatedInput(s.client.stdin))
	}
	s.drain.idle, s.drain.observe, s.drain.unwanted = s.config.DrainIdle, s.terms.Observe, s.outputUnwanted
	for _, o := range []struct {
		to   workload.Stream
		from io.ReadCloser
		fin  bool // at its own end, not at the session's: sayLine may have something to add
	}{
		{s.operatedOutput(session.Stdout, s.client.stdout), s.process.Stdout(), !s.request.Command.TTY},
		{s.operatedOutput(session.Stderr, s.client.stderr), s.process.Stderr(), false},
	} {
		if o.to == nil || o.from == nil {
			continue
		}
		s.drain.sources = append(s.drain.sources, o.from)
		s.outputs.Go(func() {
			s.drain.copyOutput(o.to, o.from)
			if o.fin {
				o.to.CloseWrite() //nolint:errcheck // a client that has gone is noticed elsewhere
			}
		})
	}
}

// wait sees the process and its client to their end. All that can end a session is in one place.
func (s *Session) wait(ctx context.Context) session.Outcome {
	refused := s.client.statusRefused
	limits := lifetime.NewTimeouts(s.terms.Limits, s.session)
	defer limits.Stop()
	for {
		select {
		case <-s.process.Exited():
			return s.exited(ctx)
		case <-s.process.ContainerExited():
			// Without a pid namespace of its own the process outlives its container (kubernetes#89233).
			s.process.Kill()
			if !transport.WaitFor(s.process.Exited(), reapTimeout) {
				return s.stop(ctx, session.Outcome{Reason: "container-exited", ExitCode: -1,
					Err: errors.New(s.containerEnd(ctx))})
			}
			return s.exited(ctx)
		case <-s.client.Done():
			s.finishInput(ctx)
			return s.disconnected()
		case <-refused:
			if s.client.refusesStatus() {
				return s.disconnected()
			}
			refused = nil
		case <-ctx.Done():
			return s.stop(ctx, lifetime.Stopped(ctx))
		case <-limits.C():
			if warning := limits.Check(); warning != "" && s.client.stdout != nil {
				s.others.Go(func() { io.WriteString(s.client.stdout, warning) }) //nolint:errcheck // best effort
			}
		}
	}
}

// exited ends a session whose process has been reaped: all output, then the status, then the client
// closes.
func (s *Session) exited(ctx context.Context) session.Outcome {
	s.session.SetPhase(session.Lingering)
	stopWatching := context.AfterFunc(ctx, func() { // shutdown does not wait for slow readers
		time.AfterFunc(lifetime.ShutdownGrace, func() { s.client.Close() }) //nolint:errcheck // see Run
	})
	defer stopWatching()
	s.stopInput()
	s.drain.begin(s.config.DrainMax)

	outcome := session.Outcome{Reason: "exited", ExitCode: s.process.ExitCode()}
	result := status.Exit(outcome.ExitCode, "")
	if upstream, ok := s.process.(*relay); ok {
		result = upstream.result
	} else if outcome.ExitCode == exitCodeKilled && s.containerEnds() {
		// Asked now, while the output is still on its way: later the container may be removed.
		outcome.Reason = "container-exited"
		outcome.Err = errors.New(s.containerEnd(ctx))
		result = status.Exit(outcome.ExitCode, outcome.Err.Error())
	}
	s.awaitOutput()
	if s.withheld.Load() { // also behind a command that has ended well
		code := outcome.ExitCode
		outcome = lifetime.Stopped(ctx)
		outcome.ExitCode, result = code, status.Ended(outcome.Err.Error())
	}
	s.process.Close() //nolint:errcheck // nothing is left in it that anybody wants
	if outcome.Err != nil {
		s.sayLine("[streamshim: " + outcome.Err.Error() + "]")
	}
	s.holdStatus(ctx)
	s.sayEnd(ctx, result)
	return outcome
}

// awaitOutput waits for the output's end, or for that of the client: output that a background child holds,
// or an upstream that does not end it, may be waited for without limit.
func (s *Session) awaitOutput() {
	ended := make(chan struct{})
	s.others.Go(func() {
		select {
		case <-s.client.Done():
			s.process.Close() //nolint:errcheck // wakes the copiers
		case <-ended:
		}
	})
	s.outputs.Wait()
	close(ended)
}

// sayLine writes a line for the user's eyes: clients that find an exit code in the status show
// nothing else of it. Stdout is left alone, unless it is a terminal.
func (s *Session) sayLine(line string) {
	if s.request.Command.TTY && s.client.stdout != nil {
		io.WriteString(s.client.stdout, "\r\n"+line+"\r\n") //nolint:errcheck // a client that has gone is noticed in sayEnd
	} else if s.client.stderr != nil {
		io.WriteString(s.client.stderr, line+"\n") //nolint:errcheck // as above
	}
}

// containerEnds says whether a process that was killed was killed with its container. It may be seen to
// end a moment before the container's main process begins to, where both get the same signal. That one is
// the last to be gone, on a busy machine a good while later.
func (s *Session) containerEnds() bool {
	for deadline := time.Now().Add(reapTimeout); ; {
		if transport.WaitFor(s.process.ContainerExited(), containerEndWait) {
			return true
		}
		if !s.process.ContainerEnding() || time.Now().After(deadline) {
			return false
		}
	}
}

// containerEnd says why the container is gone.
func (s *Session) containerEnd(ctx context.Context) string {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), endReasonTimeout)
	defer cancel()
	if reason := s.config.Runtime.EndReason(ctx, s.request.Container.Target); reason != "" {
		return reason
	}
	return "the container's main process has ended"
}

// disconnected ends a session whose client has gone: its process follows (kubernetes#89031), unless it has
// ended by itself.
func (s *Session) disconnected() session.Outcome {
	outcome := lifetime.ClientGone(s.client.Err())
	if !transport.Closed(s.process.Exited()) {
		defer s.holdInput()()
		s.process.Disconnect()
	}
	s.client.Close() //nolint:errcheck // wakes the copiers
	s.stopInput()
	if s.processFollows() {
		outcome.ExitCode = s.process.ExitCode()
	}
	s.process.Close() //nolint:errcheck // nobody is left to tell
	s.outputs.Wait()
	return outcome
}

// holdInput keeps the end of input from a process that is about to be hung up and has not been given all of
// it, until release: it may live for a while, and input that was cut must not look whole.
func (s *Session) holdInput() (release func()) {
	release = func() {}
	if s.input == nil || transport.Closed(s.input.ended) && !s.input.cut {
		return release
	}
	if stdin, ok := s.input.stdin.(*os.File); ok {
		socket.Control(stdin, func(fd int) {
			if held, err := unix.FcntlInt(uintptr(fd), unix.F_DUPFD_CLOEXEC, 0); err == nil { //nolint:gosec // a descriptor
				release = func() { unix.Close(held) } //nolint:errcheck // a pipe's end
			}
		})
	}
	return release
}

// outputUnwanted tells what to do with output that the client does not take any more: true is to throw it
// away. A command that is still to take its client's input must not end because of its output.
func (s *Session) outputUnwanted(err error) bool {
	return !transport.IsReset(err) && s.hasInputToFinish()
}

// stop ends a session from outside: the client gets a status at once, the process is treated as if
// the client had gone.
func (s *Session) stop(ctx context.Context, outcome session.Outcome) session.Outcome {
	stopWatching := time.AfterFunc(lifetime.ShutdownGrace, func() { s.client.Close() }) //nolint:errcheck // see Run
	defer stopWatching.Stop()
	defer s.holdInput()()
	s.process.Disconnect()
	s.stopInput()
	s.drain.begin(0)
	s.outputs.Wait()
	s.sayEnd(ctx, status.Ended(outcome.Err.Error()))
	if s.processFollows() {
		outcome.ExitCode = s.process.ExitCode()
	}
	s.process.Close() //nolint:errcheck // the session is over
	return outcome
}

// stopInput throws away what the client still sends.
func (s *Session) stopInput() {
	if s.input != nil {
		s.input.stop()
	} else if s.client.stdin != nil {
		s.client.stdin.CloseRead()
	}
}

// sayEnd ends the streams in the order the protocol wants and lets the client close the connection.
func (s *Session) sayEnd(ctx context.Context, result *status.Status) {
	s.session.SetPhase(session.Lingering)
	for _, stream := range []workload.Stream{s.client.stdout, s.client.stderr} {
		if stream != nil {
			stream.CloseWrite() //nolint:errcheck // a client that has gone is noticed in farewell
		}
	}
	if message := result.Encode(s.client.protocol.jsonStatus); len(message) > 0 {
		s.client.failure.Write(message) //nolint:errcheck // as above
	}
	s.client.failure.CloseWrite() //nolint:errcheck // as above
	patience, cancel := lifetime.WithGrace(ctx)
	defer cancel()
	s.client.farewell(patience)
}

// processFollows waits for the process of a client that has gone, unless processes live on without their
// clients, and reports whether it has ended.
func (s *Session) processFollows() bool {
	limit := s.config.ProcessEnd
	if s.config.KeepProcesses {
		limit = 0
	}
	return transport.WaitFor(s.process.Exited(), limit)
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
