package holdback

import (
	"math"
	"slices"
	"sync"
	"time"
)

// receipt says how far the peer has come with the data that it was sent.
type receipt struct {
	// bytes is how much payload, of all streams and since the beginning, the peer's programs had
	// taken by then. Of the last frame they may hold a part that they have not used yet.
	bytes int64
	// first and asked are when the first and the last of the bytes since the receipt before had been
	// written to the socket, came is when the receipt arrived.
	first, asked, came time.Time
}

const (
	// How far the sender gets ahead of the receipts: as far as windowPace bytes a second need for the way
	// to the peer and back; and when the peer has taken growthAfter bytes, a growthPart-th part of
	// what it takes more. A peer without a window takes 50 frames into its memory at once, and pours what comes
	// from there into its socket without a pause, upon which Linux makes the buffers behind it grow to many
	// times their size. With the window its memory stays small, and how fast it takes more shows sooner how
	// fast it is read.
	minWindow, maxWindow    = 256 << 10, 8 << 20
	windowPace              = 100 << 20
	growthPart, growthAfter = 16, 16 << 20
	// There is a question for each half of the window, and for each MiB.
	maxQuestionBytes = 1 << 20
	// minQuestionBytes is how much payload is worth a question of its own at the end.
	minQuestionBytes = 64 << 10
	// questionPings is how many PINGs are one question. SPDY's PING is answered by the connection,
	// whatever becomes of the data before it. But spdystream, which all clients of Kubernetes use,
	// has five workers, gives each stream to one of them and PINGs to all in turn; and a worker waits
	// until the frame before was taken out of its stream. So of five PINGs in a row one stands behind
	// the data, wherever the data went. A peer that answers at once makes us believe that it reads fast.
	questionPings = 5
	// maxQuestions bounds those that wait for their answers. While so many do none is added.
	maxQuestions = 128
	// From a peer that has sent no receipt for firstReceipt none is expected, and the sender does not wait: it does not
	// answer PINGs, and is no translator.
	// Later it waits for laterReceipt at most, and then goes on a frame at a time.
	firstReceipt, laterReceipt = time.Second, 10 * time.Second
)

// Conn is the connection to the peer, a *spdy.Conn.
type Conn interface {
	// Pings queues n PINGs in a row, which nothing comes between, and returns the id of the first; the others follow in
	// steps of two. It does not block; too many cannot be queued.
	Pings(n int) (first uint32, ok bool)
	// Flush writes what is queued. It does not block.
	Flush()
}

// receipts asks the peer how far it has come, understands the answers, and keeps the sender within a window.
type receipts struct {
	conn Conn

	mu        sync.Mutex
	sent      int64         // payload that was written
	asked     int64         // of it, what there was a question for
	taken     int64         // of it, what there was a receipt for
	trip      time.Duration // the shortest from question to receipt; 0 before the first
	any       bool          // a receipt has come
	none      bool          // none is expected
	unasked   bool          // a question of before a hand-over is to be asked again
	first     time.Time     // when the first byte was written that has not been asked about
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

// window is how far the sender may be ahead of the receipts.
func (r *receipts) window() int64 {
	window := max(minWindow, int64(windowPace*r.trip.Seconds()))
	return min(window+max(0, r.taken-growthAfter)/growthPart, maxWindow)
}

// Await implements spdy.Receipts: not too much of what was sent is to be without a receipt.
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
		if len(r.questions) == 0 { // there was no room for it
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

// Sent implements spdy.Receipts, and asks for a receipt when it is time.
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

// ask asks for a receipt of what was sent and not asked about yet, if it is more than a little, and says whether one is on
// its way and whether there has ever been one. It does not block. A peer that does not answer PINGs never sends any.
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

// answered notes the answer to one PING and returns the receipt if it is complete with that.
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
	// Each worker of the peer answers in order, so the questions before are complete too.
	r.questions = slices.Delete(r.questions, 0, i+1)
	r.any, r.none, r.taken = true, false, got.bytes
	if r.came != nil {
		close(r.came)
		r.came = nil
	}
	return got, true
}

// unanswered says how many bytes were sent of which no receipt has come, whether one is to come, and whether one ever has.
func (r *receipts) unanswered() (bytes int64, asked, ever bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.sent - r.taken, len(r.questions) > 0 || r.unasked, r.any
}
