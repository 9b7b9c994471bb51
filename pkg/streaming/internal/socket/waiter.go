package socket

import (
	"errors"
	"os"
	"sync"
	"sync/atomic"
	"syscall"
	"time"
)

// aLongTimeAgo is a deadline that ends a wait at once.
var aLongTimeAgo = time.Unix(1, 0)

// Waiter waits for an event outside of a socket and for events of the socket at the same time, without reading from the
// socket. One goroutine waits. Wake and Interrupt may be called from any. During a wait nobody else may set the socket's read
// deadline.
type Waiter struct {
	socket Waitable
	raw    syscall.RawConn // of socket; nil if there is no socket

	waiting atomic.Bool

	mu          sync.Mutex // orders Wake and Interrupt against the beginning and the end of a wait
	interrupted bool
	wakes       chan struct{} // used if there is no socket
}

// Init sets the socket, which may be nil.
func (w *Waiter) Init(socket Waitable) {
	w.wakes = make(chan struct{}, 1)
	if socket != nil {
		w.socket = socket
		w.raw, _ = socket.SyscallConn() //nolint:errcheck // without it there is no socket
	}
}

// Waiting reports whether a goroutine waits.
func (w *Waiter) Waiting() bool { return w.waiting.Load() }

// None is the argument of the condition if there is no socket.
const None = ^uintptr(0)

// Until waits until done returns true, for Wake or Interrupt, the end of the connection, or the time. It may also return
// early. It calls done with the socket's descriptor when the wait begins, and whenever something happens at the socket. After
// the last of several waits in a row, call End. The error is that of a closed socket.
func (w *Waiter) Until(until time.Time, done func(fd uintptr) bool) error {
	if w.raw == nil {
		w.waiting.Store(true)
		if done(None) {
			return nil
		}
		timer := time.NewTimer(time.Until(until))
		defer timer.Stop()
		select {
		case <-w.wakes:
		case <-timer.C:
		}
		return nil
	}
	w.mu.Lock()
	var err error
	if !w.interrupted { // otherwise the deadline stays in the past
		err = w.socket.SetReadDeadline(until)
	}
	w.waiting.Store(true)
	w.mu.Unlock()
	if err == nil {
		err = w.raw.Read(done)
	}
	if err != nil && !errors.Is(err, os.ErrDeadlineExceeded) {
		return err
	}
	return nil
}

// End ends a row of waits and clears the socket's read deadline for its readers.
func (w *Waiter) End() {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.waiting.Store(false)
	if w.raw != nil && !w.interrupted {
		w.socket.SetReadDeadline(time.Time{}) //nolint:errcheck // a connection without deadlines is closed already
	}
}

// Wake makes Until return, if a goroutine waits.
func (w *Waiter) Wake() {
	if !w.waiting.Load() {
		return
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.waiting.Load() {
		w.wakeLocked()
	}
}

// Interrupt ends the wait and all later ones. The socket's read deadline stays in the past.
func (w *Waiter) Interrupt() {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.interrupted = true
	w.wakeLocked()
}

func (w *Waiter) wakeLocked() {
	if w.raw != nil {
		w.socket.SetReadDeadline(aLongTimeAgo) //nolint:errcheck // a connection without deadlines is closed already
		return
	}
	select {
	case w.wakes <- struct{}{}:
	default:
	}
}
