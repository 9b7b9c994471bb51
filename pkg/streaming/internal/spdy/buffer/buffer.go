// Package buffer holds payload in pooled buffers: what was read from a connection (Input), what a stream has received and
// nobody has read (Queue), and what is read to be sent (Source). No buffer is held while there is nothing to hold.
package buffer

import (
	"sync"

	"github.com/streamshim/streamshim/pkg/streaming/internal/spdy/frames"
)

// headroom is the space before a buffer's payload. A frame header fits into it, so header and payload leave in one write
// without a copy.
const headroom = frames.HeaderLen

// sizes are the payload sizes of pooled buffers: for a keystroke or a status, for a read of a terminal, the traditional
// capacity of a pipe, and the size above which nothing is gained.
var sizes = [...]int{2 << 10, 16 << 10, 64 << 10, 1 << 20}

const (
	smallest = 0
	received = 2              // the largest class in a Queue
	largest  = len(sizes) - 1 // the class for large reads
)

var pools [len(sizes)]sync.Pool

// Buffer is a pooled piece of memory. It has one owner at a time. data[start:end] is the payload. start is never below
// headroom.
type Buffer struct {
	class      int
	data       []byte
	start, end int
	next       *Buffer // in a Queue
}

// New takes an empty buffer with space for n bytes of payload from the pool. It has space for 1 MiB if n is larger.
func New(n int) *Buffer { return take(classFor(n, largest)) }

func take(class int) *Buffer {
	b, ok := pools[class].Get().(*Buffer)
	if !ok {
		b = &Buffer{class: class, data: make([]byte, headroom+sizes[class])}
	}
	b.start, b.end = headroom, headroom
	return b
}

// Free returns the buffer to the pool.
func (b *Buffer) Free() {
	b.next = nil
	pools[b.class].Put(b)
}

// Payload returns the bytes in the buffer.
func (b *Buffer) Payload() []byte { return b.data[b.start:b.end] }

// Len returns the number of bytes in the buffer.
func (b *Buffer) Len() int { return b.end - b.start }

// Append copies as much of p as there is space for behind the payload, and returns how much that is.
func (b *Buffer) Append(p []byte) int {
	n := copy(b.spare(), p)
	b.end += n
	return n
}

// Advance removes n bytes of payload from the front.
func (b *Buffer) Advance(n int) { b.start += n }

// Frame returns headroom and the first n bytes of payload. The header is written over what was before the payload.
func (b *Buffer) Frame(n int) []byte { return b.data[b.start-headroom : b.start+n] }

func (b *Buffer) spare() []byte { return b.data[b.end:] }

// size returns how much payload the buffer can hold. The limits count sizes.
func (b *Buffer) size() int { return sizes[b.class] }

// classFor returns the smallest class that holds n bytes, but no class above limit.
func classFor(n, limit int) int {
	for class := smallest; class < limit; class++ {
		if n <= sizes[class] {
			return class
		}
	}
	return limit
}
