package remotecommand

import (
	"context"
	"io"
	"sync"
	"time"

	"github.com/streamshim/streamshim/pkg/rescue"
	"github.com/streamshim/streamshim/pkg/session"
	"github.com/streamshim/streamshim/pkg/streaming/event"
	"github.com/streamshim/streamshim/pkg/streaming/internal/lifetime"
	"github.com/streamshim/streamshim/pkg/streaming/internal/status"
	"github.com/streamshim/streamshim/pkg/streaming/internal/transport"
	"github.com/streamshim/streamshim/pkg/workload"
)

// ending is how a session ends, as far as it is known, and what of it has been said. It belongs to Run.
type ending struct {
	outcome session.Outcome
	status  *status.Status
	line    string    // for the user's eyes, before the status; empty when none is left to be sent
	said    bool      // the status was sent
	hold    bool      // the status may wait for a slow reader
	holding time.Time // since when it waits
	// stopped: the session was told to end before its process did, which is to follow.
	stopped bool
	// unopened: the client has not opened all of its streams.
	unopened bool
	// cutsAfterStop: cutAfterStop was called.
	cutsAfterStop bool
	stop          func() bool // ends the watch of cutAfterStop; nil without one
}

// stopWatching ends the watch of cutAfterStop.
func (e *ending) stopWatching() {
	if e.stop != nil {
		e.stop()
		e.stop = nil
	}
}

// cutAfterStop gives a client that reads slowly no more than a moment once the session has been told to end: a
// shutdown does not wait for it.
func (s *Session) cutAfterStop(ctx context.Context) {
	if s.ending.stop != nil {
		return
	}
	s.ending.cutsAfterStop = true
	s.ending.stop = context.AfterFunc(ctx, func() {
		rescue.Call(s.panicked, func() { s.cut.by(time.Now().Add(lifetime.ShutdownGrace)) })
	})
}

// awaitOutput waits until the output or the client has ended: a background child that holds the output, or an upstream
// that does not end it, may be waited for without limit.
func (s *Session) awaitOutput(ctx context.Context) phase {
	ended, process := make(chan struct{}), s.process
	if !s.ending.stopped {
		s.others.Go(func() {
			select {
			case <-s.client.Done():
				process.Close() //nolint:errcheck // wakes the copiers
			case <-s.freezer.frozen:
			case <-ended:
			}
		})
	}
	s.outputs.Wait()
	close(ended)
	if transport.Closed(s.freezer.frozen) && !s.drain.Over() {
		return draining
	}
	if s.ending.stopped {
		return telling
	}
	if outcome := lifetime.Stopped(ctx); ctx.Err() != nil && outcome.Reason == lifetime.Panicked {
		s.ending.hold = false
		return s.stopped(outcome) // whoever has panicked may have had output that the client does not get
	}
	if s.withheld.Load() { // also behind a command that has ended well
		code := s.ending.outcome.ExitCode
		s.ending.outcome = lifetime.Stopped(ctx)
		s.ending.outcome.ExitCode, s.ending.status = code, endedBy(s.ending.outcome)
	}
	s.process.Close() //nolint:errcheck // nothing is left in it that anybody wants
	s.process = nil
	if err := s.ending.outcome.Err; err != nil {
		s.ending.line = reasonLine(err.Error(), s.request.Command.TTY)
	}
	return telling
}

// reasonLine tells a user why the session ends.
func reasonLine(reason string, tty bool) string {
	if tty {
		return "\r\n[streamshim: " + reason + "]\r\n"
	}
	return "[streamshim: " + reason + "]\n"
}

// tell sends the line for the user's eyes.
func (s *Session) tell() phase {
	if to := s.eyes(); to != nil && s.ending.line != "" {
		if _, err := io.WriteString(to, s.ending.line); isFrozen(err) { // a client that has gone is noticed in endStreams
			return telling
		}
	}
	s.ending.line = ""
	return holding
}

// holdStatus waits until the client has read the output, or is believed to read it in time (see package holdback), or
// has gone, or the session is to end. The process was reaped before and does not wait.
func (s *Session) holdStatus(ctx context.Context) phase {
	h, limit := s.client.holdback, s.config.StatusWait
	if !s.ending.hold || h == nil || limit <= 0 {
		return saying
	}
	if s.ending.holding.IsZero() {
		s.ending.holding = time.Now()
	}
	begin := s.ending.holding
	for over := false; !over; {
		wait := time.Until(h.Until(s.session.Start, begin, limit))
		if wait <= 0 {
			break
		}
		timer := time.NewTimer(wait)
		select {
		case <-h.Changed():
		case <-timer.C:
		case <-s.freezer.frozen:
			timer.Stop()
			return holding
		case <-s.client.Done():
			over = true
		case <-s.client.statusRefused:
			over = true
		case <-ctx.Done():
			over = true
		}
		timer.Stop()
	}
	s.session.Log().Debug("status goes out", "held", time.Since(begin).Round(time.Millisecond), "reader", h)
	if time.Since(begin) >= minStatusHeld {
		s.terms.Observe(event.StatusHeld)
	}
	return saying
}

// endStreams ends the streams in the order the protocol wants.
func (s *Session) endStreams(ctx context.Context) phase {
	failure := s.failureStream()
	if !s.ending.unopened {
		s.session.SetPhase(session.Lingering)
		s.cutAfterStop(ctx)
		for _, stream := range []workload.Stream{s.client.stdout, s.client.stderr} {
			if stream != nil {
				stream.CloseWrite() //nolint:errcheck // a client that has gone is noticed in part
			}
		}
	}
	if message := s.ending.status.Encode(s.client.protocol.JSONStatus); len(message) > 0 && !s.ending.said {
		if _, err := failure.Write(message); isFrozen(err) { // as above
			return saying
		}
	}
	s.ending.said = true
	failure.CloseWrite() //nolint:errcheck // as above
	return parting
}

// failureStream is the error stream, nil as long as the client has not opened it.
func (s *Session) failureStream() workload.Stream {
	if transport.Closed(s.client.ready) {
		return s.client.failure
	}
	select {
	case failure := <-s.client.failureOpened:
		s.client.failureOpened <- failure
		return failure
	default:
		return nil
	}
}

// part lets the client close the connection.
func (s *Session) part() phase {
	s.client.closeAndWait(context.Background()) // what bounds it is cut
	if transport.Closed(s.freezer.frozen) && !transport.Closed(s.client.Done()) {
		return parting
	}
	if s.ending.stopped {
		return following
	}
	return over
}

// awaitProcess waits for the process of a client that has gone, or was told to go, unless processes live on without
// their clients.
func (s *Session) awaitProcess() phase {
	if !s.ending.stopped {
		s.client.Close() //nolint:errcheck // again, where it was frozen at the time; wakes the copiers
	}
	limit := s.config.ProcessEnd
	if s.config.KeepProcesses {
		limit = 0
	}
	if !transport.Closed(s.process.Exited()) {
		timeout := s.timer(limit)
		defer timeout.Stop()
		select {
		case <-s.process.Exited():
		case <-timeout.C:
		case <-s.freezer.frozen:
			return following
		}
	}
	if transport.Closed(s.process.Exited()) {
		s.ending.outcome.ExitCode = s.process.ExitCode()
	}
	s.process.Close() //nolint:errcheck // nobody is left to tell
	s.outputs.Wait()
	s.process = nil
	return over
}

// cut closes a client's connection when its session, which is to end, takes too long.
type cut struct {
	close  func()
	report rescue.Report

	mu      sync.Mutex
	at      time.Time // zero is never
	timer   *time.Timer
	stopped bool
}

// by is called with the time at which the connection is closed, if the session has not ended before. The first counts.
func (c *cut) by(at time.Time) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if !c.at.IsZero() {
		return
	}
	c.at = at
	c.startLocked()
}

func (c *cut) startLocked() {
	if c.stopped || c.at.IsZero() {
		return
	}
	c.timer = time.AfterFunc(time.Until(c.at), func() {
		rescue.Call(c.report, func() {
			c.mu.Lock()
			defer c.mu.Unlock()
			if !c.stopped {
				c.close()
			}
		})
	})
}

// resume begins to wait again.
func (c *cut) resume() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.startLocked()
}

// stop ends the wait. When it returns, nothing will be closed.
func (c *cut) stop() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.stopped = true
	if c.timer != nil {
		c.timer.Stop()
	}
}

// warnings are lines that were not sent because the session was frozen.
type warnings struct {
	mu    sync.Mutex
	lines []string
}

func (w *warnings) add(line string) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.lines = append(w.lines, line)
}

func (w *warnings) take() []string {
	w.mu.Lock()
	defer w.mu.Unlock()
	lines := w.lines
	w.lines = nil
	return lines
}
