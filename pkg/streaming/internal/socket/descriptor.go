package socket

import (
	"net"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// Waitable is a socket that can be waited on without reading from it.
type Waitable interface {
	syscall.Conn
	SetReadDeadline(time.Time) error
}

// Raw returns the socket of conn if reading it directly is the same as conn.Read, and nil otherwise. It knows only the plain
// types: a type that embeds one has SyscallConn too, but may have a Read of its own.
func Raw(conn net.Conn) syscall.RawConn {
	switch conn := conn.(type) {
	case *net.TCPConn:
		raw, _ := conn.SyscallConn()
		return raw
	case *net.UnixConn:
		raw, _ := conn.SyscallConn()
		return raw
	}
	return nil
}

// Below returns the socket below conn, which may be TLS, or nil if there is none.
func Below(conn net.Conn) Waitable {
	for {
		switch c := conn.(type) {
		case *net.TCPConn:
			return c
		case *net.UnixConn:
			return c
		case interface{ NetConn() net.Conn }:
			conn = c.NetConn()
		default:
			return nil
		}
	}
}

// Read reads once, and retries when a signal interrupts it.
func Read(fd uintptr, p []byte) (int, error) {
	for {
		n, err := unix.Read(int(fd), p)
		if err != unix.EINTR {
			return max(n, 0), err
		}
	}
}

// Write writes once, and retries when a signal interrupts it.
func Write(fd uintptr, p []byte) (int, error) {
	for {
		n, err := unix.Write(int(fd), p)
		if err != unix.EINTR {
			return max(n, 0), err
		}
	}
}

// End is how a peer has ended a connection.
type End int

// Ends of a connection.
const (
	Open   End = iota
	Closed     // with FIN; what the peer sent before can still be read
	Dead       // closed in both directions
)

// PeerEnd returns how the peer has ended the connection, even while there are unread bytes before the end.
func PeerEnd(fd int) End {
	fds := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLRDHUP}}
	n, err := unix.Poll(fds, 0)
	switch events := fds[0].Revents; {
	case err != nil || n != 1:
		return Open // no end is known
	case events&(unix.POLLHUP|unix.POLLERR) != 0:
		return Dead
	case events&unix.POLLRDHUP != 0:
		return Closed
	}
	return Open
}

// TakeError returns and clears the socket's pending error, or nil if there is none.
func TakeError(fd int) error {
	if code, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_ERROR); err == nil && code != 0 {
		return unix.Errno(code)
	}
	return nil
}
