package buffer

import (
	"errors"
	"io"
	"os"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/streamshim/streamshim/pkg/streaming/internal/socket"
)

// Source reads what is to be sent, into buffers that grow and shrink with what there is: a terminal
// never gets more than 4 KiB at once, a pipe may have a megabyte. One goroutine uses it.
type Source struct {
	r     io.Reader
	raw   syscall.RawConn // nil: only r can be read
	class int
	limit int

	tryRead func(fd uintptr) bool // (*Source).readSocket, made once
	b       *Buffer
	n       int
	err     error
}

// NewSource returns one that reads r: directly where r has SyscallConn, such as a pipe, a terminal or a TCP connection.
// Such a reader must not have a buffer of its own.
func NewSource(r io.Reader) *Source {
	src := &Source{r: r, limit: received}
	if conn, ok := r.(syscall.Conn); ok {
		if raw, err := conn.SyscallConn(); err == nil {
			src.raw, src.limit = raw, largest
			src.tryRead = src.readSocket
		}
	}
	return src
}

// Read waits for bytes and returns them in a buffer that is the caller's; or none with an error, or
// both.
func (src *Source) Read() (*Buffer, error) {
	var err error
	if src.raw != nil {
		err = src.raw.Read(src.tryRead)
		if err == nil {
			err = src.err
		}
		if err == nil && src.n == 0 {
			err = io.EOF
		}
	}
	// A terminal whose other side is closed fails with EIO. What that means is for the reader to
	// say, which may wait for somebody to open it again.
	if src.raw == nil || errors.Is(err, unix.EIO) {
		src.takeBuffer()
		src.n, err = src.r.Read(src.b.spare())
	}
	b := src.b
	src.b = nil
	if b == nil {
		return nil, err
	}
	n := src.n
	src.n = 0
	if n <= 0 {
		b.Free()
		return nil, err
	}
	b.end += n
	switch {
	case n == b.size() && src.class < src.limit:
		src.class++
	case src.class > smallest && n < sizes[src.class-1]:
		src.class--
	}
	return b, err
}

func (src *Source) takeBuffer() {
	if src.b == nil {
		src.b = take(src.class)
	}
}

func (src *Source) readSocket(fd uintptr) bool {
	src.takeBuffer()
	src.n, src.err = socket.Read(fd, src.b.spare())
	if src.err == unix.EAGAIN {
		src.b.Free()
		src.b = nil
		return false
	}
	if src.err != nil {
		src.err = os.NewSyscallError("read", src.err)
	}
	return true
}
