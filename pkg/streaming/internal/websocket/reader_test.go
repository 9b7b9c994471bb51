package websocket

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

// heard is what a client's bytes come to: its messages and control frames, and how they end.
func heard(r *reader) (events []string, err error) {
	r.control = func(opcode byte, payload []byte) {
		events = append(events, fmt.Sprintf("control %x %q", opcode, payload))
	}
	for {
		opcode, err := r.next()
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

func newReader(source io.Reader, limit uint64) *reader {
	return &reader{source: bufio.NewReader(source), limit: limit}
}

// raw is a frame with a length of any form, with a mask of 0.
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
		code       int // of the Close that answers a violation, 0 for none
		end        string
	}{
		{name: "nothing", end: "EOF"},
		{name: "messages", wire: frame(opBinary, true, "a") + frame(opText, true, "b") + frame(opBinary, true, ""),
			events: []string{`message 2 "a"`, `message 1 "b"`, `message 2 ""`}, end: "EOF"},
		{name: "16 and 64 bits of length", wire: frame(opBinary, true, long[:126]) + frame(opBinary, true, long[:65535]) + frame(opBinary, true, long),
			events: []string{fmt.Sprintf("message 2 %q", long[:126]), fmt.Sprintf("message 2 %q", long[:65535]), fmt.Sprintf("message 2 %q", long)}, end: "EOF"},
		{name: "fragments, a Ping among them", wire: frame(opBinary, false, "a") + frame(opPing, true, "p") + frame(opContinuation, false, "") + frame(opContinuation, true, "b"),
			events: []string{`control 9 "p"`, `message 2 "ab"`}, end: "EOF"},
		{name: "Pong", wire: frame(opPong, true, "x"), events: []string{`control a "x"`}, end: "EOF"},
		{name: "Close", wire: frame(opClose, true, "\x03\xe8bye"), end: "Close with code 1000"},
		{name: "Close without a code", wire: frame(opClose, true, ""), end: "Close with code 1005"},
		{name: "Close of an application", wire: frame(opClose, true, "\x0f\xa0"), end: "Close with code 4000"},
		{name: "Close with half a code", wire: frame(opClose, true, "\x03"), code: closeProtocolError},
		{name: "Close with 1005", wire: frame(opClose, true, "\x03\xed"), code: closeProtocolError},
		{name: "Close with 1006", wire: frame(opClose, true, "\x03\xee"), code: closeProtocolError},
		{name: "Close with 999", wire: frame(opClose, true, "\x03\xe7"), code: closeProtocolError},
		{name: "Close with 2000", wire: frame(opClose, true, "\x07\xd0"), code: closeProtocolError},
		{name: "Close with 5000", wire: frame(opClose, true, "\x13\x88"), code: closeProtocolError},
		{name: "Close with broken UTF-8", wire: frame(opClose, true, "\x03\xe8\xff"), code: closeProtocolError},
		{name: "reserved bit", wire: raw(0xC2, 0x80), code: closeProtocolError},
		{name: "no mask", wire: "\x82\x01a1234", code: closeProtocolError},
		{name: "unknown opcode", wire: raw(0x83, 0x80), code: closeProtocolError},
		{name: "unknown control opcode", wire: raw(0x8B, 0x80), code: closeProtocolError},
		{name: "continuation of nothing", wire: frame(opContinuation, true, "a"), code: closeProtocolError},
		{name: "message within a message", wire: frame(opBinary, false, "a") + frame(opBinary, true, "b"), code: closeProtocolError},
		{name: "fragment of a Ping", wire: frame(opPing, false, ""), code: closeProtocolError},
		{name: "long Ping", wire: frame(opPing, true, long[:126]), code: closeProtocolError},
		{name: "message over the limit", wire: frame(opBinary, true, long+long), code: closeTooBig},
		{name: "fragments over the limit", wire: frame(opBinary, false, long) + frame(opContinuation, true, long), events: nil, code: closeTooBig},
		{name: "length that overflows", wire: raw(0x82, 0xFF, 255, 255, 255, 255, 255, 255, 255, 255), code: closeTooBig},
		{name: "end within a header", wire: "\x82", end: "unexpected EOF"},
		{name: "end within a long header", wire: "\x82\xfe\x01", end: "unexpected EOF"},
		{name: "end within payload", wire: frame(opBinary, true, "abc")[:7], end: "unexpected EOF"},
		{name: "end within a Ping", wire: frame(opPing, true, "abc")[:7], end: "unexpected EOF"},
		{name: "end between fragments", wire: frame(opBinary, false, "abc"), end: "unexpected EOF"},
	} {
		for name, source := range map[string]io.Reader{"": strings.NewReader(test.wire), ", byte by byte": iotest.OneByteReader(strings.NewReader(test.wire))} {
			events, err := heard(newReader(source, 100_000))
			if fmt.Sprint(events) != fmt.Sprint(test.events) {
				t.Errorf("%s%s: %.100q, want %.100q", test.name, name, events, test.events)
			}
			var broken *protocolError
			switch {
			case test.code != 0 && (!errors.As(err, &broken) || broken.code != test.code):
				t.Errorf("%s%s: %v, want code %d", test.name, name, err, test.code)
			case test.code == 0 && strings.TrimPrefix(err.Error(), "websocket: ") != test.end:
				t.Errorf("%s%s: %v, want %q", test.name, name, err, test.end)
			}
		}
	}
}

// A message of which not all was read is skipped, with its further fragments.
func TestReaderSkips(t *testing.T) {
	wire := append(clientFrame(opBinary, false, "abc"), clientFrame(opPing, true, "")...)
	wire = append(wire, clientFrame(opContinuation, true, "def")...)
	wire = append(wire, clientFrame(opText, true, "x")...)
	pings := 0
	r := newReader(bytes.NewReader(wire), 0)
	r.control = func(byte, []byte) { pings++ }
	r.next()
	r.Read(make([]byte, 2))
	if opcode, err := r.next(); opcode != opText || err != nil || pings != 1 {
		t.Errorf("opcode %x, %v, %d pings", opcode, err, pings)
	}
}

func TestUnmask(t *testing.T) {
	const mask = 0x04030201
	for size := range 200 {
		for split := 0; split <= size; split += 7 {
			p := bytes.Repeat([]byte{0xA5}, size)
			unmask(p[split:], unmask(p[:split], mask))
			for i, c := range p {
				if c != 0xA5^byte(i%4+1) {
					t.Fatalf("byte %d of %d, split at %d: %x", i, size, split, c)
				}
			}
		}
	}
}

// FuzzReader reads anything at all, whole and so that another reader goes on at some byte with a copy of the state,
// which must come to the same.
func FuzzReader(f *testing.F) {
	f.Add(clientFrame(opBinary, true, "hello"), uint16(3))
	f.Add(append(clientFrame(opText, false, "a"), clientFrame(opContinuation, true, "b")...), uint16(1))
	f.Add(append(clientFrame(opPing, true, "p"), clientFrame(opClose, true, "\x03\xe8")...), uint16(2))
	f.Add([]byte{0x82, 0xFF, 0, 0, 0, 0, 0, 1, 0, 0, 1, 2, 3, 4, 5}, uint16(9))
	f.Fuzz(func(t *testing.T, wire []byte, after uint16) {
		whole, wholeErr := contents(newReader(bytes.NewReader(wire), 1<<20), -1)
		parts, partsErr := contents(newReader(bytes.NewReader(wire), 1<<20), int(after))
		if !bytes.Equal(whole, parts) || fmt.Sprint(wholeErr) != fmt.Sprint(partsErr) {
			t.Errorf("%q, %v; handed over after %d reads %q, %v", whole, wholeErr, after, parts, partsErr)
		}
	})
}

// contents is all that a reader gives, small pieces at a time; after so many of them another reader goes on.
func contents(r *reader, handOver int) (all []byte, err error) {
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
			r = &reader{readState: r.readState, source: source, limit: r.limit, control: note}
		}
		handOver--
		if !r.InMessage {
			opcode, err := r.next()
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
