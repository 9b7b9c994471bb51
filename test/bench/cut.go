package main

import (
	"context"
	"errors"
	"fmt"
	"math"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/streamshim/streamshim/test/internal/wire"
)

// A restart of the kubelet or of the API server, or a lost network, cuts all sessions of a node at once.
// What becomes of the node's probes meanwhile?

const (
	probeInterval = 200 * time.Millisecond // between the beginnings of two probes
	quietProbes   = 25
	cutWindow     = 5 * time.Second  // probes go on at least as long
	cutPatience   = 30 * time.Second // for the commands to be gone; containerd leaves them
)

// cut opens idle sessions, each a shell with a child, cuts all connections, and measures what probes see.
func (b *bench) cut(ctx context.Context, s side) error {
	for _, n := range b.scale.cut {
		for _, tty := range []bool{false, true} {
			if err := b.cutAtOnce(ctx, s, n, tty); err != nil {
				return fmt.Errorf("%d sessions, terminal %v: %w", n, tty, err)
			}
			if n > cutTerminals {
				break
			}
		}
	}
	return nil
}

// cutTerminals is the largest number of sessions that are cut with terminals as well.
const cutTerminals = 300

func (b *bench) cutAtOnce(ctx context.Context, s side, n int, tty bool) (err error) {
	sessions := make([]*wire.Exec, n)
	closeAll := func() {
		for _, session := range sessions {
			if session != nil {
				_ = session.Close() //nolint:errcheck // cut on purpose
			}
		}
	}
	defer closeAll()
	before, err := b.container.processes()
	if err != nil {
		return err
	}
	err = fourAtOnce(n, func(i int) error {
		session, err := wire.StartExec(ctx, s.client, b.containerID, wire.Command{
			Args: []string{"sh", "-c", "sleep 100000 & echo ready; wait"}, Stdin: true, TTY: tty,
		})
		if err != nil {
			return err
		}
		sessions[i] = session
		if err := session.Expect(session.Stdout, "ready"); err != nil {
			return err
		}
		session.Release()
		return nil
	})
	if err != nil {
		return err
	}
	commands, err := b.container.processes()
	if err != nil {
		return err
	}
	commands = slices.DeleteFunc(commands, func(pid int) bool { return slices.Contains(before, pid) })
	defer func() {
		for _, pid := range commands { // their pids are not reused within a minute or two
			if left, _ := b.container.processes(); slices.Contains(left, pid) { //nolint:errcheck // read before
				_ = unix.Kill(pid, unix.SIGKILL) //nolint:errcheck // it may have ended
			}
		}
	}()
	if len(commands) < 2*n {
		return fmt.Errorf("%d processes in the container, not %d", len(commands), 2*n)
	}
	quiet := newProber(ctx, s.client, b.containerID)
	time.Sleep(quietProbes * probeInterval)
	quiet.end()

	pid := b.node.PID(string(s.name))
	spent, err := ownCPU(pid)
	if err != nil {
		return err
	}
	if err := resetPeak(pid); err != nil {
		return err
	}
	storm := newProber(ctx, s.client, b.containerID)
	begin := time.Now()
	closeAll()
	gone, err := b.awaitEnd(begin, commands)
	if err != nil {
		return err
	}
	time.Sleep(cutWindow - time.Since(begin))
	storm.end()
	now, err := ownCPU(pid)
	if err != nil {
		return err
	}
	peak, err := peakMemory(pid)
	if err != nil {
		return err
	}
	id := fmt.Sprintf("cut%d", n)
	if tty {
		id += "tty"
	}
	calm, during := in(time.Millisecond, quiet.durations), in(time.Millisecond, storm.durations)
	b.results.add(id+".quiet", s.name, percentile(calm, 50))
	b.results.add(id+".p50", s.name, percentile(during, 50))
	b.results.add(id+".max", s.name, percentile(during, 100))
	b.results.add(id+".gone", s.name, gone)
	b.results.add(id+".cpu", s.name, (now - spent).Seconds())
	b.results.add(id+".memory", s.name, peak)
	progress("%s, %s: probes p50 %.0f → %.0f ms, longest %.0f → %.0f ms, %d of %d failed; commands gone after %.1f s; CPU %.2f s; memory %.0f MiB",
		id, s.name, percentile(calm, 50), percentile(during, 50), percentile(calm, 100), percentile(during, 100),
		storm.failed, len(during), gone, (now - spent).Seconds(), peak)
	return nil
}

// awaitEnd says after how many seconds none of the processes was left in the container; NaN when some stay.
func (b *bench) awaitEnd(begin time.Time, commands []int) (float64, error) {
	wanted := map[int]bool{}
	for _, pid := range commands {
		wanted[pid] = true
	}
	for time.Since(begin) < cutPatience {
		left, err := b.container.processes()
		if err != nil {
			return 0, err
		}
		if !slices.ContainsFunc(left, func(pid int) bool { return wanted[pid] }) {
			return time.Since(begin).Seconds(), nil
		}
		if len(left) >= len(commands) && time.Since(begin) > cutWindow {
			break // nobody is ending them
		}
		time.Sleep(20 * time.Millisecond)
	}
	return math.NaN(), nil
}

// prober calls ExecSync at fixed times, however long the calls take, as the probes of many pods come.
type prober struct {
	stop  chan struct{}
	calls sync.WaitGroup

	mu        sync.Mutex
	durations []time.Duration
	failed    int
}

func newProber(ctx context.Context, client runtimeapi.RuntimeServiceClient, container string) *prober {
	p := &prober{stop: make(chan struct{})}
	call := func() {
		begin := time.Now()
		ctx, cancel := context.WithTimeout(ctx, cutPatience)
		defer cancel()
		response, err := client.ExecSync(ctx, &runtimeapi.ExecSyncRequest{ContainerId: container, Cmd: []string{"true"}, Timeout: 60})
		p.mu.Lock()
		defer p.mu.Unlock()
		p.durations = append(p.durations, time.Since(begin))
		if err != nil || response.ExitCode != 0 {
			p.failed++
		}
	}
	p.calls.Go(func() {
		ticker := time.NewTicker(probeInterval)
		defer ticker.Stop()
		for {
			p.calls.Go(call)
			select {
			case <-ticker.C:
			case <-p.stop:
				return
			}
		}
	})
	return p
}

func (p *prober) end() {
	close(p.stop)
	p.calls.Wait()
}

// ownCPU is what a process has spent itself, without the children it has waited for.
func ownCPU(pid int) (time.Duration, error) {
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return 0, err
	}
	fields := strings.Fields(string(text[strings.LastIndexByte(string(text), ')')+1:]))
	const user, system, tick = 11, 12, 10 * time.Millisecond // USER_HZ is 100 everywhere
	total := time.Duration(0)
	for _, field := range []int{user, system} {
		ticks, err := strconv.ParseInt(fields[field], 10, 64)
		if err != nil {
			return 0, err
		}
		total += time.Duration(ticks) * tick
	}
	return total, nil
}

// resetPeak makes peakMemory count from now on, proc_pid_clear_refs(5).
func resetPeak(pid int) error {
	return os.WriteFile(fmt.Sprintf("/proc/%d/clear_refs", pid), []byte("5"), 0)
}

// peakMemory is the most that a process had in memory, its program's pages included, in MiB.
func peakMemory(pid int) (float64, error) {
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		return 0, err
	}
	for line := range strings.Lines(string(text)) {
		if value, ok := strings.CutPrefix(line, "VmHWM:"); ok {
			kib, err := strconv.ParseFloat(strings.Fields(value)[0], 64)
			return kib / 1024, err
		}
	}
	return 0, errors.New("/proc/PID/status has no VmHWM")
}
