// Package frames implements the wire format of SPDY/3.1: frames, and the header blocks in them. It does no I/O.
package frames

import (
	"encoding/binary"
	"fmt"
)

// This file has the frames: functions from bytes to values and back. Section numbers are those of the SPDY/3.1 draft
// (https://www.chromium.org/spdy/spdy-protocol/spdy-protocol-draft3-1/).

// ProtocolVersion is the version in every control frame. SPDY/3.1 kept the number 3.
const ProtocolVersion = 3

// Sizes.
const (
	HeaderLen    = 8         // of every frame, control or data (2.2)
	MaxLen       = 1<<24 - 1 // the length field has 24 bits (2.2)
	MaxStreamID  = 1<<31 - 1 // stream ids have 31 bits (2.3.1)
	controlBit   = 1 << 31
	streamIDMask = MaxStreamID
)

// Control frame types (2.6).
const (
	TypeSynStream    = 1
	TypeSynReply     = 2
	TypeRstStream    = 3
	TypeSettings     = 4
	TypePing         = 6
	TypeGoAway       = 7
	TypeHeaders      = 8
	TypeWindowUpdate = 9
)

// Frame flags. FIN is the same bit in data and control frames.
const (
	FlagFin            = 0x01
	FlagUnidirectional = 0x02 // SYN_STREAM only: no frames from the receiver on this stream (2.6.1)
)

// ResetStatus is the reason in a RST_STREAM frame (2.6.3).
type ResetStatus uint32

// The reset reasons that this package sends. A peer may send others.
const (
	ResetProtocolError       ResetStatus = 1
	ResetInvalidStream       ResetStatus = 2
	ResetRefusedStream       ResetStatus = 3
	ResetCancel              ResetStatus = 5
	ResetInternalError       ResetStatus = 6
	ResetFlowControlError    ResetStatus = 7
	ResetStreamAlreadyClosed ResetStatus = 9
)

// String returns the draft's name of the status.
func (s ResetStatus) String() string {
	switch s {
	case ResetProtocolError:
		return "PROTOCOL_ERROR"
	case ResetInvalidStream:
		return "INVALID_STREAM"
	case ResetRefusedStream:
		return "REFUSED_STREAM"
	case ResetCancel:
		return "CANCEL"
	case ResetInternalError:
		return "INTERNAL_ERROR"
	case ResetFlowControlError:
		return "FLOW_CONTROL_ERROR"
	case ResetStreamAlreadyClosed:
		return "STREAM_ALREADY_CLOSED"
	}
	return fmt.Sprintf("status %d", uint32(s))
}

// GoAwayStatus is the reason in a GOAWAY frame (2.6.6).
type GoAwayStatus uint32

// All reasons in the draft.
const (
	GoAwayOK            GoAwayStatus = 0
	GoAwayProtocolError GoAwayStatus = 1
	GoAwayInternalError GoAwayStatus = 2
)

// Header is the unpacked header of a frame, its first eight bytes.
type Header struct {
	Control  bool
	Version  uint16 // control frames only
	Kind     uint16 // control frames only
	StreamID uint32 // data frames only
	Flags    byte
	Length   int // of what follows the header
}

// ParseHeader unpacks the first HeaderLen bytes of b, which must exist. It accepts any bytes: the caller decides whether
// the header makes sense.
func ParseHeader(b []byte) Header {
	_ = b[HeaderLen-1]
	word := binary.BigEndian.Uint32(b)
	h := Header{
		Flags:  b[4],
		Length: int(b[5])<<16 | int(b[6])<<8 | int(b[7]),
	}
	if word&controlBit != 0 {
		h.Control = true
		h.Version = uint16(word>>16) & 0x7fff
		h.Kind = uint16(word)
	} else {
		h.StreamID = word
	}
	return h
}

// PutDataHeader writes the header of a data frame (2.2.2) into the first HeaderLen bytes of b.
func PutDataHeader(b []byte, streamID uint32, flags byte, length int) {
	_ = b[HeaderLen-1]
	binary.BigEndian.PutUint32(b, streamID&streamIDMask)
	binary.BigEndian.PutUint32(b[4:], uint32(flags)<<24|uint32(length)&MaxLen)
}

// AppendControlHeader appends the header of a control frame (2.2.1).
func AppendControlHeader(b []byte, kind uint16, flags byte, length int) []byte {
	b = binary.BigEndian.AppendUint32(b, controlBit|ProtocolVersion<<16|uint32(kind))
	return binary.BigEndian.AppendUint32(b, uint32(flags)<<24|uint32(length)&MaxLen)
}

// AppendSynStream appends a SYN_STREAM with priority 0 and no associated stream (2.6.1).
func AppendSynStream(b []byte, streamID uint32, flags byte, headerBlock []byte) []byte {
	b = AppendControlHeader(b, TypeSynStream, flags, 10+len(headerBlock))
	b = binary.BigEndian.AppendUint32(b, streamID)
	b = append(b, 0, 0, 0, 0, 0, 0)
	return append(b, headerBlock...)
}

// AppendSynReply appends a SYN_REPLY (2.6.2).
func AppendSynReply(b []byte, streamID uint32, flags byte, headerBlock []byte) []byte {
	b = AppendControlHeader(b, TypeSynReply, flags, 4+len(headerBlock))
	b = binary.BigEndian.AppendUint32(b, streamID)
	return append(b, headerBlock...)
}

// AppendRstStream appends a RST_STREAM (2.6.3).
func AppendRstStream(b []byte, streamID uint32, status ResetStatus) []byte {
	b = AppendControlHeader(b, TypeRstStream, 0, 8)
	b = binary.BigEndian.AppendUint32(b, streamID)
	return binary.BigEndian.AppendUint32(b, uint32(status))
}

// AppendEmptySettings appends a SETTINGS frame that sets nothing (2.6.4). No peer answers it.
func AppendEmptySettings(b []byte) []byte {
	b = AppendControlHeader(b, TypeSettings, 0, 4)
	return append(b, 0, 0, 0, 0)
}

// AppendPing appends a PING (2.6.5).
func AppendPing(b []byte, id uint32) []byte {
	b = AppendControlHeader(b, TypePing, 0, 4)
	return binary.BigEndian.AppendUint32(b, id)
}

// AppendGoAway appends a GOAWAY (2.6.6).
func AppendGoAway(b []byte, lastGoodStreamID uint32, status GoAwayStatus) []byte {
	b = AppendControlHeader(b, TypeGoAway, 0, 8)
	b = binary.BigEndian.AppendUint32(b, lastGoodStreamID)
	return binary.BigEndian.AppendUint32(b, uint32(status))
}

// ParseSynStream returns the stream id and the compressed header block. It skips the associated stream, the priority and
// the slot, which mean nothing to the protocols of Kubernetes.
func ParseSynStream(payload []byte) (streamID uint32, headerBlock []byte, err error) {
	if len(payload) < 10 {
		return 0, nil, ProtocolErrorf("SYN_STREAM of %d bytes, need at least 10", len(payload))
	}
	return binary.BigEndian.Uint32(payload) & streamIDMask, payload[10:], nil
}

// ParseReplyOrHeaders reads the payload of SYN_REPLY or HEADERS, which have the same format (2.6.2, 2.6.7).
func ParseReplyOrHeaders(payload []byte) (streamID uint32, headerBlock []byte, err error) {
	if len(payload) < 4 {
		return 0, nil, ProtocolErrorf("SYN_REPLY or HEADERS of %d bytes, need at least 4", len(payload))
	}
	return binary.BigEndian.Uint32(payload) & streamIDMask, payload[4:], nil
}

// ParseRstStream reads the payload of a RST_STREAM.
func ParseRstStream(payload []byte) (streamID uint32, status ResetStatus, err error) {
	if len(payload) != 8 {
		return 0, 0, ProtocolErrorf("RST_STREAM of %d bytes, must be 8", len(payload))
	}
	return binary.BigEndian.Uint32(payload) & streamIDMask, ResetStatus(binary.BigEndian.Uint32(payload[4:])), nil
}

// CheckSettings checks only that the number of entries fits the frame: no setting changes anything here. A decoder that
// trusts the number allocates gigabytes (CVE-2026-35469).
func CheckSettings(payload []byte) error {
	if len(payload) < 4 {
		return ProtocolErrorf("SETTINGS of %d bytes, need at least 4", len(payload))
	}
	if count := binary.BigEndian.Uint32(payload); uint64(count)*8 != uint64(len(payload)-4) {
		return ProtocolErrorf("SETTINGS claims %d entries in %d bytes", count, len(payload))
	}
	return nil
}

// ParsePing reads the payload of a PING.
func ParsePing(payload []byte) (id uint32, err error) {
	if len(payload) != 4 {
		return 0, ProtocolErrorf("PING of %d bytes, must be 4", len(payload))
	}
	return binary.BigEndian.Uint32(payload), nil
}

// ParseGoAway reads the payload of a GOAWAY.
func ParseGoAway(payload []byte) (lastGoodStreamID uint32, status GoAwayStatus, err error) {
	if len(payload) != 8 {
		return 0, 0, ProtocolErrorf("GOAWAY of %d bytes, must be 8", len(payload))
	}
	return binary.BigEndian.Uint32(payload) & streamIDMask, GoAwayStatus(binary.BigEndian.Uint32(payload[4:])), nil
}

// CheckWindowUpdate checks only the size: this package has no windows.
func CheckWindowUpdate(payload []byte) error {
	if len(payload) != 8 {
		return ProtocolErrorf("WINDOW_UPDATE of %d bytes, must be 8", len(payload))
	}
	return nil
}
