package frames

import (
	"bufio"
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"strings"
	"testing"
	"testing/iotest"
)

// heard returns the messages and control frames in a client's bytes, and how they end.
func heard(r *Reader) (events []string, err error) {
	r.control = func(opcode byte, payload []byte) {
		events = append(events, fmt.Sprintf("control %x %q", opcode, payload))
	}
	for {
		opcode, err := r.Next()
		if err != nil {
			return events, err
		}
		payload, err := io.ReadAll(r)
		if err != nil {
			return events, err
		}
		events = append(events, fmt.Sprintf("message %x %q", opcode, payload))
	}
}

func newReader(source io.Reader, limit uint64) *Reader {
	return &Reader{source: bufio.NewReader(source), limit: limit}
}

// raw returns a frame with a length of any form and a mask of 0.
func raw(first, second byte, length ...byte) string {
	return string(append([]byte{first, second}, append(length, 0, 0, 0, 0)...))
}

func TestReader(t *testing.T) {
	frame := func(opcode byte, final bool, payload string) string {
		return string(clientFrame(opcode, final, payload))
	}
	long := strings.Repeat("0123456789", 7000)
	for _, test := range []struct {
		name, wire string
		events     []string
		code       int // of the Close that answers a violation; 0 for none
		end        string
	}{
		{name: "nothing", end: "EOF"},
		{name: "messages", wire: frame(OpBinary, true, "a") + frame(OpText, true, "b") + frame(OpBinary, true, ""),
			events: []string{`message 2 "a"`, `message 1 "b"`, `message 2 ""`}, end: "EOF"},
		{name: "16 and 64 bits of length", wire: frame(OpBinary, true, long[:126]) + frame(OpBinary, true, long[:65535]) + frame(OpBinary, true, long),
			events: []string{fmt.Sprintf("message 2 %q", long[:126]), fmt.Sprintf("message 2 %q", long[:65535]), fmt.Sprintf("message 2 %q", long)}, end: "EOF"},
		{name: "fragments, a Ping among them", wire: frame(OpBinary, false, "a") + frame(OpPing, true, "p") + frame(OpContinuation, false, "") + frame(OpContinuation, true, "b"),
			events: []string{`control 9 "p"`, `message 2 "ab"`}, end: "EOF"},
		{name: "Pong", wire: frame(OpPong, true, "x"), events: []string{`control a "x"`}, end: "EOF"},
		{name: "Close", wire: frame(OpClose, true, "\x03\xe8bye"), end: "Close with code 1000"},
		{name: "Close without a code", wire: frame(OpClose, true, ""), end: "Close with code 1005"},
		{name: "Close of an application", wire: frame(OpClose, true, "\x0f\xa0"), end: "Close with code 4000"},
		{name: "Close with half a code", wire: frame(OpClose, true, "\x03"), code: CloseProtocolError},
		{name: "Close with 1005", wire: frame(OpClose, true, "\x03\xed"), code: CloseProtocolError},
		{name: "Close with 1006", wire: frame(OpClose, true, "\x03\xee"), code: CloseProtocolError},
		{name: "Close with 999", wire: frame(OpClose, true, "\x03\xe7"), code: CloseProtocolError},
		{name: "Close with 2000", wire: frame(OpClose, true, "\x07\xd0"), code: CloseProtocolError},
		{name: "Close with 5000", wire: frame(OpClose, true, "\x13\x88"), code: CloseProtocolError},
		{name: "Close with broken UTF-8", wire: frame(OpClose, true, "\x03\xe8\xff"), code: CloseProtocolError},
		{name: "reserved bit", wire: raw(0xC2, 0x80), code: CloseProtocolError},
		{name: "no mask", wire: "\x82\x01a1234", code: CloseProtocolError},
		{name: "unknown opcode", wire: raw(0x83, 0x80), code: CloseProtocolError},
		{name: "unknown control opcode", wire: raw(0x8B, 0x80), code: CloseProtocolError},
		{name: "continuation of nothing", wire: frame(OpContinuation, true, "a"), code: CloseProtocolError},
		{name: "message within a message", wire: frame(OpBinary, false, "a") + frame(OpBinary, true, "b"), code: CloseProtocolError},
		{name: "fragment of a Ping", wire: frame(OpPing, false, ""), code: CloseProtocolError},
		{name: "long Ping", wire: frame(OpPing, true, long[:126]), code: CloseProtocolError},
		{name: "message over the limit", wire: frame(OpBinary, true, long+long), code: CloseTooBig},
		{name: "fragments over the limit", wire: frame(OpBinary, false, long) + frame(OpContinuation, true, long), events: nil, code: CloseTooBig},
		{name: "length that overflows", wire: raw(0x82, 0xFF, 255, 255, 255, 255, 255, 255, 255, 255), code: CloseTooBig},
		{name: "end within a header", wire: "\x82", end: "unexpected EOF"},
		{name: "end within a long header", wire: "\x82\xfe\x01", end: "unexpected EOF"},
		{name: "end within payload", wire: frame(OpBinary, true, "abc")[:7], end: "unexpected EOF"},
		{name: "end within a Ping", wire: frame(OpPing, true, "abc")[:7], end: "unexpected EOF"},
		{name: "end between fragments", wire: frame(OpBinary, false, "abc"), end: "unexpected EOF"},
	} {
		for name, source := range map[string]io.Reader{"": strings.NewReader(test.wire), ", byte by byte": iotest.OneByteReader(strings.NewReader(test.wire))} {
			events, err := heard(newReader(source, 100_000))
			if fmt.Sprint(events) != fmt.Sprint(test.events) {
				t.Errorf("%s%s: %.100q, want %.100q", test.name, name, events, test.events)
			}
			var broken *Violation
			switch {
			case test.code != 0 && (!errors.As(err, &broken) || broken.Code != test.code):
				t.Errorf("%s%s: %v, want code %d", test.name, name, err, test.code)
			case test.code == 0 && strings.TrimPrefix(err.Error(), "websocket: ") != test.end:
				t.Errorf("%s%s: %v, want %q", test.name, name, err, test.end)
			}
		}
	}
}

// TestReaderSkips checks that the rest of a message that was not read to its end is skipped, with its further fragments.
func TestReaderSkips(t *testing.T) {
	wire := append(clientFrame(OpBinary, false, "abc"), clientFrame(OpPing, true, "")...)
	wire = append(wire, clientFrame(OpContinuation, true, "def")...)
	wire = append(wire, clientFrame(OpText, true, "x")...)
	pings := 0
	r := newReader(bytes.NewReader(wire), 0)
	r.control = func(byte, []byte) { pings++ }
	r.Next()
	r.Read(make([]byte, 2))
	if opcode, err := r.Next(); opcode != OpText || err != nil || pings != 1 {
		t.Errorf("opcode %x, %v, %d pings", opcode, err, pings)
	}
}

func TestUnmask(t *testing.T) {
	const mask = 0x04030201
	for size := range 200 {
		for split := 0; split <= size; split += 7 {
			p := bytes.Repeat([]byte{0xA5}, size)
			Unmask(p[split:], Unmask(p[:split], mask))
			for i, c := range p {
				if c != 0xA5^byte(i%4+1) {
					t.Fatalf("byte %d of %d, split at %d: %x", i, size, split, c)
				}
			}
		}
	}
}

// FuzzReader reads arbitrary bytes twice: at once, and with another reader that continues at some byte from a copy of the
// state. Both must read the same.
func FuzzReader(f *testing.F) {
	f.Add(clientFrame(OpBinary, true, "hello"), uint16(3))
	f.Add(append(clientFrame(OpText, false, "a"), clientFrame(OpContinuation, true, "b")...), uint16(1))
	f.Add(append(clientFrame(OpPing, true, "p"), clientFrame(OpClose, true, "\x03\xe8")...), uint16(2))
	f.Add([]byte{0x82, 0xFF, 0, 0, 0, 0, 0, 1, 0, 0, 1, 2, 3, 4, 5}, uint16(9))
	f.Fuzz(func(t *testing.T, wire []byte, after uint16) {
		whole, wholeErr := contents(newReader(bytes.NewReader(wire), 1<<20), -1)
		parts, partsErr := contents(newReader(bytes.NewReader(wire), 1<<20), int(after))
		if !bytes.Equal(whole, parts) || fmt.Sprint(wholeErr) != fmt.Sprint(partsErr) {
			t.Errorf("%q, %v; handed over after %d reads %q, %v", whole, wholeErr, after, parts, partsErr)
		}
	})
}

// contents returns all that a reader reads, in small pieces. After handOver of them another reader continues.
func contents(r *Reader, handOver int) (all []byte, err error) {
	note := func(opcode byte, payload []byte) {
		all = append(append(all, opcode), payload...)
	}
	r.control = note
	p := make([]byte, 3)
	for {
		if handOver == 0 {
			waiting, _ := r.source.Peek(r.source.Buffered())
			source := bufio.NewReader(io.MultiReader(bytes.NewReader(bytes.Clone(waiting)), r.source))
			r.source.Discard(len(waiting))
			r = &Reader{ReadState: r.ReadState, source: source, limit: r.limit, control: note}
		}
		handOver--
		if !r.InMessage {
			opcode, err := r.Next()
			if err != nil {
				return all, err
			}
			all = binary.BigEndian.AppendUint16(all, uint16(opcode))
			continue
		}
		n, err := r.Read(p)
		all = append(all, p[:n]...)
		if err != nil && err != io.EOF {
			return all, err
		}
	}
}

// clientFrame returns a masked frame. The mask is zero, so that the payload is readable.
func clientFrame(opcode byte, final bool, payload string) []byte {
	b := make([]byte, MaxHeader)
	b = b[:PutHeader(b, opcode, len(payload))]
	if !final {
		b[0] &^= Final
	}
	b[1] |= 0x80
	b = append(b, 0, 0, 0, 0)
	return append(b, payload...)
}
