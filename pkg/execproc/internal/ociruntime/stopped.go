package ociruntime

import (
	"context"
	"errors"
	"time"

	"github.com/streamshim/streamshim/pkg/execproc/internal/proc"
)

// ErrStopped is in the error of a start that was ended because a process of it was stopped.
var ErrStopped = errors.New("a process in the container has stopped the command before it began (SIGSTOP or ptrace)")

const (
	// stoppedAfter is when a start begins to be looked at. Most have ended by then.
	stoppedAfter = 200 * time.Millisecond
	// stoppedInterval is the time between two looks.
	stoppedInterval = 50 * time.Millisecond
	// maxStarting limits the processes of a start that are looked at; runc has four.
	maxStarting = 64
)

// endIfStopped calls end once a process that descends from the runtime, and so is entering the
// container, is stopped at two looks in a row. A process in the container can do that to it
// and would hold the start up until its timeout, and with it the turn of another start. It returns when
// the context is done.
func endIfStopped(ctx context.Context, runtime int, end func()) {
	timer := time.NewTimer(stoppedAfter)
	defer timer.Stop()
	before := map[proc.Identity]bool{}
	for {
		select {
		case <-ctx.Done():
			return
		case <-timer.C:
		}
		now := map[proc.Identity]bool{}
		for _, p := range descendants(runtime) {
			if p.State != 'T' && p.State != 't' {
				continue
			}
			if before[p.Identity] {
				end()
				return
			}
			now[p.Identity] = true
		}
		before = now
		timer.Reset(stoppedInterval)
	}
}

// descendants returns the children of a process and their children, as far as the kernel lists them
// (CONFIG_PROC_CHILDREN).
func descendants(pid int) []proc.Stat {
	var found []proc.Stat
	for parents := []int{pid}; len(parents) > 0 && len(found) < maxStarting; parents = parents[1:] {
		children, err := proc.ChildrenOf(parents[0], proc.Many)
		if err != nil {
			continue
		}
		for _, child := range children {
			if stat, err := proc.ReadStat(child); err == nil {
				found = append(found, stat)
				parents = append(parents, child)
			}
		}
	}
	return found
}
