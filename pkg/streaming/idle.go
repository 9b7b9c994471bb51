package streaming

import (
	"fmt"
	"time"

	"github.com/streamshim/streamshim/pkg/session"
)

// idleTimer ends a session in which no payload has moved for a while. The clock is the session's
// own, so that it does not matter whether a client sends pings (containerd#5563, kubernetes#128314).
type idleTimer struct {
	timeout time.Duration // 0 is off
	tty     bool
	session *session.Session
	timer   *time.Timer

	last   time.Time // payload last moved, the warning not counted
	moved  int64     // payload up to then, in bytes
	warned bool      // since last
	own    int64     // bytes of warnings sent
}

func newIdleTimer(timeout time.Duration, tty bool, s *session.Session) *idleTimer {
	t := &idleTimer{timeout: timeout, tty: tty, session: s, last: time.Now()}
	if timeout > 0 {
		t.timer = time.NewTimer(t.next(t.last))
	}
	return t
}

// C ticks when check is due.
func (t *idleTimer) C() <-chan time.Time {
	if t.timer == nil {
		return nil
	}
	return t.timer.C
}

func (t *idleTimer) stop() {
	if t.timer != nil {
		t.timer.Stop()
	}
}

// check stops the session if it has been idle for too long, and returns what the user of a terminal
// is to read if that will be so in a minute.
func (t *idleTimer) check() (warning string) {
	received, sent := t.session.Connection().Transferred()
	if moved := received + sent - t.own; moved > t.moved {
		t.moved, t.last, t.warned = moved, t.session.Connection().LastActivity(), false
	}
	now := time.Now()
	if now.Sub(t.last) >= t.timeout {
		t.session.Stop(&session.EndError{
			Reason:  "idle-timeout",
			Message: fmt.Sprintf("the session was ended because nothing was sent or received for %v", t.timeout),
		})
		return ""
	}
	if t.warns() && now.Sub(t.last) >= t.timeout-idleWarning {
		warning = fmt.Sprintf("\r\n[streamshim: this session is idle and will be ended in %v]\r\n",
			t.last.Add(t.timeout).Sub(now).Round(time.Second))
		t.warned = true
		t.own += int64(len(warning))
	}
	t.timer.Reset(t.next(now))
	return warning
}

// warns tells whether a warning is still to come. A timeout of a few minutes needs none.
func (t *idleTimer) warns() bool { return t.tty && !t.warned && t.timeout > 2*idleWarning }

// next is the time until check has something to do, if nothing moves in between.
func (t *idleTimer) next(now time.Time) time.Duration {
	at := t.last.Add(t.timeout)
	if t.warns() {
		at = at.Add(-idleWarning)
	}
	return max(at.Sub(now), time.Millisecond)
}
