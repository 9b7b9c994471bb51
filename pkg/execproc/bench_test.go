package execproc

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"testing"
	"time"

	"github.com/streamshim/streamshim/pkg/execproc/internal/proc"
	"github.com/streamshim/streamshim/pkg/execproc/internal/record"
	"github.com/streamshim/streamshim/pkg/workload"
)

// BenchmarkStart measures the time from the call to the exit of `true`, with what a session needs: three pipes or a
// terminal.
func BenchmarkStart(b *testing.B) {
	r := newRunner(b)
	c := newContainer(b)
	for name, command := range map[string]workload.Command{
		"Pipes":    {Args: []string{"true"}, Stdin: true, Stdout: true, Stderr: true},
		"Terminal": {Args: []string{"true"}, Stdin: true, Stdout: true, TTY: true},
	} {
		b.Run(name, func(b *testing.B) {
			for b.Loop() {
				p, err := r.Start(context.Background(), c, command)
				if err != nil {
					b.Fatal(err)
				}
				<-p.Exited()
				p.Close()
			}
		})
	}
}

func BenchmarkRunSync(b *testing.B) {
	r := newRunner(b)
	c := newContainer(b)
	for b.Loop() {
		if result, err := r.RunSync(context.Background(), c, workload.SyncCommand{Args: []string{"true"}}); err != nil || result.ExitCode != 0 {
			b.Fatal(result, err)
		}
	}
}

// BenchmarkPlainRunc measures a plain runc exec in the foreground, to compare BenchmarkStart with.
func BenchmarkPlainRunc(b *testing.B) {
	c := newContainer(b)
	for b.Loop() {
		if out, err := exec.Command(c.Runtime, "--root", c.Root, "exec", c.ContainerID, "true").CombinedOutput(); err != nil {
			b.Fatalf("%v: %s", err, out)
		}
	}
}

// BenchmarkStdout measures how many bytes of a process's stdout arrive here.
func BenchmarkStdout(b *testing.B) {
	r := newRunner(b)
	c := newContainer(b)
	p := start(b, r, c, workload.Command{Args: []string{"dd", "if=/dev/zero", "bs=256k"}, Stdout: true})
	defer p.Kill()
	buffer := make([]byte, 256<<10)
	b.SetBytes(int64(len(buffer)))
	for b.Loop() {
		if _, err := io.ReadFull(p.Stdout(), buffer); err != nil {
			b.Fatal(err)
		}
	}
}

// BenchmarkInterruptedStarts measures what a streamshim pays if it finds the records of starts during which its predecessor
// was killed.
func BenchmarkInterruptedStarts(b *testing.B) {
	for _, n := range []int{1, 10, 100, 1000} {
		b.Run(fmt.Sprint(n), func(b *testing.B) {
			dir := filepath.Join(b.TempDir(), "exec")
			now, err := proc.TicksSinceBoot()
			if err != nil {
				b.Fatal(err)
			}
			left, err := json.Marshal(record.Record{Since: now, Boot: proc.BootID(), Policy: PolicyKill})
			if err != nil {
				b.Fatal(err)
			}
			before := cpuTime(b)
			for b.Loop() {
				for i := range n {
					writeFile(b, filepath.Join(dir, fmt.Sprintf("1-1-%d.record", i)), string(left), 0o600)
				}
				r := newRunner(b, func(config *Config) { config.StateDir = dir })
				for entries := []os.DirEntry{nil}; len(entries) > 0; time.Sleep(time.Millisecond) {
					if entries, err = os.ReadDir(dir); err != nil {
						b.Fatal(err)
					}
				}
				r.Close()
			}
			b.ReportMetric(float64((cpuTime(b)-before).Microseconds())/1000/float64(b.N), "cpu-ms/op")
		})
	}
}

// cpuTime returns how much CPU time this process has used.
func cpuTime(b *testing.B) time.Duration {
	b.Helper()
	var usage syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, &usage); err != nil {
		b.Fatal(err)
	}
	return time.Duration(usage.Utime.Nano() + usage.Stime.Nano())
}

// BenchmarkHandOver measures what a hand-over costs by the number of commands carried. execve is not included.
func BenchmarkHandOver(b *testing.B) {
	for _, n := range []int{1, 200} {
		b.Run(fmt.Sprintf("commands=%d", n), func(b *testing.B) {
			r := newRunner(b)
			c := newContainer(b)
			var processes []*Process
			for i := range n {
				processes = append(processes, start(b, r, c, workload.Command{Args: []string{"sleep", "100000"}, Stdin: true, Stdout: true, TTY: i%2 == 0}))
			}
			for b.Loop() {
				processes = refreeze(b, r, processes...)
			}
			for _, p := range processes {
				p.Kill()
				p.Close()
			}
		})
	}
}
