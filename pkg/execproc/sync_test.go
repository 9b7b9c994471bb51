package execproc

import (
	"context"
	"errors"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/streamshim/streamshim/internal/testutil"
	"github.com/streamshim/streamshim/pkg/execproc/internal/ociruntime"
	"github.com/streamshim/streamshim/pkg/workload"
)

// TestRuntimeEnvironmentStaysOut checks that the command does not inherit the environment of the runtime.
func TestRuntimeEnvironmentStaysOut(t *testing.T) {
	r, c := newRunner(t), newContainer(t)
	result, err := r.RunSync(t.Context(), c, workload.SyncCommand{Args: []string{"env"}, Env: []string{"GOGC=7"}})
	if err != nil || !strings.Contains(string(result.Stdout), "GOGC=7\n") {
		t.Fatalf("env: %v: %s", err, result.Stdout)
	}
	for _, variable := range ociruntime.RuntimeEnvironment() {
		name, _, _ := strings.Cut(variable, "=")
		if name == "PATH" || name == "HOME" { // the container has its own
			continue
		}
		if strings.Contains("\n"+string(result.Stdout), "\n"+name+"=") {
			t.Errorf("the command has %s in its environment: %s", name, result.Stdout)
		}
	}
}

func TestRunSync(t *testing.T) {
	r := newRunner(t)
	c := newContainer(t)
	result, err := r.RunSync(context.Background(), c, workload.SyncCommand{
		Args: shell("cat; echo out; echo $EXTRA >&2; exit 3"), Env: []string{"EXTRA=err"}, Timeout: time.Minute,
	})
	if err != nil || result.ExitCode != 3 || string(result.Stdout) != "out\n" || string(result.Stderr) != "err\n" {
		t.Errorf("%+v, %v", result, err)
	}
	var failed *ociruntime.StartError
	if _, err := r.RunSync(context.Background(), c, workload.SyncCommand{Args: []string{"nope"}}); !errors.As(err, &failed) || failed.Code != 127 {
		t.Errorf("%v", err)
	}
}

// TestBackgroundChildHoldsPipe checks that a command whose child keeps the pipe open returns with its own exit code
// (kubernetes#44371) and leaves the child alone.
func TestBackgroundChildHoldsPipe(t *testing.T) {
	r := newRunner(t)
	c := newContainer(t)
	marker := newMarker()
	began := time.Now()
	result, err := r.RunSync(context.Background(), c, workload.SyncCommand{Args: shell("sleep " + marker + " & echo hi; exit 3")})
	if took := time.Since(began); err != nil || result.ExitCode != 3 || string(result.Stdout) != "hi\n" || took > patience {
		t.Errorf("%+v, %v after %v", result, err, took)
	}
	if len(marked(t, marker)) != 1 {
		t.Error("the child is gone")
	}
}

// TestBackgroundChildWrites checks that the output of a child that goes on writing is read, but not for ever.
func TestBackgroundChildWrites(t *testing.T) {
	testutil.Slow(t)
	r := newRunner(t, func(config *Config) { config.DrainIdle, config.DrainMax = patience, patience })
	c := newContainer(t)
	result, err := r.RunSync(context.Background(), c, workload.SyncCommand{Args: shell("(sleep 1; echo later) & echo now; exit 3")})
	if err != nil || result.ExitCode != 3 || string(result.Stdout) != "now\nlater\n" {
		t.Errorf("%+v, %v", result, err)
	}
	r.config.DrainMax = 4 * time.Second
	began := time.Now()
	result, err = r.RunSync(context.Background(), c, workload.SyncCommand{Args: shell("(while echo x; do sleep 0.1; done) & exit 4")})
	if took := time.Since(began); err != nil || result.ExitCode != 4 || len(result.Stdout) < len("x\nx\n") || took < 4*time.Second || took > 4*time.Second+patience {
		t.Errorf("%+v, %v after %v", result, err, took)
	}
}

// TestTimeoutKillsTree checks that the timeout is kept and nothing of the tree survives it (containerd#4594,
// containerd#9568).
func TestTimeoutKillsTree(t *testing.T) {
	testutil.Slow(t)
	r := newRunner(t)
	c := newContainer(t)
	for _, script := range []string{
		"exec sleep %",
		"sleep % & sleep %",
		"trap '' HUP TERM; setsid sleep % & (sleep % &); sleep %; sleep %",
	} {
		// Within the timeout the command must start and write, so a busy machine gets a longer one.
		for timeout, written := 2*time.Second, ""; written == ""; timeout *= 2 {
			marker := newMarker()
			began := time.Now()
			result, err := r.RunSync(context.Background(), c, workload.SyncCommand{
				Args: shell("echo began; " + strings.ReplaceAll(script, "%", marker)), Timeout: timeout,
			})
			if took := time.Since(began); !errors.Is(err, ErrTimeout) || took < timeout || took > timeout+patience {
				t.Fatalf("%v after %v", err, took)
			}
			if written = string(result.Stdout); written != "began\n" && (written != "" || timeout > patience) {
				t.Fatalf("output within %v: %q", timeout, written)
			}
			eventually(t, "the tree is gone", func() bool { return len(marked(t, marker)) == 0 })
		}
	}
	// The command itself has ended in time, but its child has not.
	r.config.DrainIdle, r.config.DrainMax = time.Hour, time.Hour
	for timeout := 2 * time.Second; ; timeout *= 2 {
		began := time.Now()
		result, err := r.RunSync(context.Background(), c, workload.SyncCommand{Args: shell("sleep " + newMarker() + " & exit 6"), Timeout: timeout})
		if errors.Is(err, ErrTimeout) && timeout < patience {
			continue // the machine is too busy
		}
		if took := time.Since(began); err != nil || result.ExitCode != 6 || took > timeout+patience {
			t.Errorf("%+v, %v after %v", result, err, took)
		}
		break
	}
}

func TestCancelKillsTree(t *testing.T) {
	r := newRunner(t)
	c := newContainer(t)
	marker := newMarker()
	ctx, cancel := context.WithCancel(context.Background())
	go func() {
		for deadline := time.Now().Add(patience); len(marked(t, marker)) == 0 && time.Now().Before(deadline); {
			time.Sleep(5 * time.Millisecond)
		}
		cancel()
	}()
	if _, err := r.RunSync(ctx, c, workload.SyncCommand{Args: []string{"sleep", marker}}); !errors.Is(err, ErrTimeout) || !errors.Is(err, context.Canceled) {
		t.Errorf("%v", err)
	}
	eventually(t, "the command is gone", func() bool { return len(marked(t, marker)) == 0 })
}

// TestTimeoutDuringStart checks that a timeout during the start counts, too.
func TestTimeoutDuringStart(t *testing.T) {
	r := newRunner(t)
	c := newContainer(t)
	c.Runtime = t.TempDir() + "/runtime"
	writeFile(t, c.Runtime, "#!/bin/sh\nexec sleep 1000\n", 0o755)
	if _, err := r.RunSync(context.Background(), c, workload.SyncCommand{Args: []string{"true"}, Timeout: 100 * time.Millisecond}); !errors.Is(err, ErrTimeout) {
		t.Errorf("%v", err)
	}
	r.config.StartTimeout = 100 * time.Millisecond
	if _, err := r.RunSync(context.Background(), c, workload.SyncCommand{Args: []string{"true"}, Timeout: time.Hour}); errors.Is(err, ErrTimeout) || !errors.Is(err, ErrStartTimeout) {
		t.Errorf("%v", err)
	}
}

// TestOutputLimit checks that output beyond the limit is dropped, with both streams counted together, and that the command
// goes on (CVE-2022-1708).
func TestOutputLimit(t *testing.T) {
	r := newRunner(t)
	c := newContainer(t)
	r.config.OutputLimit = 10 << 20
	result, err := r.RunSync(context.Background(), c, workload.SyncCommand{Args: shell("yes | head -c 40000000; yes | head -c 1000000 >&2; exit 8")})
	if total := len(result.Stdout) + len(result.Stderr); err != nil || result.ExitCode != 8 || total != 10<<20 {
		t.Errorf("%d bytes, exit code %d, %v", total, result.ExitCode, err)
	}
	r.config.OutputLimit = 7
	result, err = r.RunSync(context.Background(), c, workload.SyncCommand{Args: shell("printf 12345; printf 67890 >&2")})
	if err != nil || !strings.HasPrefix("12345", string(result.Stdout)) || !strings.HasPrefix("67890", string(result.Stderr)) || len(result.Stdout)+len(result.Stderr) != 7 {
		t.Errorf("%+v, %v", result, err)
	}
}

// room is a Room.
type room struct {
	mu   sync.Mutex
	left int
}

func (r *room) Take(n int) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	if n > r.left {
		return false
	}
	r.left -= n
	return true
}

func (r *room) Return(n int) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.left += n
}

// TestOutputRoom checks that the output that all calls hold together is bounded. A command without room for its output is
// ended with its tree, and the error says so. The output of a probe always has room.
func TestOutputRoom(t *testing.T) {
	shared := &room{left: 1 << 20}
	r := newRunner(t, func(config *Config) { config.OutputRoom, config.OutputLimit = shared, 16<<20 })
	c := newContainer(t)
	marker := newMarker()
	_, err := r.RunSync(context.Background(), c, workload.SyncCommand{Args: shell("sleep " + marker + " & yes; :")})
	if !errors.Is(err, ErrNoRoom) || errors.Is(err, ErrTimeout) {
		t.Errorf("%v", err)
	}
	eventually(t, "the tree is gone", func() bool { return len(marked(t, marker)) == 0 })
	result, err := r.RunSync(context.Background(), c, workload.SyncCommand{Args: shell("head -c 1000000 /dev/zero; exit 3")})
	if err != nil || result.ExitCode != 3 || len(result.Stdout) != 1000000 {
		t.Errorf("within the room: %d bytes, %v", len(result.Stdout), err)
	}
	if shared.left != 1<<20 {
		t.Errorf("%d bytes of room are left", shared.left)
	}
	shared.left = 0
	result, err = r.RunSync(context.Background(), c, workload.SyncCommand{Args: shell("head -c 40000 /dev/zero; head -c 20000 /dev/zero >&2; exit 3")})
	if err != nil || result.ExitCode != 3 || len(result.Stdout) != 40000 || len(result.Stderr) != 20000 {
		t.Errorf("of its own: %d and %d bytes, %v", len(result.Stdout), len(result.Stderr), err)
	}
}

// TestTurn checks that a command waits for its turn within its timeout, and has the turn only while it starts.
func TestTurn(t *testing.T) {
	var turn func(context.Context) (func(), error)
	r := newRunner(t, func(config *Config) {
		config.SyncTurn = func(ctx context.Context, _ workload.Container) (func(), error) { return turn(ctx) }
	})
	c := newContainer(t)
	began := make(chan struct{})
	ended := make(chan struct{})
	turn = func(context.Context) (func(), error) {
		close(began)
		return func() { close(ended) }, nil
	}
	done := make(chan error, 1)
	ctx, cancel := context.WithCancel(t.Context())
	go func() {
		_, err := r.RunSync(ctx, c, workload.SyncCommand{Args: []string{"sleep", newMarker()}})
		done <- err
	}()
	closes(t, began, "the turn")
	closes(t, ended, "the end of the turn while the command runs")
	select {
	case err := <-done:
		t.Errorf("the command has ended: %v", err)
	default:
	}
	cancel()
	<-done

	turn = func(ctx context.Context) (func(), error) {
		<-ctx.Done()
		return nil, context.Cause(ctx)
	}
	if _, err := r.RunSync(t.Context(), c, workload.SyncCommand{Args: []string{"true"}, Timeout: 50 * time.Millisecond}); !errors.Is(err, ErrTimeout) {
		t.Errorf("a turn that does not come in time: %v", err)
	}
	refused := errors.New("refused")
	turn = func(context.Context) (func(), error) { return nil, refused }
	if _, err := r.RunSync(t.Context(), c, workload.SyncCommand{Args: []string{"true"}}); !errors.Is(err, refused) || errors.Is(err, ErrTimeout) {
		t.Errorf("a refused turn: %v", err)
	}
}

// TestShutdownDuringRunSync checks that a probe that is cut off by the end of the Runner is not reported as failed.
func TestShutdownDuringRunSync(t *testing.T) {
	r := newRunner(t)
	c := newContainer(t)
	marker := newMarker()
	done := make(chan error, 1)
	go func() {
		_, err := r.RunSync(context.Background(), c, workload.SyncCommand{Args: []string{"sleep", marker}})
		done <- err
	}()
	eventually(t, "it runs", func() bool { return len(marked(t, "sleep\x00"+marker)) == 1 })
	r.Close()
	select {
	case err := <-done:
		if !errors.Is(err, ErrClosed) {
			t.Errorf("%v", err)
		}
	case <-time.After(patience):
		t.Error("waited in vain for RunSync to return")
	}
}
