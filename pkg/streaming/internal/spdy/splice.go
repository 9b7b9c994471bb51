package spdy

import (
	"errors"
	"io"
	"os"
	"time"

	"golang.org/x/sys/unix"
)

// A client that uploads sends data frame after data frame. Where such a payload goes into a pipe, and the
// stream's reader waits, the read loop lets the kernel move it there, with splice(2): it is not copied here
// at all. For that the read loop reads no further than the next frame's header. Between two sockets splice
// needs a pipe in between and was slower than what gather.go does.

const (
	// spliceMin is the smallest payload for which the system calls of splicing are worth it.
	spliceMin = 16 << 10
	// directWait bounds how long the read loop waits at a time for a destination that is full: those who
	// read make room long before. After it the payload is kept in the stream's buffers, as it is for any
	// reader who is slow. See also mayWait.
	directWait = 20 * time.Millisecond
)

var (
	// errNoSplice says that the payload has to take the usual way.
	errNoSplice = errors.New("not to be spliced")
	// errFull says that the destination takes nothing now, while there is something for it.
	errFull = errors.New("full")
)

// readLimit is how much may be read so that the next payload can still be spliced.
func (r *reader) readLimit(room int) int {
	if !r.bulk || r.remaining >= spliceMin {
		return room
	}
	return min(room, max(headerLen-r.end, 1)+r.remaining)
}

// fillDirectly moves some of the payload that comes next to where it belongs. It returns errNoSplice
// when that is not possible, and the payload is to be read.
func (r *reader) fillDirectly() error {
	if !r.bulk || r.remaining < spliceMin || r.end > 0 || len(r.partial) > 0 {
		return errNoSplice
	}
	if err := r.c.socket.Read(r.trySplice); err != nil {
		return err
	}
	switch {
	case r.err == errFull:
		if !r.stream.awaitDirect() {
			r.bulk = false // until the next frame
			return errNoSplice
		}
		return nil
	case r.err != nil:
		return r.err
	case r.n == 0:
		return io.EOF
	}
	r.now = time.Now().UnixNano()
	r.c.lastReceived.Store(r.now)
	r.c.lastActivity.Store(r.now)
	r.remaining -= r.n
	if r.remaining == 0 {
		r.endData()
	}
	return nil
}

// spliceSocket is one attempt of fillDirectly. As in readSocket nothing is held while it waits.
func (r *reader) spliceSocket(fd uintptr) bool {
	r.n, r.err = r.stream.splice(fd, r.remaining)
	if r.err == unix.EAGAIN {
		r.drop()
		return false
	}
	return true
}

// takesSplices says whether its payload may be spliced at this time.
func (s *Stream) takesSplices() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.direct != nil && s.head == nil && s.direct.pipe
}

// splice moves up to n bytes from the connection's socket to where WriteTo would write them. It fails
// with EAGAIN when nothing has come, errFull, errNoSplice, or an error of the socket.
func (s *Stream) splice(fd uintptr, n int) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.direct == nil || s.head != nil || s.readErr != nil || s.readClosed {
		return 0, errNoSplice
	}
	moved, err := s.direct.splice(fd, n)
	s.noteDirectLocked(moved)
	return moved, err
}

// awaitDirect waits for room where WriteTo would write and says whether there is some.
func (s *Stream) awaitDirect() bool {
	if !s.conn.mayWait() {
		return false
	}
	s.mu.Lock()
	direct := s.direct
	s.mu.Unlock()
	return direct != nil && direct.await(directWait)
}

// awaitCaughtUp waits for WriteTo to have written what is buffered, so that what comes next can take the direct
// way: a client that sends faster than the process reads would otherwise have all of it take the other.
func (s *Stream) awaitCaughtUp() {
	s.mu.Lock()
	if s.writesTo == nil || s.hurried || s.head == nil || s.readErr != nil || s.readClosed || !s.conn.mayWait() {
		s.mu.Unlock()
		return
	}
	caughtUp := make(chan struct{})
	s.caughtUp = caughtUp
	s.mu.Unlock()
	timeout := time.NewTimer(directWait)
	defer timeout.Stop()
	select {
	case <-caughtUp:
	case <-timeout.C:
		s.mu.Lock()
		s.caughtUp, s.hurried = nil, true
		s.mu.Unlock()
	}
}

// mayWait says whether the read loop may wait for one stream: where nobody suffers from it, because all
// streams serve one process or one forwarded connection, which has two.
func (c *Conn) mayWait() bool {
	if c.cfg.Stall < 0 {
		return true
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	return len(c.streams) <= 2
}

// splice moves up to n bytes from a socket. What it returns see Stream.splice.
func (d *direct) splice(from uintptr, n int) (int, error) {
	if d.failed || !d.pipe {
		return 0, errNoSplice
	}
	d.from, d.max, d.n, d.spliceErr = from, n, 0, nil
	if err := d.raw.Write(d.trySplice); err != nil {
		return 0, errNoSplice // whoever writes will meet it too
	}
	switch {
	case d.spliceErr == nil || d.n > 0:
		return d.n, nil
	case d.spliceErr == unix.EAGAIN:
		// Either there is nothing to move or no room for it.
		if waiting, err := pending(from); err != nil || waiting {
			return 0, errFull
		}
		return 0, unix.EAGAIN
	case d.spliceErr == unix.EPIPE:
		return 0, errNoSplice // see above
	case d.spliceErr == unix.EINVAL:
		d.pipe = false // a kernel that cannot
		return 0, errNoSplice
	}
	return 0, os.NewSyscallError("splice", d.spliceErr)
}

func (d *direct) spliceNow(fd uintptr) bool {
	for {
		n, err := unix.Splice(int(d.from), nil, int(fd), nil, d.max, unix.SPLICE_F_MOVE|unix.SPLICE_F_NONBLOCK)
		if err != unix.EINTR {
			d.n, d.spliceErr = int(max(n, 0)), err
			return true
		}
	}
}

// await waits until the destination takes something, and says whether it does.
func (d *direct) await(limit time.Duration) bool {
	ready := false
	err := d.raw.Control(func(fd uintptr) {
		fds := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLOUT}}
		n, err := unix.Poll(fds, int(limit/time.Millisecond))
		ready = err == nil && n == 1 && fds[0].Revents&unix.POLLOUT != 0 || err == unix.EINTR
	})
	return err == nil && ready
}

// pending says whether there is anything to read from a socket, be it the end.
func pending(fd uintptr) (bool, error) {
	var b [1]byte
	for {
		_, _, err := unix.Recvfrom(int(fd), b[:], unix.MSG_PEEK|unix.MSG_DONTWAIT)
		switch err {
		case nil:
			return true, nil
		case unix.EAGAIN:
			return false, nil
		case unix.EINTR:
		default:
			return false, err
		}
	}
}
