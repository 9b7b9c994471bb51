package buffer

import (
	"sync/atomic"

	"github.com/streamshim/streamshim/pkg/streaming/internal/memory"
)

// Limits bounds the unread payload of a connection's streams. It counts the sizes of buffers, not the bytes in them.
type Limits struct {
	Stream int         // bytes that each stream may always hold
	Conn   int         // bytes that all streams together may hold beyond that
	Room   memory.Room // shared with other connections

	borrowed atomic.Int64
}

// Borrowed returns how many bytes of Conn are in use.
func (l *Limits) Borrowed() int64 { return l.borrowed.Load() }

// above returns how many of the n bytes of a stream count against Conn.
func (l *Limits) above(n int) int64 { return int64(max(0, n-l.Stream)) }

// Queue holds what one stream has received and nobody has read. Callers hold the stream's lock.
type Queue struct {
	limits     *Limits
	head, tail *Buffer
	held       int // the sizes of the buffers in the queue
}

// NewQueue returns an empty queue.
func NewQueue(limits *Limits) Queue { return Queue{limits: limits} }

// Empty reports whether there is nothing to read.
func (q *Queue) Empty() bool { return q.head == nil }

// Held returns how much of the limits the queue uses.
func (q *Queue) Held() int { return q.held }

// Read copies the oldest bytes into p. The queue must not be empty.
func (q *Queue) Read(p []byte) int {
	n := copy(p, q.head.Payload())
	q.head.Advance(n)
	if q.head.Len() == 0 {
		q.Take().Free()
	}
	return n
}

// Take removes and returns the oldest buffer. The queue must not be empty.
func (q *Queue) Take() *Buffer {
	b := q.head
	q.head = b.next
	b.next = nil
	if q.head == nil {
		q.tail = nil
	}
	q.giveBack(b.size())
	return b
}

// PutBack puts back a buffer that Take has returned, as the oldest. It ignores the limits.
func (q *Queue) PutBack(b *Buffer) {
	b.next = q.head
	q.head = b
	if q.tail == nil {
		q.tail = b
	}
	q.exceed(b.size())
}

// Drop discards everything.
func (q *Queue) Drop() {
	for q.head != nil {
		q.Take().Free()
	}
}

// Append stores as much of p as there is room for, and returns how much that is. An empty queue always has some room.
func (q *Queue) Append(p []byte) int {
	stored := 0
	for stored < len(p) {
		if q.tail == nil || len(q.tail.spare()) == 0 {
			class := classFor(len(p)-stored, received)
			if q.tail != nil {
				// The reader does not keep up: use fewer, larger buffers.
				class = max(class, min(q.tail.class+1, received))
			}
			if !q.take(sizes[class]) {
				break
			}
			q.extend(take(class))
		}
		stored += q.tail.Append(p[stored:])
	}
	return stored
}

// AppendAll stores all of p and ignores the limits. It is for what was already accepted.
func (q *Queue) AppendAll(p []byte) {
	for len(p) > 0 {
		if q.tail == nil || len(q.tail.spare()) == 0 {
			class := classFor(len(p), received)
			q.exceed(sizes[class])
			q.extend(take(class))
		}
		p = p[q.tail.Append(p):]
	}
}

// HasRoom reports whether Append would store anything.
func (q *Queue) HasRoom() bool {
	if q.held == 0 {
		return true
	}
	n := sizes[received]
	if !q.take(n) {
		return false
	}
	q.giveBack(n)
	return true
}

// Bytes returns a copy of everything, or nil if the queue is empty.
func (q *Queue) Bytes() []byte {
	var all []byte
	for b := q.head; b != nil; b = b.next {
		all = append(all, b.Payload()...)
	}
	return all
}

func (q *Queue) extend(b *Buffer) {
	if q.tail == nil {
		q.head = b
	} else {
		q.tail.next = b
	}
	q.tail = b
}

// take counts n more bytes against the stream's own limit and, beyond it, against the connection's. It reports whether the
// limits allow them. They always allow the first buffer of an empty queue.
func (q *Queue) take(n int) bool {
	l := q.limits
	if q.held > 0 && l.Room.Full() {
		return false
	}
	borrow := l.above(q.held+n) - l.above(q.held)
	if borrow > 0 && l.borrowed.Add(borrow) > int64(l.Conn) && q.held > 0 {
		l.borrowed.Add(-borrow)
		return false
	}
	q.held += n
	l.Room.Take(n)
	return true
}

// exceed counts n more bytes and ignores the limits.
func (q *Queue) exceed(n int) {
	q.limits.borrowed.Add(q.limits.above(q.held+n) - q.limits.above(q.held))
	q.held += n
	q.limits.Room.Take(n)
}

func (q *Queue) giveBack(n int) {
	if lent := q.limits.above(q.held) - q.limits.above(q.held-n); lent > 0 {
		q.limits.borrowed.Add(-lent)
	}
	q.held -= n
	q.limits.Room.Return(n)
}
