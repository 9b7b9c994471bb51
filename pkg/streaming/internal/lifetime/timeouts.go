package lifetime

import (
	"fmt"
	"time"

	"github.com/streamshim/streamshim/pkg/session"
)

// Timeouts ends an idle session. It warns the user of a terminal before that, and before the end of the session's
// lifetime. A session is idle when no payload moves. Pings do not count (containerd#5563, kubernetes#128314).
type Timeouts struct {
	idle    time.Duration // 0 is off
	ends    time.Time     // the lifetime's end; zero when no warning of it is due
	warning time.Duration // how long before the idle timeout to warn; 0 is no warning
	before  time.Duration // how long before ends to warn
	session *session.Session
	timer   *time.Timer // nil when there is nothing to wait for

	last   time.Time // when payload last moved, not counting warnings
	moved  int64     // payload up to then, in bytes
	warned bool      // of idleness, since last
	own    int64     // bytes of warnings sent
}

// NewTimeouts starts the timeouts of a new session.
func NewTimeouts(l Limits, s *session.Session) *Timeouts {
	return ResumeTimeouts(l, s, TimeoutsState{Last: time.Now()})
}

// TimeoutsState is the state of Timeouts for a hand-over.
type TimeoutsState struct {
	Last         time.Time // when payload last moved
	Moved        int64     // payload up to then, in bytes
	Warned       bool      // of idleness, since Last
	WarnedOfLife bool      // of the end of the session's lifetime
	Own          int64     // bytes of warnings sent
}

// State returns the state. Call it after Stop.
func (t *Timeouts) State() TimeoutsState {
	return TimeoutsState{Last: t.last, Moved: t.moved, Warned: t.warned, WarnedOfLife: t.before > 0 && t.ends.IsZero(), Own: t.own}
}

// ResumeTimeouts continues from the state of another program's Timeouts.
func ResumeTimeouts(l Limits, s *session.Session, from TimeoutsState) *Timeouts {
	t := &Timeouts{idle: l.Idle, session: s, last: from.Last, moved: from.Moved, warned: from.Warned, own: from.Own}
	// A limit of a few minutes needs no warning, see Limits.Warning.
	if s.TTY && t.idle > 2*l.Warning {
		t.warning = l.Warning
	}
	if s.TTY && l.Max > 2*l.Warning {
		t.before = l.Warning
		if !from.WarnedOfLife {
			t.ends = s.Start.Add(l.Max)
		}
	}
	if t.idle > 0 || !t.ends.IsZero() {
		t.timer = time.NewTimer(t.next(time.Now()))
	}
	return t
}

// C receives a value when Check is due.
func (t *Timeouts) C() <-chan time.Time {
	if t.timer == nil {
		return nil
	}
	return t.timer.C
}

// Stop stops the timer.
func (t *Timeouts) Stop() {
	if t.timer != nil {
		t.timer.Stop()
	}
}

// Check stops the session if it has been idle for too long. If the session will end soon, it returns a warning for the
// user of a terminal.
func (t *Timeouts) Check() (warning string) {
	received, sent := t.session.Connection().Transferred()
	if moved := received + sent - t.own; moved > t.moved {
		t.moved, t.last, t.warned = moved, t.session.Connection().LastActivity(), false
	}
	now := time.Now()
	if t.idle > 0 && now.Sub(t.last) >= t.idle {
		t.session.Stop(&session.EndError{
			Reason:  "idle-timeout",
			Message: fmt.Sprintf("the session was ended because nothing was sent or received for %v", t.idle),
		})
		return ""
	}
	if t.warnsOfIdleness() && !now.Before(t.idleEnd().Add(-t.warning)) {
		warning += warningLine("this session is idle and will be ended", t.idleEnd().Sub(now))
		t.warned = true
	}
	if !t.ends.IsZero() && !now.Before(t.ends.Add(-t.before)) {
		warning += warningLine("this session has reached its longest lifetime and will be ended", t.ends.Sub(now))
		t.ends = time.Time{}
	}
	t.own += int64(len(warning))
	if t.idle > 0 || !t.ends.IsZero() {
		t.timer.Reset(t.next(now))
	}
	return warning
}

func warningLine(what string, left time.Duration) string {
	unit := time.Second
	if left < 10*time.Second {
		unit = time.Millisecond
	}
	return fmt.Sprintf("\r\n[streamshim: %s in %v]\r\n", what, max(left, 0).Round(unit))
}

func (t *Timeouts) idleEnd() time.Time { return t.last.Add(t.idle) }

func (t *Timeouts) warnsOfIdleness() bool { return t.warning > 0 && !t.warned }

// next returns the time until Check has something to do, if nothing moves in between.
func (t *Timeouts) next(now time.Time) time.Duration {
	var at time.Time
	if t.idle > 0 {
		at = t.idleEnd()
		if t.warnsOfIdleness() {
			at = at.Add(-t.warning)
		}
	}
	if !t.ends.IsZero() {
		if w := t.ends.Add(-t.before); at.IsZero() || w.Before(at) {
			at = w
		}
	}
	return max(at.Sub(now), time.Millisecond)
}
