// Package limits refuses sessions, by rules and above limits.
package limits

import (
	"cmp"
	"context"
	"fmt"
	"sync"

	"github.com/streamshim/streamshim/pkg/session"
)

// Config holds rules and limits. A limit of 0 means no limit.
type Config struct {
	Sessions             int // on the node
	SessionsPerPod       int
	SessionsPerContainer int
	ConcurrentStarts     int // commands of sessions that start at the same time
	ConcurrentProbes     int // ExecSync commands that start at the same time
	WaitingStarts        int // commands of each of the two kinds that wait to start
	SpareDescriptors     int // descriptors that new sessions must leave free; -1 means an eighth of all
	Deny                 []Rule
}

// Rule refuses the sessions that its selector matches.
type Rule struct {
	session.Selector
	Message string // for the client; a default if empty
}

// Limiter is a session.Guard that also limits the start of commands. Its methods are safe for concurrent use.
type Limiter struct {
	mu         sync.Mutex
	config     Config
	sessions   int
	pods       map[string]int // number of sessions by pod
	containers map[string]int // number of sessions by container

	descriptors descriptors

	probes, commands starts // of ExecSync and of sessions
}

// New returns a limiter.
func New(config Config) *Limiter {
	return &Limiter{
		config: config, pods: make(map[string]int), containers: make(map[string]int),
		descriptors: descriptors{count: OpenDescriptors, limit: DescriptorLimit},
	}
}

// Update replaces the limits. Live sessions are counted but not ended.
func (l *Limiter) Update(config Config) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.config = config
	l.wakeLocked()
}

// Check implements session.Guard. ExecSync calls are not counted; only rules that name them refuse them.
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
	l.countLocked(s)
	return nil
}

func (l *Limiter) countLocked(s *session.Session) {
	l.sessions++
	l.pods[podOf(s.Info)]++
	l.containers[s.Target.ContainerID]++
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

// podOf returns the same key for all sessions of a pod. A client other than the kubelet gives no UID, and a
// runtime other than runc may not name the sandbox. Then the container stands for its pod, so that all unknown
// pods do not count as one.
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

// MayConnect refuses a forwarded connection if it would use descriptors kept for others.
func (l *Limiter) MayConnect() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if err := l.descriptors.check(l.config.SpareDescriptors); err != nil {
		return err
	}
	l.descriptors.admitted(perConnection)
	return nil
}
