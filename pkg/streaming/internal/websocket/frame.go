package websocket

import (
	"encoding/base64"
	"encoding/binary"
)

// Opcodes of RFC 6455 section 5.2.
const (
	opContinuation = 0x0
	opText         = 0x1
	opBinary       = 0x2
	opClose        = 0x8
	opPing         = 0x9
	opPong         = 0xA
)

const (
	finalFrame = 0x80

	// maxFrameHeader is the longest header of an unmasked frame.
	maxFrameHeader = 10
	// maxControlPayload is the limit of RFC 6455 section 5.5.
	maxControlPayload = 125
)

// frameHeaderSize is the length of the header of an unmasked frame with a payload of this size.
func frameHeaderSize(payload int) int {
	switch {
	case payload <= 125:
		return 2
	case payload <= 0xFFFF:
		return 4
	default:
		return 10
	}
}

// putFrameHeader writes the header of an unmasked final frame to the beginning of b and returns its
// length. The length is in its shortest form, as RFC 6455 section 5.2 demands.
func putFrameHeader(b []byte, opcode byte, payload int) int {
	b[0] = finalFrame | opcode
	switch size := frameHeaderSize(payload); size {
	case 2:
		b[1] = byte(payload)
		return size
	case 4:
		b[1] = 126
		binary.BigEndian.PutUint16(b[2:], uint16(payload))
		return size
	default:
		b[1] = 127
		binary.BigEndian.PutUint64(b[2:], uint64(payload))
		return size
	}
}

// A message to a client is at most 32 KiB, channel byte included. client-go reads any size and the
// stock server sends up to 32 KiB + 1, but coder/websocket and what is built like it fail on
// messages above 32768 bytes unless told otherwise. Larger messages would not be cheaper: eight of
// them are read from the source and written to the client by one system call each.
const (
	maxMessage = 32 << 10

	// cellHeader is the room that a message needs in front of its payload: a frame header with a
	// 16-bit length and the channel byte.
	cellHeader = 4 + 1
	// maxPayload is the most payload in one binary message; with its headers it makes 32 KiB.
	maxPayload = maxMessage - cellHeader
	// maxBase64Payload is the most payload in one base64 message, before encoding.
	maxBase64Payload = (maxMessage - cellHeader) / 4 * 3

	cellsPerBatch = 8
	batchSize     = cellsPerBatch * maxMessage
)

// batch is a buffer of cells, each with room for the headers of one message and its payload. When
// the cells are full one after the other, the buffer is what goes on the wire.
type batch struct {
	data [batchSize]byte
	// payloads are the cells' parts for payload, the destinations of a scattered read.
	payloads [cellsPerBatch][]byte
}

func newBatch() *batch {
	b := new(batch)
	for i := range b.payloads {
		cell := b.data[i*maxMessage : (i+1)*maxMessage]
		b.payloads[i] = cell[cellHeader:]
	}
	return b
}

// frameBinary puts the headers in front of n bytes that fill the payload parts in order, and
// returns the bytes for the wire: one binary message a cell. n is at least 1.
func (b *batch) frameBinary(channel byte, n int) []byte {
	start, end := 0, 0
	for i := 0; n > 0; i++ {
		cell := b.data[i*maxMessage : (i+1)*maxMessage]
		payload := min(n, maxPayload)
		n -= payload
		headers := frameHeaderSize(1+payload) + 1
		// A short message has a shorter header. In the first cell the wire bytes begin later for
		// it; in any other the payload moves up, because there must be no gap.
		at := cellHeader - headers
		if i == 0 {
			start = at
		} else if at > 0 {
			copy(cell[headers:], cell[cellHeader:cellHeader+payload])
			at = 0
		}
		size := putFrameHeader(cell[at:], opBinary, 1+payload)
		cell[at+size] = channel
		end = i*maxMessage + at + headers + payload
	}
	return b.data[start:end]
}

// base64Source is where frameBase64 expects the payload: behind the largest encoded message.
func (b *batch) base64Source() []byte {
	return b.data[maxMessage : maxMessage+maxBase64Payload]
}

// frameBase64 returns the text message for a payload of at most maxBase64Payload bytes.
func (b *batch) frameBase64(channel byte, payload []byte) []byte {
	encoded := base64.StdEncoding.EncodedLen(len(payload))
	size := putFrameHeader(b.data[:], opText, 1+encoded)
	b.data[size] = '0' + channel
	base64.StdEncoding.Encode(b.data[size+1:], payload)
	return b.data[:size+1+encoded]
}
