package frames

import (
	"encoding/binary"
	"unicode/utf8"
)

// Close codes of RFC 6455 section 7.4.1.
const (
	CloseNormal          = 1000
	CloseGoingAway       = 1001
	CloseProtocolError   = 1002
	CloseUnsupportedData = 1003
	CloseNoStatus        = 1005
	CloseInvalidPayload  = 1007
	CloseTooBig          = 1009
	CloseInternalError   = 1011
)

// Violation is a client's violation of the protocol. It ends the connection with this close code.
type Violation struct {
	Code   int
	Reason string
}

func (e *Violation) Error() string {
	return "websocket: the client broke the protocol: " + e.Reason
}

// PutClose writes a Close frame to b and returns its length. b must have room for any control frame.
func PutClose(b []byte, code int, reason string) int {
	if code == CloseNoStatus {
		return PutHeader(b, OpClose, 0) // 1005 means "no code" and must not be sent
	}
	const most = MaxControlPayload - 2
	if len(reason) > most {
		reason = reason[:most]
		for len(reason) > 0 && !utf8.ValidString(reason) {
			reason = reason[:len(reason)-1]
		}
	}
	size := PutHeader(b, OpClose, 2+len(reason))
	binary.BigEndian.PutUint16(b[size:], uint16(code))
	copy(b[size+2:], reason)
	return size + 2 + len(reason)
}
