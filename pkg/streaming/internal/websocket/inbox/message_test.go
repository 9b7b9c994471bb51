package inbox

import (
	"bytes"
	"encoding/base64"
	"errors"
	"io"
	"strings"
	"testing"
	"testing/iotest"
	"time"

	"github.com/streamshim/streamshim/pkg/streaming/internal/memory"
	"github.com/streamshim/streamshim/pkg/streaming/internal/websocket/frames"
)

// The protocols.
var (
	unnamed  = Format{}
	v1       = Format{}
	v4       = Format{}
	v1Base64 = Format{Base64: true}
	v4Base64 = Format{Base64: true}
	v5       = Format{HalfClose: true}
)

// takeIn passes the messages to a fresh set of five readable channels and returns their payload.
func takeIn(protocol Format, wrap func(io.Reader) io.Reader, messages ...[]byte) (payload [5][]byte, ended [5]bool, err error) {
	wanted := []bool{true, true, true, true, true}
	in := New(protocol, wanted, 1<<20, 1<<20, memory.Unshared{})
	in.Wait = func(<-chan struct{}, time.Duration) error { return errors.New("no room") }
	for _, message := range messages {
		if _, err = in.Receive(wrap(bytes.NewReader(message))); err != nil {
			break
		}
	}
	for i := range ended {
		ended[i] = in.channels[i].ended
	}
	in.Fail(io.ErrUnexpectedEOF)
	for i := range payload {
		for {
			c, piece, err := in.Next(i)
			if err != nil {
				break
			}
			payload[i] = append(payload[i], piece...)
			in.Taken(i, c, len(piece))
		}
	}
	return payload, ended, err
}

func whole(r io.Reader) io.Reader { return r }

func TestReceive(t *testing.T) {
	tests := []struct {
		name     string
		protocol Format
		messages []string
		want     [5]string
		ended    [5]bool
		code     int // of the Close for a violation
	}{
		{"payload", v5, []string{"\x00abc", "\x04x", "\x00def"}, [5]string{0: "abcdef", 4: "x"}, [5]bool{}, 0},
		{"empty message", v5, []string{"", "\x00a"}, [5]string{0: "a"}, [5]bool{}, 0},
		{"empty payload", v5, []string{"\x00", "\x00a"}, [5]string{0: "a"}, [5]bool{}, 0},
		{"unknown channel is ignored", v5, []string{"\x05abc", "\xfeabc", "\x00a"}, [5]string{0: "a"}, [5]bool{}, 0},
		{"half-close", v5, []string{"\x00a", "\xff\x00"}, [5]string{0: "a"}, [5]bool{0: true}, 0},
		{"payload after half-close is ignored", v5, []string{"\xff\x00", "\x00a", "\x01b"}, [5]string{1: "b"}, [5]bool{0: true}, 0},
		{"half-close twice", v5, []string{"\xff\x02", "\xff\x02"}, [5]string{}, [5]bool{2: true}, 0},
		{"half-close of no channel", v5, []string{"\xff"}, [5]string{}, [5]bool{}, 1002},
		{"half-close of an unknown channel", v5, []string{"\xff\x05"}, [5]string{}, [5]bool{}, 1002},
		{"half-close of itself", v5, []string{"\xff\xff"}, [5]string{}, [5]bool{}, 1002},
		{"half-close with more", v5, []string{"\xff\x00\x00"}, [5]string{}, [5]bool{}, 1002},
		{"no half-close in v4", v4, []string{"\xff\x00", "\xff", "\x00a"}, [5]string{0: "a"}, [5]bool{}, 0},
		{"no half-close without name", unnamed, []string{"\xff\x00", "\x00a"}, [5]string{0: "a"}, [5]bool{}, 0},
		{"base64", v4Base64, []string{"0YWJj", "4eA==", "0ZGVm"}, [5]string{0: "abcdef", 4: "x"}, [5]bool{}, 0},
		{"base64, empty payload", v1Base64, []string{"0", "", "0YQ=="}, [5]string{0: "a"}, [5]bool{}, 0},
		{"base64, unknown channels", v1Base64, []string{"9YQ==", "/YQ==", "\x00YQ==", "\xffYQ=="}, [5]string{}, [5]bool{}, 0},
		{"base64 with line ends", v1Base64, []string{"0Y\r\nWJj\n"}, [5]string{0: "abc"}, [5]bool{}, 0},
		{"base64 cut short", v1Base64, []string{"0YWJjZ"}, [5]string{0: "abc"}, [5]bool{}, 1007},
		{"not base64", v1Base64, []string{"0Y*Jj"}, [5]string{}, [5]bool{}, 1007},
		{"base64 after its padding", v1Base64, []string{"0YQ==YQ=="}, [5]string{}, [5]bool{}, 1007},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			var messages [][]byte
			for _, message := range test.messages {
				messages = append(messages, []byte(message))
			}
			payload, ended, err := takeIn(test.protocol, whole, messages...)
			var violation *frames.Violation
			switch {
			case test.code == 0 && err != nil:
				t.Errorf("error: %v", err)
			case test.code != 0 && (!errors.As(err, &violation) || violation.Code != test.code):
				t.Errorf("got error %v, want Close code %d", err, test.code)
			}
			for i := range payload {
				// What precedes a violation in the same message may have been delivered or not.
				if got := string(payload[i]); got != test.want[i] && !(test.code != 0 && strings.HasPrefix(test.want[i], got)) {
					t.Errorf("channel %d: got %q, want %q", i, got, test.want[i])
				}
			}
			if ended != test.ended {
				t.Errorf("ended %v, want %v", ended, test.ended)
			}
		})
	}
}

var protocols = []Format{unnamed, v1, v1Base64, v4, v4Base64, v5}

// FuzzReceive receives a message at once and byte by byte, and compares both with decoding it directly.
func FuzzReceive(f *testing.F) {
	for i := range protocols {
		for _, message := range []string{"", "\x00", "\x00abc", "\x04{}", "\xff\x00", "\xff", "\xff\x00x", "\xff\xff", "\x05x",
			"0YWJj", "0YQ==", "0YQ==YQ==", "0Y\nQ\r==", "0Y*", "9YQ==", "3", "0" + strings.Repeat("YWJj", 3000) + "YQ==", "0=", "0===="} {
			f.Add(i, []byte(message))
		}
	}
	f.Fuzz(func(t *testing.T, index int, message []byte) {
		if index < 0 || index >= len(protocols) || len(message) > 256<<10 {
			return
		}
		protocol := protocols[index]
		wantPayload, wantEnded, wantError := decodeAtOnce(protocol, message)
		for name, wrap := range map[string]func(io.Reader) io.Reader{"whole": whole, "bytes": iotest.OneByteReader, "end with data": iotest.DataErrReader} {
			payload, ended, err := takeIn(protocol, wrap, message)
			var violation *frames.Violation
			if (err != nil) != wantError || err != nil && !errors.As(err, &violation) {
				t.Fatalf("%s: error %v, want one: %v", name, err, wantError)
			}
			if ended != wantEnded {
				t.Fatalf("%s: ended %v, want %v", name, ended, wantEnded)
			}
			for i := range payload {
				if !wantError && !bytes.Equal(payload[i], wantPayload[i]) {
					t.Fatalf("%s: channel %d: got %q, want %q", name, i, payload[i], wantPayload[i])
				}
			}
		}
	})
}

func decodeAtOnce(protocol Format, message []byte) (payload [5][]byte, ended [5]bool, failed bool) {
	if len(message) == 0 {
		return
	}
	channel := int(message[0])
	rest := message[1:]
	if protocol == v5 && channel == 255 {
		if len(rest) != 1 || rest[0] > 4 {
			return payload, ended, true
		}
		ended[rest[0]] = true
		return
	}
	if protocol.Base64 {
		channel -= '0'
	}
	if channel < 0 || channel > 4 {
		return
	}
	if protocol.Base64 {
		decoded, err := base64.StdEncoding.DecodeString(string(rest))
		if err != nil {
			return payload, ended, true
		}
		rest = decoded
	}
	payload[channel] = rest
	return
}
