package execproc

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
	"time"

	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/streamshim/streamshim/internal/testutil"
	"github.com/streamshim/streamshim/pkg/execproc/internal/ociruntime"
	"github.com/streamshim/streamshim/pkg/execproc/internal/proc"
	"github.com/streamshim/streamshim/pkg/execproc/internal/tree"
	"github.com/streamshim/streamshim/pkg/workload"
)

// TestExitCodes checks that a command that ran has its own exit code, and one that could not be run that of a shell
// (kubernetes#40820).
func TestExitCodes(t *testing.T) {
	r := newRunner(t)
	c := newContainer(t)
	for _, test := range []struct {
		name string
		args []string
		want int
		text string // of the error, if the start fails
	}{
		{"success", []string{"true"}, 0, ""},
		{"three", shell("exit 3"), 3, ""},
		{"real 255", shell("exit 255"), 255, ""},
		{"real 127", shell("exit 127"), 127, ""},
		{"kill -9", shell("kill -9 $$"), 137, ""},
		{"kill -15", shell("kill -15 $$"), 143, ""},
		{"not in PATH", []string{"nope"}, 127, `exec: "nope": executable file not found in $PATH`},
		{"no such file", []string{"/bin/nope"}, 127, `exec: "/bin/nope": stat /bin/nope: no such file or directory`},
		{"directory", []string{"/etc"}, 126, `exec: "/etc": is a directory`},
		{"no x bit", []string{"/bin/not-executable"}, 126, `exec: "/bin/not-executable": permission denied`},
		{"wrong machine", []string{"wrong-machine"}, 126, ""},
		{"missing interpreter", []string{"missing-interpreter"}, 126, ""},
	} {
		for _, tty := range []bool{false, true} {
			t.Run(test.name, func(t *testing.T) {
				p, err := r.Start(context.Background(), c, workload.Command{Args: test.args, TTY: tty, Stdout: true, Stderr: !tty})
				if test.text != "" {
					var failed interface{ ExitCode() int }
					if !errors.As(err, &failed) {
						t.Fatalf("error %v has no exit code", err)
					}
					if failed.ExitCode() != test.want || err.Error() != test.text {
						t.Errorf("%d, %q", failed.ExitCode(), err)
					}
					return
				}
				if err != nil {
					t.Fatal(err)
				}
				defer p.Close()
				if code := exitCode(t, p); code != test.want {
					t.Errorf("exit code %d, want %d", code, test.want)
				}
			})
		}
	}
}

// TestStartFailuresThatAreNotTheCommands checks that such failures are an error without an exit code, which says what to
// do.
func TestStartFailuresThatAreNotTheCommands(t *testing.T) {
	marker := newMarker()
	script := func(t *testing.T, text string) string {
		path := filepath.Join(t.TempDir(), "runtime")
		writeFile(t, path, "#!/bin/sh\n"+text, 0o755)
		return path
	}
	for _, test := range []struct {
		name   string
		change func(t *testing.T, r *Runner, c *workload.Container, command *workload.Command)
		is     error
		text   string
	}{
		{"cwd missing", func(t *testing.T, _ *Runner, c *workload.Container, _ *workload.Command) {
			process := *c.Process
			process.Cwd = "/nope"
			c.Process = &process
		}, nil, `chdir to cwd ("/nope")`},
		{"unknown container", func(t *testing.T, _ *Runner, c *workload.Container, _ *workload.Command) { c.ContainerID = "unknown" }, ociruntime.ErrNotRunning, "does not exist"},
		{"state is gone", func(t *testing.T, _ *Runner, c *workload.Container, _ *workload.Command) { c.Root = t.TempDir() }, ociruntime.ErrNotRunning, "does not exist"},
		{"main process has ended", func(t *testing.T, _ *Runner, c *workload.Container, _ *workload.Command) { c.InitPid = 1<<22 - 1 }, ociruntime.ErrNotRunning, "has ended"},
		{"another process has the main one's pid", func(t *testing.T, _ *Runner, c *workload.Container, _ *workload.Command) { c.InitStartTime-- }, ociruntime.ErrNotRunning, "has ended"},
		{"paused", func(t *testing.T, _ *Runner, c *workload.Container, _ *workload.Command) {
			runc(t, *c, "pause", c.ContainerID)
			t.Cleanup(func() { runc(t, *c, "resume", c.ContainerID) })
		}, ociruntime.ErrNotRunning, "paused"},
		{"runtime missing", func(t *testing.T, _ *Runner, c *workload.Container, _ *workload.Command) {
			c.Runtime = "/usr/local/bin/runc-nope"
		}, os.ErrNotExist, "installed"},
		{"runtime fails without a word", func(t *testing.T, _ *Runner, c *workload.Container, _ *workload.Command) {
			c.Runtime = script(t, "exit 7")
		}, nil, "exit status 7"},
		{"runtime fails on stderr", func(t *testing.T, _ *Runner, c *workload.Container, _ *workload.Command) {
			c.Runtime = script(t, "echo 'flag provided but not defined' >&2; exit 1")
		}, nil, "flag provided"},
		{"runtime hangs", func(t *testing.T, r *Runner, c *workload.Container, _ *workload.Command) {
			r.config.StartTimeout = 300 * time.Millisecond
			c.Runtime = script(t, "sleep "+marker+" & sleep "+marker)
		}, ErrStartTimeout, "did not start the command in time"},
		{"pid file empty", func(t *testing.T, _ *Runner, c *workload.Container, _ *workload.Command) {
			c.Runtime = script(t, `while [ "$1" != --pid-file ]; do shift; done; : >"$2"`)
		}, nil, "pid file does not hold a pid"},
		{"pid file missing", func(t *testing.T, _ *Runner, c *workload.Container, _ *workload.Command) {
			c.Runtime = script(t, "exit 0")
		}, os.ErrNotExist, "gave no pid"},
		{"pid of a stranger", func(t *testing.T, _ *Runner, c *workload.Container, _ *workload.Command) {
			c.Runtime = script(t, `while [ "$1" != --pid-file ]; do shift; done; echo 2 >"$2"`)
		}, nil, "no child of streamshim"},
		{"no terminal was sent", func(t *testing.T, _ *Runner, c *workload.Container, command *workload.Command) {
			command.TTY, command.Stderr = true, false
			c.Runtime = script(t, "exit 3")
		}, nil, "exit status 3"},
		{"command is empty", func(t *testing.T, _ *Runner, c *workload.Container, command *workload.Command) { command.Args = nil }, nil, "command is empty"},
		{"no process spec", func(t *testing.T, _ *Runner, c *workload.Container, command *workload.Command) { c.Process = nil }, nil, "no process"},
		{"disk full", func(t *testing.T, r *Runner, c *workload.Container, command *workload.Command) {
			dir := t.TempDir()
			if err := unix.Mount("tmpfs", dir, "tmpfs", 0, "size=4k"); err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { unix.Unmount(dir, 0) })
			writeFile(t, filepath.Join(dir, "filler"), strings.Repeat("x", 4096), 0o600)
			r.config.StateDir = dir
		}, unix.ENOSPC, "write recovery record"},
	} {
		t.Run(test.name, func(t *testing.T) {
			r := newRunner(t)
			c := newContainer(t)
			command := workload.Command{Args: []string{"true"}, Stdin: true, Stdout: true, Stderr: true}
			test.change(t, r, &c, &command)
			p, err := r.Start(context.Background(), c, command)
			if err == nil {
				p.Close()
				t.Fatal("it started")
			}
			var withCode interface{ ExitCode() int }
			if errors.As(err, &withCode) {
				t.Errorf("%v blames the command", err)
			}
			if test.is != nil && !errors.Is(err, test.is) {
				t.Errorf("%v is no %v", err, test.is)
			}
			if test.is != ociruntime.ErrNotRunning && errors.Is(err, ociruntime.ErrNotRunning) {
				t.Errorf("%v blames the container", err)
			}
			if !strings.Contains(err.Error(), test.text) || strings.Contains(err.Error(), "\n") {
				t.Errorf("%q does not say %q in one line", err, test.text)
			}
			eventually(t, "nothing is left of a hanging runtime", func() bool { return len(marked(t, marker)) == 0 })
		})
	}
}

// TestCancelledStartLeavesNothing checks that a start that is given up at any moment leaves nothing behind.
func TestCancelledStartLeavesNothing(t *testing.T) {
	testutil.Slow(t)
	r := newRunner(t)
	c := newContainer(t)
	before := len(marked(t, c.ContainerID))
	marker := newMarker()
	cancelled := 0
	for i := range 60 {
		ctx, cancel := context.WithTimeout(context.Background(), time.Duration(i)*time.Millisecond)
		p, err := r.Start(ctx, c, workload.Command{Args: []string{"sleep", marker}, Stdin: true, Stdout: true, TTY: i%2 == 0})
		cancel()
		if err == nil {
			p.Kill()
			exitCode(t, p)
			p.Close()
			continue
		}
		cancelled++
		if !errors.Is(err, context.DeadlineExceeded) {
			t.Fatal(err)
		}
	}
	if cancelled == 0 {
		t.Error("no start was slow enough to be cancelled; the test proves nothing")
	}
	eventually(t, "no process is left", func() bool { return len(marked(t, marker)) == 0 && len(marked(t, c.ContainerID)) == before })
}

// TestNoDescriptorFree checks that without a free descriptor a start fails, nothing crashes, and the next start works.
func TestNoDescriptorFree(t *testing.T) {
	r := newRunner(t)
	c := newContainer(t)
	var old unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &old); err != nil {
		t.Fatal(err)
	}
	failed := 0
	for spare := uint64(0); spare < 16; spare++ {
		low := old
		low.Cur = uint64(resources(t)[1]) + spare
		if err := unix.Setrlimit(unix.RLIMIT_NOFILE, &low); err != nil {
			t.Fatal(err)
		}
		p, err := r.Start(context.Background(), c, workload.Command{Args: []string{"true"}, Stdin: true, Stdout: true, Stderr: true})
		if restore := unix.Setrlimit(unix.RLIMIT_NOFILE, &old); restore != nil {
			t.Fatal(restore)
		}
		if err != nil {
			failed++
			continue
		}
		if code := exitCode(t, p); code != 0 {
			t.Errorf("exit code %d", code)
		}
		p.Close()
	}
	if failed == 0 {
		t.Error("the limit was never too low; the test proves nothing")
	}
	if _, code := output(t, r, c, workload.Command{Args: []string{"true"}}); code != 0 {
		t.Errorf("exit code %d afterwards", code)
	}
}

// TestStdinSurvivesStdoutEOF checks that the three streams are what they should be and independent of each other: stdin
// goes on if the process has closed its stdout (containerd#12734 cut uploads short).
func TestStdinSurvivesStdoutEOF(t *testing.T) {
	r := newRunner(t)
	c := newContainer(t)
	p := start(t, r, c, workload.Command{Args: shell("exec >&-; n=$(wc -c); echo $n >&2; exit 4"), Stdin: true, Stdout: true, Stderr: true})
	if data, err := io.ReadAll(p.Stdout()); len(data) > 0 || err != nil {
		t.Errorf("stdout: %q, %v", data, err)
	}
	const size = 8 << 20
	if n, err := p.Stdin().Write(make([]byte, size)); n != size || err != nil {
		t.Fatalf("stdin: %d, %v", n, err)
	}
	p.Stdin().Close()
	data, err := io.ReadAll(p.Stderr())
	if string(data) != "8388608\n" || err != nil {
		t.Errorf("stderr: %q, %v", data, err)
	}
	if code := exitCode(t, p); code != 4 {
		t.Errorf("exit code %d", code)
	}
}

// TestStreamsNotAskedFor checks that streams that were not asked for are /dev/null there and nil here.
func TestStreamsNotAskedFor(t *testing.T) {
	r := newRunner(t)
	c := newContainer(t)
	p := start(t, r, c, workload.Command{Args: shell("read x; echo to nobody && echo to nobody >&2 && exit 5")})
	if p.Stdin() != nil || p.Stdout() != nil || p.Stderr() != nil {
		t.Error("streams that nobody asked for")
	}
	if code := exitCode(t, p); code != 5 {
		t.Errorf("exit code %d", code)
	}
	var file *os.File
	p = start(t, r, c, workload.Command{Args: []string{"true"}, Stdin: true, Stdout: true, Stderr: true})
	for _, stream := range []any{p.Stdin(), p.Stdout(), p.Stderr()} {
		if _, ok := stream.(*os.File); !ok {
			t.Errorf("%T is no %T", stream, file)
		}
	}
}

// TestIdentityIsTheContainers compares all that the kernel knows of an exec and of the container's main process
// (kubernetes#73275, kata#1500).
func TestIdentityIsTheContainers(t *testing.T) {
	umask := uint32(0o027)
	user := func(spec *specs.Spec) {
		spec.Process.User = specs.User{UID: 1000, GID: 2000, AdditionalGids: []uint32{3000, 4000}, Umask: &umask}
	}
	for name, changes := range map[string][]func(*specs.Spec){
		"root":             nil,
		"user 1000":        {user},
		"user namespace":   {userNamespace},
		"userns user 1000": {userNamespace, user},
		"read-only rootfs": {func(spec *specs.Spec) { spec.Root.Readonly = true }},
		"privileges may grow": {func(spec *specs.Spec) {
			spec.Process.NoNewPrivileges = false
			caps := spec.Process.Capabilities
			for _, set := range []*[]string{&caps.Bounding, &caps.Effective, &caps.Permitted} {
				*set = append(*set, "CAP_CHOWN")
			}
			spec.Process.Cwd = "/tmp"
		}},
		"seccomp": {func(spec *specs.Spec) {
			errno := uint(unix.EPERM)
			spec.Linux.Seccomp = &specs.LinuxSeccomp{
				DefaultAction: specs.ActAllow,
				Syscalls:      []specs.LinuxSyscall{{Names: []string{"swapon"}, Action: specs.ActErrno, ErrnoRet: &errno}},
			}
		}},
	} {
		t.Run(name, func(t *testing.T) {
			r := newRunner(t)
			c := newContainer(t, changes...)
			// The shell itself writes it, not a child, and reads of pid 1 what pid 1 may read.
			script := `
				p=$1
				grep -E '^(Uid|Gid|Groups|Umask|Cap...|NoNewPrivs|Seccomp|Seccomp_filters|Cpus_allowed):' /proc/$p/status
				cat /proc/$p/limits /proc/$p/cgroup /proc/$p/oom_score_adj
				readlink /proc/$p/cwd
				for n in cgroup ipc mnt net pid user uts; do readlink /proc/$p/ns/$n; done`
			ours, code := output(t, r, c, workload.Command{Args: []string{"sh", "-c", strings.ReplaceAll(script, "$1", "$$")}})
			if code != 0 {
				t.Fatalf("exit code %d: %s", code, ours)
			}
			theirs, code := output(t, r, c, workload.Command{Args: []string{"sh", "-c", strings.ReplaceAll(script, "$1", "1")}})
			if code != 0 {
				t.Fatalf("exit code %d: %s", code, theirs)
			}
			if ours != theirs || strings.Count(ours, "\n") < 30 {
				t.Errorf("exec:\n%s\nmain process:\n%s", ours, theirs)
			}
			env, _ := output(t, r, c, workload.Command{Args: []string{"env"}, Env: []string{"EXTRA=1", "EXTRA=2", "GREETING=a=b"}})
			for _, line := range []string{"PATH=/bin\n", "GREETING=a=b\n", "EXTRA=2\n"} {
				if !strings.Contains("\n"+env, "\n"+line) {
					t.Errorf("no %q in %q", line, env)
				}
			}
		})
	}
}

// TestLimitsAreTheContainers checks limits. The container's main process has them from the container's spec or from the
// runtime that started it, whose limits may differ from streamshim's.
func TestLimitsAreTheContainers(t *testing.T) {
	for name, changes := range map[string][]func(*specs.Spec){
		"inherited": {func(spec *specs.Spec) { spec.Process.Rlimits = nil }},
		"in part in the spec": {func(spec *specs.Spec) {
			spec.Process.Rlimits = []specs.POSIXRlimit{{Type: "RLIMIT_NOFILE", Soft: 700, Hard: 800}}
		}},
		"user namespace": {userNamespace, func(spec *specs.Spec) {
			spec.Process.Rlimits = nil
			spec.Process.User = specs.User{UID: 1000, GID: 2000}
		}},
	} {
		t.Run(name, func(t *testing.T) {
			r := newRunner(t)
			c := newContainer(t, changes...)
			// As if the runtime had been started with other limits.
			set := func(resource int, soft, hard uint64) {
				if err := unix.Prlimit(c.InitPid, resource, &unix.Rlimit{Cur: soft, Max: hard}, nil); err != nil {
					t.Fatal(err)
				}
			}
			set(unix.RLIMIT_CORE, 4096, 8192)
			if len(c.Process.Rlimits) == 0 {
				set(unix.RLIMIT_NOFILE, 1500, 3000)
			}
			for _, tty := range []bool{false, true} {
				want, err := os.ReadFile(fmt.Sprintf("/proc/%d/limits", c.InitPid))
				if err != nil {
					t.Fatal(err)
				}
				got, code := output(t, r, c, workload.Command{Args: []string{"cat", "/proc/self/limits"}, TTY: tty})
				if strings.ReplaceAll(got, "\r", "") != string(want) || code != 0 {
					t.Errorf("tty %v:\n%s\nmain process:\n%s", tty, got, want)
				}
			}
		})
	}
}

// TestOOMScoreAdjIsTheContainers checks that a command does not get streamshim's oom_score_adj, which its unit sets to
// -999, even if the runtime does not set it.
func TestOOMScoreAdjIsTheContainers(t *testing.T) {
	r := newRunner(t)
	c := newContainer(t, func(spec *specs.Spec) { spec.Process.OOMScoreAdj = nil })
	if err := os.WriteFile(fmt.Sprintf("/proc/%d/oom_score_adj", c.InitPid), []byte("500"), 0); err != nil {
		t.Fatal(err)
	}
	for _, tty := range []bool{false, true} {
		if got, code := output(t, r, c, workload.Command{Args: []string{"cat", "/proc/self/oom_score_adj"}, TTY: tty}); strings.TrimSpace(got) != "500" || code != 0 {
			t.Errorf("tty %v: %q, exit code %d", tty, got, code)
		}
	}
	score := 700
	c.Process.OOMScoreAdj = &score
	if got, code := output(t, r, c, workload.Command{Args: []string{"cat", "/proc/self/oom_score_adj"}}); got != "700\n" || code != 0 {
		t.Errorf("by the spec: %q, exit code %d", got, code)
	}
}

func userNamespace(spec *specs.Spec) {
	spec.Linux.Namespaces = append(spec.Linux.Namespaces, specs.LinuxNamespace{Type: specs.UserNamespace})
	spec.Linux.UIDMappings = []specs.LinuxIDMapping{{ContainerID: 0, HostID: 100000, Size: 65536}}
	spec.Linux.GIDMappings = []specs.LinuxIDMapping{{ContainerID: 0, HostID: 200000, Size: 65536}}
	spec.Mounts = slicesDelete(spec.Mounts, "/sys/fs/cgroup")
}

func slicesDelete(mounts []specs.Mount, destination string) []specs.Mount {
	var kept []specs.Mount
	for _, mount := range mounts {
		if mount.Destination != destination {
			kept = append(kept, mount)
		}
	}
	return kept
}

// TestStreamsCanBeReopened checks that a program may open /dev/stdin and the like by name, whatever its user (cri-o#5391,
// containerd#10598, moby#31243).
func TestStreamsCanBeReopened(t *testing.T) {
	user := func(spec *specs.Spec) { spec.Process.User = specs.User{UID: 1000, GID: 2000} }
	for name, changes := range map[string][]func(*specs.Spec){
		"root":             nil,
		"user 1000":        {user},
		"user namespace":   {userNamespace},
		"userns user 1000": {userNamespace, user},
	} {
		t.Run(name, func(t *testing.T) {
			r := newRunner(t)
			c := newContainer(t, changes...)
			p := start(t, r, c, workload.Command{Args: shell("cat /dev/stdin >/dev/stdout && echo fine >/dev/stderr"), Stdin: true, Stdout: true, Stderr: true})
			io.WriteString(p.Stdin(), "hello")
			p.Stdin().Close()
			out, _ := io.ReadAll(p.Stdout())
			text, _ := io.ReadAll(p.Stderr())
			if code := exitCode(t, p); code != 0 || string(out) != "hello" || string(text) != "fine\n" {
				t.Errorf("exit code %d, stdout %q, stderr %q", code, out, text)
			}
		})
	}
	t.Run("terminal of user 1000", func(t *testing.T) {
		r := newRunner(t)
		c := newContainer(t, user)
		if out, code := output(t, r, c, workload.Command{Args: shell("echo one >/dev/stdout; echo two >/dev/tty"), TTY: true}); code != 0 || out != "one\r\ntwo\r\n" {
			t.Errorf("exit code %d, %q", code, out)
		}
	})
}

// TestContainerExitEndsProcess checks that the end of the container is seen at once and ends the process
// (kubernetes#129144).
func TestContainerExitEndsProcess(t *testing.T) {
	r := newRunner(t)
	c := newContainer(t)
	p := start(t, r, c, workload.Command{Args: []string{"sleep", "1000"}, Stdin: true, Stdout: true, Stderr: true})
	other := start(t, r, c, workload.Command{Args: []string{"sleep", "1000"}, TTY: true, Stdin: true, Stdout: true})
	select {
	case <-p.ContainerExited():
		t.Fatal("the container has not ended yet")
	case <-p.Exited():
		t.Fatal("the process has not ended yet")
	default:
	}
	runc(t, c, "kill", c.ContainerID, "KILL")
	for _, p := range []*Process{p, other} {
		closes(t, p.ContainerExited(), "the end of the container")
		if code := exitCode(t, p); code != 137 {
			t.Errorf("exit code %d", code)
		}
	}
	if _, err := r.Start(context.Background(), c, workload.Command{Args: []string{"true"}}); !errors.Is(err, ociruntime.ErrNotRunning) {
		t.Errorf("start in a container that has ended: %v", err)
	}
}

// TestSlowReaderDoesNotDelayReaping checks that a dead process is reaped although nobody reads what it wrote. Unreaped, it
// would keep the container from stopping.
func TestSlowReaderDoesNotDelayReaping(t *testing.T) {
	r := newRunner(t)
	c := newContainer(t)
	p := start(t, r, c, workload.Command{Args: []string{"yes"}, Stdout: true})
	buffer := make([]byte, 1<<10)
	if _, err := io.ReadFull(p.Stdout(), buffer); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the pipe fills up", func() bool { return pending(t, p.pipes.Stdout) >= 64<<10 })
	runc(t, c, "kill", c.ContainerID, "KILL")
	closes(t, p.Exited(), "the exit, unread output or not")
	eventually(t, "the container's init is gone or a zombie", func() bool {
		stat, err := proc.ReadStat(c.InitPid)
		return err != nil || stat.Zombie()
	})
	rest, err := io.ReadAll(p.Stdout())
	if err != nil || len(rest) < 64<<10 {
		t.Errorf("output after the exit: %d bytes, %v", len(rest), err)
	}
}

// pending returns how many bytes are in a pipe.
func pending(t *testing.T, pipe *os.File) (n int) {
	t.Helper()
	raw, err := pipe.SyscallConn()
	if err == nil {
		err = raw.Control(func(fd uintptr) { n, _ = unix.IoctlGetInt(int(fd), unix.TIOCINQ) }) //nolint:errcheck // then 0
	}
	if err != nil {
		t.Fatal(err)
	}
	return n
}

// TestContainerEndingBeforeItRuns checks that a main process that was killed and has not had a CPU since counts as ending.
func TestContainerEndingBeforeItRuns(t *testing.T) {
	r := newRunner(t)
	c := newContainer(t)
	p := start(t, r, c, workload.Command{Args: []string{"sleep", "1000"}})
	runc(t, c, "pause", c.ContainerID)
	if p.ContainerEnding() {
		t.Error("a paused container is said to end")
	}
	if err := unix.Kill(c.InitPid, unix.SIGKILL); err != nil {
		t.Fatal(err)
	}
	if !p.ContainerEnding() {
		t.Error("a container whose main process was killed is not said to end")
	}
	runc(t, c, "resume", c.ContainerID)
	closes(t, p.ContainerExited(), "the container's end")
}

// TestContainerEnding checks that the end of a main process shows before it is gone. It is the last to go: it waits in the
// kernel until the others are reaped.
func TestContainerEnding(t *testing.T) {
	r := newRunner(t)
	c := newContainer(t)
	p := start(t, r, c, workload.Command{Args: []string{"sleep", "1000"}})
	last := start(t, r, c, workload.Command{Args: []string{"sleep", "1000"}})
	if p.ContainerEnding() {
		t.Error("the container is said to end")
	}
	// An orphan is not reaped during a start, and delays the main process.
	begun := r.reaper.BeginStart()
	r.reaper.DropProcess(last.watch)
	runc(t, c, "kill", c.ContainerID, "KILL")
	if code := exitCode(t, p); code != 137 {
		t.Errorf("exit code %d", code)
	}
	eventually(t, "the container is seen to end", p.ContainerEnding)
	select {
	case <-p.ContainerExited():
		t.Error("the container ended before all its processes were reaped")
	default:
	}
	r.mu.Lock()
	delete(r.running, last) // nobody will report that it has ended
	r.mu.Unlock()
	os.Remove(last.record)
	r.reaper.EndStart(begun)
	closes(t, p.ContainerExited(), "the container's end")
	if !p.ContainerEnding() {
		t.Error("a container that has ended is not said to end")
	}
}

// TestNoWayOut checks that a command cannot be named by a descriptor that only its start had open. From a folder of the
// host, such as a cgroup's, the way up leads out of the container (CVE-2024-21626).
func TestNoWayOut(t *testing.T) {
	testutil.Slow(t)
	r := newRunner(t)
	c := newContainer(t)
	for fd := range 32 {
		for _, program := range []string{"bin/true", "usr/bin/true"} {
			path := fmt.Sprintf("/proc/self/fd/%d/%s%s", fd, strings.Repeat("../", 12), program)
			p, err := r.Start(context.Background(), c, workload.Command{Args: []string{path}})
			var failed *ociruntime.StartError
			if !errors.As(err, &failed) {
				t.Errorf("%s: %v", path, err)
			}
			if err == nil {
				p.Kill()
				p.Close()
			}
		}
	}
}

// TestNoStartOutlastsItsTimeout checks that a start ends within its timeout and the time for ending a tree, whatever a
// runtime does or leaves stopped, even on a busy machine.
func TestNoStartOutlastsItsTimeout(t *testing.T) {
	testutil.Slow(t)
	const timeout = 300 * time.Millisecond
	const limit = timeout + 2*tree.KillTimeout + patience/2
	for range runtime.NumCPU() {
		burner := exec.Command("sh", "-c", "while :; do :; done")
		if err := burner.Start(); err != nil {
			t.Fatal(err)
		}
		defer func() {
			burner.Process.Kill()
			burner.Wait()
		}()
	}
	r := newRunner(t, func(c *Config) { c.StartTimeout = timeout })
	c := newContainer(t)
	for name, text := range map[string]string{
		"hangs":                         "sleep 1000",
		"is stopped":                    "kill -STOP $$; sleep 1000",
		"has a stopped child":           "sh -c 'kill -STOP $$' & wait",
		"leaves a child with the pipes": "setsid sleep 1000 & exec sleep 1000",
		"ignores signals":               "trap '' HUP INT TERM; while :; do sleep 1; done",
		"forks away":                    "while :; do setsid sleep 1000 & sleep 0.01; done",
	} {
		for _, tty := range []bool{false, true} {
			path := filepath.Join(t.TempDir(), "runtime")
			writeFile(t, path, "#!/bin/sh\n"+text+"\n", 0o755)
			c.Runtime = path
			began := time.Now()
			p, err := r.Start(t.Context(), c, workload.Command{Args: []string{"true"}, Stdin: true, Stdout: true, TTY: tty})
			if p != nil {
				p.Close()
			}
			if !errors.Is(err, ErrStartTimeout) && !(name == "has a stopped child" && errors.Is(err, ociruntime.ErrStopped)) {
				t.Errorf("a runtime that %s (terminal: %v): %v, want %v", name, tty, err, ErrStartTimeout)
			}
			if took := time.Since(began); took > limit {
				t.Errorf("a runtime that %s (terminal: %v) took %v", name, tty, took)
			}
		}
	}
}

// TestTerminalThatNeverComes checks that a runtime that reports the start of a command with a terminal but sends no
// terminal has no more time for it than the start has.
func TestTerminalThatNeverComes(t *testing.T) {
	r := newRunner(t, func(c *Config) { c.StartTimeout = time.Second })
	c := newContainer(t)
	path := filepath.Join(t.TempDir(), "runtime")
	writeFile(t, path, "#!/bin/sh\nwhile [ \"$1\" != --pid-file ]; do shift; done; setsid sleep 1000 & echo $! >\"$2\"\n", 0o755)
	c.Runtime = path
	soonest := time.Hour
	for attempts := 0; soonest >= consoleTimeout && attempts < 10; attempts++ { // a busy machine may delay some of them
		began := time.Now()
		if _, err := r.Start(t.Context(), c, workload.Command{Args: []string{"true"}, Stdout: true, TTY: true}); err == nil {
			t.Fatal("it has started without a terminal")
		}
		soonest = min(soonest, time.Since(began))
	}
	if soonest >= consoleTimeout {
		t.Errorf("given up after %v", soonest)
	}
}

// TestRuntimeThatFailsTooLate checks that a runtime that fails after the command has begun leaves nothing of it, although
// nobody knows its pid.
func TestRuntimeThatFailsTooLate(t *testing.T) {
	r := newRunner(t)
	c := newContainer(t)
	script := filepath.Join(t.TempDir(), "runtime")
	writeFile(t, script, `#!/bin/sh
for a; do [ "$before" = --pid-file ] && pidfile="$a"; before="$a"; done
`+c.Runtime+` "$@" || exit
until [ -e /tmp/`+"MARK"+` ]; do sleep 0.01; done
kill -9 $(cat "$pidfile")
rm "$pidfile"
exit 1
`, 0o755)
	for _, tty := range []bool{false, true} {
		marker := newMarker()
		ready := filepath.Join(rootfs, "tmp", marker)
		text, err := os.ReadFile(script)
		if err != nil {
			t.Fatal(err)
		}
		late := filepath.Join(t.TempDir(), "late")
		writeFile(t, late, strings.ReplaceAll(string(text), "/tmp/MARK", ready), 0o755)
		broken := c
		broken.Runtime = late
		command := workload.Command{
			Args: shell("trap '' HUP; sleep " + marker + " & touch /tmp/" + marker + "; sleep " + marker), Stdin: true, Stdout: true, TTY: tty,
		}
		if _, err := r.Start(context.Background(), broken, command); err == nil {
			t.Error("a runtime that failed has started a command")
		}
		if left := marked(t, marker); len(left) > 0 {
			t.Errorf("terminal %v: left %v", tty, left)
			for _, pid := range left {
				unix.Kill(pid, unix.SIGKILL)
			}
		}
	}
}
