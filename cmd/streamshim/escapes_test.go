package main

import (
	"bytes"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// What a container's output would tell the operator's terminal to do is shown instead, however it is cut.
func TestEscapesAreShown(t *testing.T) {
	for in, want := range map[string]string{
		"plain\ttext\r\nü€😀\n":      "plain\ttext\r\nü€😀\r\n",
		"\x1b[31mred\x1b]0;title\a": `\x1b[31mred\x1b]0;title\a`,
		"good\rbad":                 `good\rbad`,
		"\u009b5n\u202eabc\x7f":     `\u009b5n\u202eabc\x7f`,
		"\xff\xfe":                  `\xff\xfe`,
	} {
		for cut := range len(in) + 1 {
			if cut > 0 && in[cut-1] == '\r' {
				continue // whether it ends a line is not known before the next character
			}
			var out bytes.Buffer
			w := &escapeWriter{out: &out}
			w.Write([]byte(in[:cut]))
			w.Write([]byte(in[cut:]))
			if out.String() != want {
				t.Errorf("%q cut at %d: %q, want %q", in, cut, &out, want)
			}
		}
	}
}

// FuzzEscapes: nothing comes through that a terminal obeys.
func FuzzEscapes(f *testing.F) {
	f.Add([]byte("\x1b[0m\r\n"), 2)
	f.Fuzz(func(t *testing.T, text []byte, cut int) {
		if cut < 0 || cut > len(text) {
			return
		}
		var out bytes.Buffer
		w := &escapeWriter{out: &out}
		w.Write(text[:cut])
		w.Write(text[cut:])
		if i := strings.IndexFunc(strings.ReplaceAll(out.String(), "\r\n", ""), func(r rune) bool {
			return r < ' ' && r != '\t' || r >= 0x7f && r < 0xa0 || r == 0x202e
		}); i >= 0 {
			t.Errorf("%q became %q", text, out.String())
		}
	})
}

func TestReplayShowsEscapes(t *testing.T) {
	file := filepath.Join(t.TempDir(), "x.cast")
	const text = "{\"version\":2,\"width\":80,\"height\":24,\"timestamp\":1}\n[0.0,\"o\",\"\\u001b]52;c;eA==\\u0007hello\"]\n"
	if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	for flag, want := range map[string]string{"obey": "\x1b]52;c;eA==\ahello", "show": `\x1b]52;c;eA==\ahello`} {
		if out, err := run(t, "sessions", "replay", "--escapes", flag, file); err != nil || out != want {
			t.Errorf("%s: %q, %v", flag, out, err)
		}
	}
	if _, err := run(t, "sessions", "replay", "--escapes", "maybe", file); err == nil {
		t.Error("an unknown mode was accepted")
	}
}
