// Package memory is what connections share for payload that nobody has read yet.
package memory

// Room is room for unread payload that several connections share. Its methods are called from many goroutines, with
// locks held, and must not block.
type Room interface {
	// Full says that no more payload should be kept.
	Full() bool
	// Take says that n more bytes are kept, Return that n are not any more.
	Take(n int)
	Return(n int)
}

// Unshared is the room of a connection that shares none.
type Unshared struct{}

// Full implements Room.
func (Unshared) Full() bool { return false }

// Take implements Room.
func (Unshared) Take(int) {}

// Return implements Room.
func (Unshared) Return(int) {}
