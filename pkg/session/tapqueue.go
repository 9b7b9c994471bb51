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
	From Output        // of TapOutput
	Data []byte        // of TapOutput and TapInput
	Size workload.Size // of TapResize
	Lost int64         // bytes, of TapGap
}

// eventCost is what an event counts beside its data, so that many small ones are bounded, too.
const eventCost = 64

// TapRoom bounds what several TapQueues hold together.
type TapRoom interface {
	// Take takes n bytes, all or none, and reports whether there was room.
	Take(n int) bool
	// Return gives n bytes back.
	Return(n int)
}

// ownTapBytes is what each queue may hold whether there is room with the others or not.
const ownTapBytes = 16 << 10

// TapQueue is a Tap that keeps what it sees for somebody who takes it in his own time. It never
// blocks: what does not fit is lost, and a TapGap event stands in its place. It is taken from by one
// goroutine.
type TapQueue struct {
	limit    int
	room     TapRoom // nil is no bound
	input    bool
	overflow func()

	mu      sync.Mutex
	filling tapBatch
	lost    int64
	closed  bool
	ready   chan struct{} // holds one token while there is something to take

	taken tapBatch // belongs to the taker
}

type tapBatch struct {
	events  []TapEvent
	offsets []int // where each event's data begins
	data    []byte
	shared  int // bytes taken of the room
}

// NewTapQueue returns a queue of limit bytes; as much again may be in the hands of the taker. What it holds beyond
// 16 KiB is taken of the room, which may be nil. Input is only kept when wanted. Overflow, if not nil,
// is called each time the queue begins to lose something; it must not block.
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
	q.mu.Lock()
	if q.closed {
		q.mu.Unlock()
		return
	}
	size := len(q.filling.data) + len(p) + eventCost*(len(q.filling.events)+1)
	if size > q.limit || !q.takeLocked(size) {
		first := q.lost == 0
		q.lost += int64(len(p))
		q.mu.Unlock()
		if first && q.overflow != nil {
			q.overflow()
		}
		return
	}
	q.markGap(event.At)
	b := &q.filling
	b.offsets = append(b.offsets, len(b.data))
	b.events = append(b.events, event)
	b.data = append(b.data, p...)
	q.mu.Unlock()
	q.signal()
}

// takeLocked takes room so that the batch being filled may have a size.
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

// returnRoom gives back what a batch has taken, and its memory with it.
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

// Close makes the queue forget what comes from now on. What is there can still be taken.
func (q *TapQueue) Close() {
	q.mu.Lock()
	if !q.closed {
		q.markGap(time.Now())
		q.closed = true
	}
	q.mu.Unlock()
	q.signal()
}

// Ready gets a value when there may be something to Take.
func (q *TapQueue) Ready() <-chan struct{} { return q.ready }

// Release forgets what is in the queue and gives back its room. It is called by the taker, after Close and instead of
// the next Take.
func (q *TapQueue) Release() {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.returnRoom(&q.taken)
	q.returnRoom(&q.filling)
}

// Take returns all events that are there, valid until the next call; more is false once the queue is
// closed and empty.
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
