package lifetime

import (
	"context"
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

// Fault records that a goroutine of a session has panicked, whatever the session was told to end for. Use NewFault.
type Fault struct {
	happened context.Context
	set      context.CancelFunc
}

// NewFault returns the Fault of a session none of whose goroutines has panicked.
func NewFault() Fault {
	happened, set := context.WithCancel(context.Background())
	return Fault{happened, set}
}

// Happened reports whether Panic was called for the session.
func (f Fault) Happened() bool { return f.happened.Err() != nil }

// After calls do after the first panic, with report, in a goroutine of its own. stop is that of context.AfterFunc.
func (f Fault) After(report rescue.Report, do func()) (stop func() bool) {
	return context.AfterFunc(f.happened, func() { rescue.Call(report, do) })
}

// Panic ends a session after one of its goroutines has panicked. The goroutine may have left a lock held, which keeps
// the session from ending. So the network connection, which may be nil, is reset after panicGrace.
func Panic(s *session.Session, t Terms, network net.Conn, p *rescue.Panic) {
	s.Log().Error("a goroutine of a session has panicked: the session ends", "panic", p.Value, "stack", string(p.Stack))
	if t.Observe != nil {
		t.Observe(event.Panicked)
	}
	t.Fault.set()
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
