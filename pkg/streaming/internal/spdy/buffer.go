package spdy

import (
	"sync"

	"github.com/streamshim/streamshim/pkg/streaming/internal/spdy/frames"
)

// headroom is the space in front of a buffer's payload. A frame header fits into it, so that header
// and payload leave in one write without being copied together.
const headroom = frames.HeaderLen

// bufferSizes are the payload sizes of pooled buffers: a keystroke or a status, a terminal's read, a
// pipe's traditional capacity, and the size from which larger ones gain nothing.
var bufferSizes = [...]int{2 << 10, 16 << 10, 64 << 10, 1 << 20}

const (
	smallestClass = 0
	receiveClass  = 2                    // the largest that inbound data is kept in
	largestClass  = len(bufferSizes) - 1 // and what is read into while payload is gathered
)

var bufferPools [len(bufferSizes)]sync.Pool

// buffer is a pooled piece of memory with one owner at a time. data[start:end] is the payload, and
// start is never below headroom.
type buffer struct {
	class      int
	data       []byte
	start, end int
	next       *buffer // in a stream's queue
}

// newBuffer takes an empty buffer from the pool.
func newBuffer(class int) *buffer {
	b, ok := bufferPools[class].Get().(*buffer)
	if !ok {
		b = &buffer{class: class, data: make([]byte, headroom+bufferSizes[class])}
	}
	b.start, b.end = headroom, headroom
	return b
}

// free gives the buffer back to the pool.
func (b *buffer) free() {
	b.next = nil
	bufferPools[b.class].Put(b)
}

func (b *buffer) payload() []byte { return b.data[b.start:b.end] }

func (b *buffer) spare() []byte { return b.data[b.end:] }

// size is how much payload the buffer can take in all; it is what the limits count.
func (b *buffer) size() int { return bufferSizes[b.class] }

// classFor is the smallest class that takes n bytes, or the largest class there is up to limit.
func classFor(n, limit int) int {
	for class := smallestClass; class < limit; class++ {
		if n <= bufferSizes[class] {
			return class
		}
	}
	return limit
}
