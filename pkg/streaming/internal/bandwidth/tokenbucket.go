package bandwidth

import (
	"sync"
	"time"
)

// A bucket's size is what a quarter of a second allows, within these limits: small enough that
// nobody waits long for the end of a session, large enough for reads that are worth their cost.
const (
	minBurst = 4 << 10
	maxBurst = 256 << 10
)

// tokenBucket lets a number of bytes pass in each second. What has passed is paid for afterwards, so
// that a reader need not know beforehand how much it will get.
type tokenBucket struct {
	rate        float64 // bytes a second
	burst       int
	end, frozen <-chan struct{} // nobody waits after them

	mu   sync.Mutex
	full time.Time // when the bucket would be full again
}

func newTokenBucket(bytesPerSecond int64, end, frozen <-chan struct{}) *tokenBucket {
	return &tokenBucket{
		rate: float64(bytesPerSecond), end: end, frozen: frozen,
		burst: int(min(max(bytesPerSecond/4, minBurst), maxBurst)),
	}
}

// take pays for n bytes, at most burst, and waits as long as the bucket is overdrawn.
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

// wait waits for the duration, or for the end.
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

// goOn takes over when another bucket would be full again.
func (b *tokenBucket) goOn(full time.Time) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.full = full
}
