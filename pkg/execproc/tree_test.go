package execproc

import (
	"bufio"
	"fmt"
	"io"
	"strings"
	"testing"
	"time"

	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/streamshim/streamshim/internal/testutil"
	"github.com/streamshim/streamshim/pkg/execproc/internal/proc"
	"github.com/streamshim/streamshim/pkg/workload"
)

// families are shell scripts. Each starts the processes of its row, all of which sleep for the marker, prints "ready" when
// they exist, and continues.
var families = []struct {
	name     string
	script   string // %[1]s is the marker
	sleepers int
}{
	{"alone", "echo ready; exec sleep %[1]s", 1},
	{"child", "sleep %[1]s & echo ready; wait", 1},
	{"grandchildren", "sh -c 'sleep %[1]s & sleep %[1]s' & sleep %[1]s & sleep 0.3; echo ready; wait", 3},
	{"session of its own", "setsid sleep %[1]s & sleep 0.3; echo ready; wait", 1},
	{"double fork", "(sleep %[1]s &) ; sleep 0.3; echo ready; sleep %[1]s", 2},
	{"double fork holding a stream, session of its own", "(setsid sh -c 'sleep %[1]s & sleep 0.1') ; sleep 0.3; echo ready; sleep %[1]s", 2},
	{"ignores HUP", "trap '' HUP; sleep %[1]s & echo ready; wait; sleep %[1]s", 1},
	{"ignores HUP and TERM", "trap '' HUP TERM; sleep %[1]s & echo ready; wait; sleep %[1]s", 1},
	{"leader goes with HUP, child does not", "(trap '' HUP; exec setsid sleep %[1]s) & sleep 0.3; echo ready; wait", 1},
	{"stopped", "sleep %[1]s & sleep 0.3; kill -STOP $!; echo ready; kill -STOP $$; wait", 1},
	{"stopped with handlers", "trap 'exit 9' HUP; sleep %[1]s & echo ready; kill -STOP $$; wait", 1},
}

// TestDisconnectEndsTree checks that all that a command has started ends when its client leaves (kubernetes#89031,
// runc#3359).
func TestDisconnectEndsTree(t *testing.T) {
	for _, hostPID := range []bool{false, true} {
		r := newRunner(t)
		c := newContainer(t, func(spec *specs.Spec) {
			if hostPID {
				shareHostPID(spec)
			}
		})
		for _, family := range families {
			for _, tty := range []bool{false, true} {
				for _, kill := range []bool{false, true} {
					t.Run(fmt.Sprintf("%s, tty %v, kill %v, hostPID %v", family.name, tty, kill, hostPID), func(t *testing.T) {
						t.Parallel()
						marker := newMarker()
						p := startFamily(t, r, c, family.script, marker, tty)
						eventually(t, "all are there", func() bool { return len(marked(t, "sleep\x00"+marker)) == family.sleepers })
						if kill {
							p.Kill()
						} else {
							p.Disconnect()
						}
						p.Close()
						closes(t, p.Exited(), "the process's end")
						closes(t, p.ended, "the tree's end")
						if left := marked(t, marker); len(left) > 0 {
							t.Errorf("left: %v", left)
						}
						if !(proc.Identity{Pid: c.InitPid, Start: mustStat(t, c.InitPid).Start}).Alive() {
							t.Error("the container's main process is gone")
						}
					})
				}
			}
		}
	}
}

func mustStat(t testing.TB, pid int) proc.Stat {
	t.Helper()
	stat, err := proc.ReadStat(pid)
	if err != nil {
		t.Fatal(err)
	}
	return stat
}

func shareHostPID(spec *specs.Spec) {
	var kept []specs.LinuxNamespace
	for _, namespace := range spec.Linux.Namespaces {
		if namespace.Type != specs.PIDNamespace {
			kept = append(kept, namespace)
		}
	}
	spec.Linux.Namespaces = kept
}

func startFamily(t *testing.T, r *Runner, c workload.Container, script, marker string, tty bool) *Process {
	t.Helper()
	p := start(t, r, c, workload.Command{Args: shell(fmt.Sprintf(script, marker)), Stdin: true, Stdout: true, Stderr: !tty, TTY: tty})
	line, err := bufio.NewReader(p.Stdout()).ReadString('\n')
	if err != nil || strings.TrimSpace(line) != "ready" {
		t.Fatalf("%q, %v", line, err)
	}
	return p
}

// TestHangupComesFirst checks the order of the signals: a process that obeys the hang-up gets no TERM.
func TestHangupComesFirst(t *testing.T) {
	testutil.Slow(t)
	for _, tty := range []bool{false, true} {
		r := newRunner(t, func(config *Config) { config.TermAfter, config.KillAfter = time.Minute, 2*time.Minute })
		c := newContainer(t)
		p := startFamily(t, r, c, "trap '' PIPE; trap 'exit 41' HUP; trap 'exit 42' TERM; echo ready; while :; do sleep 0.05; done #%s", "", tty)
		p.Disconnect()
		p.Disconnect()
		if code := exitCode(t, p); code != 41 {
			t.Errorf("tty %v: exit code %d", tty, code)
		}
		p = startFamily(t, r, c, "trap '' HUP; echo ready; while :; do sleep 0.05; done #%s", "", tty)
		p.Disconnect()
		p.Kill() // does not wait for the rest of the grace period
		if code := exitCode(t, p); code != 137 {
			t.Errorf("tty %v: exit code %d", tty, code)
		}
	}
	r := newRunner(t, func(config *Config) { config.KillAfter = time.Minute })
	c := newContainer(t)
	p := startFamily(t, r, c, "trap '' HUP PIPE; trap 'exit 42' TERM; echo ready; while :; do sleep 0.05; done #%s", "", false)
	p.Disconnect()
	if code := exitCode(t, p); code != 42 {
		t.Errorf("exit code %d", code)
	}
}

// TestNormalEndKillsNobody checks that a daemon started on purpose outlives its command if that ends by itself.
func TestNormalEndKillsNobody(t *testing.T) {
	r := newRunner(t)
	c := newContainer(t)
	marker := newMarker()
	p := start(t, r, c, workload.Command{Args: shell("sleep " + marker + " >/dev/null 2>&1 & exit 3"), Stdout: true, Stderr: true})
	if code := exitCode(t, p); code != 3 {
		t.Errorf("exit code %d", code)
	}
	p.Close()
	if len(marked(t, marker)) != 1 {
		t.Error("the daemon is gone")
	}
	p.Kill() // asked for, and found by its session although the leader has gone
	eventually(t, "the daemon is gone", func() bool { return len(marked(t, marker)) == 0 })
}

// TestKillHurtsNobodyElse checks that only the tree is killed: neither other execs in the container nor the daemons of
// other commands.
func TestKillHurtsNobodyElse(t *testing.T) {
	r := newRunner(t)
	c := newContainer(t)
	marker := newMarker()
	for _, tty := range []bool{false, true} {
		bystander := startFamily(t, r, c, "sleep %[1]s & echo ready; wait", marker, tty)
		victim := startFamily(t, r, c, "sleep 1%[1]s & echo ready; wait", marker, tty)
		victim.Kill()
		closes(t, victim.ended, "the tree's end")
		if len(marked(t, "1"+marker)) > 0 || len(marked(t, marker)) != 2 || bystander.hasExited() {
			t.Errorf("living: %v of the victim, %v of all", marked(t, "1"+marker), marked(t, marker))
		}
		bystander.Kill()
		closes(t, bystander.ended, "the tree's end")
	}
}

// TestReusedTerminalNumber checks that the number of a terminal that was hung up may belong to another terminal soon.
func TestReusedTerminalNumber(t *testing.T) {
	testutil.Slow(t)
	r := newRunner(t, func(config *Config) { config.TermAfter, config.KillAfter = 2*time.Second, 3*time.Second })
	c := newContainer(t)
	marker := newMarker()
	number := func(p *Process) string { return fmt.Sprint(p.ends.Dev, p.ends.Ino) }
	victim := startFamily(t, r, c, "(trap '' HUP TERM; exec setsid sleep %s >/dev/null 2>&1 </dev/null) & sleep 0.3; echo ready; wait", marker, true)
	victim.Disconnect()
	exitCode(t, victim)
	victim.Close()
	bystander := startFamily(t, r, c, "echo ready; exec sleep 1000 #%s", "", true)
	if number(bystander) != number(victim) {
		t.Errorf("terminal %s after %s; the test proves nothing", number(bystander), number(victim))
	}
	closes(t, victim.ended, "the tree's end")
	if bystander.hasExited() || len(marked(t, marker)) > 0 {
		t.Errorf("bystander gone: %v, left of the tree: %v", bystander.hasExited(), marked(t, marker))
	}
}

// TestKeep checks that a process to be kept neither blocks nor dies when nobody reads its output any more.
func TestKeep(t *testing.T) {
	for _, tty := range []bool{false, true} {
		r := newRunner(t, func(config *Config) { config.OnDisconnect = PolicyKeep })
		c := newContainer(t)
		p := start(t, r, c, workload.Command{Args: shell("read x; seq 200000; exit 7"), Stdin: true, Stdout: true, Stderr: !tty, TTY: tty})
		io.WriteString(p.Stdin(), "go on\n")
		p.Disconnect()
		p.Disconnect()
		p.Close()
		if code := exitCode(t, p); code != 7 {
			t.Errorf("tty %v: exit code %d", tty, code)
		}
		// It even outlives the Runner.
		marker := newMarker()
		p = startFamily(t, r, c, "echo ready; exec sleep %s", marker, tty)
		p.Disconnect()
		p.Close()
		r.Close()
		if len(marked(t, marker)) == 0 && !tty { // a terminal ends with its master
			t.Error("the process did not outlive the Runner")
		}
		for _, pid := range marked(t, marker) {
			unix.Kill(pid, unix.SIGKILL)
		}
		eventually(t, "the process is gone", func() bool {
			_, err := unix.Wait4(p.leader.Pid, nil, unix.WNOHANG, nil) // no Runner reaps it any more
			return err == unix.ECHILD && len(marked(t, marker)) == 0
		})
	}
}

// TestKeepDoesNotEndInput checks that a kept process does not take input that was cut for complete: it sees the end only if
// it was sent.
func TestKeepDoesNotEndInput(t *testing.T) {
	r := newRunner(t, func(config *Config) { config.OnDisconnect = PolicyKeep })
	c := newContainer(t)
	command := workload.Command{Args: shell("cat >/dev/null; exit 5"), Stdin: true}
	cut, whole := start(t, r, c, command), start(t, r, c, command)
	whole.Stdin().Close()
	for _, p := range []*Process{cut, whole} {
		p.Disconnect()
		p.Close()
	}
	if code := exitCode(t, whole); code != 5 {
		t.Errorf("with all of its input it ended with %d", code)
	}
	time.Sleep(200 * time.Millisecond) // time for a wrong end of input to take effect
	if cut.hasExited() {
		t.Error("the process took its cut input for all of it")
	}
	cut.Kill()
	exitCode(t, cut)
}
