// Package holdback decides how long the status of a finished command waits for a slow reader behind a translator.
//
// Kubelet and API server translate the WebSocket of their clients to SPDY. As soon as such a translator has the status of a
// finished command, it closes its client's connection. When the client's next ping meets the closed socket, the kernel
// discards what the client has not read yet (kubernetes#60140). Those bytes are in the translator's socket and in buffers
// behind it, which we cannot see. But we decide when the status is sent: it waits until the client will probably have read
// everything before its next ping.
package holdback

import (
	"log/slog"
	"sync"
	"time"
)

const (
	// minHoldback is the shortest useful wait.
	minHoldback = 20 * time.Millisecond
	// clientPing is how often client-go pings, from the beginning of its session (pingPeriod in
	// tools/remotecommand/websocket.go).
	clientPing = 5 * time.Second
	// holdbackSlack is the largest distance that is kept from a ping, because pings follow the client's clock.
	holdbackSlack = time.Second
)

// Holdback decides how long a session's status waits. Its methods may be called from several goroutines.
type Holdback struct {
	receipts

	mu      sync.Mutex
	backlog backlog
	last    time.Time     // of a receipt
	bytes   int64         // in it
	changed chan struct{} // has a value after a receipt
	before  State         // the state of before a hand-over
}

// New returns a new Holdback. The caller calls Attach.
func New() *Holdback { return Resume(State{}) }

// Resume continues from a state. The caller calls Attach.
func Resume(state State) *Holdback {
	h := &Holdback{changed: make(chan struct{}, 1), before: state}
	h.sent, h.unasked, h.any, h.first = state.Unanswered, state.Asked, state.Ever, time.Now()
	return h
}

// State is what is known of a reader behind a translator. Answers to questions from before a hand-over cannot be matched, so
// these questions are asked again.
type State struct {
	At          time.Time // the time of Level
	Level, Rate float64   // unread bytes, and bytes a second that are read; 0 is unknown
	Unanswered  int64     // bytes that were sent without a receipt
	Asked       bool      // a receipt was expected
	Ever        bool      // a receipt has arrived
}

// Attach sets the connection to the client. Call it before the connection is served.
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

// Changed has a value when the result of Until may have changed.
func (h *Holdback) Changed() <-chan struct{} { return h.changed }

// Until returns when the status may be sent, as far as that is known now. The session began at start, and all output was
// sent by begin. The limit counts from the last receipt.
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

// restLocked returns how long after last the reader will have read everything. A new estimate takes precedence over that
// from before a hand-over.
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

// State returns the state for Resume, or nil for a nil Holdback.
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

// beforeNoPing returns the time of the client's last ping before it will have read everything, which is rest after last. That
// is sooner than the end of the reading. It also tolerates a wrong rest better, by what is left of the ping's five seconds.
func beforeNoPing(start, last time.Time, rest time.Duration) time.Time {
	slack := min(rest/2, holdbackSlack)
	read := last.Add(rest + rest/8 + slack)
	pings := read.Sub(start) / clientPing
	if pings == 0 {
		return last
	}
	return start.Add(pings*clientPing + slack)
}
