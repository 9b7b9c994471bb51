package execproc

import (
	"bufio"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/streamshim/streamshim/internal/testutil"
	"github.com/streamshim/streamshim/pkg/workload"
)

// A command that has nothing but its own children costs no look at all the machine's processes, whatever else
// runs in its container.
func TestCostOfLook(t *testing.T) {
	testutil.Slow(t)
	r := newRunner(t)
	c := newContainer(t)
	marker := newMarker()
	look := func(p *Process) (census *census, living []procStat, wide bool) {
		census = newCensus()
		l := &look{tree: newTree(p.leader, p.container.InitPid, p.ends)}
		orphans := census.grow(l)
		return census, l.living, l.tree.mayBeHeld(l.living, orphans)
	}
	var plain []*Process
	for range 3 {
		plain = append(plain, startFamily(t, r, c, "sleep %[1]s & echo ready; wait", marker, false))
	}
	for _, p := range plain {
		if census, living, wide := look(p); census.allRead || wide || len(living) != 2 {
			t.Errorf("all processes read: %v, to be read: %v, living: %v", census.allRead, wide, living)
		}
	}
	orphans := startFamily(t, r, c, "(setsid sleep %[1]s &); echo ready; sleep 1%[1]s", marker, false)
	eventually(t, "an orphan makes descriptors worth reading", func() bool {
		census, living, wide := look(orphans)
		return !census.allRead && wide && len(living) == 1
	})
	for _, p := range append(plain, orphans) {
		p.Kill()
		closes(t, p.ended, "the tree's end")
	}
}

// Who was handed a stream, or has opened it, need not descend from the command.
func TestHolderThatDoesNotDescend(t *testing.T) {
	testutil.Slow(t)
	for _, tty := range []bool{false, true} {
		for _, kill := range []bool{false, true} {
			t.Run(fmt.Sprintf("tty %v, kill %v", tty, kill), func(t *testing.T) {
				r := newRunner(t)
				c := newContainer(t)
				marker := newMarker()
				victim := startFamily(t, r, c, "sleep 1%[1]s & echo ready; wait", marker, tty)
				holder := start(t, r, c, workload.Command{Args: shell(fmt.Sprintf(
					"trap '' HUP; exec 3</proc/%d/fd/0 4>/proc/%[1]d/fd/1; sleep %s & wait", inner(t, victim.PID()), marker))})
				eventually(t, "both are there", func() bool {
					return len(marked(t, "sleep\x001"+marker)) == 1 && len(marked(t, "sleep\x00"+marker)) == 1
				})
				if kill {
					victim.Kill()
				} else {
					victim.Disconnect()
				}
				victim.Close()
				closes(t, victim.ended, "the tree's end")
				closes(t, holder.Exited(), "the holder's end")
				if left := marked(t, marker); len(left) > 0 {
					t.Errorf("left: %v", left)
				}
			})
		}
	}
}

// Looks are served in rounds of a limited size, those of commands whose caller waits before the others.
func TestFinderOrder(t *testing.T) {
	look := func(urgent bool) *look { return &look{tree: &tree{urgent: urgent}} }
	f := &finder{limit: 3, running: true}
	for range 4 {
		f.waiting = append(f.waiting, look(false))
	}
	f.urgent = append(f.urgent, look(true), look(true))
	for round, want := range []struct{ urgent, others int }{{2, 1}, {0, 3}, {0, 0}} {
		looks := f.next()
		urgent := 0
		for _, l := range looks {
			if l.tree.urgent {
				urgent++
			}
		}
		if urgent != want.urgent || len(looks)-urgent != want.others || f.looking != len(looks) {
			t.Errorf("round %d: %d urgent ones and %d others, %d counted", round, urgent, len(looks)-urgent, f.looking)
		}
	}
	if f.running {
		t.Error("the finder runs, and nobody waits")
	}
	f.limit = 0
	f.waiting = append(f.waiting, look(false), look(false))
	if looks := f.next(); len(looks) != 2 {
		t.Errorf("%d without a limit", len(looks))
	}
}

// A process may be a sibling of its maker (CLONE_PARENT), and one whose first thread has ended is no zombie.
func TestStrangeKinship(t *testing.T) {
	testutil.Slow(t)
	for _, hostPID := range []bool{false, true} {
		r := newRunner(t)
		c := newContainer(t, func(spec *specs.Spec) {
			if hostPID {
				shareHostPID(spec)
			}
		})
		program := filepath.Join(t.TempDir(), "kin")
		if out, err := exec.Command("cc", "-O2", "-static", "-pthread", "-o", program, "testdata/kin.c").CombinedOutput(); err != nil {
			t.Fatalf("compile: %v: %s", err, out)
		}
		copyFile(t, program, filepath.Join(rootfs, "bin/kin"), 0o755)
		for kind, processes := range map[string]int{"sibling": 2, "thread": 1} {
			for _, kill := range []bool{false, true} {
				t.Run(fmt.Sprintf("%s, hostPID %v, kill %v", kind, hostPID, kill), func(t *testing.T) {
					p := start(t, r, c, workload.Command{Args: []string{"kin", kind, "1000"}, Stdout: true})
					if line, err := bufio.NewReader(p.Stdout()).ReadString('\n'); line != "ready\n" {
						t.Fatalf("%q, %v", line, err)
					}
					eventually(t, "all are there, and the thread alone", func() bool {
						found := inSession(t, p.PID())
						dead := slices.ContainsFunc(found, func(p procStat) bool { return p.state == 'Z' })
						return len(found) == processes && dead == (kind == "thread")
					})
					if kill {
						p.Kill()
					} else {
						p.Disconnect()
					}
					p.Close()
					closes(t, p.ended, "the tree's end")
					if left := inSession(t, p.PID()); len(left) > 0 {
						t.Errorf("left: %v", left)
					}
				})
			}
		}
	}
}

// inSession finds the processes of a session of which a thread lives.
func inSession(t *testing.T, session int) (found []procStat) {
	t.Helper()
	all, err := allProcesses()
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range all {
		if p.session == session && !p.zombie() {
			found = append(found, p)
		}
	}
	return found
}

// inner is a process's pid in its own namespace.
func inner(t *testing.T, pid int) int {
	t.Helper()
	status, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/status")
	if err != nil {
		t.Fatal(err)
	}
	_, rest, _ := strings.Cut(string(status), "\nNSpid:")
	line, _, _ := strings.Cut(rest, "\n")
	fields := strings.Fields(line)
	number, err := strconv.Atoi(fields[len(fields)-1])
	if err != nil {
		t.Fatal(err)
	}
	return number
}

// A container may have any number of descriptors open, at the cost of who reads them.
func TestDescriptorsHaveBudget(t *testing.T) {
	self := mustStat(t, os.Getpid())
	read, write, err := pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(read)
	defer unix.Close(write)
	var limit unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &limit); err != nil || limit.Cur < 3*descriptorsOfProcess {
		t.Skipf("limit of descriptors: %v, %v", limit, err)
	}
	for range 2 * descriptorsOfProcess {
		fd, err := unix.FcntlInt(uintptr(read), unix.F_DUPFD_CLOEXEC, 0)
		if err != nil {
			t.Fatal(err)
		}
		defer unix.Close(fd)
	}
	victim := &tree{}
	name := func(fd int) string {
		target, err := os.Readlink("/proc/self/fd/" + strconv.Itoa(fd))
		if err != nil {
			t.Fatal(err)
		}
		return target
	}
	w := &wanted{pipes: map[string][]*tree{name(read): {victim}}, budget: descriptorsOfContainer}
	if held := w.heldBy(self); !slices.Contains(held, victim) {
		t.Error("a pipe among the first descriptors was not found")
	}
	if spent := descriptorsOfContainer - w.budget; spent != descriptorsOfProcess {
		t.Errorf("%d descriptors read", spent)
	}
	w.budget = 100
	if w.heldBy(self); w.budget != 0 {
		t.Errorf("budget left: %d", w.budget)
	}
}

// Pipes say themselves whether anybody else holds them, also after our ends were closed.
func TestPipeWatch(t *testing.T) {
	s, err := newStdio(workload.Command{Stdin: true, Stdout: true, Stderr: true}, owner{})
	if err != nil {
		t.Fatal(err)
	}
	w := s.watchEnds()
	defer w.close()
	check := func(want bool, when string) {
		t.Helper()
		if w.held() != want {
			t.Errorf("%s: held %v", when, !want)
		}
	}
	check(true, "all are open")
	copies := make([]int, 3)
	for i, file := range s.process {
		if copies[i], err = unix.FcntlInt(file.Fd(), unix.F_DUPFD_CLOEXEC, 0); err != nil {
			t.Fatal(err)
		}
	}
	s.closeProcessEnds()
	for i, fd := range copies {
		check(true, fmt.Sprintf("%d others are open", 3-i))
		if i == 1 {
			s.closeOurs()
			if _, err := unix.Write(copies[2], []byte("x")); err != unix.EPIPE {
				t.Errorf("writing to a pipe that is watched but not read: %v", err)
			}
		}
		unix.Close(fd)
	}
	check(false, "none is open")
	if s.watchEnds() != nil {
		t.Error("pipes that are closed are watched")
	}
}
