package frames

import (
	"bufio"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"unicode/utf8"
)

// ReadState is the parser's position in a client's byte stream. It is plain data, and its methods do no I/O: Reader
// reads from the socket. With the bytes in Reader's buffer it is all that another process needs to continue.
type ReadState struct {
	InMessage bool   // a message has begun and its last frame has not ended
	Last      bool   // the frame being read is the message's last
	Remaining uint64 // payload bytes of that frame that are still to be read
	Mask      uint32 // of that frame, rotated to the next byte, little-endian
	Size      uint64 // bytes of the message, by the headers of its frames so far
}

// frameHeader is the head of a client's frame.
type frameHeader struct {
	opcode byte
	final  bool
	size   uint64
	mask   uint32
}

// headerSize returns the length of a client's frame header, by the header's second byte.
func headerSize(second byte) int {
	switch second & 0x7F {
	case 126:
		return 2 + 2 + 4
	case 127:
		return 2 + 8 + 4
	}
	return 2 + 4
}

// parseFrameHeader decodes headerSize bytes. The error is a *Violation.
func parseFrameHeader(b []byte) (h frameHeader, err error) {
	switch {
	case b[0]&0x70 != 0:
		return h, violation("a reserved bit is set")
	case b[1]&0x80 == 0:
		return h, violation("a frame without a mask")
	}
	h.opcode, h.final, h.size = b[0]&0x0F, b[0]&Final != 0, uint64(b[1]&0x7F)
	mask := b[2:]
	switch h.size {
	case 126:
		h.size, mask = uint64(binary.BigEndian.Uint16(b[2:])), b[4:]
	case 127:
		h.size, mask = binary.BigEndian.Uint64(b[2:]), b[10:]
	}
	h.mask = binary.LittleEndian.Uint32(mask)
	if h.opcode >= OpClose && (!h.final || h.size > MaxControlPayload) {
		return h, violation("a control frame that is long or a fragment")
	}
	return h, nil
}

// begin moves from between two frames into a data frame. A limit of 0 is no limit. The error is a *Violation.
func (s *ReadState) begin(h frameHeader, limit uint64) error {
	switch h.opcode {
	case OpContinuation:
		if !s.InMessage {
			return violation("a continuation without a beginning")
		}
	case OpText, OpBinary:
		if s.InMessage {
			return violation("a message within a message")
		}
		s.InMessage, s.Size = true, 0
	default:
		return violation(fmt.Sprintf("unknown opcode %d", h.opcode))
	}
	if h.size > 1<<63-1-s.Size || limit > 0 && s.Size+h.size > limit {
		return &Violation{CloseTooBig, "the message is larger than is taken"}
	}
	s.Last, s.Remaining, s.Mask, s.Size = h.final, h.size, h.mask, s.Size+h.size
	return nil
}

// Unmask decodes the frame's next payload bytes in place.
func (s *ReadState) Unmask(p []byte) {
	s.Mask = Unmask(p, s.Mask)
	s.Remaining -= uint64(len(p))
}

// Unmask decodes p and returns the mask for the byte after it.
func Unmask(p []byte, mask uint32) uint32 {
	wide := uint64(mask)<<32 | uint64(mask)
	for len(p) >= 32 {
		binary.LittleEndian.PutUint64(p, binary.LittleEndian.Uint64(p)^wide)
		binary.LittleEndian.PutUint64(p[8:], binary.LittleEndian.Uint64(p[8:])^wide)
		binary.LittleEndian.PutUint64(p[16:], binary.LittleEndian.Uint64(p[16:])^wide)
		binary.LittleEndian.PutUint64(p[24:], binary.LittleEndian.Uint64(p[24:])^wide)
		p = p[32:]
	}
	for i := range p {
		p[i] ^= byte(mask)
		mask = mask>>8 | mask<<24
	}
	return mask
}

func violation(reason string) error { return &Violation{CloseProtocolError, reason} }

// CloseFrame is the error of a read after the client has sent Close.
type CloseFrame struct {
	Code int // CloseNoStatus if the frame has none
	Text string
}

func (c *CloseFrame) Error() string { return fmt.Sprintf("websocket: Close with code %d", c.Code) }

// parseClose decodes a Close frame's payload into a *CloseFrame, or a *Violation.
func parseClose(payload []byte) error {
	if len(payload) == 0 {
		return &CloseFrame{Code: CloseNoStatus}
	}
	if len(payload) == 1 {
		return violation("a Close with half a code")
	}
	c := &CloseFrame{int(binary.BigEndian.Uint16(payload)), string(payload[2:])}
	switch {
	case c.Code >= 1000 && c.Code <= 1013 && c.Code != 1004 && c.Code != CloseNoStatus && c.Code != 1006,
		c.Code >= 3000 && c.Code <= 4999:
	default:
		return violation(fmt.Sprintf("a Close with code %d, which must not be sent", c.Code))
	}
	if !utf8.ValidString(c.Text) {
		return violation("a Close whose reason is not UTF-8")
	}
	return c
}

// Reader reads a client's messages and passes on its control frames. Its Read returns the rest of the current message,
// with io.EOF at its end. The end of the byte stream within a message is io.ErrUnexpectedEOF.
type Reader struct {
	ReadState
	source  *bufio.Reader
	limit   uint64 // bytes in one message; 0 is none
	control func(opcode byte, payload []byte)
	scratch [MaxControlPayload]byte
}

// NewReader returns a Reader that passes control frames to control and accepts messages of up to limit bytes; 0 is no
// limit.
func NewReader(source *bufio.Reader, limit uint64, control func(opcode byte, payload []byte)) *Reader {
	return &Reader{source: source, limit: limit, control: control}
}

// Buffered returns what was read and not parsed yet. It is valid until the next read.
func (r *Reader) Buffered() []byte {
	p, _ := r.source.Peek(r.source.Buffered()) //nolint:errcheck // the bytes are there
	return p
}

// Next skips the rest of a message and waits for the beginning of the next. The error is io.EOF at the end of the stream
// between two messages, a *CloseFrame for the client's Close, or a *Violation.
func (r *Reader) Next() (opcode byte, err error) {
	for r.InMessage {
		if r.Remaining > 0 {
			n, err := r.source.Discard(int(min(r.Remaining, 1<<30))) //nolint:gosec // fits
			r.Remaining -= uint64(n)                                 //nolint:gosec // not negative
			if err != nil {
				return 0, cut(err)
			}
		} else if _, err := r.advance(); err != nil && err != io.EOF {
			return 0, err
		}
	}
	return r.nextFrame()
}

// advance moves on after the end of a data frame. It returns io.EOF at the end of the message.
func (r *Reader) advance() (opcode byte, err error) {
	if r.Last {
		r.InMessage = false
		return 0, io.EOF
	}
	opcode, err = r.nextFrame()
	return opcode, cut(err)
}

// nextFrame reads the control frames before the next data frame, and its header.
func (r *Reader) nextFrame() (opcode byte, err error) {
	for {
		b, err := r.source.Peek(2)
		if err == nil {
			b, err = r.source.Peek(headerSize(b[1]))
		}
		if err != nil {
			if len(b) > 0 {
				err = cut(err)
			}
			return 0, err
		}
		h, err := parseFrameHeader(b)
		if err != nil {
			return 0, err
		}
		if h.opcode < OpClose {
			if err := r.begin(h, r.limit); err != nil {
				return 0, err
			}
			r.source.Discard(len(b)) //nolint:errcheck // is there
			return h.opcode, nil
		}
		// Consume a control frame only when it is complete: a freeze may come in between.
		size := len(b)
		b, err = r.source.Peek(size + int(h.size)) //nolint:gosec // a control frame's
		if err != nil {
			return 0, cut(err)
		}
		payload := r.scratch[:h.size]
		copy(payload, b[size:])
		r.source.Discard(len(b)) //nolint:errcheck // is there
		Unmask(payload, h.mask)
		switch h.opcode {
		case OpClose:
			return 0, parseClose(payload)
		case OpPing, OpPong:
			r.control(h.opcode, payload)
		default:
			return 0, violation(fmt.Sprintf("unknown opcode %d", h.opcode))
		}
	}
}

// Read reads payload of the message.
func (r *Reader) Read(p []byte) (int, error) {
	if !r.InMessage {
		return 0, io.EOF
	}
	for r.Remaining == 0 {
		if _, err := r.advance(); err != nil {
			return 0, err
		}
	}
	n, err := r.source.Read(p[:min(uint64(len(p)), r.Remaining)])
	r.Unmask(p[:n])
	return n, cut(err)
}

// cut turns io.EOF into io.ErrUnexpectedEOF, for an end of the stream where bytes are missing.
func cut(err error) error {
	if errors.Is(err, io.EOF) {
		return io.ErrUnexpectedEOF
	}
	return err
}
