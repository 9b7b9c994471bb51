package spdy

import (
	"encoding/binary"
	"fmt"
)

// This file is the wire format and nothing else: functions from bytes to values and back. Section
// numbers are those of the SPDY/3.1 draft
// (https://www.chromium.org/spdy/spdy-protocol/spdy-protocol-draft3-1/).

// protocolVersion is the version in every control frame; SPDY/3.1 kept the number 3.
const protocolVersion = 3

const (
	headerLen    = 8         // of every frame, control or data (2.2)
	maxFrameLen  = 1<<24 - 1 // the length field has 24 bits (2.2)
	maxStreamID  = 1<<31 - 1 // stream ids have 31 bits (2.3.1)
	controlBit   = 1 << 31
	streamIDMask = maxStreamID
)

// Control frame types (2.6).
const (
	typeSynStream    = 1
	typeSynReply     = 2
	typeRstStream    = 3
	typeSettings     = 4
	typePing         = 6
	typeGoAway       = 7
	typeHeaders      = 8
	typeWindowUpdate = 9
)

// Frame flags. FIN is the same bit in data and control frames.
const (
	flagFin            = 0x01
	flagUnidirectional = 0x02 // SYN_STREAM only: no frames from the receiver on this stream (2.6.1)
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

// String names the status as the draft does.
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

// All the reasons the draft knows.
const (
	GoAwayOK            GoAwayStatus = 0
	GoAwayProtocolError GoAwayStatus = 1
	GoAwayInternalError GoAwayStatus = 2
)

// frameHeader is the first eight bytes of a frame, unpacked.
type frameHeader struct {
	control  bool
	version  uint16 // control frames only
	kind     uint16 // control frames only
	streamID uint32 // data frames only
	flags    byte
	length   int // of what follows the header
}

// parseFrameHeader unpacks the first headerLen bytes of b, which must be there. Every eight bytes
// are a header; whether it makes sense is for the caller to say.
func parseFrameHeader(b []byte) frameHeader {
	_ = b[headerLen-1]
	word := binary.BigEndian.Uint32(b)
	h := frameHeader{
		flags:  b[4],
		length: int(b[5])<<16 | int(b[6])<<8 | int(b[7]),
	}
	if word&controlBit != 0 {
		h.control = true
		h.version = uint16(word>>16) & 0x7fff
		h.kind = uint16(word)
	} else {
		h.streamID = word
	}
	return h
}

// putDataHeader writes the header of a data frame (2.2.2) into the first headerLen bytes of b.
func putDataHeader(b []byte, streamID uint32, flags byte, length int) {
	_ = b[headerLen-1]
	binary.BigEndian.PutUint32(b, streamID&streamIDMask)
	binary.BigEndian.PutUint32(b[4:], uint32(flags)<<24|uint32(length)&maxFrameLen)
}

func appendControlHeader(b []byte, kind uint16, flags byte, length int) []byte {
	b = binary.BigEndian.AppendUint32(b, controlBit|protocolVersion<<16|uint32(kind))
	return binary.BigEndian.AppendUint32(b, uint32(flags)<<24|uint32(length)&maxFrameLen)
}

// appendSynStream appends a SYN_STREAM with priority 0 and no associated stream (2.6.1).
func appendSynStream(b []byte, streamID uint32, flags byte, headerBlock []byte) []byte {
	b = appendControlHeader(b, typeSynStream, flags, 10+len(headerBlock))
	b = binary.BigEndian.AppendUint32(b, streamID)
	b = append(b, 0, 0, 0, 0, 0, 0)
	return append(b, headerBlock...)
}

// appendSynReply appends a SYN_REPLY (2.6.2).
func appendSynReply(b []byte, streamID uint32, flags byte, headerBlock []byte) []byte {
	b = appendControlHeader(b, typeSynReply, flags, 4+len(headerBlock))
	b = binary.BigEndian.AppendUint32(b, streamID)
	return append(b, headerBlock...)
}

// appendRstStream appends a RST_STREAM (2.6.3).
func appendRstStream(b []byte, streamID uint32, status ResetStatus) []byte {
	b = appendControlHeader(b, typeRstStream, 0, 8)
	b = binary.BigEndian.AppendUint32(b, streamID)
	return binary.BigEndian.AppendUint32(b, uint32(status))
}

// appendEmptySettings appends a SETTINGS frame that sets nothing (2.6.4). No peer answers it.
func appendEmptySettings(b []byte) []byte {
	b = appendControlHeader(b, typeSettings, 0, 4)
	return append(b, 0, 0, 0, 0)
}

// appendPing appends a PING (2.6.5).
func appendPing(b []byte, id uint32) []byte {
	b = appendControlHeader(b, typePing, 0, 4)
	return binary.BigEndian.AppendUint32(b, id)
}

// appendGoAway appends a GOAWAY (2.6.6).
func appendGoAway(b []byte, lastGoodStreamID uint32, status GoAwayStatus) []byte {
	b = appendControlHeader(b, typeGoAway, 0, 8)
	b = binary.BigEndian.AppendUint32(b, lastGoodStreamID)
	return binary.BigEndian.AppendUint32(b, uint32(status))
}

// parseSynStream returns the stream id and the still compressed header block. The associated
// stream, the priority and the slot mean nothing to the protocols of Kubernetes and are skipped.
func parseSynStream(payload []byte) (streamID uint32, headerBlock []byte, err error) {
	if len(payload) < 10 {
		return 0, nil, protocolErrorf("SYN_STREAM of %d bytes, need at least 10", len(payload))
	}
	return binary.BigEndian.Uint32(payload) & streamIDMask, payload[10:], nil
}

// parseReplyOrHeaders reads the payload of SYN_REPLY and of HEADERS, which are alike (2.6.2, 2.6.7).
func parseReplyOrHeaders(payload []byte) (streamID uint32, headerBlock []byte, err error) {
	if len(payload) < 4 {
		return 0, nil, protocolErrorf("SYN_REPLY or HEADERS of %d bytes, need at least 4", len(payload))
	}
	return binary.BigEndian.Uint32(payload) & streamIDMask, payload[4:], nil
}

func parseRstStream(payload []byte) (streamID uint32, status ResetStatus, err error) {
	if len(payload) != 8 {
		return 0, 0, protocolErrorf("RST_STREAM of %d bytes, must be 8", len(payload))
	}
	return binary.BigEndian.Uint32(payload) & streamIDMask, ResetStatus(binary.BigEndian.Uint32(payload[4:])), nil
}

// checkSettings checks that the entry count fits the frame and nothing more: no setting changes
// anything here. A decoder that believes the count allocates gigabytes (CVE-2026-35469).
func checkSettings(payload []byte) error {
	if len(payload) < 4 {
		return protocolErrorf("SETTINGS of %d bytes, need at least 4", len(payload))
	}
	if count := binary.BigEndian.Uint32(payload); uint64(count)*8 != uint64(len(payload)-4) {
		return protocolErrorf("SETTINGS claims %d entries in %d bytes", count, len(payload))
	}
	return nil
}

func parsePing(payload []byte) (id uint32, err error) {
	if len(payload) != 4 {
		return 0, protocolErrorf("PING of %d bytes, must be 4", len(payload))
	}
	return binary.BigEndian.Uint32(payload), nil
}

func parseGoAway(payload []byte) (lastGoodStreamID uint32, status GoAwayStatus, err error) {
	if len(payload) != 8 {
		return 0, 0, protocolErrorf("GOAWAY of %d bytes, must be 8", len(payload))
	}
	return binary.BigEndian.Uint32(payload) & streamIDMask, GoAwayStatus(binary.BigEndian.Uint32(payload[4:])), nil
}

func checkWindowUpdate(payload []byte) error {
	if len(payload) != 8 {
		return protocolErrorf("WINDOW_UPDATE of %d bytes, must be 8", len(payload))
	}
	return nil
}
