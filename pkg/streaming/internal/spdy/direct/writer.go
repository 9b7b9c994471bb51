// Package direct writes received payload to a pipe or a TCP connection out of the buffer that it was received in, from
// the goroutine that has read it, without waiting for the goroutine that copies the stream. That saves a copy and two
// changes of goroutine for each buffer.
package direct

import (
	"io"
	"net"
	"os"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/streamshim/streamshim/pkg/streaming/internal/socket"
)

// Writer writes as much as its destination takes at once. What does not fit takes another way. One goroutine uses it at
// a time.
type Writer struct {
	raw      syscall.RawConn
	tryWrite func(fd uintptr) bool // (*Writer).writeNow, made once
	p        []byte
	n        int
	failed   bool // nothing more is written
	err      error

	pieces    [][]byte
	tryPieces func(fd uintptr) bool // (*Writer).writePiecesNow, made once
}

// filed is a writer past which may be written directly, to a file; nil when not.
type filed interface{ DirectFile() *os.File }

// To returns a Writer to a non-blocking *os.File or *net.TCPConn, or to the file of a writer with a method
// DirectFile() *os.File, and nil when w is none of these. Types that embed one are not trusted: they may do something of
// their own in Write, as a terminal's input does.
func To(w io.Writer) *Writer {
	if f, ok := w.(filed); ok {
		if file := f.DirectFile(); file != nil {
			w = file
		}
	}
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
	direct := &Writer{raw: raw}
	direct.tryWrite = direct.writeNow
	direct.tryPieces = direct.writePiecesNow
	return direct
}

// Failed says that nothing more is written directly, because of Err or because the destination was closed or its
// deadline has passed; the latter whoever writes there the usual way meets himself.
func (w *Writer) Failed() bool { return w.failed }

// Err is the error of a write, nil when there was none. The kernel has told it here, and may tell the next who writes
// another.
func (w *Writer) Err() error { return w.err }

// Write writes what is taken at once, and nothing more after an error.
func (w *Writer) Write(p []byte) int {
	if w.failed {
		return 0
	}
	w.p, w.n = p, 0
	if err := w.raw.Write(w.tryWrite); err != nil {
		w.failed = true
	}
	w.p = nil
	return w.n
}

func (w *Writer) writeNow(fd uintptr) bool {
	for w.n < len(w.p) {
		n, err := socket.Write(fd, w.p[w.n:])
		w.n += n
		if err == unix.EAGAIN {
			break
		}
		if err != nil {
			w.failed, w.err = true, os.NewSyscallError("write", err)
			break
		}
	}
	return true
}

// WritePieces is Write for several pieces, with one system call.
func (w *Writer) WritePieces(pieces [][]byte) int {
	if w.failed {
		return 0
	}
	w.pieces, w.n = pieces, 0
	if err := w.raw.Write(w.tryPieces); err != nil {
		w.failed = true
	}
	w.pieces = nil
	return w.n
}

func (w *Writer) writePiecesNow(fd uintptr) bool {
	for {
		n, err := unix.Writev(int(fd), w.pieces)
		switch err {
		case nil:
			w.n = n
		case unix.EINTR:
			continue
		case unix.EAGAIN:
		default:
			w.failed, w.err = true, os.NewSyscallError("writev", err)
		}
		return true
	}
}
