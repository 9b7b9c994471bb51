package daemon

import (
	"bytes"
	"context"
	"errors"
	"io"
	"log/slog"
	"strings"
	"testing"

	"github.com/streamshim/streamshim/pkg/config"
)

// A reload while the runtime is away keeps the upstream that was found at the start.
func TestReloadWithoutRuntime(t *testing.T) {
	for named, want := range map[string]string{"": "unix:///found.sock", "unix:///named.sock": "unix:///named.sock"} {
		o := Options{Load: func() (config.Config, error) {
			c := config.Default()
			c.Upstream = named
			return c, nil
		}}
		if c, err := o.loadAgain("unix:///found.sock"); err != nil || c.Upstream != want {
			t.Errorf("%q: %q, %v", named, c.Upstream, err)
		}
	}
}

// What cannot be applied leaves everything as it was, the reloader's own state included.
func TestReloadThatCannotBeApplied(t *testing.T) {
	next := config.Default()
	next.Limits.Sessions = 1
	r := &reloader{
		log:     slog.New(slog.NewTextHandler(io.Discard, nil)),
		load:    func() (config.Config, error) { return next, nil },
		apply:   func(config.Config) error { return errors.New("no such directory") },
		replace: func(context.Context) {},
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
