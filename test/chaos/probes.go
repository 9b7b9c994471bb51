package main

import (
	"context"
	"fmt"
	"slices"
	"sync"
	"time"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

const (
	probeInterval = 250 * time.Millisecond
	probeLimit    = 30 * time.Second // beyond it a probe counts as one of that length
	// probeBar is for p99, on a machine on which containerd answers the same probes in half the time.
	probeBar = time.Second

	callInterval = 500 * time.Millisecond
)

// probeForever calls ExecSync in the stable pods at fixed times, however long the calls take, as the kubelet's
// probes come.
func (s *soakRun) probeForever(ctx context.Context) {
	var calls sync.WaitGroup
	defer calls.Wait()
	number := 0
	every(ctx, probeInterval, func() {
		p := s.pods.stable[number%len(s.pods.stable)]
		number++
		calls.Go(func() {
			bounded, cancel := context.WithTimeout(context.WithoutCancel(ctx), probeLimit)
			defer cancel()
			s.measure(&s.probes, failedProbe, "probe in "+p.name, func(e excuse) bool { return e.probes }, func(e excuse) bool { return e.probes || e.failures }, func() error {
				response, err := s.node.Runtime().ExecSync(bounded, &runtimeapi.ExecSyncRequest{ContainerId: p.shell, Cmd: []string{"true"}, Timeout: 10})
				if err == nil && response.ExitCode != 0 {
					err = fmt.Errorf("exit code %d", response.ExitCode)
				}
				return err
			})
		})
	})
}

// probeContainerd asks containerd itself for the same probes, fewer of them, so that a machine that is too busy for
// anybody is told from a streamshim that is too slow.
func (s *soakRun) probeContainerd(ctx context.Context) {
	var calls sync.WaitGroup
	defer calls.Wait()
	number := 0
	every(ctx, 4*probeInterval, func() {
		p := s.pods.stable[number%len(s.pods.stable)]
		number++
		calls.Go(func() {
			bounded, cancel := context.WithTimeout(context.WithoutCancel(ctx), probeLimit)
			defer cancel()
			anything := func(e excuse) bool { return e.upstream }
			s.measure(&s.reference, "", "", anything, anything, func() error {
				_, err := s.node.Upstream().ExecSync(bounded, &runtimeapi.ExecSyncRequest{ContainerId: p.shell, Cmd: []string{"true"}, Timeout: 10})
				return err
			})
		})
	})
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

// judgeProbes compares the probes with the bar.
func (s *soakRun) judgeProbes() {
	bar := max(probeBar, 2*percentile(s.reference, 99))
	if bar > probeBar {
		say("the machine is busy: containerd's own probes took %v at p99, so the bar is %v", milliseconds(s.reference, 99), bar.Round(time.Millisecond))
	}
	if p99 := percentile(s.probes, 99); p99 > bar {
		s.violated(slowProbes, "p99 is %v, of %d probes, and may be %v", p99.Round(time.Millisecond), len(s.probes), bar.Round(time.Millisecond))
	}
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
