package remotecommand

import (
	"context"
	"errors"
	"fmt"
	"io"
	"time"

	"github.com/streamshim/streamshim/pkg/session"
	"github.com/streamshim/streamshim/pkg/streaming/internal/lifetime"
	"github.com/streamshim/streamshim/pkg/streaming/internal/status"
	"github.com/streamshim/streamshim/pkg/streaming/internal/transport"
	"github.com/streamshim/streamshim/pkg/streaming/remotecommand/internal/relay"
	"github.com/streamshim/streamshim/pkg/streaming/remotecommand/internal/stdin"
	"github.com/streamshim/streamshim/pkg/workload"
)

// phase is a phase in the life of a session. Each phase waits for something, until a deadline that survives a hand-over.
// When the session is frozen, the phase returns itself, and is entered again after the hand-over. Only starting is not
// left: Freeze waits for it.
//
// The values are part of the hand-over format.
type phase string

const (
	opening    phase = "opening"    // waits for the client to open its streams
	sizing     phase = "sizing"     // waits for the size of the client's terminal
	starting   phase = "starting"   // waits for the process to run
	running    phase = "running"    // waits for the end of the process, its container or the client, or for an order to end
	finishing  phase = "finishing"  // waits for the process to read the input of a client that has left
	reaping    phase = "reaping"    // waits for the end of a process that was killed because its container has ended
	explaining phase = "explaining" // finds the reason why the process has ended
	draining   phase = "draining"   // waits for all output to be sent
	telling    phase = "telling"    // sends the line for the user
	holding    phase = "holding"    // waits for a slow reader behind a translator, see package holdback
	saying     phase = "saying"     // ends the streams and sends the status
	parting    phase = "parting"    // waits for the client to close the connection
	following  phase = "following"  // waits for the process to end after its client has gone, or after an order to end
	over       phase = "over"
)

// step runs one phase and returns the next. What a phase starts, such as a timer, ends with it.
func (s *Session) step(ctx context.Context) phase {
	switch s.at {
	case opening:
		return s.awaitStreams(ctx)
	case sizing:
		return s.awaitSize(ctx)
	case starting:
		return s.startProcess(ctx)
	case running:
		return s.await(ctx)
	case finishing:
		return s.finishInput(ctx)
	case reaping:
		return s.reap(ctx)
	case explaining:
		return s.explain(ctx)
	case draining:
		return s.awaitOutput(ctx)
	case telling:
		return s.tell()
	case holding:
		return s.holdStatus(ctx)
	case saying:
		return s.endStreams(ctx)
	case parting:
		return s.part()
	case following:
		return s.awaitProcess()
	default:
		s.ending.outcome = session.Outcome{Reason: "internal-error", ExitCode: -1, Err: fmt.Errorf("a session has no phase %q", s.at)}
		return over
	}
}

// limit returns when the phase ends if it may last this long, counted from when it was first entered.
func (s *Session) limit(atMost time.Duration) time.Time {
	if s.deadline.IsZero() {
		s.deadline = time.Now().Add(atMost)
	}
	return s.deadline
}

// timer returns a timer that fires when the phase has lasted this long.
func (s *Session) timer(atMost time.Duration) *time.Timer {
	return time.NewTimer(time.Until(s.limit(atMost)))
}

func (s *Session) awaitStreams(ctx context.Context) phase {
	timeout := s.timer(s.config.StreamCreation)
	defer timeout.Stop()
	select {
	case <-s.client.ready:
		return sizing
	case <-s.client.Done():
		// It may have sent its streams and all of its input at once, and left.
		if transport.Closed(s.client.ready) && s.hasInputToFinish() {
			return sizing
		}
		s.ending.outcome = lifetime.ClientGone(s.client.Err())
		return over
	case <-ctx.Done():
		outcome := lifetime.Stopped(ctx)
		return s.notStarted(outcome, endedBy(outcome))
	case <-timeout.C:
		err := fmt.Errorf("the client did not open all streams of the command within %v", s.config.StreamCreation)
		return s.notStarted(session.Outcome{Reason: "no-streams", ExitCode: -1, Err: err}, status.InternalError(err.Error()))
	case <-s.freezer.frozen:
		return opening
	}
}

// notStarted ends a session whose client has not opened all streams. The client gets a status if it has opened the error
// stream, because an error stream that ends empty counts as success (kubectl#1208).
func (s *Session) notStarted(outcome session.Outcome, result *status.Status) phase {
	s.ending.outcome, s.ending.status, s.ending.unopened = outcome, result, true
	s.cut.by(time.Now().Add(lifetime.ShutdownGrace))
	if s.failureStream() == nil {
		return over
	}
	return saying
}

// awaitSize waits a moment for the terminal's size, see firstsize.go.
func (s *Session) awaitSize(ctx context.Context) phase {
	s.followSizes()
	if s.request.Command.TTY && s.client.resize != nil && !s.firstSize(ctx) {
		return sizing
	}
	return starting
}

func (s *Session) startProcess(ctx context.Context) phase {
	command := s.request.Command
	command.Size = s.terminal.Last()
	process, err := s.start(ctx, command)
	if err != nil {
		return s.startFailed(ctx, err)
	}
	s.process = process
	if upstream, ok := process.(*relay.Relay); ok {
		s.upstream.Store(upstream)
	}
	s.session.SetHelper(process.StandIn())
	s.session.SetPhase(session.Running)
	s.operate()
	return running
}

// startFailed tells the client why the command did not start. A command that is not found is the user's mistake: it gets a
// line on stderr and an exit code, as in a shell. Any other reason is an internal error (kubernetes#40820).
func (s *Session) startFailed(ctx context.Context, err error) phase {
	outcome := session.Outcome{Reason: "start-failed", ExitCode: -1, Err: err}
	var result *status.Status
	var refused *session.RefusedError
	var exit interface{ ExitCode() int }
	switch {
	case ctx.Err() != nil:
		outcome = lifetime.Stopped(ctx)
		result = endedBy(outcome)
	case errors.As(err, &refused):
		outcome.Reason = "refused"
		result = status.Refused(refused)
	case errors.As(err, &exit):
		outcome.ExitCode, outcome.Err = exit.ExitCode(), nil // its text names the command, which must not be logged
		s.ending.line = err.Error() + "\n"
		if s.request.Command.TTY {
			s.ending.line = err.Error() + "\r\n"
		}
		result = status.Exit(outcome.ExitCode, err.Error())
	default:
		result = status.InternalError("error executing command in container: " + err.Error())
	}
	s.ending.outcome, s.ending.status = outcome, result
	return telling
}

// operate starts to copy the streams of the running process.
func (s *Session) operate() {
	s.beginOperating(s.process)
	s.terminal.Attach(s.process)
	s.copyStreams()
	if s.limits == nil {
		s.limits = lifetime.NewTimeouts(s.terms.Limits, s.session)
	}
}

func (s *Session) copyStreams() {
	if to := s.process.Stdin(); s.client.stdin != nil && (s.input != nil || to != nil) {
		if s.input == nil {
			s.input = stdin.New()
		}
		s.input.Copy(&s.others, s.operatedInput(s.client.stdin, &s.input.Shown), to)
	}
	s.drain.Copy(&s.outputs, session.Stdout, s.process.Stdout(), s.operatedOutput(session.Stdout, s.client.stdout), !s.request.Command.TTY)
	s.drain.Copy(&s.outputs, session.Stderr, s.process.Stderr(), s.operatedOutput(session.Stderr, s.client.stderr), false)
}

// await waits while the process runs. It has everything that can end a session.
func (s *Session) await(ctx context.Context) phase {
	refused := s.client.statusRefused
	for {
		select {
		case <-s.process.Exited():
			return s.exited(ctx)
		case <-s.process.ContainerExited():
			// A process without a pid namespace of its own outlives its container (kubernetes#89233).
			return reaping
		case <-s.client.Done():
			if s.hasInputToFinish() {
				return finishing
			}
			return s.disconnected()
		case <-refused:
			if s.client.refusesStatus() {
				return s.disconnected()
			}
			refused = nil
		case <-ctx.Done():
			return s.stopped(lifetime.Stopped(ctx))
		case <-s.limits.C():
			if warning := s.limits.Check(); warning != "" {
				s.warn(warning)
			}
		case <-s.freezer.frozen:
			return running
		}
	}
}

func (s *Session) reap(ctx context.Context) phase {
	s.process.Kill()
	timeout := s.timer(reapTimeout)
	defer timeout.Stop()
	select {
	case <-s.process.Exited():
		return s.exited(ctx)
	case <-timeout.C:
		reason, ok := s.containerEnd(ctx)
		if !ok {
			return reaping
		}
		return s.stopped(session.Outcome{Reason: "container-exited", ExitCode: -1, Err: errors.New(reason)})
	case <-s.freezer.frozen:
		return reaping
	}
}

// exited begins the end of a session whose process was reaped: all output, then the status, then the client closes.
func (s *Session) exited(ctx context.Context) phase {
	s.session.SetPhase(session.Lingering)
	s.cutAfterStop(ctx)
	s.stopInput()
	s.drain.Begin(s.config.DrainMax)
	s.ending.outcome = session.Outcome{Reason: "exited", ExitCode: s.process.ExitCode()}
	s.ending.status = status.Exit(s.ending.outcome.ExitCode, "")
	s.ending.hold = true
	if upstream := s.upstream.Load(); upstream != nil {
		s.ending.status = upstream.Result()
		return draining
	}
	return explaining
}

// explain finds out whether the process was killed with its container. It does so before the output was sent, because later
// the container may be removed.
func (s *Session) explain(ctx context.Context) phase {
	if s.ending.outcome.ExitCode != exitCodeKilled {
		return draining
	}
	ends, ok := s.containerEnds()
	if !ok {
		return explaining
	}
	if !ends {
		return draining
	}
	reason, ok := s.containerEnd(ctx)
	if !ok {
		return explaining
	}
	s.ending.outcome.Reason, s.ending.outcome.Err = "container-exited", errors.New(reason)
	s.ending.status = status.Exit(s.ending.outcome.ExitCode, reason)
	return draining
}

// containerEnds reports whether a killed process was killed with its container. ok is false if the session was frozen
// meanwhile. If both get the same signal, the process may end a moment before the container's main process begins to end.
// The main process is the last to be gone, on a busy machine much later.
func (s *Session) containerEnds() (ends, ok bool) {
	for deadline := s.limit(reapTimeout); ; {
		look := time.NewTimer(containerEndWait)
		select {
		case <-s.process.ContainerExited():
			look.Stop()
			return true, true
		case <-s.freezer.frozen:
			look.Stop()
			return false, false
		case <-look.C:
		}
		if !s.process.ContainerEnding() || time.Now().After(deadline) {
			return false, true
		}
	}
}

// containerEnd returns why the container is gone. ok is false if the session was frozen meanwhile.
func (s *Session) containerEnd(ctx context.Context) (reason string, ok bool) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), endReasonTimeout)
	defer cancel()
	answered := make(chan struct{})
	s.others.Go(func() {
		select {
		case <-s.freezer.frozen:
			cancel()
		case <-answered:
		}
	})
	reason = s.config.Runtime.EndReason(ctx, s.request.Container.Target)
	close(answered)
	if ctx.Err() == context.Canceled {
		return "", false
	}
	if reason == "" {
		reason = "the container's main process has ended"
	}
	return reason, true
}

// inputLook is how often finishInput checks what the command has read.
const inputLook = 50 * time.Millisecond

// finishInput delivers the input of a client that has left in order, and gives the command time to use it. It ends when the
// command has ended, has read nothing for too long, or has read everything and not ended in time. It is not for terminals:
// a client that closes a terminal has left.
func (s *Session) finishInput(ctx context.Context) phase {
	ended := s.input.ClientLeft()
	ticker := time.NewTicker(inputLook)
	defer ticker.Stop()
	for {
		select {
		case <-s.process.Exited():
			return s.disconnected()
		case <-s.process.ContainerExited():
			return s.disconnected()
		case <-ctx.Done():
			return s.disconnected()
		case <-s.freezer.frozen:
			return finishing
		case <-ended:
			ended = nil
			s.input.EndSeen()
		case <-ticker.C:
		}
		if s.input.Stalled(s.config.InputGrace, transport.Closed(s.served)) {
			return s.disconnected()
		}
	}
}

// hasInputToFinish reports whether the client has left in order, or is leaving, and may have sent input that was not
// delivered to the command yet.
func (s *Session) hasInputToFinish() bool {
	return s.client.stdin != nil && !s.request.Command.TTY && s.config.InputGrace > 0 && transport.LeftInOrder(s.client.Err())
}

// disconnected begins the end of a session whose client has gone. Its process is ended too (kubernetes#89031), unless it
// has ended by itself.
func (s *Session) disconnected() phase {
	s.ending.outcome = lifetime.ClientGone(s.client.Err())
	if !transport.Closed(s.process.Exited()) {
		s.holdInput()
		s.process.Disconnect()
	}
	s.client.Close() //nolint:errcheck // unblocks the copiers
	s.stopInput()
	return following
}

// holdInput keeps stdin open until the session ends, if the process is about to be hung up and has not received all of its
// input. The process may live for a while, and input that was cut must not look complete.
func (s *Session) holdInput() {
	if s.input != nil && s.heldInput == nil {
		s.heldInput = s.input.Hold()
	}
}

// outputUnwanted reports whether output is discarded after writing to the client has failed with err. A command that still
// has to read its client's input must not end because of its output.
func (s *Session) outputUnwanted(err error) bool {
	return !transport.IsReset(err) && s.hasInputToFinish()
}

// stopped begins the end of a session that is ended from outside. The client gets a status at once, and the process is
// treated as if the client had gone.
func (s *Session) stopped(outcome session.Outcome) phase {
	s.ending.outcome, s.ending.status, s.ending.stopped = outcome, endedBy(outcome), true
	s.cut.by(time.Now().Add(lifetime.ShutdownGrace))
	s.holdInput()
	s.process.Disconnect()
	s.stopInput()
	s.drain.Begin(0)
	return draining
}

// stopInput discards what the client still sends.
func (s *Session) stopInput() {
	if s.input != nil {
		s.input.Stop()
	} else if s.client.stdin != nil {
		s.client.stdin.CloseRead()
	}
}

// warn sends a line to the user of a terminal. It does not wait for a client that does not read.
func (s *Session) warn(warning string) {
	if s.client.stdout == nil {
		return
	}
	s.others.Go(func() {
		if _, err := io.WriteString(s.client.stdout, warning); isFrozen(err) {
			s.warnings.add(warning)
		}
	})
}

// eyes returns the stream for a line to the user, or nil. The line is needed because clients that find an exit code in the
// status show nothing else of it. Stdout is used only if it is a terminal.
func (s *Session) eyes() workload.Stream {
	if s.request.Command.TTY {
		return s.client.stdout
	}
	return s.client.stderr
}
