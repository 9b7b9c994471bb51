package remotecommand

import (
	"errors"
	"io"
	"os"
	"sync"
	"syscall"
	"time"

	"github.com/streamshim/streamshim/pkg/session"
	"github.com/streamshim/streamshim/pkg/streaming/event"
	"github.com/streamshim/streamshim/pkg/streaming/internal/socket"
	"github.com/streamshim/streamshim/pkg/workload"
)

// drain decides when the output of a process that has exited is complete. Usually that is the end
// of the pipe; but a background child may hold the pipe open for ever, and then it is complete when
// the pipe has been silent for a while (kubernetes#44371, containerd#7802).
type drain struct {
	idle    time.Duration
	observe func(event.Event)
	// unwanted is asked when the client takes no more: true means that the rest is read and thrown away.
	unwanted func(err error) bool
	outputs  []*output

	mu      sync.Mutex
	until   time.Time // zero while the process runs
	stopped bool      // the session was told to end, and its output with it
	frozen  bool
}

// unlimited stands for no limit of bytes.
const unlimited = -1

// output is one stream of a process on its way to the client. What is below the first group belongs to its copier,
// and is where it was when the session was frozen.
type output struct {
	name session.Output
	to   workload.Stream
	from io.ReadCloser
	fin  bool // at its own end, not at the session's: there may be something to add

	ended     bool      // all was sent that there will be
	discarded bool      // the client takes no more, and the rest is thrown away
	looks     int       // that have found nothing, since the first, which is not a whole one
	looked    bool      // the first one is over
	lookUntil time.Time // when the look ends that goes on; zero before the first
	pending   int64     // bytes that are still to be sent, although the time is over; else unlimited
}

// deadliner is a pipe or a pty of ours, whose reads can be given a limit.
type deadliner interface{ SetReadDeadline(time.Time) error }

// begin starts the wait; it lasts no longer than limit.
func (d *drain) begin(limit time.Duration) {
	d.mu.Lock()
	d.stopped = limit == 0
	d.until = time.Now().Add(limit)
	d.mu.Unlock()
	if d.idle > 0 || limit == 0 {
		d.interrupt()
	}
}

// interrupt wakes the copiers.
func (d *drain) interrupt() {
	for _, o := range d.outputs {
		if source, ok := o.from.(deadliner); ok {
			d.limit(source, time.Unix(1, 0))
		}
	}
}

// limit gives a read a deadline. One that is frozen keeps that which has ended it.
func (d *drain) limit(source deadliner, deadline time.Time) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if !d.frozen {
		source.SetReadDeadline(deadline) //nolint:errcheck // a source that is closed has ended already
	}
}

// prepare gives the first read of an output its deadline where the wait has begun already, before a hand-over.
func (d *drain) prepare(o *output) {
	until, stopped, _ := d.state()
	source, ok := o.from.(deadliner)
	switch {
	case !ok || until.IsZero() || o.discarded || o.pending != unlimited:
	case stopped || d.idle > 0:
		deadline := o.lookUntil
		if deadline.IsZero() {
			deadline = time.Unix(1, 0) // as in begin
		}
		d.limit(source, deadline)
	}
}

// freeze ends the copiers where they are.
func (d *drain) freeze() {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.frozen = true
	for _, o := range d.outputs {
		if source, ok := o.from.(deadliner); ok {
			source.SetReadDeadline(time.Unix(1, 0)) //nolint:errcheck // as in limit
		}
	}
}

// state is where the wait stands.
func (d *drain) state() (until time.Time, stopped, frozen bool) {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.until, d.stopped, d.frozen
}

// over tells whether all outputs have ended, once the copiers have.
func (d *drain) over() bool {
	for _, o := range d.outputs {
		if !o.ended {
			return false
		}
	}
	return true
}

// drainLooks is how many times a source is looked at within one idle period. The silence that ends
// the wait is at most so much longer than asked for.
const drainLooks = 4

// copy sends an output to the client until it ends, is complete, or cannot be sent, or the session is frozen.
func (d *drain) copy(o *output) {
	if o.ended = d.send(o); o.ended && o.fin {
		o.to.CloseWrite() //nolint:errcheck // a client that has gone is noticed elsewhere
	}
}

// send reports whether the output has ended.
func (d *drain) send(o *output) bool {
	for !o.discarded && o.pending == unlimited {
		n, err := o.to.ReadFrom(o.from)
		until, _, frozen := d.state()
		if n > 0 {
			o.looks = 0
		}
		if isFrozen(err) || frozen && errors.Is(err, os.ErrDeadlineExceeded) {
			return false
		}
		if err != nil && !errors.Is(err, os.ErrDeadlineExceeded) {
			if d.unwanted(err) {
				o.discarded = true
				break
			}
			o.from.Close() //nolint:errcheck // the process sees EPIPE, as in a shell's pipe
			return true
		}
		if err == nil {
			return true
		}
		if n == 0 && o.looked {
			o.looks++
		}
		o.looked = true
		if o.looks == drainLooks {
			d.cut()
			return true
		}
		if !time.Now().Before(until) {
			d.cut()
			o.pending = d.pending(o.from)
			break
		}
		o.lookUntil = time.Now().Add(d.idle / drainLooks)
		d.limit(o.from.(deadliner), o.lookUntil)
	}
	if o.discarded {
		return d.discard(o)
	}
	return d.sendPending(o)
}

// discard reads an output until the process or the session ends.
func (d *drain) discard(o *output) bool {
	_, err := io.Copy(io.Discard, o.from)
	if _, _, frozen := d.state(); isFrozen(err) || frozen && err != nil {
		return false
	}
	o.from.Close() //nolint:errcheck // as in send
	return true
}

// cut notes that somebody still held an output when it was taken to be complete.
func (d *drain) cut() {
	if _, stopped, _ := d.state(); !stopped {
		d.observe(event.DrainCut)
	}
}

// pending is what lies in a source now: the command wrote it before its time was over,
// however slowly the client takes it.
func (d *drain) pending(from io.ReadCloser) int64 {
	if source, ok := from.(syscall.Conn); ok {
		return int64(socket.Pending(source))
	}
	return 0
}

func (d *drain) sendPending(o *output) bool {
	if o.pending == 0 {
		return true
	}
	if source, ok := o.from.(deadliner); ok {
		d.limit(source, time.Time{})
	}
	n, err := o.to.ReadFrom(io.LimitReader(o.from, o.pending)) // a client that has gone is noticed elsewhere
	o.pending -= n
	_, _, frozen := d.state()
	return !isFrozen(err) && (!frozen || err == nil)
}
