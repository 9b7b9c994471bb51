package reaper

import (
	"bufio"
	"fmt"
	"io"
	"os"
	"os/exec"
	"runtime"
	"strconv"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/streamshim/streamshim/internal/testutil"
	"github.com/streamshim/streamshim/internal/testutil/leak"
	"github.com/streamshim/streamshim/pkg/execproc/internal/proc"
)

// TestZombieWaitsForStartUnderWay checks that a zombie waits while a start is in progress: a process may end before its pid
// is known.
func TestZombieWaitsForStartUnderWay(t *testing.T) {
	leak.Check(t)
	r, err := Acquire()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Release()
	die := func(code int) int {
		command := exec.Command("sh", "-c", fmt.Sprintf("exit %d", code))
		command.SysProcAttr = &unix.SysProcAttr{Setsid: true} // as if from a runtime
		if err := command.Start(); err != nil {
			t.Fatal(err)
		}
		pid := command.Process.Pid
		command.Process.Release()
		return pid
	}
	reaped := func(pid int) func() bool {
		return func() bool { _, err := proc.ReadStat(pid); return err != nil }
	}
	isZombie := func(pid int) func() bool {
		return func() bool { stat, err := proc.ReadStat(pid); return err == nil && stat.Zombie() }
	}

	first := r.BeginStart()
	wanted, orphan := die(33), die(1)
	testutil.Eventually(t, "it is a zombie", isZombie(wanted))
	testutil.Eventually(t, "it is a zombie", isZombie(orphan))
	r.ReapOrphans()
	second := r.BeginStart() // began later: no reason to wait for this one
	if !isZombie(wanted)() || !isZombie(orphan)() {
		t.Fatal("reaped while a start was under way that may want it")
	}
	w, err := r.WatchProcess(wanted, nil)
	if err != nil {
		t.Fatal(err)
	}
	testutil.Receive(t, "the exit", w.Exited)
	if w.Status != 33 {
		t.Errorf("exit code %d", w.Status)
	}
	if !isZombie(orphan)() {
		t.Error("the orphan was reaped too early")
	}
	r.mu.Lock()
	r.looked = time.Time{} // long ago, so that the end of a start causes a look although another one goes on
	r.mu.Unlock()
	r.EndStart(first)
	testutil.Eventually(t, "the orphan is reaped", reaped(orphan))
	r.EndStart(second)
	orphan = die(2)
	testutil.Eventually(t, "an orphan is reaped at once when nothing is under way", reaped(orphan))
}

// TestOmittedZombieIsReaped checks that a zombie that the kernel's list of children has omitted when its SIGCHLD came is
// reaped later, although nothing else happens.
func TestOmittedZombieIsReaped(t *testing.T) {
	testutil.Slow(t)
	leak.Check(t)
	r, err := Acquire()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Release()
	omitted := make(chan struct{})
	r.mu.Lock()
	r.children = func(known func(pid int) bool) ([]proc.Stat, error) {
		select {
		case <-omitted:
			return proc.OwnChildren(known)
		default:
			close(omitted)
			return nil, nil
		}
	}
	r.mu.Unlock()
	command := exec.Command("true")
	command.SysProcAttr = &unix.SysProcAttr{Setsid: true} // as if from a runtime
	if err := command.Start(); err != nil {
		t.Fatal(err)
	}
	pid := command.Process.Pid
	command.Process.Release()
	testutil.Receive(t, "a look that omits it", omitted)
	testutil.Eventually(t, "it is reaped", func() bool { _, err := proc.ReadStat(pid); return err != nil })
}

// TestOwnChildIsNoOrphan checks that the status of a child of os/exec is left alone, even if it is a zombie for a long time
// because nobody asks os/exec.
func TestOwnChildIsNoOrphan(t *testing.T) {
	leak.Check(t)
	r, err := Acquire()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Release()
	command := exec.Command("sh", "-c", "exit 42")
	if err := command.Start(); err != nil {
		t.Fatal(err)
	}
	testutil.Eventually(t, "it is a zombie", func() bool {
		stat, err := proc.ReadStat(command.Process.Pid)
		return err != nil || stat.Zombie()
	})
	for range 3 {
		r.ReapOrphans()
	}
	if err := command.Wait(); command.ProcessState == nil || command.ProcessState.ExitCode() != 42 {
		t.Errorf("os/exec was told %v, %v", command.ProcessState, err)
	}
}

// TestZombieHeldByTracer checks that a zombie that a debugger holds and that cannot be reaped costs nothing meanwhile, and
// is reaped when the debugger releases it.
func TestZombieHeldByTracer(t *testing.T) {
	r, err := Acquire()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Release()
	command := exec.Command("sleep", "1000")
	command.SysProcAttr = &unix.SysProcAttr{Setsid: true}
	if err := command.Start(); err != nil {
		t.Fatal(err)
	}
	pid := command.Process.Pid
	w, err := r.WatchProcess(pid, nil)
	if err != nil {
		t.Fatal(err)
	}
	// The tracer is a separate process: a tracer that is also the parent would not be in the way.
	tracer := exec.Command(os.Args[0], "-test.run=^$")
	tracer.Env = append(os.Environ(), tracerVariable+"="+strconv.Itoa(pid))
	release, err := tracer.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	attached, err := tracer.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := tracer.Start(); err != nil {
		t.Fatal(err)
	}
	if line, err := bufio.NewReader(attached).ReadString('\n'); line != "attached\n" {
		t.Fatalf("the tracer says %q, %v", line, err)
	}
	if err := unix.Kill(pid, unix.SIGKILL); err != nil {
		t.Fatal(err)
	}
	held := func() bool {
		r.mu.Lock()
		defer r.mu.Unlock()
		_, held := r.held[w]
		return held
	}
	testutil.Eventually(t, "the zombie is known to be held", held)
	select {
	case <-w.Exited:
		t.Fatal("reaped although traced: the test proves nothing")
	default:
	}
	before := ownTime(t)
	time.Sleep(time.Second)
	if spent := ownTime(t) - before; spent > 500*time.Millisecond {
		t.Errorf("%v of CPU time in a second while a tracer holds a zombie", spent)
	}
	release.Close()
	if err := tracer.Wait(); err != nil {
		t.Error(err)
	}
	testutil.Receive(t, "the zombie to be reaped", w.Exited)
	if w.Status != 128+int(unix.SIGKILL) {
		t.Errorf("status %d", w.Status)
	}
}

func ownTime(t *testing.T) time.Duration {
	t.Helper()
	var usage unix.Rusage
	if err := unix.Getrusage(unix.RUSAGE_SELF, &usage); err != nil {
		t.Fatal(err)
	}
	return time.Duration(usage.Utime.Nano() + usage.Stime.Nano())
}

// tracerVariable makes the test binary trace this process until its input ends.
const tracerVariable = "EXECPROC_TEST_TRACE"

func trace(pid string) {
	runtime.LockOSThread()
	number, err := strconv.Atoi(pid)
	if err == nil {
		err = unix.PtraceSeize(number)
	}
	if err != nil {
		fmt.Println(err)
		os.Exit(1)
	}
	fmt.Println("attached")
	io.Copy(io.Discard, os.Stdin)
	os.Exit(0)
}

// BenchmarkReapOrphans measures the cost of a zombie that nobody waits for, as each start leaves some, while N commands
// live.
func BenchmarkReapOrphans(b *testing.B) {
	for _, n := range []int{10, 100, 1000, 4000} {
		b.Run(fmt.Sprint(n), func(b *testing.B) {
			r, err := Acquire()
			if err != nil {
				b.Fatal(err)
			}
			defer r.Release()
			child := func(args ...string) int {
				command := exec.Command(args[0], args[1:]...)
				command.SysProcAttr = &syscall.SysProcAttr{Setsid: true} // as if from a runtime
				if err := command.Start(); err != nil {
					b.Fatal(err)
				}
				defer command.Process.Release()
				return command.Process.Pid
			}
			var ends []<-chan struct{}
			defer func() {
				for _, ended := range ends {
					<-ended
				}
			}()
			for range n {
				pid := child("sleep", "1000")
				defer syscall.Kill(pid, syscall.SIGKILL)
				w, err := r.WatchProcess(pid, nil)
				if err != nil {
					b.Fatal(err)
				}
				ends = append(ends, w.Exited)
			}
			for b.Loop() {
				b.StopTimer()
				start := r.BeginStart() // until it ends, the zombie is left alone
				pid := child("true")
				for {
					if stat, err := proc.ReadStat(pid); err == nil && stat.Zombie() {
						break
					}
					time.Sleep(time.Millisecond)
				}
				r.mu.Lock()
				delete(r.starts, start)
				r.mu.Unlock()
				b.StartTimer()
				r.ReapOrphans()
			}
		})
	}
}

func TestMain(m *testing.M) {
	if pid := os.Getenv(tracerVariable); pid != "" {
		trace(pid) // does not return
	}
	os.Exit(m.Run())
}
