package spdy

import (
	"net"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// waitConn is a socket that can be waited on without reading from it.
type waitConn interface {
	syscall.Conn
	SetReadDeadline(time.Time) error
}

// rawSocket is the socket below conn if reading it directly is the same as conn.Read. Only the
// plain types are trusted with that: a type that embeds one offers SyscallConn too, but may do
// something of its own in Read.
func rawSocket(conn net.Conn) syscall.RawConn {
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

// socketBelow is the socket that carries conn, which may be TLS on top of it.
func socketBelow(conn net.Conn) waitConn {
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

// readFD is one read, retried when a signal interrupts it.
func readFD(fd uintptr, p []byte) (int, error) {
	for {
		n, err := unix.Read(int(fd), p)
		if err != unix.EINTR {
			return max(n, 0), err
		}
	}
}

// writeFD is one write, retried when a signal interrupts it.
func writeFD(fd uintptr, p []byte) (int, error) {
	for {
		n, err := unix.Write(int(fd), p)
		if err != unix.EINTR {
			return max(n, 0), err
		}
	}
}

// peerEnd says how the peer has ended the connection, also while there are bytes before the end that nobody
// has read: ErrPeerClosed, ErrPeerReset, or nil while it has not.
func peerEnd(fd uintptr) error {
	fds := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLRDHUP}}
	n, err := unix.Poll(fds, 0)
	if err != nil || n != 1 {
		return nil //nolint:nilerr // nothing is known of an end
	}
	switch events := fds[0].Revents; {
	case events&(unix.POLLHUP|unix.POLLERR) != 0:
		// A reset behind a FIN, which what is sent to a closed socket is answered with, is called EPIPE.
		if code, err := unix.GetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_ERROR); err == nil && unix.Errno(code) == unix.ECONNRESET {
			return ErrPeerReset
		}
		return ErrPeerClosed
	case events&unix.POLLRDHUP != 0:
		return ErrPeerClosed
	}
	return nil
}
