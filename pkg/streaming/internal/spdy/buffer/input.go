package buffer

import (
	"net"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/streamshim/streamshim/pkg/streaming/internal/socket"
)

// plainRead is the size of reads from a connection that is not a plain socket, such as TLS. Such a connection holds its
// buffer while it waits, so the buffer is small. TLS itself buffers a record of 16 KiB, so the small buffer costs no system
// calls.
const plainRead = 4 << 10

// Input holds what was read from a connection and not parsed yet. One goroutine uses it.
type Input struct {
	conn net.Conn
	raw  syscall.RawConn // of conn; nil if it is not a plain socket

	partial []byte  // an incomplete frame, while no buffer is held
	buf     *Buffer // nil while there is nothing to read
	end     int     // bytes in buf.data
	plain   []byte  // used instead of buf if the connection is not a plain socket

	large   bool
	tryRead func(fd uintptr) bool // (*Input).readSocket, made once
	n       int                   // its result
	err     error
}

// Init makes it the input of a connection from which buffered was read before. raw is the connection's socket, or nil if
// the connection may be read only with its own Read.
func (in *Input) Init(conn net.Conn, raw syscall.RawConn, buffered []byte) {
	in.conn, in.raw = conn, raw
	in.partial = append(in.partial, buffered...)
	in.tryRead = in.readSocket
}

// Rest returns what Park has stored.
func (in *Input) Rest() []byte { return in.partial }

// Read waits for bytes. It returns what was kept and what was read: up to 64 KiB, or 1 MiB if large is set. The bytes are
// valid until the next call. At the end it returns no bytes and no error.
func (in *Input) Read(large bool) ([]byte, error) {
	if in.raw == nil {
		return in.readPlain()
	}
	in.large = large
	if err := in.raw.Read(in.tryRead); err != nil {
		return nil, err
	}
	if in.err != nil || in.n == 0 {
		return nil, in.err
	}
	in.end += in.n
	return in.buf.data[:in.end], nil
}

// readSocket tries to read once. It takes a buffer for the attempt and returns it if there is nothing to read, so a
// connection that waits holds no buffer.
func (in *Input) readSocket(fd uintptr) bool {
	if in.buf == nil {
		in.buf = take(readClass(in.large))
		in.end = copy(in.buf.data, in.partial)
		in.partial = nil
	}
	in.n, in.err = socket.Read(fd, in.buf.data[in.end:])
	if in.err == unix.EAGAIN {
		if in.end > 0 {
			in.partial = append([]byte(nil), in.buf.data[:in.end]...)
		}
		in.Release()
		return false
	}
	return true
}

func readClass(large bool) int {
	if large {
		return largest
	}
	return received
}

func (in *Input) readPlain() ([]byte, error) {
	if in.plain == nil {
		in.plain = make([]byte, plainRead)
	}
	n, err := in.conn.Read(in.plain)
	if n == 0 {
		return nil, err // a connection returns an error that came with bytes again
	}
	if len(in.partial) == 0 {
		return in.plain[:n], nil
	}
	in.partial = append(in.partial, in.plain[:n]...)
	return in.partial, nil
}

// Keep stores the incomplete frame at the end of what was read for the next Read. large is that of the next Read.
func (in *Input) Keep(rest []byte, large bool) {
	if in.buf != nil {
		if old := in.buf; old.class != readClass(large) {
			in.buf = take(readClass(large))
			defer old.Free()
		}
		in.end = copy(in.buf.data, rest)
		return
	}
	if len(rest) == 0 {
		in.partial = nil
		return
	}
	in.partial = append(in.partial[:0], rest...)
}

// Park stores rest in memory of its own and releases the buffer.
func (in *Input) Park(rest []byte) {
	in.partial = append([]byte(nil), rest...)
	in.Release()
}

// ParkKept parks what Keep has stored.
func (in *Input) ParkKept() {
	if in.buf != nil {
		in.Park(in.buf.data[:in.end])
	}
}

// Release returns the buffer to the pool.
func (in *Input) Release() {
	if in.buf != nil {
		in.buf.Free()
		in.buf, in.end = nil, 0
	}
}
