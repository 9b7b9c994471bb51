package execproc

import (
	"context"
	"errors"
	"time"
)

// errStopped is in the error of a start that was ended because a process of it was stopped.
var errStopped = errors.New("a process in the container has stopped the command before it began (SIGSTOP or ptrace)")

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
	before := map[identity]bool{}
	for {
		select {
		case <-ctx.Done():
			return
		case <-timer.C:
		}
		now := map[identity]bool{}
		for _, p := range descendants(runtime) {
			if p.state != 'T' && p.state != 't' {
				continue
			}
			if before[p.identity] {
				end()
				return
			}
			now[p.identity] = true
		}
		before = now
		timer.Reset(stoppedInterval)
	}
}

// descendants returns the children of a process and their children, as far as the kernel lists them
// (CONFIG_PROC_CHILDREN).
func descendants(pid int) []procStat {
	var found []procStat
	for parents := []int{pid}; len(parents) > 0 && len(found) < maxStarting; parents = parents[1:] {
		children, err := childrenOf(parents[0], many)
		if err != nil {
			continue
		}
		for _, child := range children {
			if stat, err := readStat(child); err == nil {
				found = append(found, stat)
				parents = append(parents, child)
			}
		}
	}
	return found
}
