// Package frames is the wire format of WebSocket (RFC 6455) for a server: it reads the frames of a client, and writes
// frame headers around payload that is in place.
package frames

import (
	"encoding/base64"
	"encoding/binary"
	"sync"
)

// Opcodes of RFC 6455 section 5.2.
const (
	OpContinuation = 0x0
	OpText         = 0x1
	OpBinary       = 0x2
	OpClose        = 0x8
	OpPing         = 0x9
	OpPong         = 0xA
)

// Bits and sizes.
const (
	Final = 0x80 // the frame is its message's last

	// MaxHeader is the longest header of an unmasked frame.
	MaxHeader = 10
	// MaxControlPayload is the limit of RFC 6455 section 5.5.
	MaxControlPayload = 125
)

// HeaderSize returns the length of the header of an unmasked frame with a payload of this size.
func HeaderSize(payload int) int {
	switch {
	case payload <= 125:
		return 2
	case payload <= 0xFFFF:
		return 4
	default:
		return 10
	}
}

// PutHeader writes the header of an unmasked final frame to the beginning of b and returns its length. The payload length
// has its shortest form, as RFC 6455 section 5.2 requires.
func PutHeader(b []byte, opcode byte, payload int) int {
	b[0] = Final | opcode
	switch size := HeaderSize(payload); size {
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

// A message to a client is at most 32 KiB, channel byte included. client-go reads any size, and the stock server sends up
// to 32 KiB + 1. But coder/websocket and similar libraries fail on messages above 32768 bytes by default. Larger
// messages would not be cheaper: one system call reads eight of them from the source, and one writes them to the client.
const (
	MaxMessage = 32 << 10

	// CellHeader is the room in front of a message's payload: a frame header with a 16-bit length, and the
	// channel byte.
	CellHeader = 4 + 1
	// MaxPayload bounds the payload of one binary message. With its headers it makes 32 KiB.
	MaxPayload = MaxMessage - CellHeader
	// MaxBase64Payload bounds the payload of one base64 message, before encoding.
	MaxBase64Payload = (MaxMessage - CellHeader) / 4 * 3

	CellsPerBatch = 8
	batchSize     = CellsPerBatch * MaxMessage
)

// Batch is a buffer of cells. Each has room for the headers of one message and its payload. When all cells are full, the
// buffer as a whole can be written.
type Batch struct {
	data [batchSize]byte
	// Payloads are the payload parts of the cells, the destinations of a vectored read.
	Payloads [CellsPerBatch][]byte
}

var batches = sync.Pool{New: func() any { return newBatch() }}

// TakeBatch takes a batch from the pool.
func TakeBatch() *Batch { return batches.Get().(*Batch) }

// Release returns the batch to the pool.
func (b *Batch) Release() { batches.Put(b) }

func newBatch() *Batch {
	b := new(Batch)
	for i := range b.Payloads {
		cell := b.data[i*MaxMessage : (i+1)*MaxMessage]
		b.Payloads[i] = cell[CellHeader:]
	}
	return b
}

// FrameBinary puts headers in front of n bytes that fill the payload parts in order. It returns the bytes to write: one
// binary message per cell. n is at least 1.
func (b *Batch) FrameBinary(channel byte, n int) []byte {
	start, end := 0, 0
	for i := 0; n > 0; i++ {
		cell := b.data[i*MaxMessage : (i+1)*MaxMessage]
		payload := min(n, MaxPayload)
		n -= payload
		headers := HeaderSize(1+payload) + 1
		// A short message has a shorter header. In the first cell, the bytes to write then begin later. In any
		// other cell the payload moves forward, because there must be no gap.
		at := CellHeader - headers
		if i == 0 {
			start = at
		} else if at > 0 {
			copy(cell[headers:], cell[CellHeader:CellHeader+payload])
			at = 0
		}
		size := PutHeader(cell[at:], OpBinary, 1+payload)
		cell[at+size] = channel
		end = i*MaxMessage + at + headers + payload
	}
	return b.data[start:end]
}

// Base64Source returns the space where FrameBase64 expects the payload: behind the largest encoded message.
func (b *Batch) Base64Source() []byte {
	return b.data[MaxMessage : MaxMessage+MaxBase64Payload]
}

// FrameBase64 returns the text message for a payload of at most MaxBase64Payload bytes.
func (b *Batch) FrameBase64(channel byte, payload []byte) []byte {
	encoded := base64.StdEncoding.EncodedLen(len(payload))
	size := PutHeader(b.data[:], OpText, 1+encoded)
	b.data[size] = '0' + channel
	base64.StdEncoding.Encode(b.data[size+1:], payload)
	return b.data[:size+1+encoded]
}
