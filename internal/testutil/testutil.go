// Package testutil is what tests of many packages need: a buffer that one side writes while the other looks,
// and waiting for what is due to come true. It lies here and not below test/internal, where the packages'
// own tests could not import it.
package testutil

import (
	"bytes"
	"regexp"
	"sync"
	"testing"
	"time"
)

// Patience bounds waits for what is due to happen. It is long because the machine may be busy, and never
// waited for by a test that passes.
const Patience = 2 * time.Minute

// Slow skips a test that takes seconds in the inner loop, make check (go test -short).
func Slow(t testing.TB) {
	t.Helper()
	if testing.Short() {
		t.Skip("takes seconds")
	}
}

// Eventually waits until a condition is true that has no event of its own, and fails the test after Patience.
func Eventually(t testing.TB, what string, condition func() bool) {
	t.Helper()
	Within(t, Patience, what, condition)
}

// Within is Eventually with another limit; it returns how long it took.
func Within(t testing.TB, limit time.Duration, what string, condition func() bool) time.Duration {
	t.Helper()
	begin := time.Now()
	for pause := time.Millisecond; !condition(); pause = min(2*pause, 50*time.Millisecond) {
		if time.Since(begin) > limit {
			t.Fatalf("not within %v: %s", limit, what)
		}
		time.Sleep(pause)
	}
	return time.Since(begin)
}

// Receive returns what comes from the channel, or the zero value when it is closed; it fails the test after
// Patience.
func Receive[T any](t testing.TB, what string, from <-chan T) (value T) {
	t.Helper()
	select {
	case value = <-from:
	case <-time.After(Patience):
		t.Fatalf("not within %v: %s", Patience, what)
	}
	return value
}

// Buffer is a bytes.Buffer for several goroutines. The zero value is empty and ready to use.
type Buffer struct {
	mu      sync.Mutex
	text    bytes.Buffer
	changed chan struct{} // closed by the next write, if anybody waits for it
}

// Write adds to the end. It never fails.
func (b *Buffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.changed != nil {
		close(b.changed)
		b.changed = nil
	}
	return b.text.Write(p)
}

// String returns what was written and not taken.
func (b *Buffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.text.String()
}

// Take waits for the first match of a pattern, removes everything up to its end and returns it with its groups.
// It returns nil when done is closed before, or when Patience is over.
func (b *Buffer) Take(pattern *regexp.Regexp, done <-chan struct{}) []string {
	timeout := time.After(Patience)
	for {
		match, changed := b.take(pattern)
		if match != nil {
			return match
		}
		select {
		case <-changed:
		case <-done:
			match, _ = b.take(pattern)
			return match
		case <-timeout:
			return nil
		}
	}
}

func (b *Buffer) take(pattern *regexp.Regexp) (match []string, changed <-chan struct{}) {
	b.mu.Lock()
	defer b.mu.Unlock()
	at := pattern.FindSubmatchIndex(b.text.Bytes())
	if at == nil {
		if b.changed == nil {
			b.changed = make(chan struct{})
		}
		return nil, b.changed
	}
	for i := 0; i < len(at); i += 2 {
		group := ""
		if at[i] >= 0 {
			group = string(b.text.Bytes()[at[i]:at[i+1]])
		}
		match = append(match, group)
	}
	b.text.Next(at[1])
	return match, nil
}
