package spdy

import (
	"os"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// room waits for a full pipe or TCP connection to take something. The wait has a limit of its own, beside
// the deadlines of who else writes there, and holds no thread: an epoll descriptor can itself be waited for, by
// Go's own poller.
//
// It is used by one goroutine, but for interrupt. The zero value is ready; close it when done.
type room struct {
	stopped atomic.Bool // by interrupt: nothing is waited for any more

	raw syscall.RawConn

	mu    sync.Mutex // for interrupt
	epoll *os.File
}

// await waits until the destination takes something, and says whether it does.
func (r *room) await(destination syscall.RawConn, limit time.Duration) bool {
	if limit <= 0 || !r.open() {
		return false
	}
	watched := false
	err := destination.Control(func(fd uintptr) {
		event := unix.EpollEvent{Events: unix.EPOLLOUT}
		watched = r.control(unix.EPOLL_CTL_ADD, fd, &event)
	})
	if err != nil || !watched {
		return false
	}
	// A destination that is closed meanwhile has left the set by itself.
	defer destination.Control(func(fd uintptr) { r.control(unix.EPOLL_CTL_DEL, fd, nil) }) //nolint:errcheck // as said
	if err := r.epoll.SetReadDeadline(time.Now().Add(limit)); err != nil {
		return false
	}
	if r.stopped.Load() { // perhaps before the deadline was set
		return false
	}
	var events [1]unix.EpollEvent
	n := 0
	err = r.raw.Read(func(epfd uintptr) bool {
		n, _ = unix.EpollWait(int(epfd), events[:], 0) //nolint:errcheck // then there is nothing
		return n > 0
	})
	return err == nil && n > 0 && events[0].Events&unix.EPOLLOUT != 0
}

func (r *room) control(operation int, fd uintptr, event *unix.EpollEvent) (ok bool) {
	err := r.raw.Control(func(epfd uintptr) { ok = unix.EpollCtl(int(epfd), operation, int(fd), event) == nil })
	return ok && err == nil
}

// open makes the epoll descriptor, the first time.
func (r *room) open() bool {
	if r.epoll != nil {
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
	r.mu.Lock()
	r.epoll = os.NewFile(uintptr(epfd), "epoll")
	r.mu.Unlock()
	if r.raw, err = r.epoll.SyscallConn(); err != nil {
		r.close()
		return false
	}
	return true
}

func (r *room) close() {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.epoll != nil {
		r.epoll.Close() //nolint:errcheck // nothing was written
		r.epoll = nil
	}
}
