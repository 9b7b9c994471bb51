// Package drain sends a process's output to the client, and decides when the output of a process that has exited is
// complete. Usually that is the end of the pipe. But a background child may hold the pipe open for ever. Then the output is
// complete when the pipe has been silent for a while (kubernetes#44371, containerd#7802).
package drain

import (
	"errors"
	"fmt"
	"io"
	"os"
	"sync"
	"syscall"
	"time"

	"github.com/streamshim/streamshim/pkg/handover"
	"github.com/streamshim/streamshim/pkg/rescue"
	"github.com/streamshim/streamshim/pkg/session"
	"github.com/streamshim/streamshim/pkg/streaming/event"
	"github.com/streamshim/streamshim/pkg/streaming/internal/socket"
	"github.com/streamshim/streamshim/pkg/workload"
)

// Config is how output is drained.
type Config struct {
	// Idle is how long a pipe must be silent after the process's exit. Zero waits for its end.
	Idle time.Duration
	// Observe is called when an output counts as complete although a process still holds it open.
	Observe func(event.Event)
	// Unwanted is called when writing to the client has failed. If it returns true, the rest is read and discarded.
	Unwanted func(err error) bool
}

// Drain drains the outputs of one process. One goroutine calls Copy. After that any goroutine may call Begin and Freeze.
type Drain struct {
	Config
	outputs []*output

	mu      sync.Mutex
	until   time.Time // zero while the process runs
	stopped bool      // the session was told to end, and its output with it
	frozen  bool
}

// unlimited is no limit of bytes.
const unlimited = -1

// output is one stream of a process on its way to the client.
type output struct {
	from io.ReadCloser
	to   workload.Stream
	fin  bool // send FIN at its own end; otherwise the session does, after a line for the user

	OutputState // belongs to the copier, and is what it was when the session was frozen
}

// State is a frozen Drain.
type State struct {
	Until   time.Time // zero while the process runs
	Stopped bool
	Outputs []OutputState // none before the process runs
}

// OutputState is the state of an output.
type OutputState struct {
	Name      session.Output
	Ended     bool      // everything was sent
	Discarded bool      // the client reads no more, and the rest is discarded
	Looks     int       // looks that found nothing, since the first one, which is shorter
	Looked    bool      // the first look is over
	LookUntil time.Time // when the current look ends; zero before the first
	Pending   int64     // bytes that are still to be sent after the wait is over; otherwise unlimited
}

// Check returns why Resume cannot continue from a state.
func (s State) Check() error {
	for i, o := range s.Outputs {
		// The last of the looks ends the output.
		if o.Name != session.Output(i+1) || o.Pending < unlimited || o.Looks < 0 || o.Looks > maxLooks || o.Looks == maxLooks && !o.Ended {
			return fmt.Errorf("output %+v", o)
		}
	}
	return nil
}

// Resume continues from a state. Call it before Copy.
func (d *Drain) Resume(state State) {
	d.until, d.stopped = state.Until, state.Stopped
	for _, o := range state.Outputs {
		d.outputs = append(d.outputs, &output{OutputState: o})
	}
}

// State returns the state, after the copiers have ended.
func (d *Drain) State() State {
	state := State{Until: d.until, Stopped: d.stopped}
	for _, o := range d.outputs {
		state.Outputs = append(state.Outputs, o.OutputState)
	}
	return state
}

// Copy starts to send an output to the client, in a goroutine of the group, or continues where it was frozen. If fin is set,
// FIN follows its end. An output that the process or the client does not have is nil and has ended.
func (d *Drain) Copy(group *rescue.Group, name session.Output, from io.ReadCloser, to workload.Stream, fin bool) {
	o := d.output(name)
	o.from, o.to, o.fin = from, to, fin
	if to == nil || from == nil {
		o.Ended = true
	}
	if o.Ended {
		return
	}
	d.prepare(o)
	group.Go(func() { d.copy(o) })
}

// output returns the frozen output, or a new one.
func (d *Drain) output(name session.Output) *output {
	for _, o := range d.outputs {
		if o.Name == name {
			return o
		}
	}
	o := &output{OutputState: OutputState{Name: name, Pending: unlimited}}
	d.outputs = append(d.outputs, o)
	return o
}

// deadliner is a pipe or a pty, whose reads can have a deadline.
type deadliner interface{ SetReadDeadline(time.Time) error }

// Begin starts the wait for the outputs to be complete. It lasts at most limit. With 0 it is over at once.
func (d *Drain) Begin(limit time.Duration) {
	d.mu.Lock()
	d.stopped = limit == 0
	d.until = time.Now().Add(limit)
	d.mu.Unlock()
	if d.Idle > 0 || limit == 0 {
		d.interrupt()
	}
}

// interrupt makes the copiers' reads return.
func (d *Drain) interrupt() {
	for _, o := range d.outputs {
		if source, ok := o.from.(deadliner); ok {
			d.limit(source, time.Unix(1, 0))
		}
	}
}

// limit sets the deadline of reads. Frozen reads keep the deadline that has ended them.
func (d *Drain) limit(source deadliner, deadline time.Time) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if !d.frozen {
		source.SetReadDeadline(deadline) //nolint:errcheck // a source that is closed has ended already
	}
}

// prepare sets the deadline of an output's first read if the wait began before a hand-over.
func (d *Drain) prepare(o *output) {
	until, stopped, _ := d.waiting()
	source, ok := o.from.(deadliner)
	switch {
	case !ok || until.IsZero() || o.Discarded || o.Pending != unlimited:
	case stopped || d.Idle > 0:
		deadline := o.LookUntil
		if deadline.IsZero() {
			deadline = time.Unix(1, 0) // as in Begin
		}
		d.limit(source, deadline)
	}
}

// Freeze ends the copiers.
func (d *Drain) Freeze() {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.frozen = true
	for _, o := range d.outputs {
		if source, ok := o.from.(deadliner); ok {
			source.SetReadDeadline(time.Unix(1, 0)) //nolint:errcheck // as in limit
		}
	}
}

// waiting returns the state of the wait.
func (d *Drain) waiting() (until time.Time, stopped, frozen bool) {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.until, d.stopped, d.frozen
}

// Over reports whether all outputs have ended, once the copiers have.
func (d *Drain) Over() bool {
	for _, o := range d.outputs {
		if !o.Ended {
			return false
		}
	}
	return true
}

// maxLooks is how many times a source is checked within one idle period. So the silence that ends the wait is at most
// 1/maxLooks longer than Config.Idle.
const maxLooks = 4

// copy sends an output to the client until it ends, is complete or cannot be sent, or the session is frozen.
func (d *Drain) copy(o *output) {
	if o.Ended = d.send(o); o.Ended && o.fin {
		o.to.CloseWrite() //nolint:errcheck // a client that has gone is noticed elsewhere
	}
}

// send sends the output and reports whether it has ended.
func (d *Drain) send(o *output) bool {
	for !o.Discarded && o.Pending == unlimited {
		n, err := o.to.ReadFrom(o.from)
		until, _, frozen := d.waiting()
		if n > 0 {
			o.Looks = 0
		}
		if errors.Is(err, handover.ErrFrozen) || frozen && errors.Is(err, os.ErrDeadlineExceeded) {
			return false
		}
		if err != nil && !errors.Is(err, os.ErrDeadlineExceeded) {
			if d.Unwanted(err) {
				o.Discarded = true
				break
			}
			o.from.Close() //nolint:errcheck // the process sees EPIPE, as in a shell's pipe
			return true
		}
		if err == nil {
			return true
		}
		if n == 0 && o.Looked {
			o.Looks++
		}
		o.Looked = true
		if o.Looks == maxLooks {
			d.cut()
			return true
		}
		if !time.Now().Before(until) {
			d.cut()
			o.Pending = d.pending(o.from)
			break
		}
		o.LookUntil = time.Now().Add(d.Idle / maxLooks)
		d.limit(o.from.(deadliner), o.LookUntil)
	}
	if o.Discarded {
		return d.discard(o)
	}
	return d.sendPending(o)
}

// discard reads an output until the process or the session ends.
func (d *Drain) discard(o *output) bool {
	_, err := io.Copy(io.Discard, o.from)
	if _, _, frozen := d.waiting(); errors.Is(err, handover.ErrFrozen) || frozen && err != nil {
		return false
	}
	o.from.Close() //nolint:errcheck // as in send
	return true
}

// cut reports that an output counts as complete although a process still holds it open.
func (d *Drain) cut() {
	if _, stopped, _ := d.waiting(); !stopped {
		d.Observe(event.DrainCut)
	}
}

// pending returns the number of bytes in a source now. They were written in time, and are sent however slowly the client
// reads.
func (d *Drain) pending(from io.ReadCloser) int64 {
	if source, ok := from.(syscall.Conn); ok {
		return int64(socket.Pending(source))
	}
	return 0
}

func (d *Drain) sendPending(o *output) bool {
	if o.Pending == 0 {
		return true
	}
	if source, ok := o.from.(deadliner); ok {
		d.limit(source, time.Time{})
	}
	n, err := o.to.ReadFrom(io.LimitReader(o.from, o.Pending)) // a client that has gone is noticed elsewhere
	o.Pending -= n
	_, _, frozen := d.waiting()
	return !errors.Is(err, handover.ErrFrozen) && (!frozen || err == nil)
}
