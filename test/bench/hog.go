package main

import (
	"context"
	"fmt"
	"os"
	"slices"
	"time"

	"golang.org/x/sys/unix"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// A container makes as many descriptors as its limit allows, and whoever looks for those that hold the streams of a
// command reads them at the node's cost. What does one probe cost that times out there?

const (
	hogProcesses = 20
	hogTimeout   = 20 // seconds, in which all of them have to be there
	hogProbes    = 2
)

// hogCommand leaves processes that have lost their parents and have sessions of their own, hold the command's output,
// and have begun after it: there is no other way to know them than by their descriptors.
var hogCommand = []string{"sh", "-c", fmt.Sprintf("for i in $(seq %d); do (setsid hog &); done; sleep 1000", hogProcesses)}

func (b *bench) hog(ctx context.Context, s side) error {
	before, err := b.container.processes()
	if err != nil {
		return err
	}
	for range hogProbes {
		if err := b.hogProbe(ctx, s, before); err != nil {
			return err
		}
	}
	return nil
}

func (b *bench) hogProbe(ctx context.Context, s side, before []int) error {
	pid := b.node.PID(string(s.name))
	spent, err := ownCPU(pid)
	if err != nil {
		return err
	}
	begin := time.Now()
	bounded, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	open := make(chan int, 1)
	go func() {
		time.Sleep((hogTimeout - 1) * time.Second)
		open <- b.descriptors(before)
	}()
	_, probeErr := s.client.ExecSync(bounded, &runtimeapi.ExecSyncRequest{ContainerId: b.containerID, Cmd: hogCommand, Timeout: hogTimeout})
	took := time.Since(begin)
	if probeErr == nil {
		return fmt.Errorf("%v ended in time", hogCommand)
	}
	descriptors := <-open
	if descriptors < hogProcesses*fewDescriptors {
		return fmt.Errorf("the container has %d descriptors open a second before the timeout", descriptors)
	}
	left, err := b.hogs(before)
	for deadline := time.Now().Add(cutWindow); err == nil && len(left) > 0 && time.Now().Before(deadline); left, err = b.hogs(before) {
		time.Sleep(50 * time.Millisecond)
	}
	if err != nil {
		return err
	}
	now, err := ownCPU(pid)
	if err != nil {
		return err
	}
	for _, hog := range left {
		_ = unix.Kill(hog, unix.SIGKILL) //nolint:errcheck // it may have ended
	}
	for deadline := time.Now().Add(cutPatience); len(left) > 0; left, err = b.hogs(before) {
		if err != nil {
			return err
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("%d processes of a probe cannot be killed", len(left))
		}
		time.Sleep(50 * time.Millisecond)
	}
	b.results.add("hog.cpu", s.name, (now - spent).Seconds())
	b.results.add("hog.late", s.name, (took - hogTimeout*time.Second).Seconds())
	progress("hog, %s: %d descriptors, CPU %.3f s, answered %.1f s after the timeout (%v)", s.name, descriptors, (now - spent).Seconds(), (took - hogTimeout*time.Second).Seconds(), probeErr)
	return nil
}

// fewDescriptors is what each of them has at least, or nothing is measured.
const fewDescriptors = 4000

// descriptors is how many the processes have open that were not there before, as far as they can be read.
func (b *bench) descriptors(before []int) int {
	hogs, err := b.hogs(before)
	if err != nil {
		return 0
	}
	open := 0
	for _, pid := range hogs {
		if entries, err := os.ReadDir(fmt.Sprintf("/proc/%d/fd", pid)); err == nil {
			open += len(entries)
		}
	}
	return open
}

// hogs are the processes in the container that were not there before.
func (b *bench) hogs(before []int) ([]int, error) {
	now, err := b.container.processes()
	return slices.DeleteFunc(now, func(pid int) bool { return slices.Contains(before, pid) }), err
}
