// Package handover carries descriptors and state from one program to the next one in the same process
// (docs/decisions/0006-handover.md). It knows nothing of what is carried.
package handover

import "errors"

// ErrFrozen ends a call because what it works on was frozen. All that the call has moved until then it
// reports, and nothing is lost: the rest is in the state.
var ErrFrozen = errors.New("frozen for a hand-over")
