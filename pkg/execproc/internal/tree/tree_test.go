package tree

import (
	"fmt"
	"os"
	"os/exec"
	"slices"
	"strconv"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/streamshim/streamshim/pkg/execproc/internal/proc"
	"github.com/streamshim/streamshim/pkg/rescue"
)

// TestFinderOrder checks that looks are served in rounds of bounded size, those of commands whose caller waits before the
// others.
func TestFinderOrder(t *testing.T) {
	look := func(urgent bool) *look { return &look{Tree: &Tree{Urgent: urgent}} }
	f := &finder{limit: 3, running: true}
	for range 4 {
		f.waiting = append(f.waiting, look(false))
	}
	f.urgent = append(f.urgent, look(true), look(true))
	for round, want := range []struct{ urgent, others int }{{2, 1}, {0, 3}, {0, 0}} {
		looks := f.next()
		urgent := 0
		for _, l := range looks {
			if l.Tree.Urgent {
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

// TestDescriptorsHaveBudget checks that the number of descriptors that are read is bounded, however many a container has
// open.
func TestDescriptorsHaveBudget(t *testing.T) {
	self, err := proc.ReadStat(os.Getpid())
	if err != nil {
		t.Fatal(err)
	}
	file, other, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	defer other.Close()
	read := int(file.Fd())
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
	victim := &Tree{}
	name := func(fd int) string {
		target, err := os.Readlink("/proc/self/fd/" + strconv.Itoa(fd))
		if err != nil {
			t.Fatal(err)
		}
		return target
	}
	w := &wanted{pipes: map[string][]*Tree{name(read): {victim}}, budget: descriptorsOfContainer}
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

// TestPipeWatch checks that pipes themselves tell whether others hold them, even after our ends were closed.
func TestPipeWatch(t *testing.T) {
	var ours, others [3]*os.File
	var err error
	for i := range ours {
		if ours[i], others[i], err = os.Pipe(); err != nil {
			t.Fatal(err)
		}
		if i == 0 {
			ours[i], others[i] = others[i], ours[i]
		}
	}
	watch := func() *PipeWatch { return WatchPipes(ours[0], ours[1], ours[2]) }
	w := watch()
	defer w.Close()
	check := func(want bool, when string) {
		t.Helper()
		if w.Held() != want {
			t.Errorf("%s: held %v", when, !want)
		}
	}
	check(true, "all are open")
	copies := make([]int, 3)
	for i, file := range others {
		if copies[i], err = unix.FcntlInt(file.Fd(), unix.F_DUPFD_CLOEXEC, 0); err != nil {
			t.Fatal(err)
		}
	}
	for _, file := range others {
		file.Close()
	}
	for i, fd := range copies {
		check(true, fmt.Sprintf("%d others are open", 3-i))
		if i == 1 {
			for _, file := range ours {
				file.Close()
			}
			if _, err := unix.Write(copies[2], []byte("x")); err != unix.EPIPE {
				t.Errorf("writing to a pipe that is watched but not read: %v", err)
			}
		}
		unix.Close(fd)
	}
	check(false, "none is open")
	if watch() != nil {
		t.Error("pipes that are closed are watched")
	}
}

// TestPanicInALook checks that a search that panics concerns one tree: the others of its round are served, and only the
// caller that asked for it panics.
func TestPanicInALook(t *testing.T) {
	command := exec.Command("sleep", "1000")
	if err := command.Start(); err != nil {
		t.Fatal(err)
	}
	defer command.Wait() //nolint:errcheck // it is killed
	defer command.Process.Kill()
	stat, err := proc.ReadStat(command.Process.Pid)
	if err != nil {
		t.Fatal(err)
	}
	faulty, sound := &look{done: make(chan struct{})}, &look{Tree: New(stat.Identity, 0, StreamEnds{}), done: make(chan struct{})}
	round([]*look{faulty, sound})
	<-faulty.done
	<-sound.done
	if faulty.panic == nil || sound.panic != nil || len(sound.living) != 1 {
		t.Errorf("panics: %v and %v, found %d processes", faulty.panic, sound.panic, len(sound.living))
	}
	// A panic in what all looks of a round share is that of each that still waits.
	first, second := &look{done: make(chan struct{})}, &look{done: make(chan struct{})}
	close(first.done)
	abandon([]*look{first, second}, rescue.Caught("a fault of the test"))
	<-second.done
	if first.panic != nil || second.panic == nil {
		t.Errorf("panics: %v and %v", first.panic, second.panic)
	}
}
