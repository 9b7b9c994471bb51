package main

import (
	"bytes"
	"context"
	"encoding/json"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/streamshim/streamshim/pkg/admin"
	"github.com/streamshim/streamshim/pkg/session"
)

func TestParseSignal(t *testing.T) {
	for name, want := range map[string]syscall.Signal{
		"INT": syscall.SIGINT, "sigterm": syscall.SIGTERM, "9": syscall.SIGKILL, "64": 64,
		"": 0, "0": 0, "65": 0, "-1": 0, "NOPE": 0,
	} {
		got, err := parseSignal(name)
		if got != want || (err == nil) != (want != 0) {
			t.Errorf("%q: %v, %v", name, got, err)
		}
	}
}

func TestAdminSocket(t *testing.T) {
	dir := t.TempDir()
	write := func(name, text string) string {
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		return path
	}
	on, off := write("on.toml", "admin = 'unix:///from/file.sock'\n"), write("off.toml", "admin = ''\n")
	for _, test := range []struct{ address, file, want, problem string }{
		{"unix:///named.sock", on, "/named.sock", ""},
		{"", on, "/from/file.sock", ""},
		{"", off, "", "disables the admin socket"},
		{"", filepath.Join(dir, "none"), "", "none"},
		{"tcp://x", "", "", "--admin"},
	} {
		got, err := adminSocket(test.address, test.file)
		if got != test.want || (test.problem == "") != (err == nil) || (err != nil && !strings.Contains(err.Error(), test.problem)) {
			t.Errorf("%+v: %q, %v", test, got, err)
		}
	}
}

func TestTexts(t *testing.T) {
	for got, want := range map[string]string{
		age(0): "0s", age(119): "119s", age(120): "2m", age(7200): "2h00m", age(90061): "25h01m", age(172800): "2d",
		bytesText(1023): "1023", bytesText(1024): "1.0Ki", bytesText(5 << 30): "5.0Gi",
		session.Printable("a\x1b[31mb\nü"): "a\uFFFD[31mb\uFFFDü", shorten("äöüß", 3): "äö…", shorten("äöü", 3): "äöü",
	} {
		if got != want {
			t.Errorf("%q, want %q", got, want)
		}
	}
}

// What a user has chosen does not reach the operator's terminal as it is, nor break the table.
func TestTableIsSafe(t *testing.T) {
	var out bytes.Buffer
	err := printSessions(&out, []admin.Session{{ID: "1", Command: []string{"\x1b]0;title\x07\n\tx"}, PodName: "a\nb"}}, "wide")
	if err != nil || strings.Count(out.String(), "\n") != 2 || strings.ContainsAny(out.String(), "\x1b\x07\t") {
		t.Errorf("%q, %v", out.String(), err)
	}
}

// The same for JSON, whose reader gets what the user wrote.
func TestJSONIsSafe(t *testing.T) {
	command := []string{"\x1b[2J", "\u009b2J", "\u202etxt", "\x7f", "ü", "\U000e0001", "a\"b"}
	var out bytes.Buffer
	if err := session.WriteJSON(&out, admin.Session{ID: "1", Command: command}); err != nil {
		t.Fatal(err)
	}
	if strings.ContainsAny(out.String(), "\x1b\u009b\u202e\x7f\U000e0001") || !strings.Contains(out.String(), "ü") {
		t.Errorf("%q", out.String())
	}
	var read admin.Session
	if err := json.Unmarshal(out.Bytes(), &read); err != nil || !slices.Equal(read.Command, command) {
		t.Errorf("it is read as %q, %v", read.Command, err)
	}
}

func TestPlay(t *testing.T) {
	const cast = `{"version":2,"width":80,"height":24}
[0.0,"o","a"]
[0.1,"i","typed"]
[0.1,"r","100x50"]
[3600.0,"o","b"]
`
	var out bytes.Buffer
	began := time.Now()
	if err := play(t.Context(), &out, strings.NewReader(cast), &pace{speed: 1, idle: 10 * time.Millisecond}); err != nil {
		t.Fatal(err)
	}
	if out.String() != "ab" || time.Since(began) > time.Minute {
		t.Errorf("%q after %v", out.String(), time.Since(began))
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := play(ctx, &out, strings.NewReader(cast), &pace{speed: 1}); err == nil {
		t.Error("it is played after ^C")
	}
	if err := play(t.Context(), &out, strings.NewReader("no recording"), nil); err == nil {
		t.Error("it plays anything")
	}
}
