package execproc

import (
	"bufio"
	"errors"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/streamshim/streamshim/internal/testutil"
	"github.com/streamshim/streamshim/pkg/execproc/internal/ociruntime"
	"github.com/streamshim/streamshim/pkg/workload"
)

// TestTerminalSizeOnFirstCommand checks that the first command sees the size (kubernetes#47990, cri-o#9246).
func TestTerminalSizeOnFirstCommand(t *testing.T) {
	testutil.Slow(t)
	r := newRunner(t)
	c := newContainer(t)
	for range 100 {
		out, code := output(t, r, c, workload.Command{Args: []string{"stty", "size"}, TTY: true, Stdin: true, Size: workload.Size{Width: 123, Height: 45}})
		if out != "45 123\r\n" || code != 0 {
			t.Fatalf("%q, exit code %d", out, code)
		}
	}
}

// TestTerminalSizeWithCrun checks that the size is there a moment after the start. crun sets the size only after it has let
// the command run, so the first instructions may see none. A program that asked too early gets SIGWINCH. See
// docs/behaviour.md.
func TestTerminalSizeWithCrun(t *testing.T) {
	testutil.Slow(t)
	binary, err := exec.LookPath("crun")
	if err != nil {
		if os.Getenv("STREAMSHIM_REAL") == "required" {
			t.Fatal(err)
		}
		t.Skip(err)
	}
	// crun refuses a hybrid cgroup hierarchy whose v2 part has controllers. The wrapper hides it.
	wrapper := filepath.Join(t.TempDir(), "crun")
	writeFile(t, wrapper, "#!/bin/sh\nexec unshare -m sh -c 'umount /sys/fs/cgroup/unified 2>/dev/null; exec \"$0\" \"$@\"' "+binary+" \"$@\"\n", 0o755)
	r := newRunner(t)
	c := newContainerOf(t, wrapper, func(s *specs.Spec) { s.Version = "1.0.2" }) // crun 1.8 accepts no later version
	first := 0
	for range 100 {
		out, _ := output(t, r, c, workload.Command{
			Args: shell("size=$(stty size 2>/dev/null); echo first $size; until [ \"$size\" ]; do size=$(stty size 2>/dev/null); done; echo $size"),
			TTY:  true, Stdin: true, Size: workload.Size{Width: 123, Height: 45},
		})
		if strings.HasPrefix(out, "first 45 123\r\n") {
			first++
		}
		if !strings.HasSuffix(out, "45 123\r\n") {
			t.Errorf("the size never came: %q", out)
		}
	}
	t.Logf("%s: right at the first instruction %d times of 100", binary, first)
}

func TestResize(t *testing.T) {
	r := newRunner(t)
	c := newContainer(t)
	p := start(t, r, c, workload.Command{Args: shell("read x; stty size; read x; stty size"), TTY: true, Stdin: true, Stdout: true})
	for _, size := range [][2]uint16{{100, 30}, {0, 0}, {0, 9}, {9, 0}} { // zeros are ignored
		if err := p.Resize(workload.Size{Width: size[0], Height: size[1]}); err != nil {
			t.Fatal(err)
		}
	}
	io.WriteString(p.Stdin(), "\n\n")
	out, _ := io.ReadAll(p.Stdout())
	if strings.Count(string(out), "30 100\r\n") != 2 {
		t.Errorf("%q", out)
	}
	exitCode(t, p)
	p = start(t, r, c, workload.Command{Args: []string{"true"}})
	if err := p.Resize(workload.Size{Width: 1, Height: 1}); err != nil {
		t.Errorf("resize without a terminal: %v", err)
	}
}

// TestTerminalName checks that TERM is set if there is none, and left alone otherwise.
func TestTerminalName(t *testing.T) {
	r := newRunner(t)
	c := newContainer(t)
	for _, test := range []struct {
		env  []string
		tty  bool
		want string
	}{{nil, true, "xterm"}, {[]string{"TERM=vt100"}, true, "vt100"}, {nil, false, ""}} {
		out, _ := output(t, r, c, workload.Command{Args: []string{"env"}, Env: test.env, TTY: test.tty})
		_, term, _ := strings.Cut("\n"+strings.ReplaceAll(out, "\r", ""), "\nTERM=")
		if term, _, _ = strings.Cut(term, "\n"); term != test.want {
			t.Errorf("TERM is %q, want %q", term, test.want)
		}
	}
}

// TestShortTerminalCommandsLoseNothing checks that a short command with a terminal loses none of its output (cri-o#8483:
// about one in a hundred did).
func TestShortTerminalCommandsLoseNothing(t *testing.T) {
	testutil.Slow(t)
	r := newRunner(t)
	c := newContainer(t)
	for range 300 {
		if out, code := output(t, r, c, workload.Command{Args: []string{"echo", "complete"}, TTY: true}); out != "complete\r\n" || code != 0 {
			t.Fatalf("%q, exit code %d", out, code)
		}
	}
	out, code := output(t, r, c, workload.Command{Args: []string{"seq", "20000"}, TTY: true})
	if strings.Count(out, "\r\n") != 20000 || !strings.HasSuffix(out, "20000\r\n") || code != 0 {
		t.Errorf("%d lines, exit code %d", strings.Count(out, "\r\n"), code)
	}
}

// TestTerminalWithoutStdout checks that a terminal's output that nobody wants does not stop the process.
func TestTerminalWithoutStdout(t *testing.T) {
	r := newRunner(t)
	c := newContainer(t)
	p := start(t, r, c, workload.Command{Args: []string{"seq", "20000"}, TTY: true})
	if p.Stdout() != nil || p.Stdin() != nil || p.Stderr() != nil {
		t.Error("streams that nobody asked for")
	}
	if code := exitCode(t, p); code != 0 {
		t.Errorf("exit code %d", code)
	}
}

// TestTerminalStdinEOF checks that the end of input reaches a program with a terminal, and that its output still arrives
// (cri-tools#269).
func TestTerminalStdinEOF(t *testing.T) {
	r := newRunner(t)
	c := newContainer(t)
	for _, input := range []string{"", "a\n", "a"} {
		p := start(t, r, c, workload.Command{Args: shell("stty -echo; echo ready; cat | wc -c; echo end"), TTY: true, Stdin: true, Stdout: true})
		buffer := make([]byte, 7)
		if _, err := io.ReadFull(p.Stdout(), buffer); err != nil || string(buffer) != "ready\r\n" {
			t.Fatalf("%q, %v", buffer, err)
		}
		io.WriteString(p.Stdin(), input)
		if err := errors.Join(p.Stdin().Close(), p.Stdin().Close()); err != nil {
			t.Fatal(err)
		}
		out, err := io.ReadAll(p.Stdout())
		if want := string(rune('0'+len(input))) + "\r\nend\r\n"; string(out) != want || err != nil {
			t.Errorf("after %q: %q, %v", input, out, err)
		}
		if code := exitCode(t, p); code != 0 {
			t.Errorf("exit code %d", code)
		}
		p.Close()
	}
}

// TestTerminalStdinEOFReachesReaders checks that the end of input is also the end for later readers, and that it reaches a
// shell that edits lines. A program that reads keys, such as an editor, gets it as a key, and so only once.
func TestTerminalStdinEOFReachesReaders(t *testing.T) {
	testutil.Slow(t)
	r := newRunner(t)
	c := newContainer(t)
	for name, test := range map[string]struct {
		args []string
		want string // the last output
	}{
		"one reader after another": {shell("stty -echo; echo ready; cat; sleep 0.5; cat; sleep 1; cat; echo end"), "end\r\n"},
		"a shell":                  {[]string{"sh"}, ""},
		"a shell in a shell":       {shell("sh; echo end"), "end\r\n"},
		"a program that takes keys": {
			shell("stty raw -echo; echo ready; timeout 3 cat >/tmp/keys; stty sane; wc -c </tmp/keys"), "1\r\n"},
	} {
		t.Run(name, func(t *testing.T) {
			p := start(t, r, c, workload.Command{Args: test.args, TTY: true, Stdin: true, Stdout: true})
			output := bufio.NewReader(p.Stdout())
			if strings.Contains(strings.Join(test.args, " "), "ready") {
				if line, err := output.ReadString('\n'); err != nil || strings.TrimSpace(line) != "ready" {
					t.Fatalf("%q, %v", line, err)
				}
			}
			if err := p.Stdin().Close(); err != nil {
				t.Fatal(err)
			}
			out, err := io.ReadAll(output)
			if !strings.HasSuffix(string(out), test.want) || err != nil {
				t.Errorf("%q, %v", out, err)
			}
			if code := exitCode(t, p); code != 0 {
				t.Errorf("exit code %d", code)
			}
			p.Close()
		})
	}
}

// TestTerminalReopened checks that a program may close its terminal and open it again.
func TestTerminalReopened(t *testing.T) {
	r := newRunner(t)
	c := newContainer(t)
	out, code := output(t, r, c, workload.Command{Args: shell("exec <&- >&- 2>&-; sleep 1; echo again >/dev/tty; exit 3"), TTY: true})
	if out != "again\r\n" || code != 3 {
		t.Errorf("%q, exit code %d", out, code)
	}
}

// TestCloseInterruptsRead checks that Close unblocks a read and does not wait for it.
func TestCloseInterruptsRead(t *testing.T) {
	r := newRunner(t)
	c := newContainer(t)
	for _, tty := range []bool{false, true} {
		p := start(t, r, c, workload.Command{Args: []string{"sleep", "1000"}, TTY: tty, Stdin: true, Stdout: true})
		ended := make(chan struct{})
		go func() {
			defer close(ended)
			io.Copy(io.Discard, p.Stdout())
		}()
		p.Disconnect()
		p.Close()
		closes(t, ended, "the interrupted read")
		exitCode(t, p)
	}
}

// TestLongStateDirectory checks a state directory whose path is longer than the 107 bytes of a Unix socket's path.
func TestLongStateDirectory(t *testing.T) {
	r := newRunner(t, func(config *Config) {
		config.StateDir = filepath.Join(config.StateDir, strings.Repeat("long", 30))
	})
	c := newContainer(t)
	if out, code := output(t, r, c, workload.Command{Args: []string{"echo", "hi"}, TTY: true}); out != "hi\r\n" || code != 0 {
		t.Errorf("%q, exit code %d", out, code)
	}
}

// TestConsoleSocketClosesWhatElseArrives checks that no descriptor stays open, whatever a runtime sends over the console
// socket.
func TestConsoleSocketClosesWhatElseArrives(t *testing.T) {
	for name, receive := range map[string]func(*ociruntime.ConsoleSocket) (*os.File, error){
		"awaited": func(s *ociruntime.ConsoleSocket) (*os.File, error) { return s.Receive(patience) },
		"queued":  (*ociruntime.ConsoleSocket).Queued,
	} {
		t.Run(name, func(t *testing.T) { consoleSocketCloses(t, receive) })
	}
}

func consoleSocketCloses(t *testing.T, receive func(*ociruntime.ConsoleSocket) (*os.File, error)) {
	noLeaks(t)
	for count := range 4 {
		socket, err := ociruntime.NewConsoleSocket(filepath.Join(t.TempDir(), "s"))
		if err != nil {
			t.Fatal(err)
		}
		if file, err := socket.Queued(); err == nil {
			t.Errorf("%s was queued before anything was sent", file.Name())
		}
		fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			t.Fatal(err)
		}
		if err := unix.Connect(fd, &unix.SockaddrUnix{Name: socket.Path}); err != nil {
			t.Fatal(err)
		}
		null, err := os.Open(os.DevNull)
		if err != nil {
			t.Fatal(err)
		}
		var control []byte
		fds := make([]int, count)
		for i := range fds {
			fds[i] = int(null.Fd())
		}
		if count > 0 {
			control = unix.UnixRights(fds...)
		}
		if err := unix.Sendmsg(fd, []byte("/dev/pts/0"), control, nil, 0); err != nil {
			t.Fatal(err)
		}
		file, err := receive(socket)
		if (err == nil) != (count == 1) {
			t.Errorf("%d descriptors: %v", count, err)
		}
		if file != nil {
			file.Close()
		}
		null.Close()
		unix.Close(fd)
		socket.Close()
	}
}
