package execproc

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/streamshim/streamshim/pkg/execproc/internal/proc"
	"github.com/streamshim/streamshim/pkg/workload"
)

const echo = "while read line; do echo got $line; done; exit 7"

// TestManyHandOvers checks that commands and their Runner live through one execve after the other.
func TestManyHandOvers(t *testing.T) {
	a := newActor(t, PolicyHangup)
	c := newContainer(t)
	a.handOver(order{}, nil) // what is opened once is no leak
	before := a.do("resources", "").Counts
	a.start("pipes", c, workload.Command{Args: shell(echo), Stdin: true, Stdout: true, Stderr: true})
	a.start("terminal", c, workload.Command{
		Args: shell("stty -echo; while read line; do stty size; done; exit 9"), Stdin: true, Stdout: true, TTY: true,
	})
	for i := range 40 {
		a.write("pipes", fmt.Sprintf("%d\n", i))
		size := workload.Size{Width: uint16(100 + i), Height: 30} //nolint:gosec // small
		a.tell(order{Do: "resize", Name: "terminal", Size: size})
		a.write("terminal", "x\n")
		what := "hand over"
		if i%5 == 4 {
			what = "thaw"
		}
		a.handOver(order{Do: what}, nil)
		if got := a.read("pipes", "\n"); got != fmt.Sprintf("got %d\n", i) {
			t.Fatalf("read %q", got)
		}
		a.read("terminal", fmt.Sprintf("30 %d\r\n", 100+i))
		if i%8 == 0 { // new commands start, too
			if reply := a.tell(order{Do: "sync", Container: &c, Command: workload.Command{Args: shell("echo sync; exit 3")}}); reply.Text != "sync\n" || reply.Number != 3 {
				t.Errorf("RunSync: %+v", reply)
			}
		}
	}
	for _, name := range []string{"pipes", "terminal"} {
		a.do("close stdin", name)
		a.handOver(order{}, nil)
	}
	a.exit("pipes", 7)
	a.exit("terminal", 9)
	a.handOver(order{}, nil)
	a.exit("pipes", 7)
	a.exit("terminal", 9)
	a.do("close", "pipes")
	a.do("close", "terminal")
	a.leaves(before)
}

// TestExitDuringHandOver checks that a process that ends at any step of a hand-over keeps its exit code, and that nothing
// keeps its zombie.
func TestExitDuringHandOver(t *testing.T) {
	a := newActor(t, PolicyHangup)
	c := newContainer(t)
	a.handOver(order{}, nil)
	before := a.do("resources", "").Counts
	for _, gate := range []string{"before", "frozen", "executed", "begun"} {
		t.Run(gate, func(t *testing.T) {
			var pids []int
			for i := range 3 {
				pids = append(pids, a.start(strconv.Itoa(i), c, workload.Command{Args: shell("trap 'exit 11' USR1; echo ready; while :; do sleep 0.01; done"), Stdout: true, TTY: i == 1}))
				a.read(strconv.Itoa(i), "ready")
			}
			end := func() {
				for _, pid := range pids {
					unix.Kill(pid, unix.SIGUSR1)
				}
				eventually(t, "they have ended", func() bool {
					return !slices.ContainsFunc(pids, func(pid int) bool { stat, err := proc.ReadStat(pid); return err == nil && !stat.Zombie() })
				})
			}
			if gate == "before" {
				end()
			}
			a.handOver(order{}, map[string]func(){gate: end, "begun": func() {
				if gate != "before" {
					if gate == "begun" {
						end()
					}
					// The reaper of the new program is notified of a child's end before it knows the children.
					unix.Kill(a.command.Process.Pid, unix.SIGCHLD)
					time.Sleep(50 * time.Millisecond)
				}
			}})
			for i := range pids {
				a.exit(strconv.Itoa(i), 11)
				a.do("close", strconv.Itoa(i))
			}
			a.leaves(before)
		})
	}
}

// TestOrphansOfHandOver checks that an orphan that has ended during a hand-over is reaped although nobody received its
// SIGCHLD. So is a child that the earlier program has started with os/exec.
func TestOrphansOfHandOver(t *testing.T) {
	a := newActor(t, PolicyHangup)
	c := newContainer(t, shareHostPID)
	a.handOver(order{}, nil)
	before := a.do("resources", "").Counts
	marker := newMarker()
	a.start("parent", c, workload.Command{Args: shell("(sleep " + marker + " & sleep " + marker + " &); echo ready; read x"), Stdin: true, Stdout: true})
	a.read("parent", "ready")
	sleeping := a.tell(order{Do: "child", Text: "100000"}).Number
	a.handOver(order{}, map[string]func(){"executed": func() {
		for _, pid := range marked(t, marker) {
			unix.Kill(pid, unix.SIGKILL)
		}
	}})
	unix.Kill(sleeping, unix.SIGKILL)
	a.do("close stdin", "parent")
	a.do("wait", "parent")
	a.do("close", "parent")
	a.leaves(before)
}

// TestKeptThroughHandOver checks that what goes on without a session goes on in the next program: a command that is kept,
// whose output somebody must read.
func TestKeptThroughHandOver(t *testing.T) {
	for _, tty := range []bool{false, true} {
		t.Run(fmt.Sprint("terminal ", tty), func(t *testing.T) {
			a := newActor(t, PolicyKeep)
			c := newContainer(t)
			a.handOver(order{}, nil)
			before := a.do("resources", "").Counts
			progress := newMarker()
			script := "i=0; while [ ! -e /tmp/stop" + progress + " ]; do i=$((i+1)); head -c 300000 /dev/zero | tr '\\0' x; echo $i > /tmp/" + progress + "; done; read line && exit 1; exit 4"
			pid := a.start("kept", c, workload.Command{Args: shell(script), Stdin: true, Stdout: true, TTY: tty})
			a.do("disconnect", "kept")
			a.do("close", "kept")
			written := func() int {
				text, _ := os.ReadFile(filepath.Join(rootfs, "tmp", progress))
				n, _ := strconv.Atoi(strings.TrimSpace(string(text)))
				return n
			}
			for range 5 {
				a.handOver(order{}, nil)
				last := written()
				eventually(t, "the command goes on", func() bool { return written() > last+10 })
			}
			a.handOver(order{Do: "thaw"}, nil)
			last := written()
			eventually(t, "the command goes on", func() bool { return written() > last+10 })
			writeFile(t, filepath.Join(rootfs, "tmp", "stop"+progress), "", 0o600)
			// Its stdin stays open as before, because the input was not at its end.
			time.Sleep(100 * time.Millisecond)
			if !(mustStat(t, pid).Identity).Alive() {
				t.Error("the command has seen an end of its input")
			}
			a.handOver(order{}, nil)
			unix.Kill(pid, unix.SIGKILL)
			a.leaves(before)
		})
	}
}

// TestEndingThroughHandOvers checks that the ending of a process keeps its times, and that each signal is sent once.
func TestEndingThroughHandOvers(t *testing.T) {
	a := newActor(t, PolicyHangup)
	c := newContainer(t)
	a.handOver(order{}, nil)
	before := a.do("resources", "").Counts
	log, marker := filepath.Join(rootfs, "tmp", newMarker()), newMarker()
	note := func(signal string) string {
		return "trap 'echo " + signal + " >> /tmp/" + filepath.Base(log) + "' " + signal + "; "
	}
	// It has a child in its own session, which only the state knows once the leader is gone.
	script := "trap '' HUP; setsid sleep " + marker + " & " + note("HUP") + note("TERM") + "echo ready; while :; do sleep 0.01; done"
	a.start("dying", c, workload.Command{Args: shell(script), Stdin: true, Stdout: true})
	a.read("dying", "ready")
	began := time.Now()
	a.do("disconnect", "dying")
	a.do("close", "dying")
	text := func() string { data, _ := os.ReadFile(log); return string(data) }
	seen := map[string]time.Duration{}
	for len(marked(t, marker)) > 0 {
		if time.Since(began) > patience {
			t.Fatalf("they live on: %q", text())
		}
		a.handOver(order{}, nil)
		for _, signal := range []string{"HUP", "TERM"} {
			if _, known := seen[signal]; !known && strings.Contains(text(), signal) {
				seen[signal] = time.Since(began)
			}
		}
	}
	took := time.Since(began)
	if text() != "HUP\nTERM\n" {
		t.Errorf("signals: %q", text())
	}
	// Times that began again with each hand-over would never be over.
	if seen["TERM"] < 2*time.Second || took < 4*time.Second {
		t.Errorf("TERM after %v and KILL after %v, not 2s and 4s", seen["TERM"], took)
	}
	a.leaves(before)
}

// TestTreeIsRememberedInHandOver checks that the state knows the rest of the tree of a leader that has ended early.
func TestTreeIsRememberedInHandOver(t *testing.T) {
	a := newActor(t, PolicyHangup)
	c := newContainer(t)
	before := a.do("resources", "").Counts
	marker := newMarker()
	// It has a child in its own session, whose parent ends at SIGHUP.
	a.start("tree", c, workload.Command{Args: shell("trap '' HUP TERM; setsid sleep " + marker + " </dev/null >/dev/null 2>&1 & trap - HUP TERM; echo ready; exec sleep " + marker), Stdout: true})
	a.read("tree", "ready")
	eventually(t, "both run", func() bool { return len(marked(t, marker)) == 2 })
	a.do("disconnect", "tree")
	eventually(t, "the leader has ended", func() bool { return len(marked(t, marker)) == 1 })
	for range 3 {
		a.handOver(order{}, nil)
	}
	a.exit("tree", 129)
	a.do("close", "tree")
	eventually(t, "its child was killed", func() bool { return len(marked(t, marker)) == 0 })
	a.leaves([3]int{before[0] + 10, before[1] + 2, before[2]}) // the first program's
}

// TestContainerEndsDuringHandOver checks that a container that ends between two programs has ended for the next one.
func TestContainerEndsDuringHandOver(t *testing.T) {
	for _, gate := range []string{"frozen", "executed", "begun"} {
		t.Run(gate, func(t *testing.T) {
			a := newActor(t, PolicyHangup)
			c := newContainer(t)
			a.handOver(order{}, nil)
			before := a.do("resources", "").Counts
			a.start("sleep", c, workload.Command{Args: []string{"sleep", "100000"}, Stdout: true})
			a.start("terminal", c, workload.Command{Args: []string{"sleep", "100000"}, Stdout: true, TTY: true})
			a.handOver(order{}, map[string]func(){})
			if a.tell(order{Do: "container", Name: "sleep", Size: workload.Size{Width: 50}}).Yes {
				t.Error("a container that lives has ended")
			}
			a.handOver(order{}, map[string]func(){gate: func() { unix.Kill(c.InitPid, unix.SIGKILL) }})
			for _, name := range []string{"sleep", "terminal"} {
				a.exit(name, 128+int(unix.SIGKILL))
				if !a.tell(order{Do: "container", Name: name, Size: workload.Size{Width: 10000}}).Yes {
					t.Error("the container's end is not known")
				}
				a.do("close", name)
			}
			a.leaves(before)
		})
	}
}

// TestUnclaimedProcess checks that nothing is left of a process whose session was not resumed.
func TestUnclaimedProcess(t *testing.T) {
	a := newActor(t, PolicyHangup)
	c := newContainer(t)
	a.handOver(order{}, nil)
	before := a.do("resources", "").Counts
	marker := newMarker()
	a.start("claimed", c, workload.Command{Args: shell(echo), Stdin: true, Stdout: true})
	a.start("lost", c, workload.Command{Args: shell("setsid sleep " + marker + " & exec sleep " + marker), Stdin: true, Stdout: true})
	a.start("lost with a terminal", c, workload.Command{Args: []string{"sleep", marker}, Stdin: true, Stdout: true, TTY: true})
	eventually(t, "they run", func() bool { return len(marked(t, marker)) == 3 })
	a.handOver(order{Without: []string{"lost", "lost with a terminal"}}, nil)
	eventually(t, "they are ended", func() bool { return len(marked(t, marker)) == 0 })
	a.do("close stdin", "claimed")
	a.exit("claimed", 7)
	a.do("close", "claimed")
	a.leaves(before)
}

// TestLostState checks that processes are found by their records, as after a crash, if the state cannot be read.
func TestLostState(t *testing.T) {
	a := newActor(t, PolicyHangup)
	c := newContainer(t)
	a.handOver(order{}, nil)
	before := a.do("resources", "").Counts
	marker := newMarker()
	a.start("lost", c, workload.Command{Args: shell("setsid sleep " + marker + " & exec sleep " + marker), Stdin: true, Stdout: true})
	a.start("dying", c, workload.Command{Args: shell("trap '' HUP; sleep " + marker), Stdin: true, Stdout: true})
	eventually(t, "they run", func() bool { return len(marked(t, "sleep\x00"+marker)) == 3 })
	a.do("disconnect", "dying")
	a.do("close", "dying")
	a.handOver(order{Lose: true}, nil)
	eventually(t, "nothing is left", func() bool { return len(marked(t, marker)) == 0 })
	a.leaves(before)
	if reply := a.tell(order{Do: "sync", Container: &c, Command: workload.Command{Args: shell("exit 3")}}); reply.Number != 3 {
		t.Errorf("RunSync: %+v", reply)
	}
}

// TestKilledAfterHandOver checks that recovery works after a hand-over as before it.
func TestKilledAfterHandOver(t *testing.T) {
	a := newActor(t, PolicyHangup, "env", afterVariable+"=1h") // until it is killed, however busy the machine is
	c := newContainer(t)
	marker := newMarker()
	a.start("old", c, workload.Command{Args: []string{"sleep", marker}, Stdin: true, Stdout: true})
	a.start("dying", c, workload.Command{Args: shell("trap '' HUP TERM; while :; do sleep " + marker + "; done"), Stdin: true, Stdout: true})
	eventually(t, "they run", func() bool { return len(marked(t, "sleep\x00"+marker)) == 2 })
	a.do("disconnect", "dying")
	a.do("close", "dying")
	for range 3 {
		a.handOver(order{}, nil)
	}
	a.start("new", c, workload.Command{Args: []string{"sleep", marker}, Stdin: true, Stdout: true, TTY: true})
	if records := recordsIn(a.dir); len(records) != 3 {
		t.Errorf("records: %v", records)
	}
	a.handOver(order{}, nil)
	if records := recordsIn(a.dir); len(records) != 3 {
		t.Errorf("records: %v", records)
	}
	a.kill()
	newRunner(t, func(config *Config) { config.StateDir = a.dir })
	eventually(t, "nothing is left", func() bool { return len(marked(t, marker)) == 0 && len(recordsIn(a.dir)) == 0 })
}

// TestLeftoversThroughHandOver checks that a program continues to end the processes of a predecessor, which are not its
// children, if it takes over while they are being ended.
func TestLeftoversThroughHandOver(t *testing.T) {
	newRunner(t) // reaps what the killed one leaves
	c := newContainer(t)
	marker := newMarker()
	first := newActor(t, PolicyHangup)
	first.start("left", c, workload.Command{Args: shell("trap '' HUP TERM; while :; do sleep " + marker + "; done"), Stdin: true, Stdout: true})
	eventually(t, "it runs", func() bool { return len(marked(t, "sleep\x00"+marker)) == 1 })
	first.kill()
	began := time.Now()
	second := newActorIn(t, first.dir, PolicyHangup)
	for len(marked(t, marker)) > 0 {
		if time.Since(began) > patience {
			t.Fatal("it lives on") // as it would if its time began again with each hand-over
		}
		second.handOver(order{}, nil)
	}
	if took := time.Since(began); took < 4*time.Second {
		t.Errorf("it was ended after %v, not 4s", took)
	}
	eventually(t, "its record is gone", func() bool { return len(recordsIn(first.dir)) == 0 })
}

// TestInterruptedStartsThroughHandOver checks that starts during which a predecessor was killed are ended, even by a
// program that takes over meanwhile.
func TestInterruptedStartsThroughHandOver(t *testing.T) {
	newRunner(t) // reaps what the killed one leaves
	c := newContainer(t)
	dir, marker := filepath.Join(t.TempDir(), "exec"), newMarker()
	command := startPredecessor(t, c, dir, marker, PolicyHangup, "EXECPROC_TEST_BUSY=1")
	eventually(t, "starts are under way", func() bool { return len(marked(t, marker)) > 10 })
	command.Process.Kill()
	command.Wait()
	a := newActorIn(t, dir, PolicyHangup)
	for range 10 {
		a.handOver(order{}, nil)
	}
	eventually(t, "nothing is left", func() bool {
		entries, err := os.ReadDir(dir)
		return len(marked(t, marker)) == 0 && err == nil && len(entries) == 0
	})
}

// TestKilledWhileEnding checks that a program that is killed while it ends a tree leaves the rest to the next one, even if
// the command itself has ended.
func TestKilledWhileEnding(t *testing.T) {
	newRunner(t) // reaps what the killed one leaves
	c := newContainer(t)
	marker := newMarker()
	first := newActor(t, PolicyHangup, "env", afterVariable+"=1h") // as in TestKilledAfterHandOver
	// One child is in the session of the command. Another one has only its output.
	script := "trap '' HUP TERM; sleep " + marker + " </dev/null >/dev/null 2>&1 & (setsid sleep " + marker + " &); trap - HUP TERM; echo ready; exec sleep 1" + marker
	first.start("tree", c, workload.Command{Args: shell(script), Stdin: true, Stdout: true})
	first.read("tree", "ready")
	eventually(t, "both run", func() bool { return len(marked(t, "sleep\x00"+marker)) == 2 })
	first.do("disconnect", "tree")
	first.exit("tree", 128+int(unix.SIGHUP))
	first.do("close", "tree")
	first.handOver(order{}, nil)
	if len(marked(t, marker)) != 2 || len(recordsIn(first.dir)) != 1 {
		t.Errorf("%d processes and records %v: the test proves nothing", len(marked(t, marker)), recordsIn(first.dir))
	}
	first.kill()
	second := newActorIn(t, first.dir, PolicyHangup)
	second.handOver(order{}, nil)
	eventually(t, "nothing is left", func() bool { return len(marked(t, marker)) == 0 && len(recordsIn(first.dir)) == 0 })
}

// TestParentDeathSignalAtExecve checks that commands with PDEATHSIG survive a hand-over. The kernel sends that signal when
// the thread that is the parent ends, and execve ends all threads but the one that calls it. Commands are children of the
// main thread, so the main thread must call execve.
func TestParentDeathSignalAtExecve(t *testing.T) {
	for _, other := range []bool{false, true} {
		t.Run(fmt.Sprint("on another thread ", other), func(t *testing.T) {
			a := newActor(t, PolicyHangup)
			c := newContainer(t)
			setpriv, err := exec.LookPath("setpriv") // of util-linux
			if err != nil {
				t.Fatal(err)
			}
			copyFile(t, setpriv, filepath.Join(rootfs, "bin/setpriv-util-linux"), 0o755)
			libraries, _ := exec.Command("ldd", setpriv).CombinedOutput()
			for _, library := range regexp.MustCompile(`/\S+\.so\S*`).FindAllString(string(libraries), -1) {
				if _, err := os.Stat(filepath.Join(rootfs, library)); err != nil {
					copyFile(t, library, filepath.Join(rootfs, library), 0o755)
				}
			}
			marker := newMarker()
			// Not before runc, its first parent, has ended.
			pid := a.start("careful", c, workload.Command{Args: shell("read line; exec setpriv-util-linux --pdeathsig KILL sleep " + marker), Stdin: true})
			a.write("careful", "\n")
			eventually(t, "it sleeps", func() bool { return len(marked(t, "sleep\x00"+marker)) == 1 })
			for range 3 {
				a.handOver(order{Thread: other}, nil)
			}
			if other {
				a.exit("careful", 128+int(unix.SIGKILL)) // as long as this holds, the rule is needed
				return
			}
			if !(mustStat(t, pid).Identity).Alive() {
				t.Error("a command that asked for a signal at its parent's death got it at a hand-over")
			}
			a.do("kill", "careful")
			a.exit("careful", 128+int(unix.SIGKILL))
			a.do("close", "careful")
		})
	}
}

// TestIgnoredSignalsThroughHandOver checks that signals which the first program was started to ignore neither end the next
// program nor stay ignored in its commands.
func TestIgnoredSignalsThroughHandOver(t *testing.T) {
	a := newActor(t, PolicyHangup, "sh", "-c", "trap '' HUP INT; exec \"$0\"")
	c := newContainer(t)
	for range 2 {
		a.handOver(order{}, nil)
	}
	unix.Kill(a.command.Process.Pid, unix.SIGHUP)
	unix.Kill(a.command.Process.Pid, unix.SIGINT)
	reply := a.tell(order{Do: "sync", Container: &c, Command: workload.Command{Args: shell("grep -E '^Sig(Ign|Blk)' /proc/self/status")}})
	for line := range strings.Lines(reply.Text) {
		_, mask, _ := strings.Cut(line, ":")
		if bits, err := strconv.ParseUint(strings.TrimSpace(mask), 16, 64); err != nil || bits&(1<<(unix.SIGHUP-1)|1<<(unix.SIGINT-1)|1<<(unix.SIGTERM-1)) != 0 {
			t.Errorf("in a command: %s", line)
		}
	}
}
