// Package buffers bounds the unread data of all sessions together.
package buffers

import (
	"sync"
	"sync/atomic"
)

// Pool bounds the unread data of all sessions together. A single session may use much of it. All methods may be called from
// several goroutines. A nil *Pool has no limit.
type Pool struct {
	limit   atomic.Int64
	used    atomic.Int64
	refused atomic.Int64
}

// New returns a Pool with a limit in bytes. 0 is no limit.
func New(limit int64) *Pool {
	b := &Pool{}
	b.Update(limit)
	return b
}

// Update changes the limit. Data that is already buffered stays.
func (b *Pool) Update(limit int64) { b.limit.Store(limit) }

// Used returns how many bytes are buffered, rounded up to whole buffers.
func (b *Pool) Used() int64 { return b.used.Load() }

// Refused returns how many times data had to wait, or was skipped, because there was no room.
func (b *Pool) Refused() int64 { return b.refused.Load() }

// Share returns the room of one session. The caller closes it when the session is over.
func (b *Pool) Share() *Share { return &Share{buffers: b} }

// Share is the room of one session, the memory.Room of its connections. Close also returns what the connections do not:
// data that is received but not read when a session ends stays in their streams.
type Share struct {
	buffers *Pool

	mu     sync.Mutex
	held   int64
	closed bool
}

// Full reports whether a session should buffer only what it cannot continue without.
func (s *Share) Full() bool {
	b := s.buffers
	if b == nil {
		return false
	}
	limit := b.limit.Load()
	if limit == 0 || b.used.Load() < limit {
		return false
	}
	b.refused.Add(1)
	return true
}

// Take counts n more bytes.
func (s *Share) Take(n int) { s.add(int64(n)) }

// Return counts n bytes less.
func (s *Share) Return(n int) { s.add(-int64(n)) }

func (s *Share) add(n int64) {
	if s.buffers == nil || n == 0 {
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return
	}
	s.held += n
	s.buffers.used.Add(n)
}

// Close returns everything. Later calls of Take and Return do nothing.
func (s *Share) Close() {
	if s.buffers == nil {
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if !s.closed {
		s.closed = true
		s.buffers.used.Add(-s.held)
	}
}
