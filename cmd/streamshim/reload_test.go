package main

import (
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/streamshim/streamshim/internal/testutil/leak"
	"github.com/streamshim/streamshim/pkg/config"
)

// systemd is told when a reload begins, by its own clock, and when it is over, whatever came of it.
func TestReloadNotifies(t *testing.T) {
	leak.Check(t)
	dir := t.TempDir()
	file := filepath.Join(dir, "config.toml")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	notify := notifySocket(t, dir)
	s := startServe(t, dir, "--config", file)
	wantState(t, notify, "READY=1")
	for _, text := range []string{"[limits]\nsessions = 1\n", "a mistake"} {
		if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		if err := syscall.Kill(os.Getpid(), syscall.SIGHUP); err != nil {
			t.Fatal(err)
		}
		wantState(t, notify, "RELOADING=1\nMONOTONIC_USEC=")
		wantState(t, notify, "READY=1")
	}
	out, err := run(t, "sessions", "list", "--admin", filepath.Join(dir, "admin.sock"))
	if err != nil || !strings.HasPrefix(out, "ID ") {
		t.Errorf("list: %q, %v", out, err)
	}
	s.stop()
	wantState(t, notify, "STOPPING=1")
	if err := <-s.ended; err != nil {
		t.Error(err)
	}
	if _, err := os.Stat(filepath.Join(dir, "admin.sock")); err == nil {
		t.Error("the admin socket was left behind")
	}
}

// A reload finds a configuration file that has come, and refuses to go on without one that has gone.
func TestReloadWithoutFile(t *testing.T) {
	file := filepath.Join(t.TempDir(), "config.toml")
	defaultFile = file
	t.Cleanup(func() { defaultFile = config.DefaultFile })
	s := &settings{}
	if c, err := s.read(nil); err != nil || c.LogLevel != config.Default().LogLevel {
		t.Errorf("without a file: %q, %v", c.LogLevel, err)
	}
	if err := os.WriteFile(file, []byte("log_level = 'warn'\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	if c, err := s.read(nil); err != nil || c.LogLevel != "warn" {
		t.Errorf("a file that has come: %q, %v", c.LogLevel, err)
	}
	if err := os.Remove(file); err != nil {
		t.Fatal(err)
	}
	if _, err := s.read(nil); err == nil || !strings.Contains(err.Error(), file) {
		t.Errorf("a file that has gone: %v", err)
	}
}
