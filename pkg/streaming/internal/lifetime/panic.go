package lifetime

import (
	"context"
	"errors"
	"net"
	"time"

	"github.com/streamshim/streamshim/pkg/rescue"
	"github.com/streamshim/streamshim/pkg/session"
	"github.com/streamshim/streamshim/pkg/streaming/event"
)

// Panicked is the reason of a session's end after one of its goroutines has panicked.
const Panicked = "panic"

// panicGrace is how long a session may take to end after one of its goroutines has panicked.
const panicGrace = 2 * ShutdownGrace

// StuckGrace is how long a session may take to end one of whose goroutines has panicked until it is given up: its connection was
// reset by then, and what it waits for does not come.
const StuckGrace = panicGrace + ShutdownGrace

// HasPanicked tells whether the session was told to end by Panic.
func HasPanicked(s *session.Session) bool {
	var end *session.EndError
	return errors.As(context.Cause(s.Context()), &end) && end.Reason == Panicked
}

// Panic ends a session after one of its goroutines has panicked. The goroutine may have left a lock held, which keeps
// the session from ending. So the network connection, which may be nil, is reset after panicGrace.
func Panic(s *session.Session, t Terms, network net.Conn, p *rescue.Panic) {
	s.Log().Error("a goroutine of a session has panicked: the session ends", "panic", p.Value, "stack", string(p.Stack))
	if t.Observe != nil {
		t.Observe(event.Panicked)
	}
	s.Stop(&session.EndError{Reason: Panicked, Message: "the session was ended because of a fault in streamshim, which its log tells of"})
	if network != nil {
		time.AfterFunc(panicGrace, func() { Reset(network) })
	}
}

// Reset closes a connection with a TCP reset, so that its client does not see an orderly end.
func Reset(network net.Conn) {
	if tcp, ok := network.(*net.TCPConn); ok {
		tcp.SetLinger(0)
	}
	network.Close() //nolint:errcheck // it may be closed already
}
