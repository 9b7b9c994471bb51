// Package control queues a connection's control frames until they are written. It writes nothing itself and waits for
// nobody, so a read loop may answer frames through it whether the peer reads or not.
package control

import (
	"errors"
	"fmt"
	"net/http"
	"sync"
	"sync/atomic"

	"github.com/streamshim/streamshim/pkg/streaming/internal/spdy/frames"
)

// Limits of the bytes that wait. A thousand streams take some 26 KiB.
const (
	MaxBestEffort = 16 << 10 // past it PING is not answered any more
	MaxMustSend   = 64 << 10 // a peer that provokes more answers than this without reading them loses the connection
)

// Priority says what becomes of a control frame when the queue is full.
type Priority int

// Priorities of control frames.
const (
	BestEffort Priority = iota // dropped
	MustSend                   // an error, with which the connection ends
	Unlimited                  // queued all the same: no more of them than open streams, or bounded by Overflow
)

// ErrNoStreamID is returned when the ids for streams of this side are used up.
var ErrNoStreamID = errors.New("spdy: no stream id is left")

// Queue is what is to be sent ahead of data. Bytes that were taken out of it count as waiting until they are written. Its
// methods may be called from any goroutine.
type Queue struct {
	waiting atomic.Int64
	carried atomic.Int64 // of these, what a hand-over has left: payload too

	mu          sync.Mutex
	frames      []byte
	pingQueued  bool // one of Ping's is in frames
	headersSent bool
	openNext    uint32
	pingNext    uint32
}

// State is what the next program goes on with; the frames that wait are not in it.
type State struct {
	HeadersSent bool   // the zlib stream of our direction has begun
	OpenNext    uint32 // the id of the next stream of this side
	PingNext    uint32 // and of its next PING
}

// Start begins with a state: a client's ids are odd, a server's even. carried is how many bytes a hand-over has left to be
// written. It is called before the connection is used.
func (q *Queue) Start(s State, carried int) {
	q.headersSent, q.openNext, q.pingNext = s.HeadersSent, s.OpenNext, s.PingNext
	q.waiting.Store(int64(carried))
	q.carried.Store(int64(carried))
}

// State returns the present state.
func (q *Queue) State() State {
	q.mu.Lock()
	defer q.mu.Unlock()
	return State{HeadersSent: q.headersSent, OpenNext: q.openNext, PingNext: q.pingNext}
}

// Waiting is how many bytes are not written yet, also of those that were taken.
func (q *Queue) Waiting() int64 { return q.waiting.Load() }

// Answers is Waiting without what a hand-over has left.
func (q *Queue) Answers() int64 { return q.waiting.Load() - q.carried.Load() }

// Overflow is the end of a peer that provokes answers and does not read them, nil while it is not.
func (q *Queue) Overflow() error {
	if waiting := q.Answers(); waiting > MaxMustSend {
		return frames.ProtocolErrorf("does not read the answers to its frames, %d bytes wait", waiting)
	}
	return nil
}

// Add appends what build appends.
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

// Open takes the next stream id and appends the SYN_STREAM, both at once, as ids have to leave in order. add is called with
// the id before the peer can hear of it; after its error, which is returned, there is no such stream.
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

// Opened says whether this side has opened a stream with the id, which is one of its own.
func (q *Queue) Opened(id uint32) bool {
	q.mu.Lock()
	defer q.mu.Unlock()
	return id < q.openNext
}

// Ping appends a PING, unless there is one that was not taken yet.
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

// Pings appends several PINGs in a row, which nothing comes between, and returns the id of the first; the
// others follow in steps of two. It fails when the queue is full.
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

// Take takes everything out, to be written and reported to Wrote.
func (q *Queue) Take() []byte {
	q.mu.Lock()
	defer q.mu.Unlock()
	taken := q.frames
	q.frames, q.pingQueued = nil, false
	return taken
}

// Wrote says that n of the bytes that were taken, or left over, are written.
func (q *Queue) Wrote(n int) {
	q.waiting.Add(-int64(n))
	if carried := q.carried.Load(); carried > 0 {
		q.carried.Store(max(0, carried-int64(n)))
	}
}

// Held says that n more bytes wait which are not in the queue.
func (q *Queue) Held(n int) { q.waiting.Add(int64(n)) }
