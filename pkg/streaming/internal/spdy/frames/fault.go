package frames

import "fmt"

// ConnectionError is a fault after which the connection cannot go on: the peer broke the protocol
// or a limit. The connection is closed with a GOAWAY that carries Status.
type ConnectionError struct {
	Status GoAwayStatus
	Reason string
}

func (e *ConnectionError) Error() string { return "spdy: " + e.Reason }

// ProtocolErrorf is a fault of the peer.
func ProtocolErrorf(format string, args ...any) *ConnectionError {
	return &ConnectionError{Status: GoAwayProtocolError, Reason: "peer broke the protocol: " + fmt.Sprintf(format, args...)}
}

// ResetError is the end of one stream by RST_STREAM, from the peer or from this side.
type ResetError struct {
	Status ResetStatus
	Remote bool   // the peer sent it
	Reason string // why this side sent it, when it was not asked to
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
