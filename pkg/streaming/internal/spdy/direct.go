package spdy

import (
	"io"
	"net"
	"os"
	"syscall"

	"golang.org/x/sys/unix"
)

// direct is where the payload of a stream whose reader waits can be written by the read loop itself,
// out of the buffer that it was received in: a pipe or a TCP connection, without waiting. That saves
// a copy and two changes of goroutine for each buffer. What does not fit takes the usual way.
type direct struct {
	raw      syscall.RawConn
	tryWrite func(fd uintptr) bool // (*direct).writeNow, made once
	p        []byte
	n        int
	failed   bool  // nothing more is written directly
	err      error // of a write; it has been told to us, so the kernel may tell the reader another

	pieces    [][]byte              // to be written at once
	tryPieces func(fd uintptr) bool // (*direct).writePiecesNow, made once
}

// directTo returns nil when w is none of these. Types that embed one are not trusted: they may do
// something of their own in Write, as a terminal's input does.
func directTo(w io.Writer) *direct {
	var conn syscall.Conn
	switch w := w.(type) {
	case *os.File:
		conn = w
	case *net.TCPConn:
		conn = w
	default:
		return nil
	}
	raw, err := conn.SyscallConn()
	if err != nil {
		return nil
	}
	blocking := true
	err = raw.Control(func(fd uintptr) {
		flags, err := unix.FcntlInt(fd, unix.F_GETFL, 0)
		blocking = err != nil || flags&unix.O_NONBLOCK == 0
	})
	if err != nil || blocking {
		return nil
	}
	d := &direct{raw: raw}
	d.tryWrite = d.writeNow
	d.tryPieces = d.writePiecesNow
	return d
}

// write writes what is taken at once, and nothing more after an error. One that comes from the file
// being closed or its deadline having passed the stream's reader will meet itself.
func (d *direct) write(p []byte) int {
	if d.failed {
		return 0
	}
	d.p, d.n = p, 0
	if err := d.raw.Write(d.tryWrite); err != nil {
		d.failed = true
	}
	d.p = nil
	return d.n
}

func (d *direct) writeNow(fd uintptr) bool {
	for d.n < len(d.p) {
		n, err := writeFD(fd, d.p[d.n:])
		d.n += n
		if err == unix.EAGAIN {
			break
		}
		if err != nil {
			d.failed, d.err = true, os.NewSyscallError("write", err)
			break
		}
	}
	return true
}

// writePieces is write for several pieces, with one system call.
func (d *direct) writePieces(pieces [][]byte) int {
	if d.failed {
		return 0
	}
	d.pieces, d.n = pieces, 0
	if err := d.raw.Write(d.tryPieces); err != nil {
		d.failed = true
	}
	d.pieces = nil
	return d.n
}

func (d *direct) writePiecesNow(fd uintptr) bool {
	for {
		n, err := unix.Writev(int(fd), d.pieces)
		switch err {
		case nil:
			d.n = n
		case unix.EINTR:
			continue
		case unix.EAGAIN:
		default:
			d.failed, d.err = true, os.NewSyscallError("writev", err)
		}
		return true
	}
}
