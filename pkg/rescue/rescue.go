// Package rescue keeps a panic in a goroutine of one session from ending the process and all other sessions. It reports the
// panic to the code that started the goroutine, which ends that session.
package rescue

import (
	"fmt"
	"runtime/debug"
	"sync"
)

// Panic is a recovered panic, as an error.
type Panic struct {
	Value any    // the argument of panic
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

// Report handles a panic. It is called in the goroutine that has panicked. It must not block and must not panic.
type Report func(*Panic)

// Die is the Report of goroutines that belong to no session. It panics again, which ends the process.
func Die(p *Panic) { panic(p) }

// Call calls f, recovers a panic of it, and passes it to report.
func Call(report Report, f func()) {
	defer func() {
		if value := recover(); value != nil {
			report(Caught(value))
		}
	}()
	f()
}

// Go runs Call in a new goroutine.
func Go(report Report, f func()) { go Call(report, f) }

// Group is like a sync.WaitGroup whose goroutines run Call. Report must be set.
type Group struct {
	Report Report
	wait   sync.WaitGroup
}

// Go calls f in a new goroutine of the group.
func (g *Group) Go(f func()) {
	g.wait.Go(func() { Call(g.Report, f) })
}

// Wait returns when all goroutines of the group have ended.
func (g *Group) Wait() { g.wait.Wait() }
