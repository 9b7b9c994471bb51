package holdback

import (
	"testing"
	"time"
)

func TestHoldbackUntil(t *testing.T) {
	start := time.Unix(1000, 0)
	begin := start.Add(12 * time.Second)
	const limit = 20 * time.Second
	for _, test := range []struct {
		name         string
		coming, ever bool
		last         time.Duration // of the last receipt, since begin; 0 is none
		rest         time.Duration // by the model, since the last receipt
		want         time.Duration // since begin; at most 0 is no wait
	}{
		{"nothing was asked", false, false, 0, 0, 0},
		{"nothing was seen", false, true, -time.Second, 0, 0},
		{"first receipt is due", true, false, 0, 0, firstReceipt},
		{"receipt is due, none since the end", true, true, -time.Second, 0, limit},
		{"receipt is due, one since the end", true, true, 5 * time.Second, 0, 5*time.Second + limit},
		{"read long before the ping at 15 s", false, true, -time.Second, 2 * time.Second, -time.Second},
		{"read about the time of that ping", false, true, 0, 2 * time.Second, 4 * time.Second},
		{"read after that ping", false, true, 0, 4 * time.Second, 4 * time.Second},
		{"read about the time of the next", false, true, 0, 6500 * time.Millisecond, 9 * time.Second},
		{"reader is far behind", false, true, time.Second, time.Hour, time.Second + limit},
		{"reader is a little behind", false, true, 2900 * time.Millisecond, 80 * time.Millisecond, 3040 * time.Millisecond},
		{"reader is hardly behind", false, true, 2999 * time.Millisecond, minHoldback / 2, 0},
	} {
		h := New()
		h.Attach(&stubConn{})
		h.any = test.ever
		if test.coming {
			h.questions = []question{{}}
		}
		if test.last != 0 || test.rest != 0 {
			h.last = begin.Add(test.last)
			h.backlog.rate, h.backlog.level = 1000, 1000*test.rest.Seconds()
		}
		got := h.Until(start, begin, limit).Sub(begin)
		if got != test.want && (got > 0 || test.want > 0) {
			t.Errorf("%s: until %v, want %v", test.name, got, test.want)
		}
	}
}

// TestHoldbackOfShortSessions checks that there is no wait before the client's first ping.
func TestHoldbackOfShortSessions(t *testing.T) {
	start := time.Unix(1000, 0)
	if got := beforeNoPing(start, start.Add(time.Second), 2*time.Second); got.After(start.Add(time.Second)) {
		t.Errorf("wait until %v", got.Sub(start))
	}
}
