package execproc

import (
	"context"
	"errors"
	"strings"
	"testing"
	"time"

	"github.com/streamshim/streamshim/pkg/workload"
)

func TestRunSync(t *testing.T) {
	r := newRunner(t)
	c := newContainer(t)
	result, err := r.RunSync(context.Background(), c, workload.SyncCommand{
		Args: shell("cat; echo out; echo $EXTRA >&2; exit 3"), Env: []string{"EXTRA=err"}, Timeout: time.Minute,
	})
	if err != nil || result.ExitCode != 3 || string(result.Stdout) != "out\n" || string(result.Stderr) != "err\n" {
		t.Errorf("%+v, %v", result, err)
	}
	var failed *StartError
	if _, err := r.RunSync(context.Background(), c, workload.SyncCommand{Args: []string{"nope"}}); !errors.As(err, &failed) || failed.Code != 127 {
		t.Errorf("%v", err)
	}
}

// A command whose child keeps the pipe open returns with its own exit code (kubernetes#44371), and
// leaves the child alone.
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

// A child that goes on writing is listened to, but not for ever.
func TestBackgroundChildWrites(t *testing.T) {
	r := newRunner(t, func(config *Config) { config.DrainIdle, config.DrainMax = 5*time.Second, 4*time.Second })
	c := newContainer(t)
	result, err := r.RunSync(context.Background(), c, workload.SyncCommand{Args: shell("(sleep 1; echo later) & echo now; exit 3")})
	if err != nil || result.ExitCode != 3 || string(result.Stdout) != "now\nlater\n" {
		t.Errorf("%+v, %v", result, err)
	}
	began := time.Now()
	result, err = r.RunSync(context.Background(), c, workload.SyncCommand{Args: shell("(while echo x; do sleep 0.1; done) & exit 4")})
	if took := time.Since(began); err != nil || result.ExitCode != 4 || len(result.Stdout) < 20 || took < 4*time.Second || took > patience {
		t.Errorf("%+v, %v after %v", result, err, took)
	}
}

// The timeout is kept, and nothing of the tree survives it (containerd#4594, containerd#9568).
func TestTimeoutKillsTree(t *testing.T) {
	const timeout = 2 * time.Second // within which the command has to be started, and to say so
	r := newRunner(t)
	c := newContainer(t)
	for _, script := range []string{
		"exec sleep %",
		"sleep % & sleep %",
		"trap '' HUP TERM; setsid sleep % & (sleep % &); sleep %; sleep %",
	} {
		marker := newMarker()
		began := time.Now()
		result, err := r.RunSync(context.Background(), c, workload.SyncCommand{
			Args: shell("echo began; " + strings.ReplaceAll(script, "%", marker)), Timeout: timeout,
		})
		if took := time.Since(began); !errors.Is(err, ErrTimeout) || took < timeout || took > timeout+patience {
			t.Errorf("%v after %v", err, took)
		}
		if string(result.Stdout) != "began\n" {
			t.Errorf("output so far: %q", result.Stdout)
		}
		eventually(t, "the tree is gone", func() bool { return len(marked(t, marker)) == 0 })
	}
	// The command itself has ended in time, only its child has not.
	began := time.Now()
	marker := newMarker()
	r.config.DrainIdle, r.config.DrainMax = time.Hour, time.Hour
	result, err := r.RunSync(context.Background(), c, workload.SyncCommand{Args: shell("sleep " + marker + " & exit 6"), Timeout: timeout})
	if took := time.Since(began); err != nil || result.ExitCode != 6 || took > timeout+patience {
		t.Errorf("%+v, %v after %v", result, err, took)
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

// A timeout that comes during the start counts as well.
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

// Output beyond the limit is dropped, both streams counted together, and the command goes on
// (CVE-2022-1708).
func TestOutputLimit(t *testing.T) {
	r := newRunner(t)
	c := newContainer(t)
	r.config.OutputLimit = 10 << 20
	result, err := r.RunSync(context.Background(), c, workload.SyncCommand{Args: shell("yes | head -c 40000000; yes | head -c 1000000 >&2; exit 8")})
	if total := len(result.Stdout) + len(result.Stderr); err != nil || result.ExitCode != 8 || total != 10<<20 {
		t.Errorf("%d bytes, exit code %d, %v", total, result.ExitCode, err)
	}
	r.config.OutputLimit = 7
	result, err = r.RunSync(context.Background(), c, workload.SyncCommand{Args: shell("printf 12345; sleep 0.5; printf 67890 >&2")})
	if err != nil || string(result.Stdout) != "12345" || string(result.Stderr) != "67" {
		t.Errorf("%+v, %v", result, err)
	}
}

// A probe that is cut off by the end of the Runner did not fail.
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
