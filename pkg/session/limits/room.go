package limits

import "sync/atomic"

// Room bounds the bytes that many users hold together. Its methods are safe for concurrent use.
type Room struct {
	limit, used, refused atomic.Int64
}

// NewRoom returns room for limit bytes. 0 means no limit.
func NewRoom(limit int64) *Room {
	r := &Room{}
	r.Update(limit)
	return r
}

// Update changes the limit. It does not affect bytes already held.
func (r *Room) Update(limit int64) { r.limit.Store(limit) }

// Take reserves n bytes, all or none, and reports whether there was room. Return must release them.
func (r *Room) Take(n int) bool {
	limit := r.limit.Load()
	if used := r.used.Add(int64(n)); limit == 0 || used <= limit {
		return true
	}
	r.used.Add(-int64(n))
	r.refused.Add(1)
	return false
}

// Return releases n bytes.
func (r *Room) Return(n int) { r.used.Add(-int64(n)) }

// Used returns how many bytes are held.
func (r *Room) Used() int64 { return r.used.Load() }

// Refused returns how often there was no room.
func (r *Room) Refused() int64 { return r.refused.Load() }
