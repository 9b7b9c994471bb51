// Package rescue keeps a panic in a goroutine of one session from ending the process, and all other sessions with it.
// Who starts the goroutine is told of the panic, and ends that session.
package rescue

import (
	"fmt"
	"runtime/debug"
	"sync"
)

// Panic is what a goroutine has ended with. It is an error, for whoever ends the session.
type Panic struct {
	Value any    // given to panic
	Stack []byte // of the goroutine
}

// Caught makes a Panic of what recover has returned: a Panic that was raised again stays what it is.
func Caught(value any) *Panic {
	if p, again := value.(*Panic); again {
		return p
	}
	return &Panic{Value: value, Stack: debug.Stack()}
}

func (p *Panic) Error() string { return fmt.Sprintf("panic: %v", p.Value) }

// Report is told of a panic, in the goroutine that has ended with it. It must not block and must not panic.
type Report func(*Panic)

// Die is the Report of goroutines that belong to no session: it panics again, and so ends the process.
func Die(p *Panic) { panic(p) }

// Call calls f. A panic of f goes to the report and no further.
func Call(report Report, f func()) {
	defer func() {
		if value := recover(); value != nil {
			report(Caught(value))
		}
	}()
	f()
}

// Go is Call in a goroutine of its own.
func Go(report Report, f func()) { go Call(report, f) }

// Group is a sync.WaitGroup whose goroutines are called with Call. Report must be set.
type Group struct {
	Report Report
	wait   sync.WaitGroup
}

// Go calls f in a goroutine of the group.
func (g *Group) Go(f func()) {
	g.wait.Add(1)
	go func() {
		defer g.wait.Done()
		Call(g.Report, f)
	}()
}

// Wait returns when all goroutines of the group have ended.
func (g *Group) Wait() { g.wait.Wait() }
