package asciicast

import (
	"bytes"
	"fmt"
	"time"

	"github.com/streamshim/streamshim/pkg/session"
)

// Encoder writes what a session's tap has seen.
type Encoder struct {
	cast  *Writer
	start time.Time
	tty   bool

	stdout, stderr, input Text
}

// NewEncoder returns an encoder that counts time from start. Without a terminal nobody has turned
// the ends of lines into what players want; then the encoder does.
func NewEncoder(cast *Writer, start time.Time, tty bool) *Encoder {
	return &Encoder{cast: cast, start: start, tty: tty}
}

// Encode writes one event.
func (e *Encoder) Encode(event *session.TapEvent) error {
	at := event.At.Sub(e.start)
	switch event.Kind {
	case session.TapOutput:
		text := &e.stdout
		if event.From == session.Stderr {
			text = &e.stderr
		}
		return e.text(at, Output, text.Next(event.Data))
	case session.TapInput:
		return e.text(at, Input, e.input.Next(event.Data))
	case session.TapResize:
		return e.cast.Write(at, Resize, []byte(Size(int(event.Width), int(event.Height))))
	default:
		// What comes next does not continue a character from before the gap.
		if err := e.Close(event.At); err != nil {
			return err
		}
		return e.cast.Write(at, Marker, fmt.Appendf(nil, "streamshim: %d bytes are missing here", event.Lost))
	}
}

// Close ends all streams: it writes what was never completed to a character.
func (e *Encoder) Close(end time.Time) error {
	at := end.Sub(e.start)
	for _, rest := range [][]byte{e.stdout.Rest(), e.stderr.Rest()} {
		if err := e.text(at, Output, rest); err != nil {
			return err
		}
	}
	return e.text(at, Input, e.input.Rest())
}

func (e *Encoder) text(at time.Duration, code string, text []byte) error {
	if len(text) == 0 {
		return nil
	}
	if !e.tty && code == Output {
		text = bytes.ReplaceAll(text, []byte("\n"), []byte("\r\n"))
	}
	return e.cast.Write(at, code, text)
}
