// Package socket asks the kernel about a connection.
package socket

import (
	"crypto/tls"
	"net"
	"syscall"

	"golang.org/x/sys/unix"
)

// Control calls f with the descriptor of a connection, below TLS too, or of a file. It does nothing where there is none,
// and when it is closed: then nothing is to be learnt.
func Control(c any, f func(fd int)) {
	if secure, ok := c.(*tls.Conn); ok {
		c = secure.NetConn()
	}
	if socket, ok := c.(syscall.Conn); ok {
		if raw, err := socket.SyscallConn(); err == nil {
			raw.Control(func(fd uintptr) { f(int(fd)) }) //nolint:errcheck // see above
		}
	}
}

// Unacknowledged is how many bytes were written to the connection that the peer's kernel has not got yet; false when
// that is not known.
func Unacknowledged(c net.Conn) (n int, known bool) {
	Control(c, func(fd int) {
		var err error
		n, err = unix.IoctlGetInt(fd, unix.SIOCOUTQ)
		known = err == nil
	})
	return n, known
}

// Pending is how many bytes lie in a pipe, seen from either of its ends.
func Pending(pipe syscall.Conn) (bytes int) {
	Control(pipe, func(fd int) { bytes, _ = unix.IoctlGetInt(fd, unix.TIOCINQ) }) //nolint:errcheck // then nothing is known to be there
	return bytes
}
