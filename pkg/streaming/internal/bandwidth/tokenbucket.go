package bandwidth

import (
	"sync"
	"time"
)

// A bucket holds the bytes of a quarter of a second, within these limits. That is small enough for a short wait at the
// end of a session, and large enough for efficient reads.
const (
	minBurst = 4 << 10
	maxBurst = 256 << 10
)

// tokenBucket is a token bucket that is charged after the bytes have moved, so that a reader need not know in advance
// how much it will get.
type tokenBucket struct {
	rate        float64 // bytes a second
	burst       int
	end, frozen <-chan struct{} // either one ends all waits

	mu   sync.Mutex
	full time.Time // when the bucket would be full again
}

func newTokenBucket(bytesPerSecond int64, end, frozen <-chan struct{}) *tokenBucket {
	return &tokenBucket{
		rate: float64(bytesPerSecond), end: end, frozen: frozen,
		burst: int(min(max(bytesPerSecond/4, minBurst), maxBurst)),
	}
}

// take charges n bytes, at most burst, and waits while the bucket is overdrawn.
func (b *tokenBucket) take(n int) {
	if n > 0 {
		b.wait(b.reserve(n, time.Now()))
	}
}

func (b *tokenBucket) reserve(n int, now time.Time) time.Duration {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.full.Before(now) {
		b.full = now
	}
	b.full = b.full.Add(time.Duration(float64(n) / b.rate * float64(time.Second)))
	return b.full.Sub(now) - time.Duration(float64(b.burst)/b.rate*float64(time.Second))
}

// wait waits for the duration, or until end or frozen is closed.
func (b *tokenBucket) wait(d time.Duration) {
	if d <= 0 {
		return
	}
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
	case <-b.end:
	case <-b.frozen:
	}
}

func (b *tokenBucket) state() time.Time {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.full
}

// resume continues from another bucket's state.
func (b *tokenBucket) resume(full time.Time) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.full = full
}
