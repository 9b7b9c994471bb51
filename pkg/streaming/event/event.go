// Package event names what operators count of streams and sessions.
package event

// Event is something that operators count.
type Event string

// The events.
const (
	TokenIssued   Event = "token-issued"   // a URL was issued
	TokenRedeemed Event = "token-redeemed" // its client connected
	TokenExpired  Event = "token-expired"  // its client did not connect in time
	TokenRefused  Event = "token-refused"  // no URL was issued, because too many are waiting
	TokenUnknown  Event = "token-unknown"  // a client connected with a token that is not waiting
	// DrainCut is an output that a background child kept open after the command's end. It was taken as complete because it
	// was silent or took too long.
	DrainCut Event = "drain-cut"
	// LingerCut is a finished session that ended because its client read nothing any more.
	LingerCut Event = "linger-cut"
	// StatusHeld is a finished command whose status was held back for a second or more so that the client could read the
	// output first.
	StatusHeld Event = "status-held"
	// StreamStalled is a stream of a port-forward that was reset because it was not read and blocked the others.
	StreamStalled Event = "stream-stalled"
	// Panicked is a session that ended because one of its goroutines panicked.
	Panicked Event = "panicked"
	// PeerDead is a client that no longer answered.
	PeerDead Event = "peer-dead"
)
