package execproc

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/streamshim/streamshim/internal/testutil"
	"github.com/streamshim/streamshim/pkg/execproc/internal/ociruntime"
	"github.com/streamshim/streamshim/pkg/execproc/internal/proc"
	"github.com/streamshim/streamshim/pkg/workload"
)

// TestEveryStatusReachesItsOwner runs many short processes, children of os/exec and orphans at the same time. Each status
// must reach its owner, and no zombie may stay.
func TestEveryStatusReachesItsOwner(t *testing.T) {
	testutil.Slow(t)
	r := newRunner(t)
	c := newContainer(t, shareHostPID)
	var all sync.WaitGroup
	for worker := range 8 {
		all.Go(func() { // processes in the container, every second of which leaves an orphan zombie
			for i := range 40 {
				code := (worker*40 + i) % 256
				script := fmt.Sprintf("exit %d", code)
				if i%2 == 0 {
					script = "(setsid sh -c 'exit 9' &) & (sleep 0.02 &) & " + script
				}
				p, err := r.Start(context.Background(), c, workload.Command{Args: shell(script)})
				if err != nil {
					t.Error(err)
					return
				}
				if got := exitCode(t, p); got != code {
					t.Errorf("exit code %d, want %d", got, code)
				}
				p.Close()
			}
		})
		all.Go(func() { // commands that fail to start
			for range 20 {
				var failed *ociruntime.StartError
				if _, err := r.Start(context.Background(), c, workload.Command{Args: []string{"nope"}, Stdout: true}); !errors.As(err, &failed) {
					t.Error(err)
				}
			}
		})
		all.Go(func() { // other children of this process
			for i := range 100 {
				code := (worker*100 + i) % 256
				err := exec.Command("sh", "-c", fmt.Sprintf("exit %d", code)).Run()
				var exit *exec.ExitError
				if code == 0 && err != nil || code != 0 && (!errors.As(err, &exit) || exit.ExitCode() != code) {
					t.Errorf("os/exec: %v, want exit status %d", err, code)
				}
			}
		})
	}
	all.Wait()
	eventually(t, "no zombie is left", func() bool {
		children, err := proc.OwnChildren(nil)
		if err != nil {
			t.Fatal(err)
		}
		for _, child := range children {
			if child.Zombie() {
				return false
			}
		}
		return true
	})
}

// TestThousandExecsLeaveNothing checks that commands that succeed or fail, with and without terminal, leave nothing
// (containerd#9668).
func TestThousandExecsLeaveNothing(t *testing.T) {
	testutil.Slow(t)
	count := 1000
	if testing.Short() {
		count = 100
	}
	r := newRunner(t)
	c := newContainer(t)
	if _, code := output(t, r, c, workload.Command{Args: []string{"true"}}); code != 0 {
		t.Fatalf("exit code %d", code)
	}
	before := resources(t)
	var all sync.WaitGroup
	for worker := range 4 {
		all.Go(func() {
			for i := range count / 4 {
				command := workload.Command{Args: shell("cat; exit 5"), Stdin: true, Stdout: true, TTY: i%3 == 0, Stderr: i%3 == 1}
				if (i+worker)%4 == 0 {
					command.Args = []string{"nope"}
				}
				p, err := r.Start(context.Background(), c, command)
				if (err != nil) != ((i+worker)%4 == 0) {
					t.Error(err)
				}
				if err != nil {
					continue
				}
				p.Stdin().Close()
				io.Copy(io.Discard, p.Stdout())
				if code := exitCode(t, p); code != 5 {
					t.Errorf("exit code %d", code)
				}
				p.Close()
			}
		})
	}
	all.Wait()
	eventually(t, "everything is back at the start", func() bool {
		now := resources(t)
		return now[0] <= before[0] && now[1] <= before[1] && now[2] <= before[2]
	})
}

// TestContainerWatchIsShared checks that one descriptor watches a container, however many watch it.
func TestContainerWatchIsShared(t *testing.T) {
	r := newRunner(t)
	c := newContainer(t)
	var processes []*Process
	before := 0
	for i := range 5 {
		processes = append(processes, start(t, r, c, workload.Command{Args: []string{"sleep", "1000"}}))
		if now := resources(t)[1]; i > 0 && now != before+1 { // the process's own pidfd
			t.Errorf("%d descriptors more", now-before)
		}
		before = resources(t)[1]
	}
	for _, p := range processes[1:] {
		p.Kill()
		exitCode(t, p)
		p.Close()
	}
	runc(t, c, "kill", c.ContainerID, "KILL")
	closes(t, processes[0].ContainerExited(), "the end of the container, by the one that still looks")
}

// TestIgnoresNothing checks that a command ignores only the signals that its container's configuration makes it ignore.
func TestIgnoresNothing(t *testing.T) {
	c := newContainer(t)
	for range 2 { // the second time in a process that has had a Runner before
		r := newRunner(t)
		text, _ := output(t, r, c, workload.Command{Args: []string{"grep", "SigIgn", "/proc/self/status"}})
		ignored, err := strconv.ParseUint(strings.TrimSpace(strings.TrimPrefix(text, "SigIgn:")), 16, 64)
		const ours = 1<<31 - 1 // those above are the C library's
		if err != nil || ignored&ours != 0 {
			t.Errorf("a command ignores %q, %v", text, err)
		}
		r.Close()
	}
}

// TestStartedIgnoringSignals checks the same however this process was started: nohup makes it ignore the hang-up, a shell
// that starts it in the background the interrupt. Commands would inherit that, and could neither be hung up nor trap the
// signal.
func TestStartedIgnoringSignals(t *testing.T) {
	testutil.Slow(t)
	again := exec.Command("sh", "-c", "trap '' HUP INT TSTP TTIN TTOU; exec \"$0\" -test.v -test.timeout 5m -test.run '^(TestIgnoresNothing|TestHangupComesFirst)$'", os.Args[0])
	if text, err := again.CombinedOutput(); err != nil || bytes.Count(text, []byte("--- PASS")) != 2 {
		t.Errorf("%v:\n%s", err, text)
	}
}

// TestShutdown checks that Shutdown refuses new commands, ends the running ones by their policy, and leaves nothing
// (newRunner checks that).
func TestShutdown(t *testing.T) {
	r := newRunner(t, func(config *Config) { config.TermAfter, config.KillAfter = patience, patience })
	c := newContainer(t)
	marker := newMarker()
	p := startFamily(t, r, c, "trap 'exit 41' HUP; trap '' PIPE; echo ready; while :; do sleep 0.05; done #%s", marker, false)
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	if err := r.Shutdown(ctx); err != nil {
		t.Error(err)
	}
	if code := p.ExitCode(); code != 41 || len(marked(t, marker)) > 0 {
		t.Errorf("exit code %d, left %v", code, marked(t, marker))
	}
	if _, err := r.Start(context.Background(), c, workload.Command{Args: []string{"true"}}); !errors.Is(err, ErrClosed) {
		t.Errorf("start afterwards: %v", err)
	}
	if _, err := r.RunSync(context.Background(), c, workload.SyncCommand{Args: []string{"true"}}); !errors.Is(err, ErrClosed) {
		t.Errorf("RunSync afterwards: %v", err)
	}
	p.Disconnect()
	p.Kill()

	r = newRunner(t, func(config *Config) { config.TermAfter, config.KillAfter = time.Hour, 2*time.Hour })
	p = startFamily(t, r, c, "trap '' HUP; echo ready; while :; do sleep 0.05; done #%s", marker, false)
	ctx, cancel = context.WithTimeout(context.Background(), 100*time.Millisecond)
	defer cancel()
	if err := r.Shutdown(ctx); !errors.Is(err, context.DeadlineExceeded) {
		t.Error(err)
	}
	if code := p.ExitCode(); code != 137 {
		t.Errorf("exit code %d", code)
	}
}
