package spdy

import (
	"slices"
	"sync"
	"time"

	"github.com/streamshim/streamshim/pkg/streaming/internal/spdy/frames"
)

// Receipt says how far the peer has come with the data that it was sent.
type Receipt struct {
	// Bytes is how much payload, of all streams and since the beginning, the peer's programs had
	// taken by then. Of the last frame they may hold a part that they have not used yet.
	Bytes int64
	// First and Asked are when the first and the last of the bytes since the receipt before had been
	// written to the socket, Came is when the receipt arrived.
	First, Asked, Came time.Time
}

const (
	// How far the sender gets ahead of the receipts: as far as receiptPace bytes a second need for the way
	// to the peer and back; and when the peer has taken receiptGrowthAfter bytes, a receiptGrowth-th part of
	// what it takes more. A peer without a window takes 50 frames into its memory at once, and pours what comes
	// from there into its socket without a pause, upon which Linux makes the buffers behind it grow to many
	// times their size. With the window its memory stays small, and how fast it takes more shows sooner how
	// fast it is read.
	receiptWindow, maxReceiptWindow   = 256 << 10, 8 << 20
	receiptPace                       = 100 << 20
	receiptGrowth, receiptGrowthAfter = 16, 16 << 20
	// There is a question for each half of the window, and for each MiB.
	maxReceiptEvery = 1 << 20
	// receiptRest is how much payload is worth a question of its own at the end.
	receiptRest = 64 << 10
	// receiptPings is how many PINGs are one question. SPDY's PING is answered by the connection,
	// whatever becomes of the data before it. But spdystream, which all clients of Kubernetes use,
	// has five workers, gives each stream to one of them and PINGs to all in turn; and a worker waits
	// until the frame before was taken out of its stream. So of five PINGs in a row one stands behind
	// the data, wherever the data went. A peer that answers at once makes us believe that it reads fast.
	receiptPings = 5
	// maxQuestions bounds those that wait for their answers. While so many do none is added.
	maxQuestions = 128
	// From a peer that has sent no receipt for firstReceipt none is expected, and the sender does not wait.
	// Later it waits for laterReceipt at most, and then goes on a frame at a time.
	firstReceipt, laterReceipt = time.Second, 10 * time.Second
)

// receipts asks the peer how far it has come, and understands the answers.
type receipts struct {
	mu        sync.Mutex
	sent      int64         // payload that was written
	asked     int64         // of it, what there was a question for
	taken     int64         // of it, what there was a receipt for
	trip      time.Duration // the shortest from question to receipt; 0 before the first
	any       bool          // a receipt has come
	none      bool          // none is expected
	first     time.Time     // when the first byte was written that has not been asked about
	questions []question    // without a complete answer, oldest first
	came      chan struct{} // closed with the next receipt; nil while nobody waits
}

type question struct {
	id      uint32 // of the first of its PINGs
	missing int    // answers
	receipt Receipt
}

// window is how far the sender may be ahead of the receipts.
func (r *receipts) window() int64 {
	window := max(receiptWindow, int64(receiptPace*r.trip.Seconds()))
	return min(window+max(0, r.taken-receiptGrowthAfter)/receiptGrowth, maxReceiptWindow)
}

// awaitReceipts waits until not too much of what was sent is without a receipt, and returns how much may
// be sent now. It does not wait for a stream or a connection that has ended.
func (c *Conn) awaitReceipts(s *Stream) (room int) {
	r := &c.receipts
	for c.cfg.OnReceipt != nil {
		r.mu.Lock()
		ahead, window := r.sent-r.taken, r.window()
		if r.none || ahead <= window/2 {
			none := r.none
			r.mu.Unlock()
			if none {
				return frames.MaxLen
			}
			return int(window - ahead)
		}
		if len(r.questions) == 0 { // there was no room for it
			c.askLocked()
		}
		if r.came == nil {
			r.came = make(chan struct{})
		}
		came, patience := r.came, laterReceipt
		if !r.any {
			patience = firstReceipt
		}
		r.mu.Unlock()
		c.out.flush()
		timer := time.NewTimer(patience)
		select {
		case <-came:
			timer.Stop()
		case <-c.done:
			timer.Stop()
			return frames.MaxLen
		case <-c.freezing:
			timer.Stop()
			return frames.MaxLen
		case <-s.done:
			timer.Stop()
			return frames.MaxLen
		case <-timer.C:
			r.mu.Lock()
			r.none = !r.any
			r.mu.Unlock()
			if patience == laterReceipt {
				return int(window)
			}
		}
	}
	return frames.MaxLen
}

// noteSent counts payload that was written, and asks for a receipt when it is time. It does not block.
func (c *Conn) noteSent(n int) {
	if c.cfg.OnReceipt == nil {
		return
	}
	r := &c.receipts
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.sent == r.asked {
		r.first = time.Now()
	}
	r.sent += int64(n)
	if r.sent-r.asked >= min(r.window()/2, maxReceiptEvery) {
		c.askLocked()
	}
}

// AskReceipt asks for a receipt of what was sent and not asked about yet, if it is more than a little,
// and says whether one is on its way and whether there has ever been one. It does not block. A peer that
// does not answer PINGs never sends any.
func (c *Conn) AskReceipt() (coming, ever bool) {
	r := &c.receipts
	r.mu.Lock()
	if rest := r.sent - r.asked; rest >= receiptRest || (rest > 0 && len(r.questions) > 0) {
		c.askLocked()
	}
	coming, ever = len(r.questions) > 0, r.any
	r.mu.Unlock()
	c.out.flush()
	return coming, ever
}

func (c *Conn) askLocked() {
	r := &c.receipts
	if len(r.questions) == maxQuestions {
		return
	}
	id, ok := c.out.pings(receiptPings)
	if !ok {
		return
	}
	r.questions = append(r.questions, question{
		id: id, missing: receiptPings, receipt: Receipt{Bytes: r.sent, First: r.first, Asked: time.Now()},
	})
	r.asked = r.sent
}

// pings queues several PINGs in a row, which nothing comes between, and returns the id of the first; the
// others follow in steps of two. It fails when the queue is full.
func (w *writer) pings(n int) (first uint32, ok bool) {
	w.queueMu.Lock()
	defer w.queueMu.Unlock()
	if w.answers() > maxBestEffort {
		return 0, false
	}
	first = w.nextPingLocked(n)
	err := w.enqueueLocked(bestEffort, func(b []byte) []byte {
		for i := range n {
			b = frames.AppendPing(b, first+2*uint32(i))
		}
		return b
	})
	return first, err == nil
}

// pingAnswered is called from the read loop when a PING of ours has come back.
func (c *Conn) pingAnswered(id uint32) {
	if c.cfg.OnReceipt == nil {
		return
	}
	receipt, ok := c.receipts.answered(id)
	if ok {
		c.cfg.OnReceipt(receipt)
	}
}

// answered notes the answer to one PING and returns the receipt if it is complete with that.
func (r *receipts) answered(id uint32) (receipt Receipt, ok bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	i := slices.IndexFunc(r.questions, func(q question) bool { return id >= q.id && id < q.id+2*receiptPings })
	if i < 0 {
		return Receipt{}, false
	}
	if r.questions[i].missing--; r.questions[i].missing > 0 {
		return Receipt{}, false
	}
	receipt = r.questions[i].receipt
	receipt.Came = time.Now()
	if trip := receipt.Came.Sub(receipt.Asked); !r.any || trip < r.trip {
		r.trip = trip
	}
	// Each worker of the peer answers in order, so the questions before are complete too.
	r.questions = slices.Delete(r.questions, 0, i+1)
	r.any, r.none, r.taken = true, false, receipt.Bytes
	if r.came != nil {
		close(r.came)
		r.came = nil
	}
	return receipt, true
}
