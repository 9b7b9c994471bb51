package config

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"
)

func TestDefaultIsValid(t *testing.T) {
	c := Default()
	if err := c.Validate(); err != nil {
		t.Fatal(err)
	}
}

// What users get who configure nothing, and what the documentation promises them.
func TestDefaults(t *testing.T) {
	c := Default()
	for name, pair := range map[string][2]any{
		"stream_address":           {c.StreamAddress, "127.0.0.1:0"},
		"metrics_address":          {c.MetricsAddress, ""},
		"exec.on_disconnect":       {c.Exec.OnDisconnect, "hangup"},
		"exec.term_after":          {c.Exec.TermAfter, Duration(5 * time.Second)},
		"exec.kill_after":          {c.Exec.KillAfter, Duration(10 * time.Second)},
		"exec.drain_idle":          {c.Exec.DrainIdle, Duration(2 * time.Second)},
		"exec.idle_timeout":        {c.Exec.IdleTimeout, Duration(4 * time.Hour)},
		"exec.max_lifetime":        {c.Exec.MaxLifetime, Duration(0)},
		"attach.idle_timeout":      {c.Attach.IdleTimeout, Duration(4 * time.Hour)},
		"attach.max_lifetime":      {c.Attach.MaxLifetime, Duration(0)},
		"portforward.idle_timeout": {c.PortForward.IdleTimeout, Duration(4 * time.Hour)},
		"portforward.max_lifetime": {c.PortForward.MaxLifetime, Duration(0)},
		"exec.helpers":             {len(c.Exec.Helpers), 0},
		"attach.input_end":         {c.Attach.InputEnd, "detach"},
		"portforward.refused":      {c.PortForward.Refused, "reset"},
		"portforward.stall":        {c.PortForward.Stall, Duration(30 * time.Second)},
	} {
		if pair[0] != pair[1] {
			t.Errorf("%s is %v by default, want %v", name, pair[0], pair[1])
		}
	}
	if SyncOutput >= 16<<20 {
		t.Errorf("an ExecSync returns up to %d bytes, more than gRPC lets through", SyncOutput)
	}
}

// parse is like Read for a text. Its errors begin with the line.
func (c *Config) parse(text []byte) error {
	if err := c.decode(text); err != nil {
		return err
	}
	if problem := c.validate(); problem != nil {
		return fmt.Errorf("%d: %w", lineOf(text, problem.key), problem)
	}
	return nil
}

func TestFileOverridesDefaults(t *testing.T) {
	c := Default()
	err := c.parse([]byte("listen = 'unix:///tmp/s.sock'\n[exec]\non_disconnect = 'keep'\ndrain_idle = '0s'\n"))
	if err != nil {
		t.Fatal(err)
	}
	if c.Listen != "unix:///tmp/s.sock" || c.Exec.OnDisconnect != "keep" || c.Exec.DrainIdle != 0 {
		t.Errorf("not taken over: %+v", c)
	}
	if want := Duration(10 * time.Minute); c.Exec.DrainMax != want {
		t.Errorf("DrainMax = %v, want the default %v", c.Exec.DrainMax, want)
	}
}

// A file with keys that were removed is read, and each of them is told of, also after a reload.
func TestRemovedKeys(t *testing.T) {
	c := Default()
	text := "[limits]\nwaiting_starts = 5\nsessions = 7\n[exec]\nengine = 'auto'\nsync_output = 'x'\n[attach]\nbuffer = 1\n[recording]\nbuffer = 1\n"
	if err := c.parse([]byte(text)); err != nil {
		t.Fatal(err)
	}
	if c.Limits.Sessions != 7 {
		t.Errorf("limits.sessions is %d: what else is in the file was lost", c.Limits.Sessions)
	}
	told := c.Removed()
	for i, key := range []string{"attach.buffer", "exec.engine", "exec.sync_output", "limits.waiting_starts", "recording.buffer"} {
		if len(told) != len(removed) || !strings.HasPrefix(told[i], key+" was removed: ") {
			t.Fatalf("told %q, want %d with %s as number %d", told, len(removed), key, i)
		}
	}
	running := Default()
	if _, needRestart := running.Reload(c); len(needRestart) > 0 || len(running.Removed()) != len(told) {
		t.Errorf("after a reload: need a restart %q, told %q", needRestart, running.Removed())
	}
	mended := Default()
	if running.Reload(mended); len(running.Removed()) > 0 {
		t.Errorf("told although they are gone: %q", running.Removed())
	}
	// A key that is there is not told as removed.
	var keys []string
	collectKeys("", Default(), &keys)
	for key := range removed {
		if slices.Contains(keys, key) {
			t.Errorf("%s is a key", key)
		}
	}
}

// A mistake is refused with its line and a hint.
func TestMistakes(t *testing.T) {
	tests := []struct {
		name, text string
		want       []string // parts of the message
	}{
		{"unknown key", "\nlissten = 'unix:///x'\n", []string{"2: ", `unknown key "lissten"`, `did you mean "listen"?`}},
		{"unknown key in a table", "[exec]\n\ndrain_iddle = '1s'\n", []string{"3: ", `"exec.drain_iddle"`, `"exec.drain_idle"`}},
		{"key in the wrong table", "drain_idle = '1s'\n", []string{"1: ", `did you mean "exec.drain_idle"?`}},
		{"unknown table", "[exek]\nx = 1\n", []string{"unknown key"}},
		{"not a duration", "[exec]\ndrain_idle = '2'\n", []string{"2: ", `"2" is not a duration`}},
		{"negative duration", "[exec]\ndrain_idle = '-2s'\n", []string{"2: ", "negative"}},
		{"wrong type", "listen = 5\n", []string{"1: "}},
		{"not TOML", "listen\n", []string{"1: "}},
		{"choice", "[exec]\nterm_after='1s'\non_disconnect = 'hangupp'\n", []string{"3: ", "hangup, kill, keep", `did you mean "hangup"?`}},
		{"log level", "log_level = 'loud'\n", []string{"1: ", "debug, info, warn, error"}},
		{"not a socket", "listen = 'tcp://1.2.3.4:5'\n", []string{"1: ", "unix:///path"}},
		{"relative socket", "listen = 'unix://x.sock'\n", []string{"1: ", "unix:///path"}},
		{"long socket", "listen = 'unix:///" + strings.Repeat("x", 120) + "'\n", []string{"1: ", "107"}},
		{"upstream is ourselves", "\n\nupstream = 'unix:///run/streamshim/streamshim.sock'\n", []string{"3: ", "the runtime's"}},
		{"not loopback", "stream_address = '0.0.0.0:0'\n", []string{"1: ", "loopback"}},
		{"no such port", "log_level = 'info'\nstream_address = '127.0.0.1:99999'\n", []string{"2: ", "stream_address", "99999", "65535"}},
		{"no such port of metrics", "metrics_address = ':70000'\n", []string{"1: ", "metrics_address", "70000"}},
		{"no such port of traces", "[traces]\nendpoint = 'collector:65536'\n", []string{"2: ", "traces.endpoint", "65536"}},
		{"no number of a port", "stream_address = '127.0.0.1:http'\n", []string{"1: ", "stream_address", "http"}},
		{"no such helper", "[exec]\nhelpers = ['tar', 'sh']\n", []string{"2: ", "exec.helpers", "sh"}},
		{"input end", "[attach]\ninput_end = 'stays'\n", []string{"2: ", "attach.input_end", "detach, stay", `did you mean "stay"`}},
		{"no port", "stream_address = '127.0.0.1'\n", []string{"1: ", "HOST:PORT"}},
		{"kill before term", "[exec]\nterm_after = '5s'\nkill_after = '1s'\n", []string{"3: ", "term_after"}},
		{"term at once", "[exec]\nterm_after = '0s'\n", []string{"2: ", "more than 0", `on_disconnect = "kill"`}},
		{"no linger", "[exec]\n\nlinger = '0s'\n", []string{"3: ", "more than 0"}},
		{"unknown key beside a removed one", "[exec]\nengine = 'native'\nengin = 'x'\n", []string{"3: ", `unknown key "exec.engin"`}},
		{"a mistake beside a removed key", "[exec]\nengine = 'native'\nlinger = '0s'\n", []string{"3: ", "more than 0"}},
		{"admin is the CRI socket", "listen = 'unix:///a'\nadmin = 'unix:///a'\n", []string{"2: ", "another path"}},
		{"audit destination", "[audit]\n\ndestination = 'fil'\n", []string{"3: ", "off, file, stdout, journald", `did you mean "file"?`}},
		{"audit level", "[audit]\ncommand = 'arg0'\n", []string{"2: ", `did you mean "argv0"?`}},
		{"audit fsync", "[audit]\nfsync = 'sometimes'\n", []string{"2: ", "never, interval, always"}},
		{"audit failure", "[audit]\non_failure = 'x'\n", []string{"2: ", "allow, deny"}},
		{"audit file", "[audit]\nfile = 'audit.log'\n", []string{"2: ", "absolute"}},
		{"audit size", "[audit]\nmax_size = 10\n", []string{"2: ", "4096"}},
		{"recording directory", "[recording]\ndirectory = 'x'\n", []string{"2: ", "absolute"}},
		{"recording size", "[recording]\nmax_size = 1\n", []string{"2: ", "65536"}},
		{"recording rule", "[[recording.rule]]\nnamespaces = ['a']\n[[recording.rule]]\n\nnamespaces = ['[']\n", []string{"5: ", "recording.rule[1].namespaces", "no pattern"}},
		{"recording label", "[[recording.rule]]\npod_labels = { a = '[' }\n", []string{"2: ", `label "a"`}},
		{"unknown key in a rule", "[[recording.rule]]\nnamespace = ['a']\n", []string{"2: ", `did you mean "recording.rule.namespaces"?`}},
		{"negative limit", "[limits]\nsessions = -1\n", []string{"2: ", "at least 0"}},
		{"bandwidth", "[limits]\nbandwidth = 1\n", []string{"2: ", "4096", "0 for none"}},
		{"deny kind", "[[deny]]\nkinds = ['exec']\n[[deny]]\nkinds = ['exex']\n", []string{"4: ", "deny[1].kinds", `did you mean "exec"?`}},
		{"unknown key in deny", "[[deny]]\ntti = true\n", []string{"2: ", `did you mean "deny.tty"?`}},
		{"metrics without a port", "metrics_address = '127.0.0.1'\n", []string{"1: ", "HOST:PORT"}},
		{"profiling for everybody", "\nprofiling = true\nmetrics_address = '0.0.0.0:9464'\n", []string{"2: ", "loopback"}},
		{"profiling nowhere", "profiling = true\n", []string{"1: ", "metrics_address"}},
		{"traces without a port", "[traces]\nendpoint = 'collector'\n", []string{"2: ", "traces.endpoint", "HOST:PORT"}},
		{"traces with a URL", "[traces]\nendpoint = 'http://collector:4317/x'\n", []string{"2: ", "traces.endpoint", "HOST:PORT"}},
		{"sample ratio", "[traces]\n\nsample_ratio = 1.5\n", []string{"3: ", "between 0 and 1"}},
		{"sample ratio nan", "[traces]\nsample_ratio = nan\n", []string{"2: ", "between 0 and 1"}},
		{"duration without a unit", "[exec]\n\nidle_timeout = 30\n", []string{"3: ", "exec.idle_timeout", "30 is not a duration"}},
		{"duration with a point", "[shutdown]\ndrain = 1.5\n", []string{"2: ", "shutdown.drain", "1.5 is not a duration"}},
		{"string for a number", "[limits]\nsessions = 'many'\n", []string{"2: limits.sessions: this is of type string, expected: integer"}},
		{"string for a list", "[[deny]]\nkinds = 'exec'\n", []string{"2: deny.kinds: ", "expected: list of strings"}},
		{"number for a table", "deny = 3\n", []string{"1: deny: ", "expected: table"}},
		{"unknown table", "[limit]\nsessions = 3\n", []string{"1: ", `did you mean "limits"?`}},
		{"upstream written otherwise", "listen = '/run/a.sock'\nupstream = 'unix:///run/a.sock'\n", []string{"2: ", "itself serves"}},
		{"admin written otherwise", "listen = '/run/a.sock'\nadmin = 'unix:///run/a.sock'\n", []string{"2: ", "CRI is served"}},
		{"relative state", "state_dir = 'x'\n", []string{"1: ", "absolute"}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			c := Default()
			err := c.parse([]byte(tt.text))
			if err == nil {
				t.Fatal("accepted")
			}
			for _, want := range tt.want {
				if !strings.Contains(err.Error(), want) {
					t.Errorf("message %q lacks %q", err, want)
				}
			}
		})
	}
}

func TestReadNamesTheFile(t *testing.T) {
	c := Default()
	missing := filepath.Join(t.TempDir(), "none.toml")
	if err := c.Read(missing, nil); err == nil || !strings.Contains(err.Error(), missing) {
		t.Errorf("missing file: %v", err)
	}
	file := filepath.Join(t.TempDir(), "config.toml")
	if err := os.WriteFile(file, []byte("x = 1"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := c.Read(file, nil); err == nil || !strings.HasPrefix(err.Error(), file+":1: ") {
		t.Errorf("bad file: %v", err)
	}
}

func FuzzParse(f *testing.F) {
	f.Add("listen = 'unix:///x'\n[exec]\ndrain_idle = '1s'\n")
	f.Add("[exec\n")
	f.Add("exec = 1")
	f.Fuzz(func(_ *testing.T, text string) {
		c := Default()
		c.parse([]byte(text)) //nolint:errcheck // must only not panic
	})
}

// What docs/security.md says of them: nothing is written down until somebody asks for it.
func TestAuditAndRecordingAreOff(t *testing.T) {
	c := Default()
	if c.Audit.Destination != "off" || len(c.Recording.Rule) != 0 || c.Recording.Input || c.Profiling || c.MetricsAddress != "" {
		t.Errorf("audit %q, recording %+v, profiling %v, metrics %q", c.Audit.Destination, c.Recording, c.Profiling, c.MetricsAddress)
	}
}

// What is no configuration is not read into memory, and a FIFO is not waited for.
func TestFilesThatAreNoConfiguration(t *testing.T) {
	fifo := filepath.Join(t.TempDir(), "fifo")
	if err := syscall.Mkfifo(fifo, 0o600); err != nil {
		t.Fatal(err)
	}
	c := Default()
	if err := c.Read("/dev/zero", nil); err == nil || !strings.Contains(err.Error(), "larger than") {
		t.Errorf("/dev/zero: %v", err)
	}
	done := make(chan error, 1)
	go func() { done <- c.Read(fifo, nil) }()
	select {
	case <-done: // as an empty file, or an error
	case <-time.After(time.Minute):
		t.Error("a FIFO is waited for")
	}
}
