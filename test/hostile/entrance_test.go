package hostile

import (
	"bytes"
	"context"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/streamshim/streamshim/pkg/execproc"
	"github.com/streamshim/streamshim/pkg/workload"
)

// startTimeout bounds the starts of the tests that wait for it.
const startTimeout = 3 * time.Second

// entrance is a way of starting a command in a container.
type entrance struct {
	name string
	// enter runs the command to its end and returns what it wrote to stdout. The error says that it did not
	// start, or did not end in time.
	enter  func(ctx context.Context, c *container, command ...string) (string, error)
	runner *execproc.Runner // nil if it is no engine of streamshim's
}

// reference is "runc exec", than which no engine may give a container more.
func reference() *entrance {
	return &entrance{name: "runc exec", enter: func(ctx context.Context, c *container, command ...string) (string, error) {
		return runCommand(ctx, runc(), append([]string{"--root", c.Root, "exec", c.ContainerID}, command...)...)
	}}
}

// wrong is a launcher with one mistake; wrong/wrong.c has them.
func wrong(t testing.TB, mistake string) *entrance {
	t.Helper()
	program := filepath.Join(newFolder(t), "wrong") // a file of its own: one attack writes to it
	data, err := os.ReadFile(wrongProgram)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(program, data, 0o755); err != nil {
		t.Fatal(err)
	}
	return &entrance{name: mistake, enter: func(ctx context.Context, c *container, command ...string) (string, error) {
		arguments := []string{mistake, strconv.Itoa(c.InitPid), c.Process.Cwd, fmt.Sprintf("%x", capabilityMask(t, c))}
		return runCommand(ctx, program, append(arguments, command...)...)
	}}
}

func runCommand(ctx context.Context, program string, arguments ...string) (string, error) {
	command := exec.CommandContext(ctx, program, arguments...)
	command.SysProcAttr = &unix.SysProcAttr{Setpgid: true}
	command.Cancel = func() error { return unix.Kill(-command.Process.Pid, unix.SIGKILL) }
	command.WaitDelay = time.Second
	var stdout, stderr bytes.Buffer
	command.Stdout, command.Stderr = &stdout, &stderr
	if err := command.Run(); err != nil {
		return stdout.String(), fmt.Errorf("%w: %s", err, bytes.TrimSpace(stderr.Bytes()))
	}
	return stdout.String(), nil
}

// streamshimEntrance is what streamshim does, by way of runc, which is the only engine that it has.
func streamshimEntrance(t testing.TB, startTimeout time.Duration) *entrance {
	t.Helper()
	runner, err := execproc.NewRunner(execproc.Config{
		StateDir: filepath.Join(newFolder(t), "exec"), StartTimeout: startTimeout,
		OnDisconnect: execproc.PolicyHangup, TermAfter: 300 * time.Millisecond, KillAfter: 600 * time.Millisecond,
		DrainIdle: time.Second, DrainMax: 5 * time.Second, OutputLimit: 1 << 20,
		Logger: slog.New(slog.NewTextHandler(testLog{t}, nil)),
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { runner.Close() })
	return &entrance{
		name: "engine runc", runner: runner,
		enter: func(ctx context.Context, c *container, command ...string) (string, error) {
			result, err := runner.RunSync(ctx, c.Container, workload.SyncCommand{Args: command, Timeout: timeoutOf(ctx)})
			if err == nil && result.ExitCode != 0 {
				err = fmt.Errorf("exit code %d: %s", result.ExitCode, bytes.TrimSpace(result.Stderr))
			}
			return string(result.Stdout), err
		},
	}
}

// timeoutOf is the time that is left, or what a test without a deadline may take.
func timeoutOf(ctx context.Context) time.Duration {
	if deadline, set := ctx.Deadline(); set {
		return time.Until(deadline)
	}
	return startTimeout + patience
}

// entrances are the reference and all engines.
func entrances(t testing.TB) []*entrance {
	t.Helper()
	return []*entrance{reference(), streamshimEntrance(t, patience)} // the machine may be busy
}

// engines are all that may be configured, which give a start up after startTimeout.
func engines(t testing.TB) []*entrance {
	t.Helper()
	return []*entrance{streamshimEntrance(t, startTimeout)}
}

// patience is for what should happen soon, on a machine that is busy with other things.
const patience = 20 * time.Second

type testLog struct{ testing.TB }

func (l testLog) Write(line []byte) (int, error) {
	l.Logf("%s", bytes.TrimSpace(line))
	return len(line), nil
}

// state is what a victim says of itself.
type state map[string]string

func parseState(output string) (state, error) {
	line, found := strings.CutPrefix(output, "victim ")
	if !found {
		return nil, fmt.Errorf("the victim said %q", output)
	}
	s := state{}
	for _, field := range strings.Fields(line) {
		name, value, _ := strings.Cut(field, "=")
		s[name] = value
	}
	return s, nil
}

// wrongs are what a victim has that it should not have, by what the container's specification says, each in
// words that are the same every time.
func (s state) wrongs(t testing.TB, c *container) []string {
	t.Helper()
	var wrongs []string
	mask := fmt.Sprintf("%016x", capabilityMask(t, c))
	expect := func(what string, names []string, want string) {
		for _, name := range names {
			if s[name] != want {
				wrongs = append(wrongs, "command: "+what)
				return
			}
		}
	}
	user := c.Process.User
	zero := strings.Repeat("0", 16)
	held := mask
	if user.UID != 0 {
		held = zero
	}
	id := func(n uint32) string { return fmt.Sprintf("%d,%d,%d", n, n, n) }
	filters, mode := "0", "0"
	if c.spec.Linux.Seccomp != nil {
		filters, mode = "1", "2"
	}
	expect("other ids", []string{"uid"}, id(user.UID))
	expect("other ids", []string{"gid"}, id(user.GID))
	expect("other capabilities", []string{"bnd"}, mask)
	expect("other capabilities", []string{"eff", "prm"}, held)
	expect("other capabilities", []string{"amb"}, zero)
	expect("inheritable capabilities", []string{"inh"}, zero)
	expect("other no_new_privs", []string{"no_new_privs"}, map[bool]string{true: "1", false: "0"}[c.Process.NoNewPrivileges])
	expect("other filters", []string{"seccomp"}, mode)
	expect("other filters", []string{"filters"}, filters)
	expect("a descriptor", []string{"fds"}, "")
	expect("something of the host", []string{"host"}, "0")
	return wrongs
}

var capabilityNumbers = map[string]int{
	"CAP_CHOWN": unix.CAP_CHOWN, "CAP_DAC_OVERRIDE": unix.CAP_DAC_OVERRIDE, "CAP_FSETID": unix.CAP_FSETID, "CAP_FOWNER": unix.CAP_FOWNER,
	"CAP_MKNOD": unix.CAP_MKNOD, "CAP_NET_RAW": unix.CAP_NET_RAW, "CAP_SETGID": unix.CAP_SETGID, "CAP_SETUID": unix.CAP_SETUID,
	"CAP_SETFCAP": unix.CAP_SETFCAP, "CAP_SETPCAP": unix.CAP_SETPCAP, "CAP_NET_BIND_SERVICE": unix.CAP_NET_BIND_SERVICE,
	"CAP_SYS_CHROOT": unix.CAP_SYS_CHROOT, "CAP_KILL": unix.CAP_KILL, "CAP_AUDIT_WRITE": unix.CAP_AUDIT_WRITE,
	"CAP_SYS_PTRACE": unix.CAP_SYS_PTRACE, "CAP_SYS_ADMIN": unix.CAP_SYS_ADMIN,
}

func capabilityMask(t testing.TB, c *container) uint64 {
	t.Helper()
	var mask uint64
	for _, name := range c.Process.Capabilities.Bounding {
		number, known := capabilityNumbers[name]
		if !known {
			t.Fatalf("which number has %s?", name)
		}
		mask |= 1 << number
	}
	return mask
}
