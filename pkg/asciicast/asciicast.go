// Package asciicast writes and reads recordings of terminals in the asciicast v2 format: a JSON
// object with the header in the first line, then one JSON array [time, code, data] a line
// (https://docs.asciinema.org/manual/asciicast/v2/).
package asciicast

import (
	"bufio"
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"strconv"
	"strings"
	"time"
	"unicode/utf8"
)

// Version is the format's.
const Version = 2

// Codes of events.
const (
	Output = "o" // what the terminal shows
	Input  = "i" // what was typed
	Resize = "r" // the new size, as "COLUMNSxROWS"
	Marker = "m" // a remark with a label; players before asciinema 2.3 skip it
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

// Event is one of the other lines.
type Event struct {
	Time time.Duration // since the beginning
	Code string
	Data string
}

// Writer writes one recording. It is used by one goroutine at a time.
type Writer struct {
	w    io.Writer
	last time.Duration
	line []byte
}

// NewWriter writes the header.
func NewWriter(w io.Writer, h Header) (*Writer, error) {
	h.Version = Version
	header, err := json.Marshal(h)
	if err != nil {
		return nil, fmt.Errorf("asciicast header: %w", err)
	}
	_, err = w.Write(append(header, '\n'))
	return &Writer{w: w}, err
}

// Continue returns a writer of what follows in a recording whose last event was at a time, see Last.
func Continue(w io.Writer, last time.Duration) *Writer { return &Writer{w: w, last: last} }

// Last is the time of the last event.
func (a *Writer) Last() time.Duration { return a.last }

// Write writes one event with one Write of the writer below. Data that is not UTF-8 is replaced by
// U+FFFD, because JSON has only text; see Text. Events must not go back in time: one that would is
// written with the time of the one before.
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

// appendText appends the inside of a JSON string (RFC 8259, section 7). encoding/json takes several
// times as long, which at the speed of a terminal is worth half a processor.
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

// Text cuts a stream of bytes into pieces of whole characters: an unfinished one at the end of a
// piece is kept for the next.
type Text struct {
	pending []byte // fewer than utf8.UTFMax
}

// Next returns what is complete with p, valid as long as p. It may be empty.
func (t *Text) Next(p []byte) []byte {
	if len(t.pending) > 0 {
		p = append(t.pending, p...)
		t.pending = nil
	}
	cut := len(p) - unfinished(p)
	t.pending = append(t.pending, p[cut:]...)
	return p[:cut]
}

// Pending is what Rest would return.
func (t *Text) Pending() []byte { return bytes.Clone(t.pending) }

// TextAfter cuts what follows pending.
func TextAfter(pending []byte) Text { return Text{pending: bytes.Clone(pending)} }

// Rest returns what was never completed.
func (t *Text) Rest() []byte {
	rest := t.pending
	t.pending = nil
	return rest
}

// unfinished is the number of bytes at p's end that begin a character and do not finish it.
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

// maxLine bounds one line of a recording that is read, in bytes.
const maxLine = 16 << 20

// Reader reads a recording.
type Reader struct {
	Header Header

	scanner *bufio.Scanner
	line    int
}

// NewReader reads the header.
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

// Next returns the next event, io.EOF after the last. A last line that was cut off, as after a
// crash, is the end.
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

// Size is the data of a Resize event.
func Size(width, height int) string { return strconv.Itoa(width) + "x" + strconv.Itoa(height) }

// ParseSize reads the data of a Resize event.
func ParseSize(data string) (width, height int, err error) {
	columns, rows, ok := strings.Cut(data, "x")
	if !ok {
		return 0, 0, fmt.Errorf("%q is not COLUMNSxROWS", data)
	}
	if width, err = strconv.Atoi(columns); err == nil {
		height, err = strconv.Atoi(rows)
	}
	if err != nil {
		return 0, 0, fmt.Errorf("%q is not COLUMNSxROWS", data)
	}
	return width, height, nil
}
