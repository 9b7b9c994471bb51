package remotecommand

import (
	"errors"
	"io"
	"os"
	"sync/atomic"
	"syscall"
	"time"

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
	sources  []io.ReadCloser
	until    atomic.Int64 // Unix nanoseconds; 0 while the process runs
	stopped  atomic.Bool  // the session was told to end, and its output with it
}

// deadliner is a pipe or a pty of ours, whose reads can be given a limit.
type deadliner interface{ SetReadDeadline(time.Time) error }

// begin starts the wait; it lasts no longer than limit.
func (d *drain) begin(limit time.Duration) {
	d.stopped.Store(limit == 0)
	d.until.Store(time.Now().Add(limit).UnixNano())
	for _, source := range d.sources {
		if s, ok := source.(deadliner); ok && (d.idle > 0 || limit == 0) {
			s.SetReadDeadline(time.Unix(1, 0)) //nolint:errcheck // a source that is closed has ended already
		}
	}
}

// drainLooks is how many times a source is looked at within one idle period. The silence that ends
// the wait is at most so much longer than asked for.
const drainLooks = 4

// copyOutput sends a source to the client until it ends, is complete, or cannot be sent.
func (d *drain) copyOutput(to workload.Stream, from io.ReadCloser) {
	silent := -1 // looks that have found nothing; the first one was not a whole one
	for {
		n, err := to.ReadFrom(from)
		if err != nil && !errors.Is(err, os.ErrDeadlineExceeded) {
			if d.unwanted(err) {
				io.Copy(io.Discard, from) //nolint:errcheck // until the process or the session ends
			}
			from.Close() //nolint:errcheck // the process sees EPIPE, as in a shell's pipe
			return
		}
		if n > 0 && silent >= 0 {
			silent = 0
		} else {
			silent++
		}
		if err == nil {
			break
		}
		if silent == drainLooks {
			d.cut()
			break
		}
		if time.Now().UnixNano() >= d.until.Load() {
			d.cut()
			copyPending(to, from)
			break
		}
		from.(deadliner).SetReadDeadline(time.Now().Add(d.idle / drainLooks)) //nolint:errcheck // as in begin
	}
}

// cut notes that somebody still held an output when it was taken to be complete.
func (d *drain) cut() {
	if !d.stopped.Load() {
		d.observe(event.DrainCut)
	}
}

// copyPending sends what lies in a source now: the command wrote it before its time was over,
// however slowly the client takes it.
func copyPending(to workload.Stream, from io.ReadCloser) {
	source, ok := from.(interface {
		syscall.Conn
		deadliner
	})
	if !ok {
		return
	}
	if pending := socket.Pending(source); pending > 0 && source.SetReadDeadline(time.Time{}) == nil {
		to.ReadFrom(io.LimitReader(from, int64(pending))) //nolint:errcheck // a client that has gone is noticed elsewhere
	}
}
