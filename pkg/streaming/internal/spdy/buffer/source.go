package buffer

import (
	"errors"
	"io"
	"os"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/streamshim/streamshim/pkg/streaming/internal/socket"
)

// Source reads what is to be sent. Its buffers grow and shrink with what there is to read: a terminal has at most 4 KiB
// at once, a pipe may have 1 MiB. One goroutine uses it.
type Source struct {
	r     io.Reader
	raw   syscall.RawConn // nil if only r can be read
	class int
	limit int

	tryRead func(fd uintptr) bool // (*Source).readSocket, made once
	b       *Buffer
	n       int
	err     error
}

// NewSource returns a Source of r. It reads r directly if r has SyscallConn, as a pipe, a terminal or a TCP connection has.
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

// Read waits for bytes and returns them in a buffer, which the caller then owns. It returns a buffer, an error, or both.
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
	// A terminal whose other side is closed fails with EIO. Only the reader knows what that means: it may wait until
	// somebody opens the terminal again.
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
