package execproc

import (
	"context"
	"errors"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/opencontainers/runtime-spec/specs-go"

	"github.com/streamshim/streamshim/internal/testutil"
	"github.com/streamshim/streamshim/pkg/execproc/internal/ociruntime"
	"github.com/streamshim/streamshim/pkg/workload"
)

// The tests in this file check what containers, and those who replace them, can do to a start.

// TestContainerReplacedDuringStart has the container end and another one get its id before the runtime looks for it. The
// command then runs in the other one. Nobody who has only the id can prevent that. So the command must be ended, and its
// client must see nothing of it.
func TestContainerReplacedDuringStart(t *testing.T) {
	testutil.Slow(t)
	named := func(name string) func(*specs.Spec) { return func(spec *specs.Spec) { spec.Hostname = name } }
	for _, tty := range []bool{false, true} {
		r := newRunner(t)
		c := newContainer(t, named("meant"))
		marker := newMarker()
		launched := false
		replaceFirst := func(ctx context.Context, c workload.Container, spec *specs.Process, f ociruntime.Files, streams [3]*os.File, stderr *os.File) (int, error) {
			runc(t, c, "delete", "--force", c.ContainerID)
			runContainer(t, c.Runtime, c.Root, c.ContainerID, named("other"))
			pid, err := ociruntime.Exec(ctx, c, spec, f, streams, stderr)
			launched = err == nil
			return pid, err
		}
		command := workload.Command{Args: shell("hostname; sleep " + marker), Stdin: true, Stdout: true, TTY: tty}
		p, err := r.start(t.Context(), c, command, PolicyKill, replaceFirst)
		if !launched {
			t.Fatalf("the runtime did not start it: %v", err)
		}
		if !errors.Is(err, ociruntime.ErrNotRunning) {
			t.Errorf("tty %v: started in another container: %v", tty, err)
			if err == nil {
				p.Kill()
				p.Close()
			}
		}
		eventually(t, "the command is gone", func() bool { return len(marked(t, marker)) == 0 })
	}
}

// stopper compiles testdata/stopper.c, to mount it into a container.
func stopper(t *testing.T) string {
	t.Helper()
	program := filepath.Join(t.TempDir(), "stopper")
	if out, err := exec.Command("cc", "-static", "-O2", "-o", program, "testdata/stopper.c").CombinedOutput(); err != nil {
		t.Fatalf("compile the stopper: %v: %s", err, out)
	}
	return program
}

// TestStoppedStartEnds checks that a container which stops everything that enters it does not delay its own starts until
// their timeout, and does not delay those in another container at all.
func TestStoppedStartEnds(t *testing.T) {
	testutil.Slow(t)
	program := stopper(t)
	r := newRunner(t, func(config *Config) { config.StartTimeout = 10 * time.Minute })
	hostile := newContainer(t, func(spec *specs.Spec) {
		spec.Process.Args = []string{"/stopper"}
		spec.Mounts = append(spec.Mounts, specs.Mount{Destination: "/stopper", Type: "bind", Source: program, Options: []string{"rbind", "ro"}})
	})
	other := newContainer(t)
	var stopped atomic.Int64
	ended := make(chan struct{})
	var starts sync.WaitGroup
	for range 8 { // the share of a pod, see pkg/session/limits
		starts.Go(func() {
			for {
				select {
				case <-ended:
					return
				default:
				}
				p, err := r.Start(context.Background(), hostile, workload.Command{Args: []string{"true"}, Stdout: true})
				switch {
				case errors.Is(err, ociruntime.ErrStopped):
					stopped.Add(1)
				case err == nil:
					p.Kill()
					p.Close()
				}
			}
		})
	}
	eventually(t, "starts are stopped and ended", func() bool { return stopped.Load() > 20 })
	longest := time.Duration(0)
	for range 20 {
		began := time.Now()
		p, err := r.Start(t.Context(), other, workload.Command{Args: []string{"echo", "hello"}, Stdout: true})
		if err != nil {
			t.Fatal(err)
		}
		longest = max(longest, time.Since(began))
		if out, err := io.ReadAll(p.Stdout()); err != nil || string(out) != "hello\n" {
			t.Errorf("%q, %v", out, err)
		}
		p.Close()
	}
	close(ended)
	finished := make(chan struct{})
	go func() { starts.Wait(); close(finished) }()
	closes(t, finished, "the last starts")
	t.Logf("%d starts were stopped; meanwhile the longest in another container took %s", stopped.Load(), longest)
}
