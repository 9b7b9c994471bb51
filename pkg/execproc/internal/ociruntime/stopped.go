package ociruntime

import (
	"context"
	"errors"
	"time"

	"github.com/streamshim/streamshim/pkg/execproc/internal/proc"
)

// ErrStopped is wrapped by the error of a start that was aborted because one of its processes was stopped.
var ErrStopped = errors.New("a process in the container has stopped the command before it began (SIGSTOP or ptrace)")

const (
	// stoppedAfter is when checks of a start begin. Most starts are done by then.
	stoppedAfter = 200 * time.Millisecond
	// stoppedInterval is the time between checks.
	stoppedInterval = 50 * time.Millisecond
	// maxStarting bounds how many processes of a start are checked. runc has four.
	maxStarting = 64
)

// endIfStopped calls end once a descendant of the runtime, and so a process that is entering the container, is
// found stopped in two consecutive checks. A process in the container can stop it, which would delay the start
// until its timeout, and block another start's turn. endIfStopped returns when the context is done.
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

// descendants returns a process's descendants, about maxStarting at most, as far as the kernel lists them
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
