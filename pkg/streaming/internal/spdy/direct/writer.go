// Package direct writes received payload to a pipe or a TCP connection straight from the buffer that it was received in.
// The goroutine that has read it writes it, without waiting for the goroutine that copies the stream. That saves a copy and
// two goroutine switches for each buffer.
package direct

import (
	"io"
	"net"
	"os"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/streamshim/streamshim/pkg/streaming/internal/socket"
)

// Writer writes as much as its destination accepts at once. The caller delivers the rest another way. One goroutine uses it
// at a time.
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

// filed is implemented by a writer to a file that may also be written to directly. The file is nil if it may not.
type filed interface{ DirectFile() *os.File }

// To returns a Writer to a non-blocking *os.File or *net.TCPConn, or to the file of a writer with a method DirectFile()
// *os.File. It returns nil if w is none of these. It does not accept types that embed one of them: their Write may do
// something else, as that of a terminal's input does.
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

// Failed reports whether nothing more is written directly. The reason is Err, or the destination was closed or its deadline
// has passed. In the latter cases a usual write to the destination fails, too.
func (w *Writer) Failed() bool { return w.failed }

// Err returns the error of a write, or nil. The kernel has reported it here, and may report another one to the next writer.
func (w *Writer) Err() error { return w.err }

// Write writes what is accepted at once, and returns how much that is. After an error it writes nothing.
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

// WritePieces is like Write, for several pieces with one system call.
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
