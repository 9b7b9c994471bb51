package bandwidth

import (
	"bytes"
	"io"
	"strings"
	"testing"
	"time"
)

func TestTokenBucket(t *testing.T) {
	now := time.Now()
	b := newTokenBucket(100_000, nil, nil)
	if b.burst != 25_000 {
		t.Fatalf("burst %d", b.burst)
	}
	if wait := b.reserve(25_000, now); wait > 0 {
		t.Errorf("the burst waits %v", wait)
	}
	if wait := b.reserve(10_000, now); wait.Round(time.Millisecond) != 100*time.Millisecond {
		t.Errorf("10 kB more wait %v", wait)
	}
	if wait := b.reserve(1, now.Add(time.Hour)); wait > 0 {
		t.Errorf("after an hour it waits %v", wait)
	}
	if wait := b.reserve(25_000, now.Add(time.Hour)); wait <= 0 || wait > time.Millisecond {
		t.Errorf("an hour does not fill it above its size: %v", wait)
	}
	// After the end there is no wait.
	end := make(chan struct{})
	close(end)
	b = newTokenBucket(1, end, nil)
	began := time.Now()
	n, err := limitedWriter{io.Discard, b}.Write(make([]byte, 100<<10))
	if n != 100<<10 || err != nil || time.Since(began) > time.Minute {
		t.Errorf("%d, %v after %v", n, err, time.Since(began))
	}
	var out bytes.Buffer
	if n, err := io.Copy(&out, limitedReader{strings.NewReader(strings.Repeat("x", 100<<10)), b}); n != 100<<10 || err != nil {
		t.Errorf("%d, %v", n, err)
	}
}
