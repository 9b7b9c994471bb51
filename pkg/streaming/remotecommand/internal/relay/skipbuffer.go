package relay

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"sync"

	"github.com/streamshim/streamshim/pkg/handover"
	"github.com/streamshim/streamshim/pkg/streaming/buffers"
)

// skipBufferKeep is how many bytes of memory an empty skipBuffer keeps.
const skipBufferKeep = 64 << 10

// skipBuffer buffers output for a reader that may be slower than its writer. The writer never waits: data that does not fit
// is skipped, and the reader gets a line that says how much.
type skipBuffer struct {
	max     int
	buffers *buffers.Share // counts data.Len()
	newline string

	mu      sync.Mutex
	changed *sync.Cond
	data    bytes.Buffer
	skipped int64
	ended   bool
	frozen  bool
}

func newSkipBuffer(limit int, tty bool, buffers *buffers.Share) *skipBuffer {
	b := &skipBuffer{max: limit, buffers: buffers, newline: "\n"}
	if tty {
		b.newline = "\r\n"
	}
	b.changed = sync.NewCond(&b.mu)
	return b
}

// Write never blocks. It accepts everything, even if it then skips it.
func (b *skipBuffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.ended {
		return 0, errors.New("nobody reads any more")
	}
	defer b.count(b.data.Len())
	if b.skipped > 0 && b.max-b.data.Len() < b.max/2 || b.data.Len() > 0 && b.buffers.Full() {
		b.skipped += int64(len(p)) // one long gap is better than many short ones
		return len(p), nil
	}
	b.mark()
	n := min(len(p), max(b.max-b.data.Len(), 0)) // the line alone may be more than max
	b.data.Write(p[:n])
	b.skipped += int64(len(p) - n)
	b.changed.Signal()
	return len(p), nil
}

// count updates the share. Called with mu held.
func (b *skipBuffer) count(before int) { b.buffers.Take(b.data.Len() - before) }

// mark writes the line about the gap, before more data is added. Called with mu held.
func (b *skipBuffer) mark() {
	if b.skipped > 0 {
		fmt.Fprintf(&b.data, "%s[streamshim: %d bytes skipped because the client reads too slowly]%s", b.newline, b.skipped, b.newline)
		b.skipped = 0
	}
}

// end ends the writing side. Buffered data can still be read.
func (b *skipBuffer) end() {
	b.mu.Lock()
	defer b.mu.Unlock()
	defer b.count(b.data.Len())
	b.mark()
	b.ended = true
	b.changed.Broadcast()
}

// Read waits for output; it returns io.EOF after the end.
func (b *skipBuffer) Read(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	for b.data.Len() == 0 {
		if b.ended {
			return 0, io.EOF
		}
		if b.frozen {
			return 0, handover.ErrFrozen
		}
		b.changed.Wait()
	}
	defer b.count(b.data.Len())
	n, err := b.data.Read(p)
	if b.data.Len() == 0 && b.data.Cap() > skipBufferKeep {
		b.data = bytes.Buffer{}
	}
	return n, err
}

// freeze unblocks the reader.
func (b *skipBuffer) freeze() {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.frozen = true
	b.changed.Broadcast()
}

// skipState is a frozen skipBuffer.
type skipState struct {
	Max     int
	Newline string
	Data    []byte
	Skipped int64
	Ended   bool
}

// state returns the buffer's state, and releases its share.
func (b *skipBuffer) state() *skipState {
	b.mu.Lock()
	defer b.mu.Unlock()
	defer b.count(b.data.Len())
	s := &skipState{b.max, b.newline, bytes.Clone(b.data.Bytes()), b.skipped, b.ended}
	b.data.Reset()
	return s
}

// resumeSkipBuffer continues from a state.
func resumeSkipBuffer(s *skipState, buffers *buffers.Share) *skipBuffer {
	b := newSkipBuffer(s.Max, false, buffers)
	b.newline, b.skipped, b.ended = s.Newline, s.Skipped, s.Ended
	defer b.count(0)
	b.data.Write(s.Data)
	return b
}

// Close makes writes fail and ends the reader.
func (b *skipBuffer) Close() error {
	b.mu.Lock()
	defer b.mu.Unlock()
	defer b.count(b.data.Len())
	b.ended = true
	b.data.Reset()
	b.changed.Broadcast()
	return nil
}
