// Package memory is the room for unread payload that connections share.
package memory

// Room bounds the unread payload that several connections keep together. Its methods are called from many goroutines,
// with locks held. They must not block.
type Room interface {
	// Full reports that no more payload should be kept.
	Full() bool
	// Take adds n bytes to what is kept, Return removes n.
	Take(n int)
	Return(n int)
}

// Unshared is the Room of a connection that shares none. It has no bound.
type Unshared struct{}

// Full implements Room.
func (Unshared) Full() bool { return false }

// Take implements Room.
func (Unshared) Take(int) {}

// Return implements Room.
func (Unshared) Return(int) {}
