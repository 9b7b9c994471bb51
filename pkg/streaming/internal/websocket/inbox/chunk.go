package inbox

import "sync"

// chunkSize is the unit in which received payload is buffered.
const chunkSize = 32 << 10

// Chunk is a piece of a channel's received payload. data[read:written] is not read yet.
type Chunk struct {
	next          *Chunk
	read, written int
	// users counts the list that holds the chunk, the read loop while it reads into it, and the reader
	// while it writes from it. The last one returns the chunk to the pool.
	users int
	data  [chunkSize]byte
}

var chunks = sync.Pool{New: func() any { return new(Chunk) }}

func getChunk() *Chunk {
	c := chunks.Get().(*Chunk)
	c.next, c.read, c.written, c.users = nil, 0, 0, 1
	return c
}

// letGo ends one use of the chunk. Called with the Inbox's mu held.
func (c *Chunk) letGo() {
	c.users--
	if c.users == 0 {
		c.next = nil
		chunks.Put(c)
	}
}
