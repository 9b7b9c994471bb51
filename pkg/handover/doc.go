// Package handover carries descriptors and state from one program to the next within the same process
// (docs/decisions/0006-handover.md). It does not know what the state means.
package handover

import "errors"

// ErrFrozen is returned by calls whose object was frozen for a hand-over. The call reports what it has moved so far;
// the rest is in the state, and nothing is lost.
var ErrFrozen = errors.New("frozen for a hand-over")
