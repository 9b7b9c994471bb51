package remotecommand

import (
	"context"
	"sync"
	"time"

	"github.com/streamshim/streamshim/pkg/streaming/event"
	"github.com/streamshim/streamshim/pkg/streaming/internal/spdy"
)

// Kubelet and API server translate the WebSocket of their clients to SPDY towards us. As soon as such a
// translator has the status of a finished command it closes its client's connection, and when the
// client's next ping meets the closed socket, the kernel throws away what the client has not read yet
// (kubernetes#60140). That is in the translator's socket and in buffers behind it, and we cannot see them.
// But it is for us to say when the status goes out: it is held back until no ping is due any more before the
// client is believed to have read everything.

const (
	// minHoldback is what is not worth waiting for.
	minHoldback = 20 * time.Millisecond
	// clientPing is how often client-go pings, from the beginning of its session on (pingPeriod in
	// tools/remotecommand/websocket.go).
	clientPing = 5 * time.Second
	// holdbackSlack is how far from a ping we stay, at most: it is the client's clock.
	holdbackSlack = time.Second
	// firstReceiptWait is how long a client may take for its first receipt, which comes from its memory.
	// One that sends none does not answer PINGs, and is no translator.
	firstReceiptWait = time.Second
	// minStatusHeld is what counts as StatusHeld.
	minStatusHeld = time.Second
)

// holdback knows how long a session's status is to be held back.
type holdback struct {
	// ask is spdy.Conn.AskReceipt.
	ask func() (coming, ever bool)

	mu      sync.Mutex
	backlog backlog
	last    time.Time     // of a receipt
	bytes   int64         // in it
	changed chan struct{} // has a value after a receipt
	before  HoldbackState // what was known before a hand-over
}

func newHoldback() *holdback { return &holdback{changed: make(chan struct{}, 1)} }

// receipt is spdy.Config.OnReceipt.
func (h *holdback) receipt(r spdy.Receipt) {
	h.mu.Lock()
	h.backlog.took(r)
	h.last, h.bytes = r.Came, r.Bytes
	h.mu.Unlock()
	select {
	case h.changed <- struct{}{}:
	default:
	}
}

// until is when the status may go out of a command whose output was all sent by begin, as far as that is
// known now. The session began at start. The limit counts from the last receipt.
func (h *holdback) until(start, begin time.Time, limit time.Duration) time.Time {
	coming, ever := h.ask()
	h.mu.Lock()
	defer h.mu.Unlock()
	switch {
	case coming && !ever:
		return begin.Add(min(firstReceiptWait, limit))
	case coming && h.last.After(begin):
		return h.last.Add(limit)
	case coming:
		return begin.Add(limit)
	}
	rest, last := h.restLocked()
	if rest < minHoldback {
		return begin
	}
	release := beforeNoPing(start, last, rest)
	if latest := last.Add(limit); release.After(latest) {
		return latest
	}
	return release
}

// restLocked is how long after last the reader will have read everything. A new estimate is better than that from
// before a hand-over.
func (h *holdback) restLocked() (rest time.Duration, last time.Time) {
	if h.backlog.rate > 0 || h.before.Rate <= 0 {
		return h.backlog.rest(), h.last
	}
	return time.Duration((h.before.Level + float64(h.bytes)) / h.before.Rate * float64(time.Second)), h.before.At
}

// state is nil where nothing is held back.
func (h *holdback) state() *HoldbackState {
	if h == nil {
		return nil
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.backlog.rate > 0 {
		return &HoldbackState{At: h.last, Level: h.backlog.level, Rate: h.backlog.rate}
	}
	before := h.before
	before.Level += float64(h.bytes)
	return &before
}

// beforeNoPing is from when on there will be no ping of the client until it has read everything, which it
// will have done when the rest has gone by after last. That is sooner than waiting for all to be read, and
// forgives more if the rest is wrong: what is left of the five seconds.
func beforeNoPing(start, last time.Time, rest time.Duration) time.Time {
	slack := min(rest/2, holdbackSlack)
	read := last.Add(rest + rest/8 + slack)
	pings := read.Sub(start) / clientPing
	if pings == 0 {
		return last
	}
	return start.Add(pings*clientPing + slack)
}

// holdStatus waits until the client has read the output, or will have before anything can go wrong, as far
// as that can be known; or has gone, or the session is to end. The process is not held up: it was reaped before.
func (s *Session) holdStatus(ctx context.Context) phase {
	h, limit := s.client.holdback, s.config.StatusWait
	if !s.ending.hold || h == nil || limit <= 0 {
		return saying
	}
	if s.ending.holding.IsZero() {
		s.ending.holding = time.Now()
	}
	begin := s.ending.holding
	for {
		wait := time.Until(h.until(s.session.Start, begin, limit))
		if wait <= 0 {
			break
		}
		timer := time.NewTimer(wait)
		select {
		case <-h.changed:
			timer.Stop()
			continue
		case <-timer.C:
			continue
		case <-s.freezer.frozen:
			timer.Stop()
			return holding
		case <-s.client.Done():
		case <-s.client.statusRefused:
		case <-ctx.Done():
		}
		timer.Stop()
		break
	}
	h.mu.Lock()
	s.session.Log().Debug("status goes out", "held", time.Since(begin).Round(time.Millisecond),
		"bytes", h.bytes, "unread", int64(h.backlog.level), "rate", int64(h.backlog.rate), "rest", h.backlog.rest().Round(time.Millisecond))
	h.mu.Unlock()
	if time.Since(begin) >= minStatusHeld {
		s.terms.Observe(event.StatusHeld)
	}
	return saying
}
