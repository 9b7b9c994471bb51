package spdy

import "github.com/streamshim/streamshim/pkg/streaming/internal/spdy/frames"

// Receipts decides how far the connection may be ahead of what the peer has read. Its methods may be called from several
// goroutines. Only Await blocks.
type Receipts interface {
	// Await waits until payload may be sent, and returns how many bytes, at least 1. If one of the channels is closed, it
	// returns any number.
	Await(stream, conn, freezing <-chan struct{}) int
	// Sent is called with the number of bytes of payload that were written on any stream.
	Sent(bytes int)
	// Answered is called from the read loop when the peer has answered a PING of this end.
	Answered(id uint32)
}

// awaitReceipts returns how much may be sent on a stream now.
func (c *Conn) awaitReceipts(s *Stream) int {
	if c.receipts == nil {
		return frames.MaxLen
	}
	return min(c.receipts.Await(s.done, c.done, c.freezing), frames.MaxLen)
}

// noteSent counts payload that was written. It does not block.
func (c *Conn) noteSent(n int) {
	if c.receipts != nil {
		c.receipts.Sent(n)
	}
}

// pingAnswered is called from the read loop when the peer has answered a PING of ours.
func (c *Conn) pingAnswered(id uint32) {
	if c.receipts != nil {
		c.receipts.Answered(id)
	}
}

// Pings queues n PINGs with nothing in between, and returns the id of the first. The others follow in steps of two. They are
// written before more data, or by Flush. It does not block. ok is false if too many answers wait.
func (c *Conn) Pings(n int) (first uint32, ok bool) { return c.out.control.Pings(n) }

// Flush writes what is queued, if nobody else is writing. It does not block.
func (c *Conn) Flush() { c.out.flush() }
