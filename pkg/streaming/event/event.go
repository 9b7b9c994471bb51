// Package event names what operators count of streams and sessions.
package event

// Event is something that operators count.
type Event string

// The events.
const (
	TokenIssued   Event = "token-issued"   // a URL was given out
	TokenRedeemed Event = "token-redeemed" // its client came
	TokenExpired  Event = "token-expired"  // its client did not come in time
	TokenRefused  Event = "token-refused"  // no URL was given out because too many wait
	TokenUnknown  Event = "token-unknown"  // somebody came with a token that is not waiting
	// DrainCut is an output that a background child held open after the command's end, and that was
	// taken to be complete because it had been silent or had taken too long.
	DrainCut Event = "drain-cut"
	// LingerCut is a finished session whose client took nothing any more and was let go.
	LingerCut Event = "linger-cut"
	// StatusHeld is a finished command whose status was held back for a second or more, so that the
	// client could read the output first.
	StatusHeld Event = "status-held"
	// StreamStalled is a stream of a port-forward that was reset because nobody read it and it held
	// up the others.
	StreamStalled Event = "stream-stalled"
	// Panicked is a session that was ended because one of its goroutines panicked.
	Panicked Event = "panicked"
	// PeerDead is a client that did not answer any more.
	PeerDead Event = "peer-dead"
)
