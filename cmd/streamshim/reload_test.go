package main

import (
	"bytes"
	"errors"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/spf13/pflag"

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

// A reload while the runtime is away keeps the upstream that was found at the start.
func TestReloadWithoutRuntime(t *testing.T) {
	file := filepath.Join(t.TempDir(), "config.toml")
	for text, want := range map[string]string{"": "unix:///found.sock", "upstream = 'unix:///named.sock'": "unix:///named.sock"} {
		if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		flags := pflag.NewFlagSet("test", pflag.ContinueOnError)
		settings := addSettings(flags)
		settings.file = file
		if c, err := settings.loadAgain(flags, "unix:///found.sock"); err != nil || c.Upstream != want {
			t.Errorf("%q: %q, %v", text, c.Upstream, err)
		}
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

// What cannot be applied leaves everything as it was, the reloader's own state included.
func TestReloadThatCannotBeApplied(t *testing.T) {
	next := config.Default()
	next.Limits.Sessions = 1
	r := &reloader{
		log:   slog.New(slog.NewTextHandler(io.Discard, nil)),
		load:  func() (config.Config, error) { return next, nil },
		apply: func(config.Config) error { return errors.New("no such directory") },
	}
	var logged bytes.Buffer
	r.log = slog.New(slog.NewTextHandler(&logged, nil))
	current := config.Default()
	r.current.Store(&current)
	r.reload()
	if strings.Contains(logged.String(), "was reloaded") {
		t.Error(logged.String())
	}
	if r.current.Load().Limits.Sessions != config.Default().Limits.Sessions {
		t.Error("it was taken over")
	}
	r.apply = func(config.Config) error { return nil }
	r.reload()
	if r.current.Load().Limits.Sessions != 1 {
		t.Error("it was not taken over")
	}
	if !strings.Contains(logged.String(), "changed=limits.sessions\n") {
		t.Errorf("what has changed is not said: %s", &logged)
	}
	logged.Reset()
	r.reload()
	if !strings.Contains(logged.String(), "nothing that needs no restart has changed") {
		t.Errorf("the same again: %s", &logged)
	}
}
