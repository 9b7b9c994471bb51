package inbox

import (
	"encoding/base64"
	"errors"
	"fmt"
	"io"

	"github.com/streamshim/streamshim/pkg/streaming/internal/websocket/frames"
)

// halfClose is the first byte of the message [255, channel], by which a v5 client half-closes a channel (KEP-4006).
const halfClose = 255

// Format is how a protocol's messages name their channel.
type Format struct {
	Base64    bool // a digit, then the payload in base64
	HalfClose bool // a byte, which may be halfClose
}

// messageHeader is the channel byte of a message, decoded.
type messageHeader struct {
	channel int
	close   bool // the message is a half-close of the channel
}

// errEmptyMessage means that a message has no channel byte. Such messages are skipped, as in the stock server.
var errEmptyMessage = errors.New("empty message")

// readHeader reads a message's channel byte, or the whole message if it is a half-close. scratch has room for at least 3
// bytes. The channel may not exist, and may be negative.
func readHeader(format Format, r io.Reader, scratch []byte) (messageHeader, error) {
	if _, err := io.ReadFull(r, scratch[:1]); err != nil {
		if err == io.EOF {
			return messageHeader{}, errEmptyMessage
		}
		return messageHeader{}, err
	}
	if format.Base64 {
		return messageHeader{channel: int(scratch[0]) - '0'}, nil
	}
	if scratch[0] != halfClose || !format.HalfClose {
		return messageHeader{channel: int(scratch[0])}, nil
	}
	switch n, err := io.ReadFull(r, scratch[:2]); {
	case err == nil:
		return messageHeader{}, &frames.Violation{Code: frames.CloseProtocolError, Reason: "bytes after the channel of a half-close"}
	case n == 1 && err == io.ErrUnexpectedEOF:
		return messageHeader{channel: int(scratch[0]), close: true}, nil
	case n == 0 && err == io.EOF:
		return messageHeader{}, &frames.Violation{Code: frames.CloseProtocolError, Reason: "a half-close without a channel"}
	default:
		return messageHeader{}, err
	}
}

// base64Reader decodes one message's payload piece by piece. It is reset for each message of a connection.
type base64Reader struct {
	source  io.Reader
	encoded [MaxEncoded]byte
	pending int  // bytes in encoded that are not a whole quantum yet
	padded  bool // padding was seen, so nothing may follow
	ended   bool
}

func (r *base64Reader) reset(source io.Reader) {
	r.source, r.pending, r.padded, r.ended = source, 0, false, false
}

// Read decodes as much as p has room for, which must be at least 3 bytes. It skips line ends in the encoded text, as the
// stock server does.
func (r *base64Reader) Read(p []byte) (int, error) {
	if r.ended {
		return 0, io.EOF
	}
	most := min(len(p)/3*4, len(r.encoded))
	for {
		n, err := r.source.Read(r.encoded[r.pending:most])
		r.pending += dropLineEnds(r.encoded[r.pending : r.pending+n])
		if err == io.EOF {
			r.ended = true
			if r.pending%4 != 0 {
				return 0, &frames.Violation{Code: frames.CloseInvalidPayload, Reason: "base64 payload is cut short"}
			}
		} else if err != nil {
			return 0, err
		}
		if whole := r.pending / 4 * 4; whole > 0 {
			if r.padded {
				return 0, &frames.Violation{Code: frames.CloseInvalidPayload, Reason: "base64 payload goes on after its padding"}
			}
			decoded, decodeErr := base64.StdEncoding.Decode(p, r.encoded[:whole])
			if decodeErr != nil {
				return 0, &frames.Violation{Code: frames.CloseInvalidPayload, Reason: fmt.Sprintf("payload is not base64: %v", decodeErr)}
			}
			r.padded = decoded < whole/4*3
			r.pending = copy(r.encoded[:], r.encoded[whole:r.pending])
			return decoded, nil
		}
		if r.ended {
			return 0, io.EOF
		}
	}
}

// dropLineEnds removes CR and LF from b in place and returns the number of bytes that are left.
func dropLineEnds(b []byte) int {
	kept := 0
	for _, c := range b {
		if c != '\r' && c != '\n' {
			b[kept] = c
			kept++
		}
	}
	return kept
}
