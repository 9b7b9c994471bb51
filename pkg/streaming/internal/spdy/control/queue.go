// Package control queues a connection's control frames until they are written. It neither writes nor waits, so a read loop
// can answer frames through it even if the peer does not read.
package control

import (
	"errors"
	"fmt"
	"net/http"
	"sync"
	"sync/atomic"

	"github.com/streamshim/streamshim/pkg/streaming/internal/spdy/frames"
)

// Limits of the bytes that wait to be written. A thousand streams take some 26 KiB.
const (
	MaxBestEffort = 16 << 10 // PINGs above it are not answered
	MaxMustSend   = 64 << 10 // a peer that provokes more answers than this without reading them loses the connection
)

// Priority is what happens to a control frame when the queue is full.
type Priority int

// Priorities of control frames.
const (
	BestEffort Priority = iota // dropped
	MustSend                   // an error that ends the connection
	Unlimited                  // queued anyway: the open streams or Overflow bound them
)

// ErrNoStreamID is returned when this side has used up its stream ids.
var ErrNoStreamID = errors.New("spdy: no stream id is left")

// Queue holds what is to be sent ahead of data. Bytes that were taken out wait until they are written, and count as
// waiting. All methods may be called from any goroutine.
type Queue struct {
	waiting atomic.Int64
	carried atomic.Int64 // how many of them a hand-over has left, payload too

	mu          sync.Mutex
	frames      []byte
	pingQueued  bool // a PING of Ping's is in frames
	headersSent bool
	openNext    uint32
	pingNext    uint32
}

// State is what the next program continues from. It does not have the frames that wait.
type State struct {
	HeadersSent bool   // the zlib stream of our direction has begun
	OpenNext    uint32 // the id of the next stream of this side
	PingNext    uint32 // the id of the next PING of this side
}

// Start begins with a state. A client's ids are odd, a server's even. carried is the number of bytes that a hand-over has
// left to be written. Call Start before the connection is used.
func (q *Queue) Start(s State, carried int) {
	q.headersSent, q.openNext, q.pingNext = s.HeadersSent, s.OpenNext, s.PingNext
	q.waiting.Store(int64(carried))
	q.carried.Store(int64(carried))
}

// State returns the current state.
func (q *Queue) State() State {
	q.mu.Lock()
	defer q.mu.Unlock()
	return State{HeadersSent: q.headersSent, OpenNext: q.openNext, PingNext: q.pingNext}
}

// Waiting returns how many bytes are not written yet. It counts those that were taken, too.
func (q *Queue) Waiting() int64 { return q.waiting.Load() }

// Answers returns Waiting without what a hand-over has left.
func (q *Queue) Answers() int64 { return q.waiting.Load() - q.carried.Load() }

// Overflow returns the error that ends a peer which provokes answers and does not read them. It is nil while there is no
// such error.
func (q *Queue) Overflow() error {
	if waiting := q.Answers(); waiting > MaxMustSend {
		return frames.ProtocolErrorf("does not read the answers to its frames, %d bytes wait", waiting)
	}
	return nil
}

// Add appends a frame with build.
func (q *Queue) Add(p Priority, build func([]byte) []byte) error {
	q.mu.Lock()
	defer q.mu.Unlock()
	return q.addLocked(p, build)
}

func (q *Queue) addLocked(p Priority, build func([]byte) []byte) error {
	if p == BestEffort && q.Answers() > MaxBestEffort {
		return nil
	}
	if p == MustSend {
		if err := q.Overflow(); err != nil {
			return err
		}
	}
	before := len(q.frames)
	q.frames = build(q.frames)
	q.waiting.Add(int64(len(q.frames) - before))
	return nil
}

// Reset appends a RST_STREAM.
func (q *Queue) Reset(p Priority, stream uint32, status frames.ResetStatus) error {
	return q.Add(p, func(b []byte) []byte { return frames.AppendRstStream(b, stream, status) })
}

// Reply appends the SYN_REPLY for a stream.
func (q *Queue) Reply(stream uint32) error {
	q.mu.Lock()
	defer q.mu.Unlock()
	return q.addLocked(MustSend, func(b []byte) []byte {
		if q.headersSent {
			return frames.AppendSynReply(b, stream, 0, frames.EmptyHeaderBlock)
		}
		q.headersSent = true
		return frames.AppendSynReply(b, stream, 0, frames.AppendHeaderBlock(nil, true, nil))
	})
}

// Open takes the next stream id and appends the SYN_STREAM. It does both under one lock, because ids must be sent in order.
// It calls add with the id before the peer can hear of the stream. If add returns an error, Open returns it, and there is
// no such stream.
func (q *Queue) Open(header http.Header, maxFrame int, add func(id uint32) error) error {
	q.mu.Lock()
	defer q.mu.Unlock()
	id := q.openNext
	if id > frames.MaxStreamID {
		return ErrNoStreamID
	}
	block := frames.AppendHeaderBlock(nil, !q.headersSent, header)
	if len(block)+10 > maxFrame {
		return fmt.Errorf("spdy: opening a stream: its headers take %d bytes, limit %d", len(block), maxFrame-10)
	}
	if err := q.Overflow(); err != nil {
		return err
	}
	if err := add(id); err != nil {
		return err
	}
	q.headersSent, q.openNext = true, id+2
	return q.addLocked(Unlimited, func(b []byte) []byte { return frames.AppendSynStream(b, id, 0, block) })
}

// Opened reports whether this side has opened a stream with the id, which must be one of its own ids.
func (q *Queue) Opened(id uint32) bool {
	q.mu.Lock()
	defer q.mu.Unlock()
	return id < q.openNext
}

// Ping appends a PING, unless an earlier one was not taken yet.
func (q *Queue) Ping() {
	q.mu.Lock()
	defer q.mu.Unlock()
	if q.pingQueued {
		return
	}
	q.pingQueued = true
	id := q.nextPingLocked(1)
	q.addLocked(Unlimited, func(b []byte) []byte { return frames.AppendPing(b, id) }) //nolint:errcheck // has no limit
}

// Pings appends n PINGs with nothing between them and returns the id of the first. The ids of the others follow in steps of
// two. It returns false if the queue is full.
func (q *Queue) Pings(n int) (first uint32, ok bool) {
	q.mu.Lock()
	defer q.mu.Unlock()
	if q.Answers() > MaxBestEffort {
		return 0, false
	}
	first = q.nextPingLocked(n)
	err := q.addLocked(BestEffort, func(b []byte) []byte {
		for i := range n {
			b = frames.AppendPing(b, first+2*uint32(i))
		}
		return b
	})
	return first, err == nil
}

// nextPingLocked takes the next n ids for PINGs, in steps of two, and returns the first.
func (q *Queue) nextPingLocked(n int) uint32 {
	first, step := q.pingNext, 2*uint32(n)
	if first+step > frames.MaxStreamID {
		first = 2 - first%2
	}
	q.pingNext = first + step
	return first
}

// Take removes and returns everything. The caller writes it and calls Wrote.
func (q *Queue) Take() []byte {
	q.mu.Lock()
	defer q.mu.Unlock()
	taken := q.frames
	q.frames, q.pingQueued = nil, false
	return taken
}

// Wrote records that n of the bytes that were taken, or left by a hand-over, are written.
func (q *Queue) Wrote(n int) {
	q.waiting.Add(-int64(n))
	if carried := q.carried.Load(); carried > 0 {
		q.carried.Store(max(0, carried-int64(n)))
	}
}

// Held counts n more bytes that wait outside the queue.
func (q *Queue) Held(n int) { q.waiting.Add(int64(n)) }
