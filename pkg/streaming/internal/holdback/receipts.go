package holdback

import (
	"math"
	"slices"
	"sync"
	"time"
)

// receipt says how far the peer has come with the data that it was sent.
type receipt struct {
	// bytes is how many bytes of payload, of all streams and since the beginning, the peer has read. It may still hold a
	// part of the last frame.
	bytes int64
	// first and asked are when the first and the last of the bytes since the previous receipt were written to the
	// socket. came is when the receipt arrived.
	first, asked, came time.Time
}

const (
	// The window is how far the sender may be ahead of the receipts. It is the bandwidth-delay product for windowPace
	// bytes a second. When the peer has read growthAfter bytes, the window also grows by a growthPart-th of what it reads
	// more. Without a window, a peer reads 50 frames into its memory at once and writes them to its socket without a
	// pause. Then Linux lets the buffers behind it grow to many times their size. With the window its memory stays
	// small, and its rate shows sooner how fast the reader is.
	minWindow, maxWindow    = 256 << 10, 8 << 20
	windowPace              = 100 << 20
	growthPart, growthAfter = 16, 16 << 20
	// A question is asked for each half of the window, at least for each MiB.
	maxQuestionBytes = 1 << 20
	// minQuestionBytes is the least payload that gets a question of its own at the end.
	minQuestionBytes = 64 << 10
	// questionPings is how many PINGs make one question. In SPDY the connection answers a PING, whether or not the data
	// before it was read. But spdystream, which all clients of Kubernetes use, has five workers. It gives each stream to
	// one of them, and PINGs to all in turn. A worker waits until the previous frame was read from its stream. So of
	// five PINGs in a row one is behind the data, whichever worker has the stream. A peer that answers at once looks
	// like a fast reader.
	questionPings = 5
	// maxQuestions bounds the unanswered questions. At the limit none is added.
	maxQuestions = 128
	// A peer that has sent no receipt within firstReceipt does not answer PINGs and is not a translator. Then no
	// receipt is expected, and the sender does not wait. After the first receipt the sender waits at most laterReceipt,
	// and then continues a frame at a time.
	firstReceipt, laterReceipt = time.Second, 10 * time.Second
)

// Conn is the connection to the peer, a *spdy.Conn.
type Conn interface {
	// Pings queues n PINGs with nothing in between, and returns the id of the first. The others follow in steps of two.
	// It does not block. ok is false if there is no room in the queue.
	Pings(n int) (first uint32, ok bool)
	// Flush writes what is queued. It does not block.
	Flush()
}

// receipts asks the peer how far it has come, and keeps the sender within a window.
type receipts struct {
	conn Conn

	mu        sync.Mutex
	sent      int64         // bytes of payload that were written
	asked     int64         // how many of them were asked about
	taken     int64         // how many of them have a receipt
	trip      time.Duration // the shortest time from question to receipt; 0 before the first
	any       bool          // a receipt has arrived
	none      bool          // no receipt is expected
	unasked   bool          // a question from before a hand-over must be asked again
	first     time.Time     // when the first byte after asked was written
	questions []question    // without a complete answer, oldest first
	came      chan struct{} // closed with the next receipt; nil while nobody waits
}

type question struct {
	id      uint32 // of the first of its PINGs
	missing int    // answers
	receipt receipt
}

// unlimited is more than a frame holds.
const unlimited = math.MaxInt32

// window returns how many bytes the sender may be ahead of the receipts.
func (r *receipts) window() int64 {
	window := max(minWindow, int64(windowPace*r.trip.Seconds()))
	return min(window+max(0, r.taken-growthAfter)/growthPart, maxWindow)
}

// Await implements spdy.Receipts. It waits while too much of what was sent has no receipt.
func (r *receipts) Await(stream, conn, freezing <-chan struct{}) (room int) {
	for {
		r.mu.Lock()
		ahead, window := r.sent-r.taken, r.window()
		if r.none || ahead <= window/2 {
			none := r.none
			r.mu.Unlock()
			if none {
				return unlimited
			}
			return int(window - ahead)
		}
		if len(r.questions) == 0 { // there was no room to queue one
			r.askLocked()
		}
		if r.came == nil {
			r.came = make(chan struct{})
		}
		came, patience := r.came, laterReceipt
		if !r.any {
			patience = firstReceipt
		}
		r.mu.Unlock()
		r.conn.Flush()
		timer := time.NewTimer(patience)
		ended, late := false, false
		select {
		case <-came:
		case <-conn:
			ended = true
		case <-freezing:
			ended = true
		case <-stream:
			ended = true
		case <-timer.C:
			late = true
		}
		timer.Stop()
		if ended {
			return unlimited
		}
		if late {
			r.mu.Lock()
			r.none = !r.any
			r.mu.Unlock()
			if patience == laterReceipt {
				return int(window)
			}
		}
	}
}

// Sent implements spdy.Receipts. It asks for a receipt when one is due.
func (r *receipts) Sent(bytes int) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.sent == r.asked {
		r.first = time.Now()
	}
	r.sent += int64(bytes)
	if r.sent-r.asked >= min(r.window()/2, maxQuestionBytes) {
		r.askLocked()
	}
}

// ask asks for a receipt of what was not asked about yet, if that is enough. It reports whether a receipt is expected, and
// whether one has ever arrived. It does not block. A peer that does not answer PINGs never sends a receipt.
func (r *receipts) ask() (coming, ever bool) {
	r.mu.Lock()
	if rest := r.sent - r.asked; rest >= minQuestionBytes || (rest > 0 && (len(r.questions) > 0 || r.unasked)) {
		r.askLocked()
	}
	coming, ever = len(r.questions) > 0, r.any
	r.mu.Unlock()
	r.conn.Flush()
	return coming, ever
}

func (r *receipts) askLocked() {
	if len(r.questions) == maxQuestions {
		return
	}
	id, ok := r.conn.Pings(questionPings)
	if !ok {
		return
	}
	r.questions = append(r.questions, question{
		id: id, missing: questionPings, receipt: receipt{bytes: r.sent, first: r.first, asked: time.Now()},
	})
	r.asked, r.unasked = r.sent, false
}

// answered handles the answer to one PING, and returns the receipt if that completes it.
func (r *receipts) answered(id uint32) (got receipt, ok bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	i := slices.IndexFunc(r.questions, func(q question) bool { return id >= q.id && id < q.id+2*questionPings })
	if i < 0 {
		return receipt{}, false
	}
	if r.questions[i].missing--; r.questions[i].missing > 0 {
		return receipt{}, false
	}
	got = r.questions[i].receipt
	got.came = time.Now()
	if trip := got.came.Sub(got.asked); r.trip == 0 || trip < r.trip {
		r.trip = trip
	}
	// Each worker of the peer answers in order, so earlier questions are complete too.
	r.questions = slices.Delete(r.questions, 0, i+1)
	r.any, r.none, r.taken = true, false, got.bytes
	if r.came != nil {
		close(r.came)
		r.came = nil
	}
	return got, true
}

// unanswered returns how many bytes have no receipt, whether a receipt is expected, and whether one has ever arrived.
func (r *receipts) unanswered() (bytes int64, asked, ever bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.sent - r.taken, len(r.questions) > 0 || r.unasked, r.any
}
