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
	rate  float64 // bytes a second
	burst int
	end   <-chan struct{} // nobody waits after it

	mu   sync.Mutex
	full time.Time // when the bucket would be full again
}

func newTokenBucket(bytesPerSecond int64, end <-chan struct{}) *tokenBucket {
	return &tokenBucket{
		rate: float64(bytesPerSecond), end: end,
		burst: int(min(max(bytesPerSecond/4, minBurst), maxBurst)),
	}
}

// take pays for n bytes, at most burst, and waits as long as the bucket is overdrawn.
func (b *tokenBucket) take(n int) {
	if n > 0 {
		waitForTurn(b.reserve(n, time.Now()), b.end)
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

// waitForTurn waits for the duration or for the end.
func waitForTurn(d time.Duration, end <-chan struct{}) {
	if d <= 0 {
		return
	}
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
	case <-end:
	}
}
