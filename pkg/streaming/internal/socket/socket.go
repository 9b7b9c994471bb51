// Package socket asks the kernel about a connection.
package socket

import (
	"crypto/tls"
	"net"
	"syscall"

	"golang.org/x/sys/unix"
)

// Control calls f with the descriptor of a file or a connection, also below TLS. If there is none, or it is closed, Control does
// nothing.
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

// Unacknowledged returns how many bytes that were written to the connection the peer's kernel has not acknowledged. known is
// false if that is unknown.
func Unacknowledged(c net.Conn) (n int, known bool) {
	Control(c, func(fd int) {
		var err error
		n, err = unix.IoctlGetInt(fd, unix.SIOCOUTQ)
		known = err == nil
	})
	return n, known
}

// Pending returns how many bytes are in a pipe. It works at either end.
func Pending(pipe syscall.Conn) (bytes int) {
	Control(pipe, func(fd int) { bytes, _ = unix.IoctlGetInt(fd, unix.TIOCINQ) }) //nolint:errcheck // then nothing is known to be there
	return bytes
}
