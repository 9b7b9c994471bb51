package limits

import "sync/atomic"

// Room bounds the bytes that many hold together. Its methods may be called from several goroutines.
type Room struct {
	limit, used, refused atomic.Int64
}

// NewRoom returns room for so many bytes; 0 is no limit.
func NewRoom(limit int64) *Room {
	r := &Room{}
	r.Update(limit)
	return r
}

// Update changes the limit. What is held stays.
func (r *Room) Update(limit int64) { r.limit.Store(limit) }

// Take takes n bytes, all or none, and reports whether there was room. They are to be returned.
func (r *Room) Take(n int) bool {
	limit := r.limit.Load()
	if used := r.used.Add(int64(n)); limit == 0 || used <= limit {
		return true
	}
	r.used.Add(-int64(n))
	r.refused.Add(1)
	return false
}

// Return gives n bytes back.
func (r *Room) Return(n int) { r.used.Add(-int64(n)) }

// Used is how many bytes are held.
func (r *Room) Used() int64 { return r.used.Load() }

// Refused is how many times there was no room.
func (r *Room) Refused() int64 { return r.refused.Load() }
