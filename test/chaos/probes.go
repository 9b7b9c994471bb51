package main

import (
	"context"
	"fmt"
	"os/exec"
	"slices"
	"sync"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

const (
	probesInPod   = 4
	probeInterval = 3 * time.Second // of each of them
	probeTimeout  = 10              // seconds
	probeLimit    = 30 * time.Second

	// The same commands without streamshim, one after the other.
	referenceInterval = time.Second
	floorInterval     = 500 * time.Millisecond

	// A probe is late that takes more than probeBar, and more than probeFactor times as long as the slowest plain
	// `runc exec` at that time: the machine may be busy with other things, and no probe is faster than that.
	probeBar    = time.Second
	probeFactor = 3
	// lateProbes is how many of a hundred may be, and one in any case.
	lateProbes = 1

	// cpuFactor is how many times the CPU time of a plain `runc exec` streamshim itself may use for each command.
	cpuFactor = 2

	callInterval = 500 * time.Millisecond
)

// probeForever calls ExecSync in the stable pods as a kubelet does: several probes of each pod, each at fixed times, and
// never one before the last one was answered.
func (s *soakRun) probeForever(ctx context.Context) {
	var probes sync.WaitGroup
	for number := range len(s.pods.stable) * probesInPod {
		p := s.pods.stable[number%len(s.pods.stable)]
		probes.Go(func() {
			if pause(ctx, time.Duration(number)*probeInterval/time.Duration(len(s.pods.stable)*probesInPod)) {
				every(ctx, probeInterval, func() { s.probe(ctx, p) })
			}
		})
	}
	probes.Wait()
}

func (s *soakRun) probe(ctx context.Context, p *pod) {
	bounded, cancel := context.WithTimeout(context.WithoutCancel(ctx), probeLimit)
	defer cancel()
	unanswered := func(e excuse) bool { return e.probes }
	failing := func(e excuse) bool { return e.probes || e.failures }
	s.measure(&s.probes, failedProbe, "probe in "+p.name, unanswered, failing, func() error {
		response, err := s.node.Runtime().ExecSync(bounded, &runtimeapi.ExecSyncRequest{ContainerId: p.shell, Cmd: []string{"true"}, Timeout: probeTimeout})
		if status.Code(err) == codes.DeadlineExceeded {
			return nil // it is late, and counts as such
		}
		if err == nil && response.ExitCode != 0 {
			err = fmt.Errorf("exit code %d", response.ExitCode)
		}
		return err
	})
}

// probeContainerd asks containerd itself for the same probes, to be seen beside them.
func (s *soakRun) probeContainerd(ctx context.Context) {
	number := 0
	every(ctx, referenceInterval, func() {
		p := s.pods.stable[number%len(s.pods.stable)]
		number++
		bounded, cancel := context.WithTimeout(context.WithoutCancel(ctx), probeLimit)
		defer cancel()
		anything := func(e excuse) bool { return e.upstream }
		s.measure(&s.reference, "", "", anything, anything, func() error {
			_, err := s.node.Upstream().ExecSync(bounded, &runtimeapi.ExecSyncRequest{ContainerId: p.shell, Cmd: []string{"true"}, Timeout: probeTimeout})
			return err
		})
	})
}

// probeDirectly runs the same command with `runc exec` in the same containers, without streamshim and containerd: what
// a probe must take on this machine at this time.
func (s *soakRun) probeDirectly(ctx context.Context) {
	number := 0
	every(ctx, floorInterval, func() {
		p := s.pods.stable[number%len(s.pods.stable)]
		number++
		command := exec.Command(s.node.Program("runc"), "--root", s.node.RuncRoot(), "exec", p.shell, "true") //nolint:gosec // the soak's own
		never := func(excuse) bool { return false }
		s.floorBegan.Store(int64(time.Since(s.begin)))
		s.measure(&s.floor, failedControl, "runc exec in "+p.name, never, never, command.Run)
		s.floorBegan.Store(0)
		if state := command.ProcessState; state != nil {
			s.mu.Lock()
			defer s.mu.Unlock()
			s.floorCPU += state.UserTime() + state.SystemTime()
		}
	})
}

// busy is how long a `runc exec` takes now: the last one, or the one that runs if it runs longer.
func (s *soakRun) busy() time.Duration {
	var running time.Duration
	if began := time.Duration(s.floorBegan.Load()); began > 0 {
		running = time.Since(s.begin) - began
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if n := len(s.floor); n > 0 {
		return max(running, s.floor[n-1].took)
	}
	return running
}

// callForever makes those calls that a kubelet makes all the time.
func (s *soakRun) callForever(ctx context.Context) {
	var calls sync.WaitGroup
	defer calls.Wait()
	number := 0
	every(ctx, callInterval, func() {
		number++
		which, container := number%3, s.pods.stable[number%len(s.pods.stable)].shell
		calls.Go(func() {
			bounded, cancel := context.WithTimeout(context.WithoutCancel(ctx), probeLimit)
			defer cancel()
			excused := func(e excuse) bool { return e.calls || e.upstream }
			s.measure(&s.calls, failedCall, fmt.Sprintf("call %d", which), excused, excused, func() (err error) {
				switch which {
				case 0:
					_, err = s.node.Runtime().Version(bounded, &runtimeapi.VersionRequest{})
				case 1:
					_, err = s.node.Runtime().ListPodSandbox(bounded, &runtimeapi.ListPodSandboxRequest{})
				case 2:
					_, err = s.node.Runtime().ContainerStatus(bounded, &runtimeapi.ContainerStatusRequest{ContainerId: container})
				}
				return err
			})
		})
	})
}

// measure makes a call and keeps how long it took. Without a kind its failure is no violation. slow excuses the time that it takes, failing its failure.
func (s *soakRun) measure(kept *[]sample, kind violationKind, what string, slow, failing func(excuse) bool, call func() error) {
	begin := time.Now()
	err := call()
	end := time.Now()
	one := sample{
		at: begin.Sub(s.begin), took: end.Sub(begin), failed: err != nil,
		excused: s.excused(begin, end, slow) != "",
	}
	if err != nil && kind != "" && s.excused(begin, end, failing) == "" {
		s.violated(kind, "%s after %v: %v", what, one.took.Round(time.Millisecond), err)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	*kept = append(*kept, one)
}

// judgeProbes compares the probes with what `runc exec` took at the same time.
func (s *soakRun) judgeProbes() {
	counted, late := 0, 0
	for _, one := range s.probes {
		if one.excused {
			continue
		}
		counted++
		if bar := max(probeBar, probeFactor*s.floorAt(one.at, one.at+one.took)); one.took > bar {
			late++
			s.note("late: a probe at %.3f took %v, and might take %v", one.at.Seconds(), one.took.Round(time.Millisecond), bar.Round(time.Millisecond))
		}
	}
	if late > max(1, lateProbes*counted/100) {
		s.violated(slowProbes, "%d of %d took more than %v and more than %d times as long as runc exec did at that time",
			late, counted, probeBar, probeFactor)
	}
}

// floorAt is how long the slowest `runc exec` took that ran in a time, or a moment before or after it, or was the last
// one before it.
func (s *soakRun) floorAt(begin, end time.Duration) time.Duration {
	var longest, last time.Duration
	for _, one := range s.floor {
		if one.at < begin {
			last = one.took // one runs after the other
		}
		if one.at < end+time.Second && begin-time.Second < one.at+one.took {
			longest = max(longest, one.took)
		}
	}
	return max(longest, last)
}

// slowest is floorAt for points in time.
func (s *soakRun) slowest(begin, end time.Time) time.Duration {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.floorAt(begin.Sub(s.begin), end.Sub(s.begin))
}

// judgeCPU compares streamshim's own CPU time with that of `runc exec`: what it burns makes both slow, which
// judgeProbes does not see.
func (s *soakRun) judgeCPU() {
	each, floor := s.cpuOfCommand()
	if floor > 0 && each > cpuFactor*floor {
		s.violated(burntCPU, "streamshim itself used %v for each command, and runc exec %v", each.Round(time.Millisecond/10), floor.Round(time.Millisecond/10))
	}
}

// cpuOfCommand is the CPU time that streamshim itself used for each session and probe, and that of one `runc exec`.
func (s *soakRun) cpuOfCommand() (each, floor time.Duration) {
	commands := len(s.probes)
	for _, n := range s.counts {
		commands += n
	}
	return s.cpu / time.Duration(max(commands, 1)), s.floorCPU / time.Duration(max(len(s.floor), 1))
}

// percentile is that of those that are not excused.
func percentile(samples []sample, percent int) time.Duration {
	var took []time.Duration
	for _, one := range samples {
		if !one.excused {
			took = append(took, one.took)
		}
	}
	if len(took) == 0 {
		return 0
	}
	slices.Sort(took)
	return took[min(len(took)*percent/100, len(took)-1)]
}
