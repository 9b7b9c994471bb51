package recording

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"
	"unicode/utf8"

	"golang.org/x/sys/unix"

	"github.com/streamshim/streamshim/internal/testutil"
	"github.com/streamshim/streamshim/internal/testutil/leak"
	"github.com/streamshim/streamshim/pkg/session"
	"github.com/streamshim/streamshim/pkg/workload"
)

// cast is a recording as a strict reader of the asciicast v2 specification sees it. It shares no
// code with what wrote it.
type cast struct {
	width, height int
	header        map[string]any
	events        []castEvent
}

type castEvent struct {
	time       float64
	code, data string
}

// parseCast fails the test for anything that the specification does not allow.
func parseCast(t *testing.T, path string) cast {
	t.Helper()
	text, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if !utf8.Valid(text) {
		t.Error("the file is not UTF-8")
	}
	lines := bytes.Split(text, []byte("\n"))
	if last := lines[len(lines)-1]; len(last) != 0 {
		t.Errorf("the last line %q does not end", last)
	}
	lines = lines[:len(lines)-1]
	var c cast
	if err := json.Unmarshal(lines[0], &c.header); err != nil {
		t.Fatalf("header %q: %v", lines[0], err)
	}
	positive := func(name string) int {
		n, ok := c.header[name].(float64)
		if !ok || n < 1 || n != float64(int(n)) {
			t.Errorf("header: %s is %v, which is no positive integer", name, c.header[name])
		}
		return int(n)
	}
	if c.header["version"] != float64(2) {
		t.Errorf("version %v", c.header["version"])
	}
	c.width, c.height = positive("width"), positive("height")
	positive("timestamp")
	if env, ok := c.header["env"]; ok {
		for name, value := range env.(map[string]any) {
			if _, ok := value.(string); !ok {
				t.Errorf("env %s is %v", name, value)
			}
		}
	}
	if _, ok := c.header["title"].(string); !ok {
		t.Errorf("title %v", c.header["title"])
	}
	last := 0.0
	for i, line := range lines[1:] {
		var fields []any
		if err := json.Unmarshal(line, &fields); err != nil || len(fields) != 3 {
			t.Fatalf("line %d %q: %v", i+2, line, err)
		}
		at, isTime := fields[0].(float64)
		code, isCode := fields[1].(string)
		data, isData := fields[2].(string)
		if !isTime || !isCode || !isData || at < last || !strings.Contains("oirm", code) || len(code) != 1 {
			t.Fatalf("line %d %q is no event, or goes back in time", i+2, line)
		}
		last = at
		if code == "r" {
			columns, rows, ok := strings.Cut(data, "x")
			_, errC := strconv.ParseUint(columns, 10, 16)
			_, errR := strconv.ParseUint(rows, 10, 16)
			if !ok || errC != nil || errR != nil {
				t.Errorf("size %q", data)
			}
		}
		c.events = append(c.events, castEvent{at, code, data})
	}
	return c
}

// text is everything with this code.
func (c cast) text(code string) string {
	var all strings.Builder
	for _, e := range c.events {
		if e.code == code {
			all.WriteString(e.data)
		}
	}
	return all.String()
}

type fixture struct {
	*Recorder
	config   Config
	registry *session.Registry
}

func newFixture(t *testing.T, change func(*Config)) *fixture {
	t.Helper()
	leak.Check(t)
	f := &fixture{config: Config{
		Directory: filepath.Join(t.TempDir(), "recordings"), Buffer: 1 << 20, Command: session.CommandArg0,
		Rules: []session.Selector{{Namespaces: []string{"shop"}}},
	}}
	if change != nil {
		change(&f.config)
	}
	f.Recorder = New(f.config, nil, slog.New(slog.DiscardHandler))
	f.registry = session.NewRegistry(slog.New(slog.DiscardHandler), f.Recorder)
	t.Cleanup(f.Close)
	return f
}

var info = session.Info{
	Kind: session.Exec, Target: workload.Target{PodName: "web", PodNamespace: "shop", ContainerName: "app"},
	Command: []string{"/bin/bash", "-l"}, TTY: true,
}

func (f *fixture) begin(t *testing.T, info session.Info) *session.Session {
	t.Helper()
	s, err := f.registry.Begin(t.Context(), info)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func (f *fixture) files(t *testing.T) []string {
	t.Helper()
	files, err := filepath.Glob(filepath.Join(f.config.Directory, "*"+Suffix))
	if err != nil {
		t.Fatal(err)
	}
	return files
}

// only waits until everything is written, and returns the only recording.
func (f *fixture) only(t *testing.T) cast {
	t.Helper()
	f.Close()
	files := f.files(t)
	if len(files) != 1 {
		t.Fatalf("recordings: %v", files)
	}
	return parseCast(t, files[0])
}

func TestRecording(t *testing.T) {
	f := newFixture(t, nil)
	s := f.begin(t, info)
	s.Taps.Resize(workload.Size{Width: 132, Height: 43})
	s.Taps.Resize(workload.Size{Width: 132, Height: 43}) // a size that is no news
	euro := []byte("10 €\r\n")
	s.Taps.Output(session.Stdout, euro[:4])
	s.Taps.Output(session.Stdout, euro[4:])
	s.Taps.Output(session.Stdout, []byte("\x1b[0m\xff\x00<"))
	s.Taps.Input([]byte("password\r"))
	s.Taps.Resize(workload.Size{Width: 80, Height: 25})
	s.Taps.Output(session.Stdout, []byte("end\xe2"))
	s.End(session.Outcome{Reason: "exited", ExitCode: 3})
	c := f.only(t)
	if c.width != 132 || c.height != 43 {
		t.Errorf("size %dx%d", c.width, c.height)
	}
	if got := c.text("o"); got != "10 €\r\n\x1b[0m\uFFFD\x00<end\uFFFD" {
		t.Errorf("output %q", got)
	}
	if c.text("i") != "" {
		t.Errorf("input was recorded: %q", c.text("i"))
	}
	if c.text("r") != "80x25" {
		t.Errorf("sizes %q", c.text("r"))
	}
	if c.text("m") != "streamshim: the session has ended: exited, exit code 3" || f.Incomplete() != 0 {
		t.Errorf("marker %q, %d incomplete", c.text("m"), f.Incomplete())
	}
	env, _ := c.header["env"].(map[string]any)
	if env["SHELL"] != "/bin/bash" || env["TERM"] != "xterm" || c.header["title"] != "exec shop/web/app: /bin/bash" {
		t.Errorf("header %v", c.header)
	}
	for path, mode := range map[string]os.FileMode{f.files(t)[0]: 0o600, f.config.Directory: 0o700} {
		if stat, err := os.Stat(path); err != nil || stat.Mode().Perm() != mode {
			t.Errorf("%s has mode %v, %v", path, stat.Mode(), err)
		}
	}
}

func TestInputWhenAsked(t *testing.T) {
	f := newFixture(t, func(c *Config) { c.Input = true })
	s := f.begin(t, info)
	s.Taps.Input([]byte("ls\r"))
	s.End(session.Outcome{Reason: "exited"})
	if got := f.only(t).text("i"); got != "ls\r" {
		t.Errorf("input %q", got)
	}
}

func TestSelection(t *testing.T) {
	testutil.Slow(t)
	yes := true
	for _, test := range []struct {
		name   string
		change func(*Config)
		info   func(*session.Info)
		want   int
	}{
		{"chosen", nil, nil, 1},
		{"no rules", func(c *Config) { c.Rules = nil }, nil, 0},
		{"other namespace", nil, func(i *session.Info) { i.Target.PodNamespace = "bank" }, 0},
		{"pattern", func(c *Config) { c.Rules[0].Namespaces = []string{"x", "sh*"} }, nil, 1},
		{"no terminal", nil, func(i *session.Info) { i.TTY = false }, 0},
		{"no terminal, asked for", func(c *Config) { c.NonTTY = true }, func(i *session.Info) { i.TTY = false }, 1},
		{"port-forward", func(c *Config) { c.NonTTY = true }, func(i *session.Info) { i.TTY, i.Kind = false, session.PortForward }, 0},
		{"attach", nil, func(i *session.Info) { i.Kind = session.Attach }, 1},
		{"label", func(c *Config) { c.Rules[0].PodLabels = map[string]string{"a": "*"} }, func(i *session.Info) { i.PodLabels = map[string]string{"a": "b"} }, 1},
		{"other label", func(c *Config) { c.Rules[0].PodLabels = map[string]string{"a": "c"} }, func(i *session.Info) { i.PodLabels = map[string]string{"a": "b"} }, 0},
		{"unknown labels", func(c *Config) { c.Rules[0].PodLabels = map[string]string{"a": "c"} }, nil, 1},
		{"second rule", func(c *Config) {
			c.Rules = append([]session.Selector{{Namespaces: []string{"no"}}}, session.Selector{TTY: &yes})
		}, nil, 1},
	} {
		t.Run(test.name, func(t *testing.T) {
			f := newFixture(t, test.change)
			i := info
			if test.info != nil {
				test.info(&i)
			}
			f.begin(t, i).End(session.Outcome{Reason: "exited"})
			f.Close()
			if got := len(f.files(t)); got != test.want {
				t.Errorf("%d recordings", got)
			}
		})
	}
}

// At its size limit a recording ends with a remark, and stays below the limit.
func TestSizeLimit(t *testing.T) {
	for _, deny := range []bool{false, true} {
		t.Run(fmt.Sprintf("deny=%v", deny), func(t *testing.T) {
			f := newFixture(t, func(c *Config) { c.MaxSize, c.Deny = 64<<10, deny })
			s := f.begin(t, info)
			for range 2000 {
				s.Taps.Output(session.Stdout, bytes.Repeat([]byte("x"), 50))
			}
			if deny {
				<-s.Context().Done()
				var end *session.EndError
				if !errors.As(context.Cause(s.Context()), &end) || end.Reason != "recording-failed" {
					t.Errorf("the session ends with %v", context.Cause(s.Context()))
				}
			}
			s.End(session.Outcome{Reason: "exited"})
			c := f.only(t)
			if stat, err := os.Stat(f.files(t)[0]); err != nil || stat.Size() > 64<<10 || stat.Size() < 60<<10 {
				t.Errorf("%d bytes, %v", stat.Size(), err)
			}
			if !strings.Contains(c.text("m"), "size limit") {
				t.Errorf("marker %q", c.text("m"))
			}
			if n := f.Incomplete(); n != 1 {
				t.Errorf("%d are counted as incomplete", n)
			}
		})
	}
}

// A session that is faster than its recording has a gap that says how much is missing; one that must be recorded waits.
func TestOverflow(t *testing.T) {
	testutil.Slow(t)
	for _, deny := range []bool{false, true} {
		t.Run(fmt.Sprintf("deny=%v", deny), func(t *testing.T) {
			f := newFixture(t, func(c *Config) { c.Buffer, c.Deny = 64<<10, deny })
			s := f.begin(t, info)
			const chunk = 8 << 10
			chunks := 20000
			if deny {
				chunks = 500
			}
			began := time.Now()
			for i := range chunks {
				if err := s.Taps.Output(session.Stdout, bytes.Repeat([]byte{byte('a' + i%26)}, chunk)); err != nil {
					t.Fatal(err)
				}
			}
			t.Logf("%d MB passed in %v", chunk*chunks>>20, time.Since(began))
			if s.Context().Err() != nil {
				t.Error("the session was ended")
			}
			s.End(session.Outcome{Reason: "exited"})
			c := f.only(t)
			if n := f.Incomplete(); (n == 0) != deny {
				t.Errorf("%d are counted as incomplete", n)
			}
			if deny {
				if got := len(c.text("o")); got != chunk*chunks {
					t.Errorf("%d bytes are recorded of %d", got, chunk*chunks)
				}
				return
			}
			missing := 0
			for _, e := range c.events {
				n := 0
				if _, err := fmt.Sscanf(e.data, "streamshim: %d bytes are missing here", &n); e.code == "m" && err == nil {
					missing += n
				}
			}
			if got := len(c.text("o")); missing == 0 || got+missing != chunk*chunks {
				t.Errorf("%d bytes are recorded and %d said to be missing, of %d", got, missing, chunk*chunks)
			}
		})
	}
}

func tmpfs(t *testing.T, size string) string {
	t.Helper()
	dir := t.TempDir()
	if err := unix.Mount("tmpfs", dir, "tmpfs", 0, "size="+size); err != nil {
		t.Skipf("mount a tmpfs: %v", err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(dir, 0); err != nil {
			t.Error(err)
		}
	})
	return dir
}

// When the disk runs full during a session, what is written stays readable; when it is full before,
// deny refuses.
func TestFullDisk(t *testing.T) {
	for _, deny := range []bool{false, true} {
		t.Run(fmt.Sprintf("deny=%v", deny), func(t *testing.T) {
			f := newFixture(t, func(c *Config) { c.Directory, c.Deny = filepath.Join(tmpfs(t, "128k"), "r"), deny })
			s := f.begin(t, info)
			for range 200 {
				s.Taps.Output(session.Stdout, bytes.Repeat([]byte("x"), 1000))
			}
			if deny {
				<-s.Context().Done()
			}
			s.End(session.Outcome{Reason: "exited"})
			f.writers.Wait()
			parseCast(t, f.files(t)[0])
			again, err := f.registry.Begin(t.Context(), info)
			var refused *session.RefusedError
			if deny != errors.As(err, &refused) || (err == nil) == deny {
				t.Errorf("with a full disk: %v", err)
			}
			if again != nil {
				again.End(session.Outcome{Reason: "exited"})
			}
			f.Close()
			if n := f.Incomplete(); n != 2 {
				t.Errorf("%d are counted as incomplete", n)
			}
		})
	}
}

// Files that are removed under a recording harm nobody.
func TestRemovedWhileRecording(t *testing.T) {
	f := newFixture(t, func(c *Config) { c.Deny = true })
	s := f.begin(t, info)
	if err := os.RemoveAll(f.config.Directory); err != nil {
		t.Fatal(err)
	}
	s.Taps.Output(session.Stdout, []byte("x"))
	s.End(session.Outcome{Reason: "exited"})
	f.writers.Wait()
	f.begin(t, info).End(session.Outcome{Reason: "exited"})
	f.only(t)
}

func TestRetention(t *testing.T) {
	f := newFixture(t, func(c *Config) { c.MaxFiles = 3 })
	if err := os.MkdirAll(f.config.Directory, 0o700); err != nil {
		t.Fatal(err)
	}
	foreign := filepath.Join(f.config.Directory, "0-not-ours.txt")
	if err := os.WriteFile(foreign, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	for i := range 6 {
		s := f.begin(t, info)
		s.End(session.Outcome{Reason: "exited"})
		f.writers.Wait()
		if left := len(f.files(t)); left != min(i+1, 3) {
			t.Errorf("%d files after %d recordings", left, i+1)
		}
	}
	files := f.files(t)
	if len(files) != 3 {
		t.Errorf("%d files are left", len(files))
	}
	if _, err := os.Stat(foreign); err != nil {
		t.Error(err)
	}
	f.config.MaxTotal = 1
	f.place(f.config.Directory).retain(f.config)
	if files := f.files(t); len(files) != 0 {
		t.Errorf("with a total of one byte %v are left", files)
	}
}

func TestLiveRecordingsStay(t *testing.T) {
	f := newFixture(t, func(c *Config) { c.MaxTotal = 1 })
	live := f.begin(t, info)
	f.begin(t, info).End(session.Outcome{Reason: "exited"})
	f.place(f.config.Directory).retain(f.config)
	if len(f.files(t)) == 0 {
		t.Error("a recording was removed while it was written")
	}
	live.End(session.Outcome{Reason: "exited"})
	f.Close()
}

func TestFileName(t *testing.T) {
	s := &session.Session{ID: "0123456789abcdef", Start: time.Unix(1, 0)}
	s.Target = workload.Target{PodNamespace: "../etc", PodName: strings.Repeat("ü/", 200), ContainerName: "a b"}
	name := fileName(s)
	if strings.ContainsAny(name, "/ ") || len(name) > 255 || !strings.HasPrefix(name, "19700101T000001.000Z_..-etc_") {
		t.Errorf("name %q", name)
	}
}

// Where a session must be recorded, what is delivered was written before, on a full disk too.
func TestNothingIsDeliveredUnrecorded(t *testing.T) {
	const piece = 1000
	f := newFixture(t, func(c *Config) {
		c.Directory, c.Deny, c.Buffer, c.Input = filepath.Join(tmpfs(t, "512k"), "r"), true, 64<<10, true
	})
	s := f.begin(t, info)
	recorded := func(code string) int { return len(parseCast(t, f.files(t)[0]).text(code)) }
	deliver := map[string]func([]byte) error{
		"o": func(p []byte) error { return s.Taps.Output(session.Stdout, p) },
		"i": s.Taps.Input,
	}
	delivered := map[string]int{}
	for full := false; !full; {
		for code, show := range deliver {
			if delivered[code] > 64<<20 {
				t.Fatal("the disk is never full")
			}
			full = show(bytes.Repeat([]byte("x"), piece)) != nil
			if full {
				break
			}
			delivered[code] += piece
			if delivered[code]%(100*piece) == 0 && recorded(code) != delivered[code] {
				t.Fatalf("%q: %d bytes were delivered and %d recorded at that moment", code, delivered[code], recorded(code))
			}
		}
	}
	var end *session.EndError
	if !errors.As(context.Cause(s.Context()), &end) || end.Reason != "recording-failed" {
		t.Errorf("the session ends with %v", context.Cause(s.Context()))
	}
	for code, show := range deliver {
		if show([]byte("y")) == nil {
			t.Errorf("%q: delivered after the recording's end", code)
		}
	}
	s.End(session.Outcome{Reason: "exited"})
	f.writers.Wait()
	for code, n := range delivered {
		if got := recorded(code); got < n || n == 0 {
			t.Errorf("%q: %d bytes were delivered and %d recorded", code, n, got)
		}
	}
}

// A disk that does not answer ends a session that must be recorded, and does not hold it up for ever.
func TestDiskThatDoesNotAnswer(t *testing.T) {
	f := newFixture(t, func(c *Config) { c.Deny = true })
	s := f.begin(t, info)
	tap := newBlockingTap(f.recordings[s], nil) // whose events nobody takes
	tap.patience = 20 * time.Millisecond
	if err := tap.Output(session.Stdout, []byte("x")); !errors.Is(err, errSlowDisk) {
		t.Errorf("it ends with %v", err)
	}
	if s.Context().Err() == nil {
		t.Error("the session goes on")
	}
	s.End(session.Outcome{Reason: "exited"})
	f.Close()
	if n := f.Incomplete(); n != 1 {
		t.Errorf("%d are counted as incomplete", n)
	}
}
