package direct

import (
	"os"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// Waiter waits until a full pipe or TCP connection accepts data. The wait has its own limit, apart from the deadlines of
// other writers. It holds no thread: Go's poller can wait for an epoll descriptor.
//
// One goroutine uses it, but Interrupt may be called from any. The zero value is ready. Close it when done.
type Waiter struct {
	stopped atomic.Bool // set by Interrupt: later waits end at once

	raw syscall.RawConn

	mu    sync.Mutex // for Interrupt
	epoll *os.File
}

// Await waits until the destination of to accepts data, and reports whether it does.
func (w *Waiter) Await(to *Writer, limit time.Duration) bool {
	destination := to.raw
	if limit <= 0 || !w.open() {
		return false
	}
	watched := false
	err := destination.Control(func(fd uintptr) {
		event := unix.EpollEvent{Events: unix.EPOLLOUT}
		watched = w.control(unix.EPOLL_CTL_ADD, fd, &event)
	})
	if err != nil || !watched {
		return false
	}
	// A destination that was closed meanwhile has already left the set.
	defer destination.Control(func(fd uintptr) { w.control(unix.EPOLL_CTL_DEL, fd, nil) }) //nolint:errcheck // it has left, as said
	if err := w.epoll.SetReadDeadline(time.Now().Add(limit)); err != nil {
		return false
	}
	if w.stopped.Load() { // maybe before the deadline was set
		return false
	}
	var events [1]unix.EpollEvent
	n := 0
	err = w.raw.Read(func(epfd uintptr) bool {
		n, _ = unix.EpollWait(int(epfd), events[:], 0) //nolint:errcheck // then there is nothing
		return n > 0
	})
	return err == nil && n > 0 && events[0].Events&unix.EPOLLOUT != 0
}

func (w *Waiter) control(operation int, fd uintptr, event *unix.EpollEvent) (ok bool) {
	err := w.raw.Control(func(epfd uintptr) { ok = unix.EpollCtl(int(epfd), operation, int(fd), event) == nil })
	return ok && err == nil
}

// open creates the epoll descriptor if there is none.
func (w *Waiter) open() bool {
	if w.epoll != nil {
		return true
	}
	epfd, err := unix.EpollCreate1(unix.EPOLL_CLOEXEC)
	if err != nil {
		return false
	}
	if err := unix.SetNonblock(epfd, true); err != nil {
		unix.Close(epfd) //nolint:errcheck // just made
		return false
	}
	w.mu.Lock()
	w.epoll = os.NewFile(uintptr(epfd), "epoll")
	w.mu.Unlock()
	if w.raw, err = w.epoll.SyscallConn(); err != nil {
		w.Close()
		return false
	}
	return true
}

// Interrupt ends the current wait and all later ones.
func (w *Waiter) Interrupt() {
	w.stopped.Store(true)
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.epoll != nil {
		w.epoll.SetReadDeadline(time.Unix(1, 0)) //nolint:errcheck // then it waits no longer than it would
	}
}

// Close closes the epoll descriptor. It does not close the destinations.
func (w *Waiter) Close() {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.epoll != nil {
		w.epoll.Close() //nolint:errcheck // nothing was written
		w.epoll = nil
	}
}
