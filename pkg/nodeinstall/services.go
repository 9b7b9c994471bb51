package nodeinstall

import (
	"context"
	"fmt"
	"os/exec"
	"strings"
	"time"
)

// Systemctl is systemd, by way of its systemctl, or of another program that takes the same verbs: a node
// with OpenRC or runit can have a script of ten lines.
type Systemctl struct {
	Program string // systemctl when empty
}

func (s Systemctl) run(ctx context.Context, args ...string) error {
	program := s.Program
	if program == "" {
		program = "systemctl"
	}
	out, err := command(ctx, program, args...)
	if err != nil {
		return fmt.Errorf("%s %s: %w: %s", program, strings.Join(args, " "), err, lastLine(out))
	}
	return nil
}

// Reload implements Services.
func (s Systemctl) Reload(ctx context.Context) error { return s.run(ctx, "daemon-reload") }

// Enable implements Services.
func (s Systemctl) Enable(ctx context.Context, unit string) error { return s.run(ctx, "enable", unit) }

// Disable implements Services.
func (s Systemctl) Disable(ctx context.Context, unit string) error {
	return s.run(ctx, "disable", "--now", unit)
}

// Restart implements Services.
func (s Systemctl) Restart(ctx context.Context, unit string) error {
	return s.run(ctx, "restart", unit)
}

// Active implements Services.
func (s Systemctl) Active(ctx context.Context, unit string) bool {
	return s.run(ctx, "is-active", "--quiet", unit) == nil
}

// command runs a program to its end and returns all that it has written.
func command(ctx context.Context, name string, args ...string) ([]byte, error) {
	c := exec.CommandContext(ctx, name, args...)
	c.WaitDelay = 5 * time.Second // for a child that holds its output
	return c.CombinedOutput()
}
