package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/streamshim/streamshim/test/internal/node"
)

// fault is something that is done to the node.
type fault struct {
	name    string
	excuses excuse
	do      func(context.Context, *soakRun, time.Duration) error
	least   time.Duration // how long it lasts, or up to twice that
}

var (
	everything = excuse{probes: true, failures: true, sessions: true, upstream: true, calls: true}
	upstream   = excuse{upstream: true}
	nothing    = excuse{}
)

// faults come in an order of their own for each seed, all of them before one comes again.
var faults = []fault{
	{"containerd-killed", upstream, restartContainerd, time.Second},
	{"containerd-hangs", upstream, hangContainerd, 4 * time.Second},
	{"streamshim-restarted", everything, restartStreamshim(10 * time.Second), 0},
	{"streamshim-killed", everything, restartStreamshim(0), 0},
	{"streamshim-reloads", nothing, reload, 0},
	{"streamshim-handed-over", nothing, handOver, 0},
	// A start needs a file in the state directory: without room it fails, and says why.
	{"state-full", excuse{failures: true, starts: []string{"no space left on device"}}, fill("state"), 2 * time.Second},
	{"audit-full", nothing, fill("audit"), 2 * time.Second},
	{"recordings-full", nothing, fill("recordings"), 2 * time.Second},
	// A forwarded connection that is refused is reset, and the reason logged: kubectl answers text by ending all.
	{"no-descriptors", excuse{starts: []string{"limits.spare_descriptors", "too many open files", resetAtOnce}}, exhaustDescriptors, 2 * time.Second},
	{"clock-jumps", nothing, jumpClock, 2 * time.Second},
}

func faultNames() []string {
	var names []string
	for _, f := range faults {
		names = append(names, f.name)
	}
	return names
}

// chosen are the faults of this run.
func (s *soakRun) chosen() []fault {
	return slices.DeleteFunc(slices.Clone(faults), func(f fault) bool {
		if f.name == "clock-jumps" && !s.clock {
			return true
		}
		return s.only != "" && !slices.Contains(strings.Split(s.only, ","), f.name)
	})
}

// injectFaults does one fault after the other until the context ends. A fault that has begun is ended.
func (s *soakRun) injectFaults(ctx context.Context) {
	r := s.random("faults", 0)
	chosen := s.chosen()
	for len(chosen) > 0 {
		r.Shuffle(len(chosen), func(i, j int) { chosen[i], chosen[j] = chosen[j], chosen[i] })
		for _, f := range chosen {
			if !pause(ctx, between(r, 3*time.Second, 8*time.Second)) {
				return
			}
			d := f.least
			if d > 0 {
				d = between(r, f.least, 2*f.least)
			}
			end := s.openWindow(f.name, f.excuses)
			if err := f.do(context.WithoutCancel(ctx), s, d); err != nil {
				s.violated(faultTrouble, "%s: %v", f.name, err)
			}
			end()
		}
	}
}

func restartContainerd(ctx context.Context, s *soakRun, d time.Duration) error {
	if err := s.node.KillContainerd(); err != nil {
		return err
	}
	pause(ctx, d)
	return s.node.StartContainerd(ctx)
}

func hangContainerd(ctx context.Context, s *soakRun, d time.Duration) error {
	pid := s.node.PID("containerd")
	if err := unix.Kill(pid, unix.SIGSTOP); err != nil {
		return err
	}
	pause(ctx, d)
	return unix.Kill(pid, unix.SIGCONT)
}

func restartStreamshim(grace time.Duration) func(context.Context, *soakRun, time.Duration) error {
	return func(ctx context.Context, s *soakRun, _ time.Duration) error {
		if err := s.node.StopStreamshim(grace); err != nil {
			return err
		}
		return s.node.StartStreamshim(ctx)
	}
}

// handOver has streamshim execute itself in the same process, with all that goes on in it.
func handOver(ctx context.Context, s *soakRun, _ time.Duration) error {
	program, err := node.FindBinary()
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, 3*time.Minute)
	defer cancel()
	out, err := exec.CommandContext(ctx, program, "upgrade", "--admin", "unix://"+s.node.AdminSocket()).CombinedOutput()
	if err == nil && !strings.Contains(string(out), " 0 have ended;") {
		err = errors.New("not all sessions go on")
	}
	if err != nil {
		return fmt.Errorf("%w: %s", err, out)
	}
	return nil
}

func reload(_ context.Context, s *soakRun, _ time.Duration) error {
	return unix.Kill(s.node.PID("streamshim"), unix.SIGHUP)
}

// fill leaves no byte on a disk for a while.
func fill(disk string) func(context.Context, *soakRun, time.Duration) error {
	return func(ctx context.Context, s *soakRun, d time.Duration) error {
		path := filepath.Join(s.dir, disk, "full")
		file, err := os.Create(path)
		if err != nil {
			return err
		}
		defer os.Remove(path) //nolint:errcheck // found as left behind
		for size := 1 << 20; size > 0; {
			if _, err := file.Write(make([]byte, size)); errors.Is(err, unix.ENOSPC) {
				size /= 2
			} else if err != nil {
				return errors.Join(err, file.Close())
			}
		}
		pause(ctx, d)
		return file.Close()
	}
}

// leftDescriptors is less than limits.spare_descriptors, so that no new session may begin, and enough for probes.
const leftDescriptors = 64

// exhaustDescriptors leaves streamshim a few descriptors that are not open now.
func exhaustDescriptors(ctx context.Context, s *soakRun, d time.Duration) error {
	pid := s.node.PID("streamshim")
	open, err := os.ReadDir(fmt.Sprintf("/proc/%d/fd", pid))
	if err != nil {
		return err
	}
	var before unix.Rlimit
	if err := unix.Prlimit(pid, unix.RLIMIT_NOFILE, nil, &before); err != nil {
		return err
	}
	few := unix.Rlimit{Cur: min(uint64(len(open)+leftDescriptors), before.Cur), Max: before.Max}
	if err := unix.Prlimit(pid, unix.RLIMIT_NOFILE, &few, nil); err != nil {
		return err
	}
	pause(ctx, d)
	return unix.Prlimit(pid, unix.RLIMIT_NOFILE, &before, nil)
}

// jumpClock sets the machine's clock an hour ahead and back again.
func jumpClock(ctx context.Context, _ *soakRun, d time.Duration) error {
	jump := func(by time.Duration) error {
		now := unix.NsecToTimespec(time.Now().Add(by).UnixNano())
		return unix.ClockSettime(unix.CLOCK_REALTIME, &now)
	}
	if err := jump(time.Hour); err != nil {
		return err
	}
	pause(ctx, d)
	return jump(-time.Hour)
}

// injectStalls stops streamshim now and then without telling anybody, see -inject.
func (s *soakRun) injectStalls(ctx context.Context) {
	if !s.injects(injectStall) {
		return
	}
	for pause(ctx, 5*time.Second) {
		pid := s.node.PID("streamshim")
		stall := min(max(3*time.Second, 2*probeFactor*s.busy()), 15*time.Second)
		if err := errors.Join(unix.Kill(pid, unix.SIGSTOP), waitThen(stall, func() error { return unix.Kill(pid, unix.SIGCONT) })); err != nil {
			s.violated(faultTrouble, "inject a stall: %v", err)
		}
	}
}

func waitThen(d time.Duration, do func() error) error {
	<-time.After(d)
	return do()
}
