// Package holdback says how long the status of a finished command is held back for a reader that cannot be seen.
//
// Kubelet and API server translate the WebSocket of their clients to SPDY towards us. As soon as such a
// translator has the status of a finished command it closes its client's connection, and when the
// client's next ping meets the closed socket, the kernel throws away what the client has not read yet
// (kubernetes#60140). That is in the translator's socket and in buffers behind it, and we cannot see them.
// But we decide when the status goes out: it is held back until no ping is due any more before the
// client is believed to have read everything.
package holdback

import (
	"log/slog"
	"sync"
	"time"
)

const (
	// minHoldback is the shortest wait that is worth it.
	minHoldback = 20 * time.Millisecond
	// clientPing is how often client-go pings, from the beginning of its session on (pingPeriod in
	// tools/remotecommand/websocket.go).
	clientPing = 5 * time.Second
	// holdbackSlack is the largest distance kept from a ping, whose time is that of the client's clock.
	holdbackSlack = time.Second
)

// Holdback knows how long a session's status is to be held back. Its methods may be called from several goroutines.
type Holdback struct {
	receipts

	mu      sync.Mutex
	backlog backlog
	last    time.Time     // of a receipt
	bytes   int64         // in it
	changed chan struct{} // has a value after a receipt
	before  State         // what was known before a hand-over
}

// New knows nothing yet. Attach follows.
func New() *Holdback { return Resume(State{}) }

// Resume continues from a state. Attach follows.
func Resume(state State) *Holdback {
	h := &Holdback{changed: make(chan struct{}, 1), before: state}
	h.sent, h.unasked, h.any, h.first = state.Unanswered, state.Asked, state.Ever, time.Now()
	return h
}

// State is what is known of a reader behind a translator. The answers to questions that were asked before are not
// understood any more: they are asked again.
type State struct {
	At          time.Time // when Level was right
	Level, Rate float64   // bytes unread, and bytes a second that are read; 0 where nothing is known
	Unanswered  int64     // bytes that were sent and of which no receipt has come
	Asked       bool      // one was to come
	Ever        bool      // one has come
}

// Attach gives it the connection to the client, before that is served.
func (h *Holdback) Attach(conn Conn) { h.conn = conn }

// Answered implements spdy.Receipts.
func (h *Holdback) Answered(id uint32) {
	r, ok := h.answered(id)
	if !ok {
		return
	}
	h.mu.Lock()
	h.backlog.took(r)
	h.last, h.bytes = r.came, r.bytes
	h.mu.Unlock()
	select {
	case h.changed <- struct{}{}:
	default:
	}
}

// Changed has a value when Until may say something else.
func (h *Holdback) Changed() <-chan struct{} { return h.changed }

// Until is when the status may go out of a command whose output was all sent by begin, as far as that is
// known now. The session began at start. The limit counts from the last receipt.
func (h *Holdback) Until(start, begin time.Time, limit time.Duration) time.Time {
	coming, ever := h.ask()
	h.mu.Lock()
	defer h.mu.Unlock()
	switch {
	case coming && !ever:
		return begin.Add(min(firstReceipt, limit))
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
func (h *Holdback) restLocked() (rest time.Duration, last time.Time) {
	if h.backlog.rate > 0 || h.before.Rate <= 0 {
		return h.backlog.rest(), h.last
	}
	return time.Duration((h.before.Level + float64(h.bytes)) / h.before.Rate * float64(time.Second)), h.before.At
}

// LogValue implements slog.LogValuer.
func (h *Holdback) LogValue() slog.Value {
	h.mu.Lock()
	defer h.mu.Unlock()
	return slog.GroupValue(
		slog.Int64("bytes", h.bytes), slog.Int64("unread", int64(h.backlog.level)), slog.Int64("rate", int64(h.backlog.rate)),
		slog.Duration("rest", h.backlog.rest().Round(time.Millisecond)),
	)
}

// State is what Resume continues from, nil where nothing is held back.
func (h *Holdback) State() *State {
	if h == nil {
		return nil
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	state := h.before
	state.Level += float64(h.bytes)
	if h.backlog.rate > 0 {
		state.At, state.Level, state.Rate = h.last, h.backlog.level, h.backlog.rate
	}
	state.Unanswered, state.Asked, state.Ever = h.unanswered()
	return &state
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
