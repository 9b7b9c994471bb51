// Package lifetime ends sessions from outside: when they are idle or too old, when the client is dead, or when it has
// stopped reading.
package lifetime

import (
	"fmt"
	"time"

	"github.com/streamshim/streamshim/pkg/session"
	"github.com/streamshim/streamshim/pkg/streaming/buffers"
	"github.com/streamshim/streamshim/pkg/streaming/event"
)

// Limits bound one session. Zero is no limit.
type Limits struct {
	// Idle ends a session in which no payload has moved for this long. Pings do not count
	// (containerd#5563).
	Idle time.Duration
	// Max ends a session this long after its start.
	Max time.Duration
	// Warning is how long before either end a line on the terminal warns of it. A limit of at most twice this
	// time gets no warning.
	Warning time.Duration
}

// Terms are what the server gives to one session.
type Terms struct {
	Limits    Limits
	Bandwidth int64          // bytes a second in each direction; 0 is no limit
	Buffers   *buffers.Share // closed by the server
	Observe   func(event.Event)
	Fault     Fault
}

// Limit stops the session at the end of its maximum lifetime. The returned function cancels that.
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
