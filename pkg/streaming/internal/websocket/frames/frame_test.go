package frames

import (
	"bytes"
	"encoding/base64"
	"encoding/binary"
	"encoding/hex"
	"testing"
)

func TestFrameHeader(t *testing.T) {
	tests := []struct {
		opcode  byte
		payload int
		want    string
	}{
		{OpBinary, 0, "8200"},
		{OpText, 1, "8101"},
		{OpBinary, 125, "827d"},
		{OpBinary, 126, "827e007e"},
		{OpBinary, 65535, "827effff"},
		{OpBinary, 65536, "827f0000000000010000"},
		{OpPong, 2, "8a02"},
	}
	for _, test := range tests {
		b := make([]byte, MaxHeader)
		n := PutHeader(b, test.opcode, test.payload)
		if got := hex.EncodeToString(b[:n]); got != test.want {
			t.Errorf("opcode %d, payload %d: got %s, want %s", test.opcode, test.payload, got, test.want)
		}
		if n != HeaderSize(test.payload) {
			t.Errorf("payload %d: size %d announced, %d written", test.payload, HeaderSize(test.payload), n)
		}
	}
}

func TestPutClose(t *testing.T) {
	long := bytes.Repeat([]byte("a"), 122)
	tests := []struct {
		name, reason string
		code         int
		want         []byte
	}{
		{"code alone", "", 1000, []byte{0x88, 2, 0x03, 0xE8}},
		{"with reason", "bye", 1001, []byte{0x88, 5, 0x03, 0xE9, 'b', 'y', 'e'}},
		{"no status", "ignored", CloseNoStatus, []byte{0x88, 0}},
		{"cut before half a rune", string(long) + "ä", 1011, append([]byte{0x88, 124, 0x03, 0xF3}, long...)},
	}
	for _, test := range tests {
		b := make([]byte, 2+MaxControlPayload)
		if got := b[:PutClose(b, test.code, test.reason)]; !bytes.Equal(got, test.want) {
			t.Errorf("%s: got %x, want %x", test.name, got, test.want)
		}
	}
}

// splitFrames splits wire bytes into frames. It fails if a length is not in its shortest form.
func splitFrames(t *testing.T, wire []byte) (frames []wireFrame) {
	t.Helper()
	for len(wire) > 0 {
		size, header := int(wire[1]), 2
		switch size {
		case 126:
			size, header = int(binary.BigEndian.Uint16(wire[2:])), 4
		case 127:
			size, header = int(binary.BigEndian.Uint64(wire[2:])), 10
		}
		if header != HeaderSize(size) {
			t.Fatalf("a length of %d in a header of %d bytes", size, header)
		}
		if wire[0]&Final == 0 {
			t.Fatal("a frame that is not final")
		}
		frames = append(frames, wireFrame{wire[0] & 0x0F, wire[header : header+size]})
		wire = wire[header+size:]
	}
	return frames
}

type wireFrame struct {
	opcode  byte
	payload []byte
}

func TestFrameBinary(t *testing.T) {
	source := make([]byte, CellsPerBatch*MaxPayload)
	for i := range source {
		source[i] = byte(i * 7 >> 3)
	}
	for _, n := range []int{1, 2, 123, 124, 125, 126, 1000, MaxPayload - 1, MaxPayload, MaxPayload + 1, MaxPayload + 124,
		MaxPayload + 125, 2*MaxPayload + 5, 7*MaxPayload + 1, len(source) - 1, len(source)} {
		b := newBatch()
		rest := source[:n]
		for _, place := range b.Payloads {
			rest = rest[copy(place, rest):]
		}
		var got []byte
		for _, frame := range splitFrames(t, b.FrameBinary(7, n)) {
			if frame.opcode != OpBinary || frame.payload[0] != 7 {
				t.Fatalf("%d bytes: opcode %d, channel %d", n, frame.opcode, frame.payload[0])
			}
			if len(frame.payload) > MaxMessage {
				t.Errorf("%d bytes: a message of %d", n, len(frame.payload))
			}
			got = append(got, frame.payload[1:]...)
		}
		if !bytes.Equal(got, source[:n]) {
			t.Errorf("%d bytes do not come back", n)
		}
	}
}

func TestFrameBase64(t *testing.T) {
	for _, n := range []int{0, 1, 2, 3, 92, 93, MaxBase64Payload} {
		b := newBatch()
		payload := b.Base64Source()[:n]
		for i := range payload {
			payload[i] = byte(i)
		}
		want := append([]byte("2"), base64.StdEncoding.EncodeToString(payload)...)
		frames := splitFrames(t, b.FrameBase64(2, payload))
		if len(frames) != 1 || frames[0].opcode != OpText || !bytes.Equal(frames[0].payload, want) {
			t.Errorf("%d bytes: wrong message", n)
		}
		if len(want) > MaxMessage {
			t.Errorf("%d bytes: a message of %d", n, len(want))
		}
	}
}
