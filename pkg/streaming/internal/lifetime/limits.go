// Package lifetime ends sessions from outside: for idleness, for age, because the client is dead or takes
// nothing any more.
package lifetime

import (
	"fmt"
	"time"

	"github.com/streamshim/streamshim/pkg/session"
	"github.com/streamshim/streamshim/pkg/streaming/buffers"
	"github.com/streamshim/streamshim/pkg/streaming/event"
)

// Limits are those of one session. A zero is no limit.
type Limits struct {
	// Idle ends a session in which no payload has moved for this long. Pings do not count
	// (containerd#5563).
	Idle time.Duration
	// Max ends a session this long after its start.
	Max time.Duration
	// Warning is how long before either end a line on the terminal says so, when the limit is more than
	// twice as long.
	Warning time.Duration
}

// Terms are what one session is given.
type Terms struct {
	Limits    Limits
	Bandwidth int64          // bytes a second in each direction, 0 without a limit
	Buffers   *buffers.Share // closed by who gives it
	Observe   func(event.Event)
}

// Limit stops the session when it may not last any longer, whatever it does at that time, until the returned
// function is called.
func (l Limits) Limit(s *session.Session) (release func()) {
	if l.Max <= 0 {
		return func() {}
	}
	timer := time.AfterFunc(l.Max-time.Since(s.Start), func() {
		s.Stop(&session.EndError{
			Reason:  "max-lifetime",
			Message: fmt.Sprintf("the session was ended because sessions may last %v at most", l.Max),
		})
	})
	return func() { timer.Stop() }
}
