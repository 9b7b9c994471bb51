package transcript

import (
	"bytes"
	"encoding/json"
	"strings"
	"testing"
	"time"

	"github.com/streamshim/streamshim/pkg/asciicast"
	"github.com/streamshim/streamshim/pkg/session"
)

func TestEncoder(t *testing.T) {
	var file bytes.Buffer
	start := time.Unix(1000, 0)
	w, err := asciicast.NewWriter(&file, asciicast.Header{Width: 80, Height: 24})
	if err != nil {
		t.Fatal(err)
	}
	e := NewEncoder(w, start, false)
	for _, event := range []session.TapEvent{
		{Kind: session.TapOutput, From: session.Stdout, Data: []byte("line\n\xe2\x82")},
		{Kind: session.TapOutput, From: session.Stderr, Data: []byte("error\n")}, // between the halves of a character
		{Kind: session.TapOutput, From: session.Stdout, Data: []byte("\xac")},
		{Kind: session.TapInput, Data: []byte("in\n")},
		{Kind: session.TapOutput, From: session.Stdout, Data: []byte("\xe2\x82")},
		{Kind: session.TapGap, Lost: 7},
	} {
		event.At = start.Add(time.Second)
		if err := e.Encode(&event); err != nil {
			t.Fatal(err)
		}
	}
	var got []string
	for i, line := range strings.Split(strings.TrimSpace(file.String()), "\n") {
		if i == 0 {
			continue
		}
		var fields []any
		if err := json.Unmarshal([]byte(line), &fields); err != nil {
			t.Fatal(err)
		}
		got = append(got, fields[1].(string)+":"+fields[2].(string))
	}
	want := []string{"o:line\r\n", "o:error\r\n", "o:€", "i:in\n", "o:\uFFFD\uFFFD", "m:streamshim: 7 bytes are missing here"}
	if strings.Join(got, "|") != strings.Join(want, "|") {
		t.Errorf("got  %q\nwant %q", got, want)
	}
}
