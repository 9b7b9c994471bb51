// Package cri tests streamshim from outside, as a node uses it: in front of a real containerd, called through CRI and
// through crictl.
package cri

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/creack/pty"
	"go.uber.org/goleak"

	"github.com/streamshim/streamshim/internal/testutil"
	"github.com/streamshim/streamshim/test/internal/harness"
	"github.com/streamshim/streamshim/test/internal/images"
	"github.com/streamshim/streamshim/test/internal/node"
)

// waitTimeout bounds every wait of a test. It is long because the machine may be busy.
const waitTimeout = 2 * time.Minute

// The tests share a node, one after the other: none is parallel, and each removes its pods.
func TestMain(m *testing.M) {
	code := harness.Main(m, "cri")
	if err := goleak.Find(); err != nil && code == 0 {
		fmt.Fprintln(os.Stderr, err)
		code = 1
	}
	os.Exit(code)
}

// runTwoServers runs a pod that serves HTTP on the ports 80 and 81, each from its own container.
func runTwoServers(t *testing.T, n *node.Node) (podID string, containers []string) {
	t.Helper()
	podID, first := runLab(t, n, node.PodSpec{Name: "servers"}, node.ContainerSpec{})
	second, err := n.RunContainer(t.Context(), podID, node.ContainerSpec{
		Name: "second", Image: node.Image("e2e-test-images/nginx:1.14-2"), Env: map[string]string{"LISTEN": ":81"},
	})
	if err != nil {
		t.Fatal(err)
	}
	return podID, []string{first, second}
}

// The answers of the two servers of runTwoServers.
const firstPage, secondPage = "hello from the pod", "Welcome to nginx!"

// runLab runs a pod with a container that serves HTTP and answers lines. See images.Lab.
func runLab(t *testing.T, n *node.Node, pod node.PodSpec, spec node.ContainerSpec) (podID, containerID string) {
	t.Helper()
	spec.Image = node.Image(images.Lab)
	return runContainer(t, n, pod, spec)
}

func runContainer(t *testing.T, n *node.Node, pod node.PodSpec, spec node.ContainerSpec) (podID, containerID string) {
	t.Helper()
	pod.Namespace = harness.Unique("test") // so that its name is free
	podID, err := n.RunPod(t.Context(), pod)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := n.RemovePod(context.Background(), podID); err != nil {
			t.Error(err)
		}
	})
	containerID, err = n.RunContainer(t.Context(), podID, spec)
	if err != nil {
		t.Fatal(err)
	}
	return podID, containerID
}

// program is a program that runs beside the test, with pipes, or in its own terminal if terminal is set.
type program struct {
	t        *testing.T
	name     string
	command  *exec.Cmd
	terminal *os.File
	stdin    io.WriteCloser
	output   *testutil.Buffer // stdout, and with a terminal all output
	stderr   *testutil.Buffer // empty with a terminal
	done     chan struct{}    // closed when it has ended and its output was read
}

// start runs a program with pipes.
func start(t *testing.T, command *exec.Cmd) *program {
	t.Helper()
	p := &program{t: t, command: command, output: &testutil.Buffer{}, stderr: &testutil.Buffer{}, done: make(chan struct{})}
	command.Stdout, command.Stderr = p.output, p.stderr
	stdin, err := command.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	p.stdin = stdin
	if err := command.Start(); err != nil {
		t.Fatal(err)
	}
	p.watch(func() {})
	return p
}

// startInTerminal runs a program in a terminal of this size.
func startInTerminal(t *testing.T, command *exec.Cmd, columns, rows uint16) *program {
	t.Helper()
	p := &program{t: t, command: command, output: &testutil.Buffer{}, stderr: &testutil.Buffer{}, done: make(chan struct{})}
	terminal, err := pty.StartWithSize(command, &pty.Winsize{Cols: columns, Rows: rows})
	if err != nil {
		t.Fatal(err)
	}
	p.terminal, p.stdin = terminal, terminal
	read := make(chan struct{})
	go func() {
		defer close(read)
		_, _ = io.Copy(p.output, terminal) // ends with EIO when nobody has the terminal open any more
	}()
	p.watch(func() {
		<-read
		terminal.Close()
	})
	return p
}

// watch waits for the program in the background, and then calls finish. A program that still runs at the end of the test is
// killed.
func (p *program) watch(finish func()) {
	p.name = strings.Join(p.command.Args[3:], " ") // without crictl --config FILE
	go func() {
		defer close(p.done)
		_ = p.command.Wait() // end checks the exit code
		finish()
	}()
	p.t.Cleanup(func() {
		select {
		case <-p.done:
			return
		default:
		}
		_ = p.command.Process.Kill()
		<-p.done
	})
}

func (p *program) write(text string) {
	p.t.Helper()
	if _, err := io.WriteString(p.stdin, text); err != nil {
		p.t.Fatalf("%s: write: %v", p.name, err)
	}
}

// expect waits until the text has appeared in the output, and drops the output up to the end of the text.
func (p *program) expect(text string) {
	p.t.Helper()
	p.expectMatch(regexp.QuoteMeta(text))
}

// expectMatch is like expect, with a regular expression. It returns the match and its groups.
func (p *program) expectMatch(pattern string) []string {
	p.t.Helper()
	match := p.output.Take(regexp.MustCompile(pattern), p.done)
	if match == nil {
		p.t.Fatalf("%s: %q did not appear, but %q and %q", p.name, pattern, p.output, p.stderr)
	}
	return match
}

// end waits for the program's end and checks its exit code.
func (p *program) end(exitCode int) {
	p.t.Helper()
	select {
	case <-p.done:
	case <-time.After(waitTimeout):
		p.t.Fatalf("%s: still runs, output %q and %q", p.name, p.output, p.stderr)
	}
	if code := p.command.ProcessState.ExitCode(); code != exitCode {
		p.t.Errorf("%s: exit code %d, want %d, output %q and %q", p.name, code, exitCode, p.output, p.stderr)
	}
}

// forwardedTo waits until crictl port-forward prints the local address on which it listens for a port of the pod.
func (p *program) forwardedTo(port int) string {
	p.t.Helper()
	return p.expectMatch(fmt.Sprintf(`Forwarding from (127\.0\.0\.1:\d+) -> %d\n`, port))[1]
}

func (p *program) signal(signal os.Signal) {
	p.t.Helper()
	if err := p.command.Process.Signal(signal); err != nil {
		p.t.Fatalf("%s: %v", p.name, err)
	}
}

// run runs a program to its end.
func run(t *testing.T, command *exec.Cmd) (stdout, stderr string, exitCode int) {
	t.Helper()
	p := start(t, command)
	p.stdin.Close()
	select {
	case <-p.done:
	case <-time.After(waitTimeout):
		t.Fatalf("%s: still runs, output %q and %q", p.name, p.output, p.stderr)
	}
	return p.output.String(), p.stderr.String(), p.command.ProcessState.ExitCode()
}

// footprint is what sessions could leave behind in streamshim and in containers.
type footprint struct {
	descriptors int // of streamshim
	children    int // of streamshim
	members     int // processes in the containers
}

// takeFootprint counts it.
func takeFootprint(t *testing.T, n *node.Node, containers ...string) footprint {
	t.Helper()
	pid := n.PID("streamshim")
	if pid == 0 {
		t.Fatal("streamshim does not run")
	}
	entries, err := os.ReadDir(fmt.Sprintf("/proc/%d/fd", pid))
	if err != nil {
		t.Fatal(err)
	}
	found := footprint{descriptors: len(entries)}
	processes, err := filepath.Glob("/proc/[0-9]*")
	if err != nil {
		t.Fatal(err)
	}
	for _, process := range processes {
		status, err := os.ReadFile(process + "/status")
		if err != nil {
			continue // it has ended meanwhile
		}
		zombie := strings.Contains(string(status), "\nState:\tZ")
		if strings.Contains(string(status), "\nPPid:\t"+strconv.Itoa(pid)+"\n") {
			found.children++
		}
		cgroup, _ := os.ReadFile(process + "/cgroup")
		for _, container := range containers {
			if !zombie && bytes.Contains(cgroup, []byte(container)) { // reaping orphans is the container's task
				found.members++
			}
		}
	}
	return found
}

// expectNothingLeft waits until there is no more than before.
func expectNothingLeft(t *testing.T, n *node.Node, before footprint, containers ...string) {
	t.Helper()
	var now footprint
	defer func() {
		if t.Failed() {
			t.Logf("left behind: %+v, before it was %+v", now, before)
		}
	}()
	testutil.Eventually(t, "nothing is left behind", func() bool {
		now = takeFootprint(t, n, containers...)
		return now.descriptors <= before.descriptors && now.children <= before.children && now.members <= before.members
	})
}

// interrupt is ctrl-C in a terminal.
const interrupt = "\x03"
