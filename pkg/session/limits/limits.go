// Package limits refuses sessions: by rules, and when there are too many.
package limits

import (
	"cmp"
	"context"
	"fmt"
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

	starting   int
	startingIn map[string]int // the same by container
	waiting    []waiter       // first come, first served, but for those whose container has its share
}

// waiter waits for a turn to start a command.
type waiter struct {
	container string
	turn      chan struct{} // closed when it has come
}

// containerShare is how much of the starts on a node, and of those that wait, one container may take: a part of it.
// A container can stop whatever enters it, and with it the start, until that times out.
const containerShare = 4

// shareOf is the share of one container in a limit.
func shareOf(limit int) int { return max(1, limit/containerShare) }

// New returns a limiter.
func New(config Config) *Limiter {
	return &Limiter{config: config, pods: make(map[string]int), containers: make(map[string]int), startingIn: make(map[string]int)}
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

// Acquire waits for a turn to start a command in a container; release ends it. The error is the context's, or a
// *session.RefusedError when too many wait already. One container has at most a quarter of the turns, and of the places
// of those who wait.
func (l *Limiter) Acquire(ctx context.Context, container string) (release func(), err error) {
	l.mu.Lock()
	if l.mayStartLocked(container) { // and then nobody who waits may
		l.startLocked(container)
		l.mu.Unlock()
		return func() { l.release(container) }, nil
	}
	if err := l.checkWaitingLocked(container); err != nil {
		l.mu.Unlock()
		return nil, err
	}
	turn := make(chan struct{})
	l.waiting = append(l.waiting, waiter{container, turn})
	l.mu.Unlock()
	select {
	case <-turn:
		return func() { l.release(container) }, nil
	case <-ctx.Done():
		l.giveUp(container, turn)
		return nil, context.Cause(ctx)
	}
}

func (l *Limiter) mayStartLocked(container string) bool {
	limit := l.config.ConcurrentStarts
	return limit == 0 || (l.starting < limit && l.startingIn[container] < shareOf(limit))
}

// checkWaitingLocked says why a start may not wait.
func (l *Limiter) checkWaitingLocked(container string) error {
	limit := l.config.WaitingStarts
	if limit == 0 {
		return nil
	}
	if n := len(l.waiting); n >= limit {
		return &session.RefusedError{Refusal: session.TooMany, Message: fmt.Sprintf(
			"%d commands wait to be started on this node, and no more may wait (limits.waiting_starts): try again later", n)}
	}
	n := 0
	for _, w := range l.waiting {
		if w.container == container {
			n++
		}
	}
	if n >= shareOf(limit) {
		return &session.RefusedError{Refusal: session.TooMany, Message: fmt.Sprintf(
			"%d commands wait to be started in this container, a quarter of limits.waiting_starts, and no more may wait: try again later", n)}
	}
	return nil
}

func (l *Limiter) startLocked(container string) {
	l.starting++
	l.startingIn[container]++
}

func (l *Limiter) release(container string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.starting--
	decrement(l.startingIn, container)
	l.wakeLocked()
}

func (l *Limiter) giveUp(container string, turn chan struct{}) {
	l.mu.Lock()
	for i, waiting := range l.waiting {
		if waiting.turn == turn {
			l.waiting = append(l.waiting[:i], l.waiting[i+1:]...)
			l.mu.Unlock()
			return
		}
	}
	l.mu.Unlock()
	l.release(container) // the turn came at the same moment
}

// wakeLocked gives turns to all who may start, in the order in which they came.
func (l *Limiter) wakeLocked() {
	still := l.waiting[:0]
	for _, w := range l.waiting {
		if !l.mayStartLocked(w.container) {
			still = append(still, w)
			continue
		}
		l.startLocked(w.container)
		close(w.turn)
	}
	clear(l.waiting[len(still):])
	l.waiting = still
}
