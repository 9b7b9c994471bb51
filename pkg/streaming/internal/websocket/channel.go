package websocket

import (
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"sync/atomic"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/streamshim/streamshim/pkg/handover"
	"github.com/streamshim/streamshim/pkg/streaming/internal/websocket/frames"
)

// Channel is one numbered channel of a connection. One goroutine at a time may call Read or WriteTo, and one may call
// Write or ReadFrom. The two sides are independent of each other.
type Channel struct {
	conn        *ChannelConn
	number      byte
	direction   Direction
	writeClosed atomic.Bool
	sent        atomic.Int64
}

// ID returns the channel's number.
func (ch *Channel) ID() uint32 { return uint32(ch.number) }

// Received returns the number of payload bytes that arrived, read or not, after base64 is decoded.
func (ch *Channel) Received() int64 { return ch.conn.inbound.Received(int(ch.number)) }

// InputEnded reports whether the end of the client's input has arrived. There may still be input to read.
func (ch *Channel) InputEnded() bool { return ch.conn.inbound.HasEnded(int(ch.number)) }

// Sent returns the number of payload bytes that were written to the kernel.
func (ch *Channel) Sent() int64 { return ch.sent.Load() }

// Read reads what the client sent. It returns io.EOF at the end of the client's input, see ChannelConn.Serve. When the
// connection ends otherwise, Read first returns what arrived before, then the error. While the connection is frozen it
// returns handover.ErrFrozen instead of data.
func (ch *Channel) Read(p []byte) (int, error) {
	if len(p) == 0 {
		return 0, nil
	}
	c, piece, err := ch.conn.inbound.Next(int(ch.number))
	if err != nil {
		return 0, err
	}
	n := copy(p, piece)
	ch.conn.inbound.Taken(int(ch.number), c, n)
	return n, nil
}

// WriteTo writes what the client sends to w, without a copy in between. It returns at the end of the client's input, at
// the end of the connection, or after an error of w. Bytes that w has not accepted stay unread. When the connection is
// frozen, the error is handover.ErrFrozen, also when w fails because its deadline has passed.
func (ch *Channel) WriteTo(w io.Writer) (int64, error) {
	var total int64
	for {
		c, piece, err := ch.conn.inbound.Next(int(ch.number))
		if err == io.EOF {
			return total, nil
		}
		if err != nil {
			return total, err
		}
		n, err := w.Write(piece)
		ch.conn.inbound.Taken(int(ch.number), c, n)
		total += int64(n)
		if err != nil {
			return total, ch.frozenError(err)
		}
		if n < len(piece) {
			return total, io.ErrShortWrite
		}
	}
}

// frozenError returns handover.ErrFrozen if err is due to a freeze, and err otherwise.
func (ch *Channel) frozenError(err error) error {
	if errors.Is(err, handover.ErrFrozen) || ch.conn.stopped(err) {
		return handover.ErrFrozen
	}
	return err
}

// Write sends p in messages of at most 32 KiB, up to eight in one system call. It blocks while the client does not
// read. The end of the connection unblocks it. If the connection is frozen meanwhile, Write takes all of p, or takes
// nothing and returns handover.ErrFrozen.
func (ch *Channel) Write(p []byte) (int, error) { return ch.write(p, false) }

// write is like Write. A frozen connection still takes committed bytes.
func (ch *Channel) write(p []byte, committed bool) (int, error) {
	if err := ch.writable(); err != nil {
		return 0, err
	}
	copied := ch.conn.protocol.Base64() || !ch.conn.vectored
	written := 0
	for written < len(p) {
		var n int
		var err error
		if copied {
			n, err = ch.writeCopy(p[written:], committed || written > 0)
		} else {
			n, err = ch.writeParts(p[written:], committed || written > 0)
		}
		written += n
		if err != nil {
			return written, err
		}
	}
	return written, nil
}

// writeParts sends the beginning of p, up to eight messages, straight from p.
func (ch *Channel) writeParts(p []byte, committed bool) (int, error) {
	if err := ch.lock(committed); err != nil {
		return 0, err
	}
	defer ch.conn.unlock()
	n, parts := 0, 0
	for n < len(p) && parts < len(ch.conn.vector) {
		payload := p[n:min(len(p), n+frames.MaxPayload)]
		header := ch.conn.headers[parts/2*frames.CellHeader:]
		size := frames.PutHeader(header, frames.OpBinary, 1+len(payload))
		header[size] = ch.number
		ch.conn.vector[parts], ch.conn.vector[parts+1] = header[:size+1], payload
		n += len(payload)
		parts += 2
	}
	if err := ch.conn.writeVector(parts); err != nil {
		return 0, ch.failed(err)
	}
	ch.count(n)
	return n, nil
}

// writeCopy sends the beginning of p as one write, framed in a buffer.
func (ch *Channel) writeCopy(p []byte, committed bool) (int, error) {
	b := frames.TakeBatch()
	defer b.Release()
	var wire []byte
	if ch.conn.protocol.Base64() {
		p = p[:min(len(p), frames.MaxBase64Payload)]
		wire = b.FrameBase64(ch.number, p)
	} else {
		p = p[:min(len(p), frames.MaxPayload)]
		copy(b.Payloads[0], p)
		wire = b.FrameBinary(ch.number, len(p))
	}
	if err := ch.send(wire, len(p), committed); err != nil {
		return 0, err
	}
	return len(p), nil
}

// writeEmpty sends a message without payload.
func (ch *Channel) writeEmpty() error {
	message := []byte{frames.Final | frames.OpBinary, 1, ch.number}
	if ch.conn.protocol.Base64() {
		message = []byte{frames.Final | frames.OpText, 1, '0' + ch.number}
	}
	return ch.send(message, 0, false)
}

// ReadFrom sends what it reads from r, as it arrives, until r's end. It does not half-close.
//
// If r has a file descriptor, ReadFrom waits until it is readable and holds no buffer meanwhile. It then reads up to
// eight messages in one system call, straight behind their headers, and writes them in another. EIO, by which the
// master of a pseudo-terminal reports that nobody has the other end open, counts as r's end if r's own Read confirms
// it. That Read may wait for somebody to open the other end again. From any other reader ReadFrom reads into a
// buffer that it holds.
//
// ReadFrom notices the end of the connection only when r has something to send. To make it return sooner, close r. It
// notices a freeze in the same way and then returns handover.ErrFrozen. To make it return sooner, set r's deadline.
func (ch *Channel) ReadFrom(r io.Reader) (int64, error) {
	if err := ch.writable(); err != nil {
		return 0, err
	}
	if file, ok := r.(syscall.Conn); ok {
		if raw, err := file.SyscallConn(); err == nil {
			return ch.readFromFile(r, raw)
		}
	}
	return ch.readFromReader(r)
}

func (ch *Channel) readFromFile(r io.Reader, raw syscall.RawConn) (int64, error) {
	var (
		total   int64
		b       *frames.Batch
		n       int
		readErr error
	)
	base64 := ch.conn.protocol.Base64()
	read := func(fd uintptr) bool {
		b = frames.TakeBatch()
		for {
			if base64 {
				n, readErr = unix.Read(int(fd), b.Base64Source())
			} else {
				n, readErr = unix.Readv(int(fd), b.Payloads[:])
			}
			if readErr != unix.EINTR {
				break
			}
		}
		if readErr == unix.EAGAIN {
			b.Release()
			b = nil // otherwise the closure would keep it alive during the wait
			return false
		}
		return true
	}
	for {
		if ch.conn.frozen.Load() {
			return total, handover.ErrFrozen
		}
		if err := raw.Read(read); err != nil {
			if ch.conn.stopped(err) {
				return total, handover.ErrFrozen
			}
			if !errors.Is(err, os.ErrDeadlineExceeded) && !errors.Is(err, net.ErrClosed) {
				err = fmt.Errorf("%w: %w", os.ErrClosed, err) // os.File reports this with an internal error
			}
			return total, err
		}
		if readErr == unix.EIO {
			b.Release()
			b = nil
			sent, err := ch.readAfterEIO(r)
			total += int64(sent)
			if sent == 0 || err != nil {
				return total, ch.frozenError(err)
			}
			continue
		}
		if readErr != nil || n <= 0 {
			b.Release()
			return total, readErr
		}
		var wire []byte
		if base64 {
			wire = b.FrameBase64(ch.number, b.Base64Source()[:n])
		} else {
			wire = b.FrameBinary(ch.number, n)
		}
		err := ch.send(wire, n, true)
		b.Release()
		b = nil
		if err != nil {
			return total, err
		}
		total += int64(n)
	}
}

// readAfterEIO calls r's own Read once and sends what it returns. No bytes and no error mean the end.
func (ch *Channel) readAfterEIO(r io.Reader) (sent int, err error) {
	buffer := make([]byte, minReaderBuffer) // held while r waits
	n, err := r.Read(buffer)
	if n > 0 {
		return ch.write(buffer[:n], true) // an error returned with bytes is returned again by the next Read
	}
	if err == io.EOF || errors.Is(err, unix.EIO) {
		return 0, nil
	}
	return 0, err
}

// A reader without a descriptor needs a buffer while it waits. So the buffer starts small, and grows.
const (
	minReaderBuffer = 4 << 10
	maxReaderBuffer = 64 << 10
)

func (ch *Channel) readFromReader(r io.Reader) (int64, error) {
	var total int64
	buffer := make([]byte, minReaderBuffer)
	for {
		if ch.conn.frozen.Load() {
			return total, handover.ErrFrozen
		}
		n, readErr := r.Read(buffer)
		if n > 0 {
			if _, err := ch.write(buffer[:n], true); err != nil {
				return total, err
			}
			total += int64(n)
		}
		if readErr == io.EOF {
			return total, nil
		}
		if readErr != nil {
			return total, ch.frozenError(readErr)
		}
		if n == len(buffer) && n < maxReaderBuffer {
			buffer = make([]byte, 2*n)
		}
	}
}

// send writes whole messages that carry payload bytes of payload.
func (ch *Channel) send(wire []byte, payload int, committed bool) error {
	if err := ch.lock(committed); err != nil {
		return err
	}
	defer ch.conn.unlock()
	if err := ch.conn.write(wire); err != nil {
		return ch.failed(err)
	}
	ch.count(payload)
	return nil
}

// lock takes the connection's write lock, unless the channel is closed for writing.
func (ch *Channel) lock(committed bool) error {
	if err := ch.conn.lock(committed); err != nil {
		return err
	}
	if ch.writeClosed.Load() {
		ch.conn.unlock()
		return errWriteClosed
	}
	return nil
}

func (ch *Channel) writable() error {
	if ch.writeClosed.Load() || !ch.direction.writable() {
		return errWriteClosed
	}
	return ch.conn.Err()
}

// failed ends the connection after a failed write. If the client has closed or reset the connection, the read loop
// continues, because data that arrived before is still to be read.
func (ch *Channel) failed(err error) error {
	switch {
	case errors.Is(err, errWriteClosed):
		return err
	case errors.Is(err, syscall.EPIPE): // the client sent FIN, and then RST in answer to our data
		ch.conn.finish(ErrClientVanished)
	case errors.Is(err, syscall.ECONNRESET):
		ch.conn.finish(ErrClientReset)
	default:
		ch.conn.finish(err)
		ch.conn.closeSocket()
	}
	return ch.conn.doneErr // if the connection had ended before, that reason is more exact
}

func (ch *Channel) count(payload int) {
	ch.sent.Add(int64(payload))
	if payload > 0 {
		ch.conn.active()
	}
}

// CloseWrite makes further writes fail. It sends nothing, because no version of the protocol has a half-close from the
// server. client-go would read [255, channel] as data of an unknown channel and print an error. The connection's Close
// ends its streams.
func (ch *Channel) CloseWrite() error {
	ch.writeClosed.Store(true)
	return nil
}

// CloseRead discards what is buffered, and whatever the client still sends on the channel. A blocked Read returns an
// error.
func (ch *Channel) CloseRead() { ch.conn.inbound.Discard(int(ch.number)) }

// Reset ends both directions. The protocol has no way to tell the client. The client of a legacy port-forward learns it
// from the error channel or from the end of the connection.
func (ch *Channel) Reset() error {
	ch.CloseRead()
	return ch.CloseWrite()
}

// Err implements workload.Stream. A channel is cut only when its connection is.
func (ch *Channel) Err() error { return ch.conn.Err() }

// AfterReset implements workload.Stream. It never calls the function, because a channel cannot be reset.
func (ch *Channel) AfterReset(func()) {}
