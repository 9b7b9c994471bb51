// Package buffer is the memory that payload passes through, in pooled buffers: what was read from a connection (Input),
// what a stream has received and nobody has read (Queue), and what is read to be sent (Source). While nothing comes,
// none is held.
package buffer

import (
	"sync"

	"github.com/streamshim/streamshim/pkg/streaming/internal/spdy/frames"
)

// headroom is the space in front of a buffer's payload. A frame header fits into it, so that header
// and payload leave in one write without being copied together.
const headroom = frames.HeaderLen

// sizes are the payload sizes of pooled buffers: a keystroke or a status, a terminal's read, a
// pipe's traditional capacity, and the size from which larger ones gain nothing.
var sizes = [...]int{2 << 10, 16 << 10, 64 << 10, 1 << 20}

const (
	smallest = 0
	received = 2              // the largest that a Queue keeps payload in
	largest  = len(sizes) - 1 // and what large reads go into
)

var pools [len(sizes)]sync.Pool

// Buffer is a pooled piece of memory with one owner at a time. data[start:end] is the payload, and
// start is never below headroom.
type Buffer struct {
	class      int
	data       []byte
	start, end int
	next       *Buffer // in a Queue
}

// New takes an empty buffer from the pool, with space for n bytes of payload but for no more than 1 MiB.
func New(n int) *Buffer { return take(classFor(n, largest)) }

func take(class int) *Buffer {
	b, ok := pools[class].Get().(*Buffer)
	if !ok {
		b = &Buffer{class: class, data: make([]byte, headroom+sizes[class])}
	}
	b.start, b.end = headroom, headroom
	return b
}

// Free gives the buffer back to the pool.
func (b *Buffer) Free() {
	b.next = nil
	pools[b.class].Put(b)
}

// Payload returns what is in the buffer.
func (b *Buffer) Payload() []byte { return b.data[b.start:b.end] }

// Len is how many bytes are in the buffer.
func (b *Buffer) Len() int { return b.end - b.start }

// Append copies the beginning of p behind the payload, as much as there is space for, and returns how much.
func (b *Buffer) Append(p []byte) int {
	n := copy(b.spare(), p)
	b.end += n
	return n
}

// Advance takes n bytes of payload from the front.
func (b *Buffer) Advance(n int) { b.start += n }

// Frame returns the first n bytes of payload behind the room for a frame header, over what was in front of them.
func (b *Buffer) Frame(n int) []byte { return b.data[b.start-headroom : b.start+n] }

func (b *Buffer) spare() []byte { return b.data[b.end:] }

// size is how much payload the buffer can take in all; it is what the limits count.
func (b *Buffer) size() int { return sizes[b.class] }

// classFor is the smallest class that takes n bytes, or the largest class there is up to limit.
func classFor(n, limit int) int {
	for class := smallest; class < limit; class++ {
		if n <= sizes[class] {
			return class
		}
	}
	return limit
}
