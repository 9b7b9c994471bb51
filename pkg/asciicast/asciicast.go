// Package asciicast writes and reads terminal recordings in the asciicast v2 format
// (https://docs.asciinema.org/manual/asciicast/v2/). The first line is the header, a JSON object. Each further line is an
// event, a JSON array [time, code, data].
package asciicast

import (
	"bufio"
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"strconv"
	"time"
	"unicode/utf8"
)

// Version is the version of the format.
const Version = 2

// Codes of events.
const (
	Output = "o" // what the terminal shows
	Input  = "i" // what was typed
	Resize = "r" // the new size, as "COLUMNSxROWS"
	Marker = "m" // a label; players before asciinema 2.3 skip it
)

// Header is the first line.
type Header struct {
	Version   int               `json:"version"`
	Width     int               `json:"width"`  // columns
	Height    int               `json:"height"` // rows
	Timestamp int64             `json:"timestamp,omitempty"`
	Title     string            `json:"title,omitempty"`
	Env       map[string]string `json:"env,omitempty"`
}

// Event is a line after the header.
type Event struct {
	Time time.Duration // since the beginning
	Code string
	Data string
}

// Writer writes one recording. Only one goroutine at a time may use it.
type Writer struct {
	w    io.Writer
	last time.Duration
	line []byte
}

// NewWriter writes the header and returns a Writer for the events.
func NewWriter(w io.Writer, h Header) (*Writer, error) {
	h.Version = Version
	header, err := json.Marshal(h)
	if err != nil {
		return nil, fmt.Errorf("asciicast header: %w", err)
	}
	_, err = w.Write(append(header, '\n'))
	return &Writer{w: w}, err
}

// Continue returns a Writer that continues a recording whose last event was at the time last.
func Continue(w io.Writer, last time.Duration) *Writer { return &Writer{w: w, last: last} }

// Last returns the time of the last event.
func (a *Writer) Last() time.Duration { return a.last }

// Write writes one event, with one Write of the underlying writer. Bytes that are not UTF-8 become U+FFFD, because JSON
// has only text; see Text. An event with a time before that of the last event gets the time of the last event.
func (a *Writer) Write(at time.Duration, code string, data []byte) error {
	a.last = max(a.last, at)
	b := append(a.line[:0], '[')
	b = strconv.AppendFloat(b, a.last.Seconds(), 'f', 6, 64)
	b = append(b, `,"`...)
	b = append(b, code...)
	b = append(b, `","`...)
	b = appendText(b, data)
	a.line = append(b, "\"]\n"...)
	_, err := a.w.Write(a.line)
	return err
}

// appendText appends the inside of a JSON string (RFC 8259, section 7). encoding/json takes several times as long. At the
// speed of a terminal the difference is half a processor.
func appendText(b, data []byte) []byte {
	const hex = "0123456789abcdef"
	start := 0 // of what needs no change
	for i := 0; i < len(data); {
		c := data[i]
		if c >= ' ' && c != '"' && c != '\\' && c < utf8.RuneSelf {
			i++
			continue
		}
		if c >= utf8.RuneSelf {
			if r, size := utf8.DecodeRune(data[i:]); r != utf8.RuneError || size > 1 {
				i += size
				continue
			}
		}
		b = append(b, data[start:i]...)
		switch c {
		case '"', '\\':
			b = append(b, '\\', c)
		case '\n':
			b = append(b, `\n`...)
		case '\r':
			b = append(b, `\r`...)
		case '\t':
			b = append(b, `\t`...)
		default:
			if c >= utf8.RuneSelf {
				b = utf8.AppendRune(b, utf8.RuneError)
			} else {
				b = append(b, `\u00`...)
				b = append(b, hex[c>>4], hex[c&0xf])
			}
		}
		i++
		start = i
	}
	return append(b, data[start:]...)
}

// Text splits a stream of bytes into pieces of whole characters. An incomplete character at the end of a piece is kept
// for the next one.
type Text struct {
	pending []byte // fewer than utf8.UTFMax
}

// Next returns the complete characters up to the end of p. The result is valid as long as p, and may be empty.
func (t *Text) Next(p []byte) []byte {
	if len(t.pending) > 0 {
		p = append(t.pending, p...)
		t.pending = nil
	}
	cut := len(p) - unfinished(p)
	t.pending = append(t.pending, p[cut:]...)
	return p[:cut]
}

// Pending returns what Rest would return, and keeps it.
func (t *Text) Pending() []byte { return bytes.Clone(t.pending) }

// TextAfter returns a Text that continues after pending.
func TextAfter(pending []byte) Text { return Text{pending: bytes.Clone(pending)} }

// Rest returns the incomplete character at the end of the stream.
func (t *Text) Rest() []byte {
	rest := t.pending
	t.pending = nil
	return rest
}

// unfinished returns the number of bytes of an incomplete character at the end of p.
func unfinished(p []byte) int {
	for n := 1; n < utf8.UTFMax && n <= len(p); n++ {
		tail := p[len(p)-n:]
		if utf8.RuneStart(tail[0]) {
			if utf8.FullRune(tail) {
				return 0
			}
			return n
		}
	}
	return 0
}

// maxLine bounds a line that Reader reads, in bytes.
const maxLine = 16 << 20

// Reader reads a recording.
type Reader struct {
	Header Header

	scanner *bufio.Scanner
	line    int
}

// NewReader reads the header and returns a Reader for the events.
func NewReader(r io.Reader) (*Reader, error) {
	a := &Reader{scanner: bufio.NewScanner(r)}
	a.scanner.Buffer(nil, maxLine)
	line, err := a.next()
	if err != nil {
		if errors.Is(err, io.EOF) {
			err = errors.New("it is empty")
		}
		return nil, fmt.Errorf("asciicast: %w", err)
	}
	if err := json.Unmarshal(line, &a.Header); err != nil {
		return nil, fmt.Errorf("asciicast, line 1: %w", err)
	}
	if a.Header.Version != Version {
		return nil, fmt.Errorf("asciicast version %d; only version %d can be read", a.Header.Version, Version)
	}
	return a, nil
}

// Next returns the next event, or io.EOF after the last one. It ignores a last line that is cut off, as after a crash.
func (a *Reader) Next() (Event, error) {
	line, err := a.next()
	for err == nil && len(bytes.TrimSpace(line)) == 0 {
		line, err = a.next()
	}
	if err != nil {
		return Event{}, err
	}
	var event Event
	var seconds float64
	fields := []any{&seconds, &event.Code, &event.Data}
	if err := json.Unmarshal(line, &fields); err != nil || len(fields) != 3 {
		if _, end := a.next(); errors.Is(end, io.EOF) {
			return Event{}, io.EOF
		}
		if err == nil {
			err = fmt.Errorf("%d fields, not 3", len(fields))
		}
		return Event{}, fmt.Errorf("asciicast, line %d: %w", a.line-1, err)
	}
	event.Time = time.Duration(seconds * float64(time.Second))
	return event, nil
}

func (a *Reader) next() ([]byte, error) {
	if !a.scanner.Scan() {
		if err := a.scanner.Err(); err != nil {
			return nil, fmt.Errorf("line %d: %w", a.line+1, err)
		}
		return nil, io.EOF
	}
	a.line++
	return a.scanner.Bytes(), nil
}

// Size returns the data of a Resize event.
func Size(width, height int) string { return strconv.Itoa(width) + "x" + strconv.Itoa(height) }
