package execproc

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"os"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/streamshim/streamshim/pkg/execproc/internal/tree"
	"github.com/streamshim/streamshim/pkg/handover"
	"github.com/streamshim/streamshim/pkg/workload"
)

// refreeze freezes processes with their Runner and resumes them in the same program.
func refreeze(t testing.TB, r *Runner, processes ...*Process) []*Process {
	t.Helper()
	files := handover.NewFiles()
	defer files.Close()
	if err := r.Quiesce(t.Context()); err != nil {
		t.Fatal(err)
	}
	var states [][]byte
	for _, p := range processes {
		state, err := p.Freeze(files)
		if err != nil {
			t.Fatal(err)
		}
		p.Discard()
		states = append(states, state)
	}
	state, err := r.Freeze(files)
	if err != nil {
		t.Fatal(err)
	}
	if err := CheckState(state); err != nil {
		t.Error(err)
	}
	if err := r.Resume(state, files); err != nil {
		t.Fatal(err)
	}
	var resumed []*Process
	for _, state := range states {
		p, err := r.ResumeProcess(t.Context(), state, files)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { p.Close() })
		resumed = append(resumed, p)
	}
	r.EndUnclaimed(files)
	return resumed
}

func TestFreezeAndResumeWithPipes(t *testing.T) {
	r := newRunner(t)
	c := newContainer(t)
	p := start(t, r, c, workload.Command{Args: shell("while read line; do echo got $line; echo err $line >&2; done; exit 7"), Stdin: true, Stdout: true, Stderr: true})
	for i := range 30 {
		word := strings.Repeat("x", i+1)
		io.WriteString(p.Stdin(), word+"\n")
		p = refreeze(t, r, p)[0]
		for _, from := range []struct {
			io.Reader
			prefix string
		}{{p.Stdout(), "got "}, {p.Stderr(), "err "}} {
			// The pipe has only one line.
			line, err := bufio.NewReader(from).ReadString('\n')
			if line != from.prefix+word+"\n" {
				t.Fatalf("read %q, %v", line, err)
			}
		}
	}
	p.Stdin().Close()
	p = refreeze(t, r, p)[0]
	if _, err := p.Stdin().Write([]byte("x")); err == nil {
		t.Error("stdin that was closed is open after a hand-over")
	}
	if code := exitCode(t, p); code != 7 {
		t.Errorf("exit code %d", code)
	}
	p = refreeze(t, r, p)[0]
	if code := exitCode(t, p); code != 7 {
		t.Errorf("exit code %d after a hand-over", code)
	}
}

func TestFreezeAndResumeWithTerminal(t *testing.T) {
	r := newRunner(t)
	c := newContainer(t)
	p := start(t, r, c, workload.Command{
		Args: shell("stty -echo; while read line; do echo got $line; stty size; done; exit 9"), Stdin: true, Stdout: true, TTY: true,
		Size: workload.Size{Width: 80, Height: 24},
	})
	for i := range 20 {
		p = refreeze(t, r, p)[0]
		size := workload.Size{Width: uint16(100 + i), Height: 30}
		if err := p.Resize(size); err != nil {
			t.Fatal(err)
		}
		io.WriteString(p.Stdin(), "x\n")
		p = refreeze(t, r, p)[0]
		awaitText(t, p.Stdout(), "30 "+strconv.Itoa(100+i))
	}
	p.Stdin().Close()
	for range 3 {
		p = refreeze(t, r, p)[0]
	}
	if code := exitCode(t, p); code != 9 {
		t.Errorf("exit code %d", code)
	}
	p = refreeze(t, r, p)[0]
	if _, err := io.ReadAll(p.Stdout()); err != nil {
		t.Error(err)
	}
}

// TestExitWhileFrozen checks that a process that ends while it is frozen stays a zombie until it is resumed.
func TestExitWhileFrozen(t *testing.T) {
	r := newRunner(t)
	c := newContainer(t)
	p := start(t, r, c, workload.Command{Args: shell("read line; exit 5"), Stdin: true})
	// A Runner that looks for orphans sees its end, because others end at the same time.
	other := start(t, r, c, workload.Command{Args: shell("read line"), Stdin: true})
	files := handover.NewFiles()
	defer files.Close()
	if err := r.Quiesce(t.Context()); err != nil {
		t.Fatal(err)
	}
	state, err := p.Freeze(files)
	if err != nil {
		t.Fatal(err)
	}
	io.WriteString(p.Stdin(), "x\n")
	p.Discard()
	eventually(t, "the process is a zombie", func() bool { stat := mustStat(t, p.PID()); return stat.Zombie() })
	other.Stdin().Close()
	closes(t, other.Exited(), "the other's exit")
	r.reaper.ReapOrphans()
	if stat := mustStat(t, p.PID()); !stat.Zombie() {
		t.Fatalf("the frozen process's state is %c", stat.State)
	}
	r.Continue()
	if p, err = r.ResumeProcess(t.Context(), state, files); err != nil {
		t.Fatal(err)
	}
	defer p.Close()
	if code := exitCode(t, p); code != 5 {
		t.Errorf("exit code %d", code)
	}
	eventually(t, "the record is removed", func() bool { _, err := os.Stat(p.record); return err != nil })
}

// TestFreezeBeforeTheFirstLook checks that a freeze does not wait for a look at /proc that has not begun, and that the look
// is for the process's own terminal and pipes afterwards.
func TestFreezeBeforeTheFirstLook(t *testing.T) {
	r := newRunner(t)
	c := newContainer(t)
	for _, tty := range []bool{false, true} {
		for _, kill := range []bool{false, true} {
			t.Run(fmt.Sprintf("terminal %v, kill %v", tty, kill), func(t *testing.T) {
				marker := newMarker()
				// The holder of a stream without a parent is found only by the stream.
				p := start(t, r, c, workload.Command{Args: shell("(setsid sleep " + marker + " &); echo ready; exec sleep " + marker), Stdin: true, Stdout: true, TTY: tty})
				awaitText(t, p.Stdout(), "ready")
				eventually(t, "both run", func() bool { return len(marked(t, "sleep\x00"+marker)) == 2 })
				release := tree.HoldLooks()
				if kill {
					p.Kill()
				} else {
					p.Disconnect()
				}
				p.Close()
				files := handover.NewFiles()
				defer files.Close()
				state, err := p.Freeze(files)
				if err != nil {
					t.Fatal(err)
				}
				p.Discard()
				if got := len(marked(t, marker)); got != 2 {
					t.Errorf("%d processes live", got)
				}
				release()
				resumed, err := r.ResumeProcess(t.Context(), state, files)
				if err != nil {
					t.Fatal(err)
				}
				closes(t, resumed.ended, "the tree's end")
				if left := marked(t, marker); len(left) > 0 {
					t.Errorf("left: %v", left)
				}
			})
		}
	}
}

// TestQuiesce checks that nothing starts while the Runner is quiet, and everything does afterwards.
func TestQuiesce(t *testing.T) {
	r := newRunner(t)
	c := newContainer(t)
	done := make(chan error, 1)
	marker := newMarker()
	go func() {
		_, err := r.RunSync(context.Background(), c, workload.SyncCommand{Args: []string{"sleep", marker}})
		done <- err
	}()
	eventually(t, "the command runs", func() bool { return len(r.watched()) == 1 && len(marked(t, "sleep\x00"+marker)) == 1 })
	short, cancel := context.WithTimeout(t.Context(), 10*time.Millisecond)
	defer cancel()
	if err := r.Quiesce(short); err == nil {
		t.Error("quiet while a command is run")
	}
	for _, pid := range marked(t, marker) {
		unix.Kill(pid, unix.SIGKILL)
	}
	if err := r.Quiesce(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := <-done; err != nil {
		t.Error(err)
	}
	if _, err := r.RunSync(context.Background(), c, workload.SyncCommand{Args: []string{"true"}, Timeout: 50 * time.Millisecond}); err == nil {
		t.Error("a command was run in the quiet")
	}
	go func() {
		_, err := r.RunSync(context.Background(), c, workload.SyncCommand{Args: []string{"true"}})
		done <- err
	}()
	r.Continue()
	if err := <-done; err != nil {
		t.Error(err)
	}
}

func awaitText(t testing.TB, from io.Reader, text string) {
	t.Helper()
	read := make(chan string, 1)
	go func() {
		var seen strings.Builder
		buffer := make([]byte, 4096)
		for !strings.Contains(seen.String(), text) {
			n, err := from.Read(buffer)
			seen.Write(buffer[:n])
			if err != nil {
				break
			}
		}
		read <- seen.String()
	}()
	select {
	case seen := <-read:
		if !strings.Contains(seen, text) {
			t.Fatalf("%q is not in %q", text, seen)
		}
	case <-time.After(patience):
		t.Fatalf("waited in vain for %q", text)
	}
}
