package execproc

import (
	"context"
	"testing"
	"time"

	"github.com/streamshim/streamshim/pkg/workload"
)

// TestPanicWhileEnding checks that an ending that panics kills what it was ending, and that the Runner goes on with all
// else.
func TestPanicWhileEnding(t *testing.T) {
	r := newRunner(t, func(config *Config) { config.OnKill = func() { panic("a fault of the test") } })
	c := newContainer(t)
	other := start(t, r, c, workload.Command{Args: []string{"cat"}, Stdin: true, Stdout: true})
	marker := newMarker()
	p := start(t, r, c, workload.Command{Args: shell("trap '' HUP TERM; (trap '' HUP TERM; while true; do sleep " + marker + "; done) & while true; do sleep " + marker + "; done")})
	eventually(t, "both run", func() bool { return len(marked(t, marker)) > 1 })
	p.Disconnect()
	closes(t, p.ended, "the end of the tree")
	closes(t, p.Exited(), "the process's exit")
	eventually(t, "nothing of it is left", func() bool { return len(marked(t, marker)) == 0 })
	if other.hasExited() {
		t.Error("another process has ended as well")
	}
	other.Stdin().Close()
	if code := exitCode(t, other); code != 0 {
		t.Errorf("another process ends with %d", code)
	}
}

// faultyRoom is a Room that panics.
type faultyRoom struct{}

func (faultyRoom) Take(int) bool { panic("a fault of the test") }
func (faultyRoom) Return(int)    {}

// TestPanicInOutput checks that a panic while output is collected is that of the call, and that its command does not go on.
func TestPanicInOutput(t *testing.T) {
	r := newRunner(t, func(config *Config) { config.OutputRoom = faultyRoom{} })
	c := newContainer(t)
	marker := newMarker()
	var caught any
	func() {
		defer func() { caught = recover() }()
		r.RunSync(context.Background(), c, workload.SyncCommand{ //nolint:errcheck // it panics
			Args: shell("head -c 1000000 /dev/zero; sleep " + marker), Timeout: time.Minute,
		})
	}()
	if caught == nil {
		t.Error("nobody is told of the panic")
	}
	eventually(t, "the command has ended", func() bool { return len(marked(t, marker)) == 0 })
	if result, err := r.RunSync(context.Background(), c, workload.SyncCommand{Args: []string{"echo", "hi"}}); err != nil || string(result.Stdout) != "hi\n" {
		t.Errorf("the next one: %+v, %v", result, err)
	}
}
