package asciicast

import (
	"bytes"
	"encoding/json"
	"errors"
	"io"
	"strings"
	"testing"
	"time"
	"unicode/utf8"
)

func TestWriteAndRead(t *testing.T) {
	var file bytes.Buffer
	w, err := NewWriter(&file, Header{Width: 80, Height: 24, Timestamp: 1, Title: "a <b> & \"c\"", Env: map[string]string{"TERM": "xterm"}})
	if err != nil {
		t.Fatal(err)
	}
	want := []Event{
		{0, Output, "plain\r\n"},
		{1500 * time.Millisecond, Output, "\x1b[31m<&>\u2028\x00\"\\"},
		{1500 * time.Millisecond, Resize, "100x50"},
		{1500 * time.Millisecond, Input, "ü😀"},
		{2 * time.Second, Marker, "m"},
	}
	for _, e := range want {
		at := e.Time
		if e.Code == Resize {
			at = time.Second // back in time
		}
		if err := w.Write(at, e.Code, []byte(e.Data)); err != nil {
			t.Fatal(err)
		}
	}
	if !strings.HasPrefix(file.String(), `{"version":2,"width":80,"height":24,"timestamp":1,`) || !strings.Contains(file.String(), `[1.500000,"o","`) {
		t.Errorf("file:\n%s", file.String())
	}
	r, err := NewReader(&file)
	if err != nil {
		t.Fatal(err)
	}
	if r.Header.Title != "a <b> & \"c\"" || r.Header.Env["TERM"] != "xterm" {
		t.Errorf("header %+v", r.Header)
	}
	for i, e := range want {
		got, err := r.Next()
		if err != nil || got != e {
			t.Errorf("event %d: %+v, %v, want %+v", i, got, err, e)
		}
	}
	if _, err := r.Next(); err != io.EOF {
		t.Errorf("at the end: %v", err)
	}
}

func TestReadMistakes(t *testing.T) {
	const header = `{"version":2,"width":1,"height":1}` + "\n"
	for _, test := range []struct{ name, text, want string }{
		{"empty", "", "empty"},
		{"no JSON", "x\n", "line 1"},
		{"old version", `{"version":1}` + "\n", "version 1"},
		{"no array", header + "{}\n" + `[1,"o","x"]` + "\n", "line 2"},
		{"too few", header + `[1,"o"]` + "\n" + `[1,"o","x"]` + "\n", "line 2"},
		{"cut off", header + `[1,"o","x`, ""},
		{"good", header + "\n" + `[1,"o","x"]` + "\n", ""},
	} {
		t.Run(test.name, func(t *testing.T) {
			r, err := NewReader(strings.NewReader(test.text))
			for err == nil {
				_, err = r.Next()
			}
			if test.want == "" && !errors.Is(err, io.EOF) || !strings.Contains(err.Error(), test.want) {
				t.Errorf("error %v, want %q", err, test.want)
			}
		})
	}
}

// Cut anywhere, text stays what it was, and each piece is whole.
func FuzzText(f *testing.F) {
	f.Add([]byte("a ü € 😀 b"), uint8(1))
	f.Add([]byte("\xff\xc3(\xe2\x82"), uint8(2))
	f.Add([]byte("\xf0\x9f\x98"), uint8(1))
	f.Fuzz(func(t *testing.T, data []byte, size uint8) {
		var text Text
		var whole strings.Builder
		for chunk := data; len(chunk) > 0; {
			n := min(int(size)%7+1, len(chunk))
			piece := text.Next(chunk[:n])
			if utf8.Valid(data) && !utf8.Valid(piece) {
				t.Errorf("%q is cut into %q", data, piece)
			}
			whole.Write(piece)
			if len(text.pending) >= utf8.UTFMax {
				t.Errorf("%d bytes are kept", len(text.pending))
			}
			chunk = chunk[n:]
		}
		whole.Write(text.Rest())
		if whole.String() != string(data) {
			t.Errorf("%q became %q", data, whole.String())
		}
	})
}

// What is written is what encoding/json reads, except that what is no character is replaced.
func FuzzWriter(f *testing.F) {
	f.Add([]byte("a\x00\"\\\n\r\t\x1b\x7fü€😀\u2028\xff\xe2\x82\uFFFD"))
	f.Fuzz(func(t *testing.T, data []byte) {
		var line bytes.Buffer
		w := &Writer{w: &line}
		if err := w.Write(time.Second, Output, data); err != nil {
			t.Fatal(err)
		}
		var fields []any
		if err := json.Unmarshal(line.Bytes(), &fields); err != nil || len(fields) != 3 {
			t.Fatalf("%q: %v", line.Bytes(), err)
		}
		if !utf8.Valid(line.Bytes()) || bytes.Count(line.Bytes(), []byte("\n")) != 1 {
			t.Errorf("line %q", line.Bytes())
		}
		if want := string([]rune(string(data))); fields[2] != want {
			t.Errorf("%q became %q", want, fields[2])
		}
	})
}

// The reader takes anything without panic.
func FuzzReader(f *testing.F) {
	f.Add("{\"version\":2}\n[1,\"o\",\"x\"]\n")
	f.Add("{\"version\":2}\n[")
	f.Fuzz(func(_ *testing.T, text string) {
		r, err := NewReader(strings.NewReader(text))
		for err == nil {
			_, err = r.Next()
		}
	})
}
