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

	"github.com/streamshim/streamshim/internal/testutil"
	"github.com/streamshim/streamshim/pkg/execproc/internal/proc"
	"github.com/streamshim/streamshim/pkg/execproc/internal/tree"
	"github.com/streamshim/streamshim/pkg/workload"
)

// TestCostOfLook checks that a command with nothing but its own children never costs a look at all processes of the
// machine, whatever else runs in its container.
func TestCostOfLook(t *testing.T) {
	testutil.Slow(t)
	r := newRunner(t)
	c := newContainer(t)
	marker := newMarker()
	look := func(p *Process) (living []proc.Stat, all, wide bool) {
		return tree.New(p.leader, p.container.InitPid, p.ends).Cost()
	}
	var plain []*Process
	for range 3 {
		plain = append(plain, startFamily(t, r, c, "sleep %[1]s & echo ready; wait", marker, false))
	}
	for _, p := range plain {
		if living, all, wide := look(p); all || wide || len(living) != 2 {
			t.Errorf("all processes read: %v, to be read: %v, living: %v", all, wide, living)
		}
	}
	orphans := startFamily(t, r, c, "(setsid sleep %[1]s &); echo ready; sleep 1%[1]s", marker, false)
	eventually(t, "an orphan makes descriptors worth reading", func() bool {
		living, all, wide := look(orphans)
		return !all && wide && len(living) == 1
	})
	for _, p := range append(plain, orphans) {
		p.Kill()
		closes(t, p.ended, "the tree's end")
	}
}

// TestHolderThatDoesNotDescend checks that a process that has received or opened a stream is found, even if it does not
// descend from the command.
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

// TestStrangeKinship checks that a process may be a sibling of its creator (CLONE_PARENT), and that one whose first thread
// has ended is not taken for a zombie.
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
						dead := slices.ContainsFunc(found, func(p proc.Stat) bool { return p.State == 'Z' })
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

// inSession returns the processes of a session that have a living thread.
func inSession(t *testing.T, session int) (found []proc.Stat) {
	t.Helper()
	all, err := proc.All()
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range all {
		if p.Session == session && !p.Zombie() {
			found = append(found, p)
		}
	}
	return found
}

// inner returns a process's pid in its own namespace.
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
