package session

import (
	"errors"
	"slices"
	"sync"
	"sync/atomic"

	"github.com/streamshim/streamshim/pkg/workload"
)

// Output names a stream of a process.
type Output int

// The output streams. With a terminal there is only Stdout.
const (
	Stdout Output = 1
	Stderr Output = 2
)

// Tap gets a copy of what a session moves, before it is delivered. Its methods are called by the session between
// two system calls, and must not keep p. They must not block, unless nothing may be delivered that the tap has not
// got; then they must be bounded, and an error keeps p from being delivered. Calls for one stream are sequential,
// those for different streams concurrent. A call may still come shortly after the tap was removed.
type Tap interface {
	Output(from Output, p []byte) error
	Input(p []byte) error
	Resize(workload.Size)
}

// Taps are the taps of one session. The zero value has none, and costs its session one atomic load per read.
type Taps struct {
	list atomic.Pointer[[]Tap] // replaced, never modified

	mu   sync.Mutex
	open bool
	size workload.Size
}

// Add lets the tap see what comes from now on, until remove is called.
func (t *Taps) Add(tap Tap) (remove func()) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.replace(append(slices.Clone(t.current()), tap))
	return func() {
		t.mu.Lock()
		defer t.mu.Unlock()
		t.replace(slices.DeleteFunc(slices.Clone(t.current()), func(other Tap) bool { return other == tap }))
	}
}

func (t *Taps) replace(taps []Tap) { t.list.Store(&taps) }

func (t *Taps) current() []Tap {
	if list := t.list.Load(); list != nil {
		return *list
	}
	return nil
}

// Count returns the number of taps.
func (t *Taps) Count() int { return len(t.current()) }

// Open records that the session's bytes pass through these taps. Taps of a session that was never opened see
// nothing.
func (t *Taps) Open() {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.open = true
}

// Opened reports whether taps see anything.
func (t *Taps) Opened() bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.open
}

// Output passes what the process wrote to all taps. After an error it must not be delivered.
func (t *Taps) Output(from Output, p []byte) error {
	var err error
	for _, tap := range t.current() {
		err = errors.Join(err, tap.Output(from, p))
	}
	return err
}

// Input passes what the client sent to all taps. After an error it must not be delivered.
func (t *Taps) Input(p []byte) error {
	var err error
	for _, tap := range t.current() {
		err = errors.Join(err, tap.Input(p))
	}
	return err
}

// Resize tells all taps the terminal's new size.
func (t *Taps) Resize(size workload.Size) {
	t.mu.Lock()
	t.size = size
	t.mu.Unlock()
	for _, tap := range t.current() {
		tap.Resize(size)
	}
}

// Size returns the terminal's size in characters, 0 if unknown.
func (t *Taps) Size() workload.Size {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.size
}
