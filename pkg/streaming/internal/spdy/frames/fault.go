package frames

import "fmt"

// ConnectionError ends the connection: the peer broke the protocol or exceeded a limit. The connection is closed with a
// GOAWAY that carries Status.
type ConnectionError struct {
	Status GoAwayStatus
	Reason string
}

func (e *ConnectionError) Error() string { return "spdy: " + e.Reason }

// ProtocolErrorf returns a ConnectionError that blames the peer.
func ProtocolErrorf(format string, args ...any) *ConnectionError {
	return &ConnectionError{Status: GoAwayProtocolError, Reason: "peer broke the protocol: " + fmt.Sprintf(format, args...)}
}

// ResetError is the end of one stream by a RST_STREAM of either side.
type ResetError struct {
	Status ResetStatus
	Remote bool   // the peer sent it
	Reason string // why this side sent it on its own
}

func (e *ResetError) Error() string {
	switch {
	case e.Remote:
		return fmt.Sprintf("spdy: stream reset by peer (%v)", e.Status)
	case e.Reason != "":
		return fmt.Sprintf("spdy: stream reset (%v): %s", e.Status, e.Reason)
	}
	return fmt.Sprintf("spdy: stream reset (%v)", e.Status)
}
