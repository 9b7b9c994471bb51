package limits

import (
	"context"
	"fmt"
	"slices"

	"github.com/streamshim/streamshim/pkg/session"
)

// starts counts the commands of one kind that are starting, and queues those that wait for a turn.
type starts struct {
	running int
	inPod   map[string]int // of those starting, by pod
	waiting []turn         // first come, first served, except for pods that have used up their share
}

// turn is one command waiting for its turn to start.
type turn struct {
	pod   string
	comes chan struct{} // closed when the turn comes
}

// shares is how many pods it takes to use up all starts, or all places in the queue. A pod that delays whatever
// enters it can thus block at most one of so many shares of the node's starts, for as long as each start may take.
const shares = 4

// share returns a pod's share of all, at least 1.
func share(all int) int { return (all + shares - 1) / shares }

func (s *starts) begin(pod string) {
	if s.inPod == nil {
		s.inPod = make(map[string]int)
	}
	s.running++
	s.inPod[pod]++
}

func (s *starts) end(pod string) {
	s.running--
	decrement(s.inPod, pod)
}

// Acquire waits for a turn to start a command; release ends it. The error is the context's cause, or a
// *session.RefusedError if too many wait already, on the node or in the pod. A pod may have a quarter of either.
//
// ExecSync goes first: a late probe costs its pod a restart, a late session costs a moment. ExecSync has turns of
// its own. Sessions get what ExecSync leaves of theirs, but always at least one, so that they make progress.
func (l *Limiter) Acquire(ctx context.Context, info session.Info) (release func(), err error) {
	pod, kind := podOf(info), &l.commands
	if info.Kind == session.ExecSync {
		kind = &l.probes
	}
	release = func() { l.release(kind, pod) }
	l.mu.Lock()
	if l.mayStartLocked(kind, pod) { // anyone in the queue who might start would have been woken
		kind.begin(pod)
		l.mu.Unlock()
		return release, nil
	}
	if err := l.mayWaitLocked(kind, pod); err != nil {
		l.mu.Unlock()
		return nil, err
	}
	mine := turn{pod, make(chan struct{})}
	kind.waiting = append(kind.waiting, mine)
	l.mu.Unlock()
	select {
	case <-mine.comes:
		return release, nil
	case <-ctx.Done():
		l.giveUp(kind, mine)
		return nil, context.Cause(ctx)
	}
}

// Starts returns how many commands of a kind are starting, and how many wait for their turn.
func (l *Limiter) Starts(kind session.Kind) (running, waiting int) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if kind == session.ExecSync {
		return l.probes.running, len(l.probes.waiting)
	}
	return l.commands.running, len(l.commands.waiting)
}

func (l *Limiter) mayStartLocked(kind *starts, pod string) bool {
	most, all := l.config.ConcurrentStarts, l.commands.running+l.probes.running
	switch {
	case kind == &l.probes:
		most, all = l.config.ConcurrentProbes, l.probes.running
	case l.commands.running == 0:
		all = 0
	}
	return most == 0 || all < most && kind.inPod[pod] < share(most)
}

func (l *Limiter) mayWaitLocked(kind *starts, pod string) error {
	most := l.config.WaitingStarts
	if most == 0 {
		return nil
	}
	inPod := 0
	for _, t := range kind.waiting {
		if t.pod == pod {
			inPod++
		}
	}
	switch {
	case len(kind.waiting) >= most:
		return &session.RefusedError{Refusal: session.TooMany, Message: fmt.Sprintf(
			"%d commands wait to be started on this node, and no more may wait: try again later", len(kind.waiting))}
	case inPod >= share(most):
		return &session.RefusedError{Refusal: session.TooMany, Message: fmt.Sprintf(
			"%d commands wait to be started in this pod, and no more may wait: try again later", inPod)}
	}
	return nil
}

func (l *Limiter) release(kind *starts, pod string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	kind.end(pod)
	l.wakeLocked()
}

func (l *Limiter) giveUp(kind *starts, mine turn) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for i, waiting := range kind.waiting {
		if waiting == mine {
			kind.waiting = slices.Delete(kind.waiting, i, i+1)
			return
		}
	}
	kind.end(mine.pod) // the turn came at the same moment
	l.wakeLocked()
}

// wakeLocked gives turns to waiting commands, ExecSync first.
func (l *Limiter) wakeLocked() {
	for _, kind := range []*starts{&l.probes, &l.commands} {
		kind.waiting = slices.DeleteFunc(kind.waiting, func(t turn) bool {
			if !l.mayStartLocked(kind, t.pod) {
				return false
			}
			kind.begin(t.pod)
			close(t.comes)
			return true
		})
	}
}
