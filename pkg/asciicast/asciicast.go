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
	line bytes.Buffer
	json *json.Encoder
}

// NewWriter writes the header.
func NewWriter(w io.Writer, h Header) (*Writer, error) {
	h.Version = Version
	a := &Writer{w: w}
	a.json = json.NewEncoder(&a.line)
	a.json.SetEscapeHTML(false)
	if err := a.json.Encode(h); err != nil {
		return nil, fmt.Errorf("asciicast header: %w", err)
	}
	return a, a.flush()
}

// Write writes one event with one Write of the writer below. Data that is not UTF-8 is replaced by
// U+FFFD, because JSON has only text; see Text. Events must not go back in time: one that would is
// written with the time of the one before.
func (a *Writer) Write(at time.Duration, code, data string) error {
	a.last = max(a.last, at)
	a.line.WriteByte('[')
	a.line.WriteString(strconv.FormatFloat(a.last.Seconds(), 'f', 6, 64))
	a.line.WriteString(`,"` + code + `",`)
	if err := a.json.Encode(data); err != nil {
		return fmt.Errorf("asciicast event: %w", err)
	}
	a.line.Truncate(a.line.Len() - 1) // the newline
	a.line.WriteString("]\n")
	return a.flush()
}

func (a *Writer) flush() error {
	_, err := a.w.Write(a.line.Bytes())
	a.line.Reset()
	return err
}

// Text cuts a stream of bytes into pieces of whole characters: an unfinished one at the end of a
// piece is kept for the next.
type Text struct {
	pending []byte // fewer than utf8.UTFMax
}

// Next returns what is complete with p. It may be empty.
func (t *Text) Next(p []byte) string {
	if len(t.pending) > 0 {
		p = append(t.pending, p...)
		t.pending = nil
	}
	cut := len(p) - unfinished(p)
	t.pending = append(t.pending, p[cut:]...)
	return string(p[:cut])
}

// Rest returns what was never completed.
func (t *Text) Rest() string {
	rest := string(t.pending)
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
