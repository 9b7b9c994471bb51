// Package drain sends a process's output to the client, and decides when the output of a process that has exited is
// complete. Usually that is the end of the pipe; but a background child may hold the pipe open for ever, and then it is
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
	// Observe is told when somebody still held an output that was taken to be complete.
	Observe func(event.Event)
	// Unwanted is asked when the client takes no more: true means that the rest is read and discarded.
	Unwanted func(err error) bool
}

// Drain has the outputs of one process. Copy is called by one goroutine; Begin and Freeze by any, after it.
type Drain struct {
	Config
	outputs []*output

	mu      sync.Mutex
	until   time.Time // zero while the process runs
	stopped bool      // the session was told to end, and its output with it
	frozen  bool
}

// unlimited stands for no limit of bytes.
const unlimited = -1

// output is one stream of a process on its way to the client.
type output struct {
	from io.ReadCloser
	to   workload.Stream
	fin  bool // at its own end, not at the session's: there may be something to add

	OutputState // belongs to the copier, and is what it was when the session was frozen
}

// State is a Drain that was frozen.
type State struct {
	Until   time.Time // zero while the process runs
	Stopped bool
	Outputs []OutputState // none before the process runs
}

// OutputState is where an output is.
type OutputState struct {
	Name      session.Output
	Ended     bool      // all was sent that there will be
	Discarded bool      // the client takes no more, and the rest is discarded
	Looks     int       // that have found nothing, since the first, which is not a whole one
	Looked    bool      // the first one is over
	LookUntil time.Time // when the look ends that is under way; zero before the first
	Pending   int64     // bytes that are still to be sent, although the time is over; else unlimited
}

// Check says why Resume could not continue from a state.
func (s State) Check() error {
	for i, o := range s.Outputs {
		// The last of the looks ends the output.
		if o.Name != session.Output(i+1) || o.Pending < unlimited || o.Looks < 0 || o.Looks > maxLooks || o.Looks == maxLooks && !o.Ended {
			return fmt.Errorf("output %+v", o)
		}
	}
	return nil
}

// Resume makes a Drain continue where another was frozen. It is called before Copy.
func (d *Drain) Resume(state State) {
	d.until, d.stopped = state.Until, state.Stopped
	for _, o := range state.Outputs {
		d.outputs = append(d.outputs, &output{OutputState: o})
	}
}

// State is where the Drain is. Nothing is copied any more.
func (d *Drain) State() State {
	state := State{Until: d.until, Stopped: d.stopped}
	for _, o := range d.outputs {
		state.Outputs = append(state.Outputs, o.OutputState)
	}
	return state
}

// Copy begins to send an output to the client, in a goroutine of the group, or continues where it was frozen. Its end is
// followed by FIN where fin is set. An output that the process or the client does not have, which is nil, has ended.
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

// output is new unless it was frozen.
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

// deadliner is a pipe or a pty of ours, whose reads can be given a limit.
type deadliner interface{ SetReadDeadline(time.Time) error }

// Begin starts the wait for the outputs to be complete; it lasts no longer than limit, and is over at once with 0.
func (d *Drain) Begin(limit time.Duration) {
	d.mu.Lock()
	d.stopped = limit == 0
	d.until = time.Now().Add(limit)
	d.mu.Unlock()
	if d.Idle > 0 || limit == 0 {
		d.interrupt()
	}
}

// interrupt wakes the copiers.
func (d *Drain) interrupt() {
	for _, o := range d.outputs {
		if source, ok := o.from.(deadliner); ok {
			d.limit(source, time.Unix(1, 0))
		}
	}
}

// limit gives reads a deadline, unless they are frozen and keep the one that has ended them.
func (d *Drain) limit(source deadliner, deadline time.Time) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if !d.frozen {
		source.SetReadDeadline(deadline) //nolint:errcheck // a source that is closed has ended already
	}
}

// prepare gives the first read of an output its deadline where the wait began before a hand-over.
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

// Freeze ends the copiers where they are.
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

// waiting is where the wait stands.
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

// maxLooks is how many times a source is looked at within one idle period. The silence that ends
// the wait is at most so much longer than asked for.
const maxLooks = 4

// copy sends an output to the client until it ends, is complete, or cannot be sent, or the session is frozen.
func (d *Drain) copy(o *output) {
	if o.Ended = d.send(o); o.Ended && o.fin {
		o.to.CloseWrite() //nolint:errcheck // a client that has gone is noticed elsewhere
	}
}

// send reports whether the output has ended.
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

// cut notes that somebody still held an output when it was taken to be complete.
func (d *Drain) cut() {
	if _, stopped, _ := d.waiting(); !stopped {
		d.Observe(event.DrainCut)
	}
}

// pending is what lies in a source now: the command wrote it before its time was over,
// however slowly the client takes it.
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
