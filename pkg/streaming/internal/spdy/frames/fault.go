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
