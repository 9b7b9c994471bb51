package session

import (
	"sync"
	"time"

	"github.com/streamshim/streamshim/pkg/workload"
)

// TapKind says what a TapEvent is.
type TapKind int

// The kinds of event.
const (
	TapOutput TapKind = iota
	TapInput
	TapResize
	TapGap // bytes were lost here because the queue was full
)

// TapEvent is something that a tap has seen.
type TapEvent struct {
	Kind TapKind
	At   time.Time
	From Output        // TapOutput only
	Data []byte        // TapOutput and TapInput only
	Size workload.Size // TapResize only
	Lost int64         // TapGap only: bytes
}

// eventCost is what an event counts in addition to its data, so that many small ones are bounded too.
const eventCost = 64

// TapRoom bounds what several TapQueues hold together.
type TapRoom interface {
	// Take reserves n bytes, all or none, and reports whether there was room.
	Take(n int) bool
	// Return releases n bytes.
	Return(n int)
}

// ownTapBytes is how much each queue may hold without needing shared room.
const ownTapBytes = 16 << 10

// TapQueue is a Tap that keeps what it sees until it is taken. It never blocks: what does not fit is lost, and a
// TapGap event marks the place. Only one goroutine may take from it.
type TapQueue struct {
	limit    int
	room     TapRoom // nil means no bound
	input    bool
	overflow func()

	mu      sync.Mutex
	filling tapBatch
	lost    int64
	closed  bool
	ready   chan struct{} // holds one token while there is something to take

	taken tapBatch // owned by the taker
}

type tapBatch struct {
	events  []TapEvent
	offsets []int // start of each event's data
	data    []byte
	shared  int // bytes of shared room
}

// NewTapQueue returns a queue of limit bytes; the taker may hold as much again. What it holds beyond 16 KiB is
// taken from room, which may be nil. Input is kept only if input is set. overflow, if not nil, is called each time
// the queue begins to lose something. It must not block.
func NewTapQueue(limit int, room TapRoom, input bool, overflow func()) *TapQueue {
	return &TapQueue{limit: limit, room: room, input: input, overflow: overflow, ready: make(chan struct{}, 1)}
}

// Output implements Tap. It never fails.
func (q *TapQueue) Output(from Output, p []byte) error {
	q.put(TapEvent{Kind: TapOutput, From: from}, p)
	return nil
}

// Input implements Tap. It never fails.
func (q *TapQueue) Input(p []byte) error {
	if q.input {
		q.put(TapEvent{Kind: TapInput}, p)
	}
	return nil
}

// Resize implements Tap.
func (q *TapQueue) Resize(size workload.Size) {
	q.put(TapEvent{Kind: TapResize, Size: size}, nil)
}

func (q *TapQueue) put(event TapEvent, p []byte) {
	event.At = time.Now()
	kept, overflows := q.keep(event, p)
	if kept {
		q.signal()
	}
	if overflows && q.overflow != nil {
		q.overflow()
	}
}

// keep adds an event. It reports whether it has, and whether the queue begins to lose events with this one.
func (q *TapQueue) keep(event TapEvent, p []byte) (kept, overflows bool) {
	q.mu.Lock()
	defer q.mu.Unlock() // also after a panic of the room: the end of the session closes the queue
	if q.closed {
		return false, false
	}
	size := len(q.filling.data) + len(p) + eventCost*(len(q.filling.events)+1)
	if size > q.limit || !q.takeLocked(size) {
		first := q.lost == 0
		q.lost += int64(len(p))
		return false, first
	}
	q.markGap(event.At)
	b := &q.filling
	b.offsets = append(b.offsets, len(b.data))
	b.events = append(b.events, event)
	b.data = append(b.data, p...)
	return true, false
}

// takeLocked reserves room for the batch being filled to have the given size.
func (q *TapQueue) takeLocked(size int) bool {
	more := size - ownTapBytes - q.filling.shared
	if q.room == nil || more <= 0 {
		return true
	}
	if !q.room.Take(more) {
		return false
	}
	q.filling.shared += more
	return true
}

// returnRoom releases a batch's shared room, and the batch's memory with it.
func (q *TapQueue) returnRoom(b *tapBatch) {
	if b.shared > 0 {
		q.room.Return(b.shared)
		*b = tapBatch{}
	}
}

func (q *TapQueue) markGap(at time.Time) {
	if q.lost > 0 {
		q.filling.offsets = append(q.filling.offsets, len(q.filling.data))
		q.filling.events = append(q.filling.events, TapEvent{Kind: TapGap, At: at, Lost: q.lost})
		q.lost = 0
	}
}

func (q *TapQueue) signal() {
	select {
	case q.ready <- struct{}{}:
	default:
	}
}

// Close makes the queue ignore further events. What is in it can still be taken.
func (q *TapQueue) Close() {
	q.mu.Lock()
	if !q.closed {
		q.markGap(time.Now())
		q.closed = true
	}
	q.mu.Unlock()
	q.signal()
}

// Ready returns a channel that receives a value when there may be something to Take.
func (q *TapQueue) Ready() <-chan struct{} { return q.ready }

// Release discards the queue's contents and releases its room. The taker calls it after Close, instead of the next
// Take.
func (q *TapQueue) Release() {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.returnRoom(&q.taken)
	q.returnRoom(&q.filling)
}

// Take returns all events in the queue, valid until the next call. more is false once the queue is closed and
// empty.
func (q *TapQueue) Take() (events []TapEvent, more bool) {
	q.returnRoom(&q.taken)
	q.mu.Lock()
	q.taken, q.filling = q.filling, q.taken
	q.filling.events, q.filling.offsets, q.filling.data = q.filling.events[:0], q.filling.offsets[:0], q.filling.data[:0]
	closed := q.closed
	q.mu.Unlock()
	b := &q.taken
	for i := range b.events {
		end := len(b.data)
		if i+1 < len(b.offsets) {
			end = b.offsets[i+1]
		}
		b.events[i].Data = b.data[b.offsets[i]:end]
	}
	if closed && len(b.events) > 0 {
		q.signal()
	}
	return b.events, !closed || len(b.events) > 0
}
