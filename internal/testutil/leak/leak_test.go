package leak

import (
	"fmt"
	"os"
	"os/exec"
	"runtime"
	"strings"
	"testing"
	"time"

	"go.uber.org/goleak"
	"golang.org/x/sys/unix"
)

// The process's first thread belongs to the main goroutine here, because it cannot be destroyed:
// moved to another namespace it would stay there.
func init() { runtime.LockOSThread() }

func TestNothingLeftBehind(t *testing.T) {
	Check(t)
	if err := exec.Command("true").Run(); err != nil {
		t.Fatal(err)
	}
}

func TestWhatIsLeftBehindIsNamed(t *testing.T) {
	for _, each := range []struct {
		name string
		// leave leaves something behind, and returns what a report has to say of it and its cure.
		leave func(t *testing.T) (want string, cure func())
	}{
		{"descriptor", func(t *testing.T) (string, func()) {
			file, err := os.Open("/dev/null")
			if err != nil {
				t.Fatal(err)
			}
			return fmt.Sprintf("descriptor %d: /dev/null", file.Fd()), func() { file.Close() }
		}},
		{"child", func(t *testing.T) (string, func()) {
			child := exec.Command("sleep", "1000")
			if err := child.Start(); err != nil {
				t.Fatal(err)
			}
			return fmt.Sprintf("child process %d: (sleep), state S", child.Process.Pid), func() {
				child.Process.Kill()
				child.Wait()
			}
		}},
		{"zombie", func(t *testing.T) (string, func()) {
			child := exec.Command("true")
			if err := child.Start(); err != nil {
				t.Fatal(err)
			}
			return fmt.Sprintf("child process %d: (true), state Z", child.Process.Pid), func() { child.Wait() }
		}},
		{"goroutine", func(t *testing.T) (string, func()) {
			forever := make(chan struct{})
			go func() { <-forever }()
			return "found unexpected goroutines", func() { close(forever) }
		}},
		{"thread in another network namespace", func(t *testing.T) (string, func()) {
			if os.Getuid() != 0 {
				t.Skip("needs root to make a network namespace")
			}
			tid, forever := make(chan int), make(chan struct{})
			go func() {
				runtime.LockOSThread() // and not unlocked, so that the thread ends with the goroutine
				if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
					t.Error(err)
				}
				tid <- unix.Gettid()
				<-forever
			}()
			return fmt.Sprintf("thread %d", <-tid), func() { close(forever) }
		}},
	} {
		t.Run(each.name, func(t *testing.T) {
			startPoller()
			before, goroutines := takeAccount(), []goleak.Option{goleak.IgnoreCurrent()}
			want, cure := each.leave(t)
			// A child is named after its program once it has got that far, and is a zombie
			// after that: so ask until the answer is the final one.
			var found string
			for end := time.Now().Add(settleTime); time.Now().Before(end); {
				if found = settle(before, goroutines, 0); strings.Contains(found, want) {
					break
				}
			}
			if !strings.Contains(found, want) {
				t.Errorf("found %q, want in it %q", found, want)
			}
			cure()
			if found := settle(before, goroutines, settleTime); found != "" {
				t.Errorf("found after the cure: %s", found)
			}
		})
	}
}
