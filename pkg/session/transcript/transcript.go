// Package transcript writes what a session's tap has seen as an asciicast.
package transcript

import (
	"bytes"
	"fmt"
	"time"

	"github.com/streamshim/streamshim/pkg/asciicast"
	"github.com/streamshim/streamshim/pkg/session"
)

// Encoder writes what a session's tap has seen.
type Encoder struct {
	cast  *asciicast.Writer
	start time.Time
	tty   bool

	stdout, stderr, input asciicast.Text
}

// NewEncoder returns an encoder that counts time from start. Without a terminal nothing has translated line ends
// into what players need, so the encoder does it.
func NewEncoder(cast *asciicast.Writer, start time.Time, tty bool) *Encoder {
	return &Encoder{cast: cast, start: start, tty: tty}
}

// State holds incomplete characters.
type State struct {
	Stdout, Stderr, Input []byte
}

// State returns what Continue needs, apart from the writer's own state.
func (e *Encoder) State() State {
	return State{Stdout: e.stdout.Pending(), Stderr: e.stderr.Pending(), Input: e.input.Pending()}
}

// Continue returns an encoder that continues from another's state.
func Continue(cast *asciicast.Writer, start time.Time, tty bool, state State) *Encoder {
	return &Encoder{
		cast: cast, start: start, tty: tty,
		stdout: asciicast.TextAfter(state.Stdout), stderr: asciicast.TextAfter(state.Stderr), input: asciicast.TextAfter(state.Input),
	}
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
		return e.text(at, asciicast.Output, text.Next(event.Data))
	case session.TapInput:
		return e.text(at, asciicast.Input, e.input.Next(event.Data))
	case session.TapResize:
		return e.cast.Write(at, asciicast.Resize, []byte(asciicast.Size(int(event.Size.Width), int(event.Size.Height))))
	default:
		// What follows does not complete a character from before the gap.
		if err := e.Close(event.At); err != nil {
			return err
		}
		return e.cast.Write(at, asciicast.Marker, fmt.Appendf(nil, "streamshim: %d bytes are missing here", event.Lost))
	}
}

// Close ends all streams: it writes what was never completed to a character.
func (e *Encoder) Close(end time.Time) error {
	at := end.Sub(e.start)
	for _, rest := range [][]byte{e.stdout.Rest(), e.stderr.Rest()} {
		if err := e.text(at, asciicast.Output, rest); err != nil {
			return err
		}
	}
	return e.text(at, asciicast.Input, e.input.Rest())
}

func (e *Encoder) text(at time.Duration, code string, text []byte) error {
	if len(text) == 0 {
		return nil
	}
	if !e.tty && code == asciicast.Output {
		text = bytes.ReplaceAll(text, []byte("\n"), []byte("\r\n"))
	}
	return e.cast.Write(at, code, text)
}
