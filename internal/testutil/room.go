package testutil

import "sync"

// Room is room for unread payload, as connections share it, that counts what is held. The zero value is ready to use.
type Room struct {
	mu   sync.Mutex
	held int
	full bool
}

// Full implements memory.Room.
func (r *Room) Full() bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.full
}

// SetFull says whether the room is full, whatever is held.
func (r *Room) SetFull(full bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.full = full
}

// Take implements memory.Room.
func (r *Room) Take(n int) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.held += n
}

// Return implements memory.Room.
func (r *Room) Return(n int) { r.Take(-n) }

// Held is how much is taken and not returned.
func (r *Room) Held() int {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.held
}
