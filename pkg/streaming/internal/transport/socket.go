package transport

import (
	"net"
	"syscall"

	"golang.org/x/sys/unix"
)

// Unacknowledged is how many bytes were written to the connection and have not arrived yet.
func Unacknowledged(c net.Conn) int {
	tcp, ok := c.(*net.TCPConn)
	if !ok {
		return 0
	}
	n := 0
	Control(tcp, func(fd int) { n, _ = unix.IoctlGetInt(fd, unix.SIOCOUTQ) }) //nolint:errcheck // 0 is a good guess
	return n
}

// Control calls f with the descriptor of a connection or pipe, unless it is closed.
func Control(c syscall.Conn, f func(fd int)) {
	if raw, err := c.SyscallConn(); err == nil {
		raw.Control(func(fd uintptr) { f(int(fd)) }) //nolint:errcheck // fails on a closed connection, whose session ends anyway
	}
}

// Pending is how many bytes lie in a pipe, seen from either of its ends.
func Pending(pipe syscall.Conn) (bytes int) {
	Control(pipe, func(fd int) { bytes, _ = unix.IoctlGetInt(fd, unix.TIOCINQ) }) //nolint:errcheck // then nothing is known to be there
	return bytes
}
