package daemon

import (
	"bytes"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/streamshim/streamshim/pkg/config"
)

// exec.drain_max holds for ExecSync as well, which does not wait longer than 10 s anyway.
func TestDrainMaxOfExecSync(t *testing.T) {
	for set, want := range map[time.Duration]time.Duration{
		time.Second: time.Second, 10 * time.Minute: 10 * time.Second,
	} {
		c := config.Default()
		c.Exec.DrainMax = config.Duration(set)
		if got := runnerConfig(c, nil, &operation{}, hooks{}, false).DrainMax; got != want {
			t.Errorf("exec.drain_max %v: ExecSync waits %v", set, got)
		}
	}
}

// What the configuration names and is not there is said when streamshim is ready.
func TestMissingIsSaid(t *testing.T) {
	var logged bytes.Buffer
	log := slog.New(slog.NewTextHandler(&logged, nil))
	dir := t.TempDir()
	c := config.Default()
	c.Upstream, c.Runtime.Binary = "unix://"+filepath.Join(dir, "away.sock"), filepath.Join(dir, "no-runc")
	warnOfMissing(log, c)
	for _, want := range []string{"away.sock", "no-runc"} {
		if !strings.Contains(logged.String(), want) {
			t.Errorf("nothing of %s: %s", want, &logged)
		}
	}
	logged.Reset()
	if err := os.WriteFile(filepath.Join(dir, "away.sock"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	c.Runtime.Binary = "/bin/true"
	warnOfMissing(log, c)
	if os.Geteuid() == 0 && logged.Len() > 0 {
		t.Errorf("all is there: %s", &logged)
	}
}
func TestDurationsInLogs(t *testing.T) {
	var text bytes.Buffer
	slog.New(slog.NewJSONHandler(&text, logOptions(nil))).With("a", time.Second).Info("x", slog.Group("g", "b", 90*time.Second))
	for _, want := range []string{`"a":"1s"`, `"b":"1m30s"`} {
		if !strings.Contains(text.String(), want) {
			t.Errorf("%s lacks %s", &text, want)
		}
	}
	_, level := newLogger(config.Default())
	if level.Level() != slog.LevelInfo {
		t.Error(level.Level())
	}
}
