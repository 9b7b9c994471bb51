// Package limits refuses sessions: by rules, and when there are too many.
package limits

import (
	"cmp"
	"context"
	"fmt"
	"slices"
	"sync"

	"github.com/streamshim/streamshim/pkg/session"
)

// Config is what is refused. A limit of 0 is none.
type Config struct {
	Sessions             int // on the node
	SessionsPerPod       int
	SessionsPerContainer int
	ConcurrentStarts     int // commands that start at the same time
	WaitingStarts        int // commands that wait for their turn to start
	SpareDescriptors     int // that no new session may use; -1 is an eighth of those that there are
	Deny                 []Rule
}

// Rule refuses the sessions that it chooses.
type Rule struct {
	session.Selector
	Message string // for the client; a plain one when empty
}

// Limiter is a session.Guard, and a gate for the start of commands. Its methods may be called from
// several goroutines.
type Limiter struct {
	mu         sync.Mutex
	config     Config
	sessions   int
	pods       map[string]int // sessions by pod
	containers map[string]int // sessions by container

	descriptors descriptors

	starting map[string]int // commands that start, by pod
	waiting  []turn         // first come, first served, but for pods that have their share
}

// turn is one command that waits for its turn to start.
type turn struct {
	pod   string
	comes chan struct{} // closed when it does
}

// shares is how many pods it takes to use up all starts or all places to wait: a pod that holds up what
// enters it holds up at most one part in this of the node's starts, for the time that each may take.
const shares = 4

// share is a pod's part, at least one.
func share(all int) int { return (all + shares - 1) / shares }

// New returns a limiter.
func New(config Config) *Limiter {
	return &Limiter{config: config, pods: make(map[string]int), containers: make(map[string]int), starting: make(map[string]int)}
}

// Update takes over new limits. Sessions that live are counted, and not ended.
func (l *Limiter) Update(config Config) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.config = config
	l.wakeLocked()
}

// Check implements session.Guard. ExecSync calls are not counted, only denied by rules that name
// them.
func (l *Limiter) Check(info session.Info) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.checkLocked(info)
}

// Admit implements session.Guard.
func (l *Limiter) Admit(_ context.Context, s *session.Session) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if err := l.checkLocked(s.Info); err != nil {
		return err
	}
	l.descriptors.admitted(perSession)
	l.sessions++
	l.pods[podOf(s.Info)]++
	l.containers[s.Target.ContainerID]++
	return nil
}

// Ended implements session.Guard.
func (l *Limiter) Ended(s *session.Session, _ session.Outcome) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.sessions--
	decrement(l.pods, podOf(s.Info))
	decrement(l.containers, s.Target.ContainerID)
}

// Refused implements session.Guard.
func (l *Limiter) Refused(session.Info, error) {}

func decrement(counts map[string]int, key string) {
	if counts[key]--; counts[key] == 0 {
		delete(counts, key)
	}
}

// podOf is the same for all sessions of a pod. A client that is no kubelet gives no UID, and a runtime
// that is no runc may not tell the sandbox: then the container stands for its pod, so that all pods
// that are not known are not taken for one.
func podOf(info session.Info) string {
	return cmp.Or(info.Target.PodUID, info.Target.SandboxID, info.Target.ContainerID)
}

func (l *Limiter) checkLocked(info session.Info) error {
	for _, rule := range l.config.Deny {
		matches, unknown := rule.Matches(info)
		if !matches && !unknown {
			continue
		}
		message := rule.Message
		if message == "" {
			message = fmt.Sprintf("%s is not allowed here: a rule on this node denies it", info.Kind)
		}
		if unknown {
			message += " (the pod's labels could not be found out)"
		}
		return &session.RefusedError{Refusal: session.Denied, Message: message}
	}
	if info.Kind == session.ExecSync {
		return nil
	}
	if err := l.descriptors.check(l.config.SpareDescriptors); err != nil {
		return err
	}
	for _, limit := range []struct {
		where     string
		key       string
		now, most int
	}{
		{"node", "sessions", l.sessions, l.config.Sessions},
		{"pod", "sessions_per_pod", l.pods[podOf(info)], l.config.SessionsPerPod},
		{"container", "sessions_per_container", l.containers[info.Target.ContainerID], l.config.SessionsPerContainer},
	} {
		if limit.most == 0 || limit.now < limit.most || (limit.key == "sessions_per_container" && info.Target.ContainerID == "") {
			continue
		}
		return &session.RefusedError{Refusal: session.TooMany, Message: fmt.Sprintf(
			"this %s has %d exec, attach and port-forward sessions, and may have %d (limits.%s): try again when one has ended",
			limit.where, limit.now, limit.most, limit.key)}
	}
	return nil
}

// MayConnect refuses a forwarded connection when no more files are left than are kept for others.
func (l *Limiter) MayConnect() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if err := l.descriptors.check(l.config.SpareDescriptors); err != nil {
		return err
	}
	l.descriptors.admitted(perConnection)
	return nil
}

// Acquire waits for a turn to start a command; release ends it. The error is the context's, or a
// *session.RefusedError when too many wait already, on the node or in the pod. A pod has a quarter of
// either.
func (l *Limiter) Acquire(ctx context.Context, info session.Info) (release func(), err error) {
	pod := podOf(info)
	release = func() { l.release(pod) }
	l.mu.Lock()
	if l.mayStartLocked(pod) { // nobody waits who might as well: he would have been woken
		l.starting[pod]++
		l.mu.Unlock()
		return release, nil
	}
	if err := l.mayWaitLocked(pod); err != nil {
		l.mu.Unlock()
		return nil, err
	}
	mine := turn{pod, make(chan struct{})}
	l.waiting = append(l.waiting, mine)
	l.mu.Unlock()
	select {
	case <-mine.comes:
		return release, nil
	case <-ctx.Done():
		l.giveUp(mine)
		return nil, context.Cause(ctx)
	}
}

func (l *Limiter) mayStartLocked(pod string) bool {
	most := l.config.ConcurrentStarts
	if most == 0 {
		return true
	}
	now := 0
	for _, n := range l.starting {
		now += n
	}
	return now < most && l.starting[pod] < share(most)
}

func (l *Limiter) mayWaitLocked(pod string) error {
	most := l.config.WaitingStarts
	if most == 0 {
		return nil
	}
	inPod := 0
	for _, t := range l.waiting {
		if t.pod == pod {
			inPod++
		}
	}
	switch {
	case len(l.waiting) >= most:
		return &session.RefusedError{Refusal: session.TooMany, Message: fmt.Sprintf(
			"%d commands wait to be started on this node, and no more may wait: try again later", len(l.waiting))}
	case inPod >= share(most):
		return &session.RefusedError{Refusal: session.TooMany, Message: fmt.Sprintf(
			"%d commands wait to be started in this pod, and no more may wait: try again later", inPod)}
	}
	return nil
}

func (l *Limiter) release(pod string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	decrement(l.starting, pod)
	l.wakeLocked()
}

func (l *Limiter) giveUp(mine turn) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for i, waiting := range l.waiting {
		if waiting == mine {
			l.waiting = slices.Delete(l.waiting, i, i+1)
			return
		}
	}
	decrement(l.starting, mine.pod) // the turn came at the same moment
	l.wakeLocked()
}

func (l *Limiter) wakeLocked() {
	l.waiting = slices.DeleteFunc(l.waiting, func(t turn) bool {
		if !l.mayStartLocked(t.pod) {
			return false
		}
		l.starting[t.pod]++
		close(t.comes)
		return true
	})
}
