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

// ending is how a session ends, as far as that is decided, and what the client was told of it. Only Run's goroutine uses
// it.
type ending struct {
	outcome       session.Outcome
	status        *status.Status
	line          string      // a line for the user, sent before the status; empty once it was sent
	said          bool        // the status was sent
	hold          bool        // the status may wait for a slow reader
	holding       time.Time   // since when it waits
	stopped       bool        // the session was told to end before its process did, and the process must still end
	unopened      bool        // the client has not opened all of its streams
	cutsAfterStop bool        // cutAfterStop was called
	stop          func() bool // cancels cutAfterStop; nil if it was not called
}

// stopWatching cancels cutAfterStop.
func (e *ending) stopWatching() {
	if e.stop != nil {
		e.stop()
		e.stop = nil
	}
}

// cutAfterStop closes the client's connection ShutdownGrace after the session is told to end, so that a shutdown does not
// wait for a client that reads slowly.
func (s *Session) cutAfterStop(ctx context.Context) {
	if s.ending.stop != nil {
		return
	}
	s.ending.cutsAfterStop = true
	s.ending.stop = context.AfterFunc(ctx, func() {
		rescue.Call(s.panicked, func() { s.cut.by(time.Now().Add(lifetime.ShutdownGrace)) })
	})
}

// awaitOutput waits until the output or the client has ended. The wait may have no limit, if a background child holds the
// output or an upstream does not end it.
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
	if s.terms.Fault.Happened() {
		s.ending.hold = false
		return s.stopped(lifetime.Stopped(ctx)) // output may have been lost in the goroutine that has panicked
	}
	if s.withheld.Load() { // even if the command has succeeded
		code := s.ending.outcome.ExitCode
		s.ending.outcome = lifetime.Stopped(ctx)
		s.ending.outcome.ExitCode, s.ending.status = code, endedBy(s.ending.outcome)
	}
	s.process.Close() //nolint:errcheck // all output was read
	s.process = nil
	if err := s.ending.outcome.Err; err != nil {
		s.ending.line = reasonLine(err.Error(), s.request.Command.TTY)
	}
	return telling
}

// reasonLine returns a line that tells a user why the session ends.
func reasonLine(reason string, tty bool) string {
	if tty {
		return "\r\n[streamshim: " + reason + "]\r\n"
	}
	return "[streamshim: " + reason + "]\n"
}

// tell sends the line for the user.
func (s *Session) tell() phase {
	if to := s.eyes(); to != nil && s.ending.line != "" {
		if _, err := io.WriteString(to, s.ending.line); isFrozen(err) { // a client that has gone is noticed in endStreams
			return telling
		}
	}
	s.ending.line = ""
	return holding
}

// holdStatus waits until the client has read the output, or will probably read it in time (see package holdback), or has
// gone, or the session is told to end. The process was reaped before and does not wait.
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

// endStreams ends the streams in the order that the protocol requires.
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

// failureStream returns the error stream, or nil if the client has not opened it.
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

// part waits for the client to close the connection.
func (s *Session) part() phase {
	s.client.closeAndWait(context.Background()) // bounded by s.cut and lifetime.Watcher
	if transport.Closed(s.freezer.frozen) && !transport.Closed(s.client.Done()) {
		return parting
	}
	if s.ending.stopped {
		return following
	}
	return over
}

// awaitProcess waits for the process of a client that has gone, or of a session that was told to end, unless processes
// outlive their clients.
func (s *Session) awaitProcess() phase {
	if !s.ending.stopped {
		s.client.Close() //nolint:errcheck // it may have been frozen the first time; unblocks the copiers
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

// cut closes the client's connection if a session that was told to end takes too long.
type cut struct {
	close  func()
	report rescue.Report

	mu      sync.Mutex
	at      time.Time // zero is never
	timer   *time.Timer
	stopped bool
}

// by sets when the connection is closed, unless the session ends before. Only the first call counts.
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

// resume starts the timer again after a hand-over.
func (c *cut) resume() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.startLocked()
}

// stop cancels the cut. After it has returned, nothing is closed.
func (c *cut) stop() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.stopped = true
	if c.timer != nil {
		c.timer.Stop()
	}
}

// warnings are lines that could not be sent because the session was frozen.
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
