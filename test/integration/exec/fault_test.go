package exec

import (
	"context"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	"k8s.io/client-go/tools/remotecommand"

	"github.com/streamshim/streamshim/internal/testutil"
	"github.com/streamshim/streamshim/test/internal/harness"
	"github.com/streamshim/streamshim/test/internal/node"
)

// expectStartFailure runs a command that cannot start, over each protocol and through ExecSync. It expects an early error
// that says why.
func expectStartFailure(t *testing.T, shim *harness.Streamshim, container, mark string, words ...string) {
	t.Helper()
	check := func(how string, err error, took time.Duration) {
		t.Logf("%s: after %v: %v", how, took, err)
		if err == nil || harness.ExitCodeOf(err) >= 0 {
			t.Errorf("%s: %v, want an error of ours", how, err)
			return
		}
		for _, word := range words {
			if !strings.Contains(err.Error(), word) {
				t.Errorf("%s: %v, want %q in it", how, err, word)
			}
		}
		if took > 30*time.Second {
			t.Errorf("%s: the answer took %v", how, took)
		}
	}
	command := harness.Marked(mark, "sleep 1000; :")
	for _, transport := range harness.Transports {
		for _, tty := range []bool{false, true} {
			options := remotecommand.StreamOptions{Stdout: io.Discard, Tty: tty}
			if !tty { // otherwise the runtime's message has nowhere to go
				options.Stderr = io.Discard
			}
			begin := time.Now()
			err := shim.Exec(t, transport, container, options, command...)
			check(fmt.Sprintf("%s, tty %v", transport, tty), err, time.Since(begin))
		}
	}
	begin := time.Now()
	_, err := shim.ExecSync(t.Context(), container, 0, command...)
	check("ExecSync", err, time.Since(begin))
	harness.AwaitNone(t, mark, goneLimit)
}

// expectWorking runs a good command over each protocol.
func expectWorking(t *testing.T, shim *harness.Streamshim, container string) {
	t.Helper()
	for _, transport := range harness.Transports {
		output := &testutil.Buffer{}
		if err := shim.Exec(t, transport, container, remotecommand.StreamOptions{Stdout: output}, "echo", "works"); err != nil || output.String() != "works\n" {
			t.Errorf("%s: %q, %v", transport, output, err)
		}
	}
}

// fakeRuntime returns a program to use instead of runc.
func fakeRuntime(t *testing.T, script string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "runc")
	if err := os.WriteFile(path, []byte("#!/bin/bash\nreal="+harness.Shared.Node.Program("runc")+"\n"+script), 0o755); err != nil {
		t.Fatal(err)
	}
	return path
}

// pidFileOf finds the argument of --pid-file.
const pidFileOf = `for a; do [ "$last" = --pid-file ] && pidfile=$a; last=$a; done
`

func TestFailureOfTheOCIRuntimeIsTold(t *testing.T) {
	t.Parallel()
	container := harness.RunContainer(t, node.ContainerSpec{})
	for _, test := range []struct {
		name, script string
		words        []string
	}{
		{"missing", "", []string{"no such file or directory"}},
		{"fails", "echo 'the moon is in the wrong place' >&2; exit 1\n", []string{"the moon is in the wrong place"}},
		{"fails-without-a-word", "exit 1\n", nil},
		{"hangs", "sleep 1000\n", []string{"in time"}},
		{"hangs-having-started", `"$real" "$@"; sleep 1000` + "\n", []string{"in time"}},
		{"hangs-ignoring-signals", "trap '' HUP TERM INT; while :; do sleep 1; done\n", []string{"in time"}},
		{"empty-pid-file", pidFileOf + `"$real" "$@" && : > "$pidfile"` + "\n", []string{"pid"}},
		{"no-pid-file", pidFileOf + `"$real" "$@" && rm "$pidfile"` + "\n", []string{"pid"}},
		{"pid-of-a-stranger", pidFileOf + `"$real" "$@" && echo 1 > "$pidfile"` + "\n", []string{"pid"}},
	} {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			binary := "/nonexistent/runc"
			if test.script != "" {
				binary = fakeRuntime(t, test.script)
			}
			shim := harness.StartStreamshim(t, fmt.Sprintf("[exec]\nstart_timeout = \"2s\"\n[runtime]\nbinary = %q\n", binary))
			before := harness.Descriptors(shim.PID())
			expectStartFailure(t, shim, container, harness.Unique(t.Name()), test.words...)
			testutil.Eventually(t, "descriptors are closed", func() bool { return harness.Descriptors(shim.PID()) <= before+8 })
			if left := harness.Glob(filepath.Join(shim.Folder, "state", "exec", "*")); len(left) > 0 {
				t.Errorf("files left: %q", left)
			}
			testutil.Eventually(t, "no zombies are left", func() bool { return len(harness.Zombies(shim.PID())) == 0 })
		})
	}
}

// TestBundleIsGone checks that an exec works without the bundle, which it does not need.
func TestBundleIsGone(t *testing.T) {
	t.Parallel()
	container := harness.RunContainer(t, node.ContainerSpec{})
	bundles := harness.Glob(filepath.Join(harness.Shared.Node.Dir(), "run/state/io.containerd.runtime.v2.task/k8s.io", container))
	bundles = append(bundles, harness.Glob(filepath.Join(harness.Shared.Node.Dir(), "run/*/io.containerd.runtime.v2.task/k8s.io", container))...)
	if len(bundles) == 0 {
		t.Fatal("the bundle was not found")
	}
	config := filepath.Join(bundles[0], "config.json")
	if err := os.Rename(config, config+".gone"); err != nil {
		t.Fatal(err)
	}
	defer os.Rename(config+".gone", config) //nolint:errcheck // the container is about to be removed
	expectWorking(t, harness.Shared.Shim, container)
}

// TestStateDirectoryIsFull checks that a start fails cleanly if there is no space for its files.
func TestStateDirectoryIsFull(t *testing.T) {
	t.Parallel()
	container := harness.RunContainer(t, node.ContainerSpec{})
	shim := harness.StartStreamshim(t, "")
	directory := filepath.Join(shim.Folder, "state", "exec")
	if err := unix.Mount("tmpfs", directory, "tmpfs", 0, "size=64k"); err != nil {
		t.Fatal(err)
	}
	defer unix.Unmount(directory, unix.MNT_DETACH) //nolint:errcheck // unmounted below
	filler := filepath.Join(directory, "filler")
	if err := os.WriteFile(filler, make([]byte, 1<<20), 0o600); err == nil {
		t.Fatal("the directory has room for everything")
	}
	expectStartFailure(t, shim, container, harness.Unique(t.Name()), "no space left on device")
	if err := os.Remove(filler); err != nil {
		t.Fatal(err)
	}
	expectWorking(t, shim, container)
}

func TestContainerIsPaused(t *testing.T) {
	t.Parallel()
	container := harness.RunContainer(t, node.ContainerSpec{})
	runc := func(verb string) {
		t.Helper()
		if output, err := harness.Command(t, harness.Shared.Node.Program("runc"), "--root", harness.Shared.Node.RuncRoot(), verb, container).CombinedOutput(); err != nil {
			t.Fatalf("runc %s: %v: %s", verb, err, output)
		}
	}
	mark := harness.Unique(t.Name())
	options := remotecommand.StreamOptions{Stdout: io.Discard}
	ended, cancel := harness.Begin(t, "SPDY", harness.Shared.Shim.ExecURL(t, container, options, harness.Marked(mark, "sleep 1000; :")...), options)
	harness.AwaitMarked(t, mark, 2)
	runc("pause")
	resumed := false
	defer func() {
		if !resumed {
			runc("resume")
		}
	}()
	expectStartFailure(t, harness.Shared.Shim, container, harness.Unique(t.Name()), "paused")
	// A client that leaves a paused container leaves processes that can end only when the container goes on.
	cancel()
	harness.AwaitEnd(t, ended) //nolint:errcheck // cancelled
	time.Sleep(12 * time.Second)
	runc("resume")
	resumed = true
	t.Logf("gone %v after the container went on", harness.AwaitNone(t, mark, goneLimit))
	expectWorking(t, harness.Shared.Shim, container)
}

// setFreeFiles sets the limit of open files so that a process can open exactly this many more.
func setFreeFiles(t *testing.T, pid, free int) {
	t.Helper()
	limit := 0
	for ; ; limit++ {
		if _, err := os.Lstat(fmt.Sprintf("/proc/%d/fd/%d", pid, limit)); err == nil {
			continue
		}
		if free == 0 {
			break
		}
		free--
	}
	setFileLimit(t, pid, uint64(limit))
}

func setFileLimit(t *testing.T, pid int, limit uint64) {
	t.Helper()
	var both unix.Rlimit
	if err := unix.Prlimit(pid, unix.RLIMIT_NOFILE, nil, &both); err != nil {
		t.Fatal(err)
	}
	both.Cur = limit
	if err := unix.Prlimit(pid, unix.RLIMIT_NOFILE, &both, nil); err != nil {
		t.Fatal(err)
	}
}

// fewestDescriptors returns how many descriptors a process has when nothing of its last session is left: the fewest seen
// within a second.
func fewestDescriptors(pid int) int {
	fewest := harness.Descriptors(pid)
	for end := time.Now().Add(time.Second); time.Now().Before(end); time.Sleep(20 * time.Millisecond) {
		fewest = min(fewest, harness.Descriptors(pid))
	}
	return fewest
}

// TestFileLimitIsReached checks that the client is told when the limit of open files is reached, and that all works again
// afterwards.
func TestFileLimitIsReached(t *testing.T) {
	t.Parallel()
	container := harness.RunContainer(t, node.ContainerSpec{})
	shim := harness.StartStreamshim(t, "")
	expectWorking(t, shim, container)
	var most unix.Rlimit
	if err := unix.Prlimit(shim.PID(), unix.RLIMIT_NOFILE, nil, &most); err != nil {
		t.Fatal(err)
	}
	idle := fewestDescriptors(shim.PID())
	// One is for the connection itself. Without it nobody could tell the client anything, see below.
	for spare := 1; spare <= 12; spare++ {
		mark := harness.Unique(t.Name())
		options := remotecommand.StreamOptions{Stdin: harness.OpenStdin(t), Stdout: io.Discard, Stderr: io.Discard}
		for i, transport := range harness.Transports {
			u := shim.ExecURL(t, container, options, harness.Marked(mark, "sleep 1000; :")...)
			testutil.Eventually(t, "the descriptors of the last session are closed", func() bool { return harness.Descriptors(shim.PID()) <= idle })
			setFreeFiles(t, shim.PID(), spare)
			ctx, cancel := context.WithTimeout(t.Context(), 3*time.Second)
			err := harness.Stream(ctx, transport, u.String(), options)
			if i == 0 {
				t.Logf("room for %d files: %v", spare, err)
			}
			if err == nil || harness.ExitCodeOf(err) >= 0 {
				t.Errorf("%s, room for %d files: %v", transport, spare, err)
			}
			cancel()
			setFileLimit(t, shim.PID(), most.Cur)
		}
		harness.AwaitNone(t, mark, goneLimit)
	}
	// A connection that cannot even be accepted waits until it can.
	for _, transport := range harness.Transports {
		output := &testutil.Buffer{}
		options := remotecommand.StreamOptions{Stdout: output}
		u := shim.ExecURL(t, container, options, "echo", "works")
		testutil.Eventually(t, "the descriptors of the last session are closed", func() bool { return harness.Descriptors(shim.PID()) <= idle })
		refused := func() int {
			log, _ := os.ReadFile(shim.Log) //nolint:errcheck // 0 will not do
			return strings.Count(string(log), "accept4: too many open files")
		}
		before := refused()
		setFreeFiles(t, shim.PID(), 0)
		ended, _ := harness.Begin(t, transport, u, options)
		testutil.Eventually(t, "the connection cannot be accepted", func() bool { return refused() > before })
		setFileLimit(t, shim.PID(), most.Cur)
		if err := harness.AwaitEnd(t, ended); err != nil || output.String() != "works\n" {
			t.Errorf("%s, after there was no room: %q, %v", transport, output, err)
		}
	}
	expectWorking(t, shim, container)
}

// TestStreamshimIsKilled kills streamshim during sessions. The next one must end what is left, unless it is to be kept.
func TestStreamshimIsKilled(t *testing.T) {
	t.Parallel()
	for _, policy := range []string{"hangup", "kill", "keep"} {
		t.Run(policy, func(t *testing.T) {
			t.Parallel()
			shim := harness.StartStreamshim(t, fmt.Sprintf("[exec]\non_disconnect = %q\n", policy))
			container := harness.RunContainer(t, node.ContainerSpec{})
			var marks []string
			var sessions []<-chan error
			for i, script := range []string{"sleep 1000; :", "trap '' HUP TERM; sleep 1000 & (sleep 1000 &) ; setsid sleep 1000 & sleep 1000; :"} {
				for _, tty := range []bool{false, true} {
					mark := harness.Unique(t.Name())
					marks = append(marks, mark)
					options := remotecommand.StreamOptions{Stdin: harness.OpenStdin(t), Stdout: io.Discard, Tty: tty}
					if tty && policy == "keep" {
						script = "trap '' HUP; " + script // the terminal hangs up with streamshim
					}
					ended, _ := harness.Begin(t, harness.Transports[i], shim.ExecURL(t, container, options, harness.Marked(mark, script)...), options)
					sessions = append(sessions, ended)
				}
			}
			for _, mark := range marks {
				harness.AwaitMarked(t, mark, 2)
			}
			shim.Stop(t, syscall.SIGKILL)
			for i, ended := range sessions {
				// Over SPDY stock client-go itself takes a lost connection for a success (kubectl#1726).
				if err := harness.AwaitEnd(t, ended); err == nil && i >= 2 {
					t.Error("a session of the killed streamshim is a success")
				}
			}
			shim.Start(t)
			if policy == "keep" {
				time.Sleep(12 * time.Second)
				for _, mark := range marks {
					if len(harness.WithMark(mark)) == 0 {
						t.Errorf("%s was ended", mark)
					}
				}
			} else {
				for _, mark := range marks {
					harness.AwaitNone(t, mark, goneLimit)
				}
			}
			expectWorking(t, shim, container)
			testutil.Eventually(t, "no files are left", func() bool {
				return len(harness.Glob(filepath.Join(shim.Folder, "state", "exec", "*"))) == 0
			})
		})
	}
}
