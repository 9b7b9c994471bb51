// Package tree finds a process with all its descendants, and ends them.
package tree

import (
	"slices"
	"time"

	"golang.org/x/sys/unix"

	"github.com/streamshim/streamshim/pkg/execproc/internal/proc"
	"github.com/streamshim/streamshim/pkg/execproc/internal/reaper"
)

// Tree finds a process with all its descendants. The kernel keeps no such list, so it is assembled from /proc,
// repeatedly, until nothing new appears. The members are
//
//   - children of a member, by parent pid;
//   - everyone in a member's session: the runtime gives each process it starts a session of its own, and a process
//     can only be born into a session;
//   - whoever holds the process's end of our pipes or of our terminal and is in the same cgroup.
//
// Members stay known after they have ended, so that their children are not lost. The terminal number in
// /proc/PID/stat does not help: each container counts its own.
//
// A Tree is not safe for concurrent use.
type Tree struct {
	leader proc.Identity
	init   int // the container's main process, never signalled
	// Stranger marks a leader that is not our child, so its orphans may have gone anywhere.
	Stranger bool
	// Mounts, if not 0, is a pid: processes outside its mount namespace are not members. It is set for a leader
	// that has ended, whose pid may have been reused.
	Mounts int
	// Urgent trees are searched for first: somebody is waiting for a probe's answer.
	Urgent bool
	// Frozen, once closed, ends waits for looks that have not begun, and sets Blind. Nil never does.
	Frozen <-chan struct{}
	Blind  bool
	Ends   StreamEnds
	Pipes  *PipeWatch // nil if it is unknown who holds the pipes
	// Killing is set once the tree is only to be killed. Other holders of its pipes are then searched for only
	// after its members are dead.
	Killing bool

	members  map[proc.Identity]*member
	sessions map[int]bool
	cgroups  cgroups // of the leader, or empty
}

// member is a process that was found to belong to a tree.
type member struct {
	// descends is false for processes that are members because they hold one of the leader's streams, and for
	// their children.
	descends bool
	gone     bool // has ended; kept so that it is not taken for a new one
	asked    bool // has been sent this stage's signal
}

// NextStage allows another signal to be sent to all members.
func (t *Tree) NextStage() {
	for _, m := range t.members {
		m.asked = false
	}
}

// StreamEnds identifies the process's ends of its streams among other processes' descriptors.
type StreamEnds struct {
	Pipes    map[string]bool // as in /proc/PID/fd: "pipe:[inode]"
	Terminal bool
	Dev, Ino uint64 // of the terminal's slave
}

// New returns a tree of which only the leader is known. It never signals init, the container's main process.
func New(leader proc.Identity, init int, ends StreamEnds) *Tree {
	return &Tree{
		leader:   leader,
		init:     init,
		Ends:     ends,
		members:  map[proc.Identity]*member{leader: {descends: true}},
		sessions: map[int]bool{leader.Pid: true},
	}
}

func (t *Tree) has(id proc.Identity) bool { return t.members[id] != nil }

// admissible reports whether a process is not a member yet but may become one.
func (t *Tree) admissible(p proc.Stat, self int) bool {
	return !t.has(p.Identity) && p.Pid != self && p.Pid != t.init && p.Start >= t.leader.Start &&
		(t.Mounts == 0 || proc.SameMountNamespace(p.Pid, t.Mounts))
}

// Living searches for new members and returns all that are alive. If it ends up Blind, it returns only the known
// ones.
func (t *Tree) Living() []proc.Stat { return trees.find(t) }

// grow adds the members' descendants and the processes in their sessions, and returns all members that are alive.
func (t *Tree) grow(v processView) []proc.Stat {
	var living []proc.Stat
	byPid := map[int]proc.Stat{}
	var queue []proc.Stat
	for id, m := range t.members {
		if m.gone {
			continue
		}
		p, err := v.process(id.Pid)
		if err != nil && !proc.Gone(err) {
			p, err = proc.Stat{Identity: id}, nil // such as when there are no free descriptors
		}
		if m.gone = err != nil || p.Identity != id || p.Zombie(); !m.gone {
			queue = append(queue, p)
			byPid[p.Pid] = p
		}
	}
	add := func(p proc.Stat, descends bool) {
		t.members[p.Identity] = &member{descends: descends, gone: p.Zombie()}
		byPid[p.Pid] = p
		queue = append(queue, p)
	}
	inSession := func(session int) {
		for _, p := range v.inSession(session, t.leader.Start) {
			// A session keeps its number while it has members. After that, a stranger may get the number as its
			// pid.
			if first, err := v.process(session); err == nil && !t.has(first.Identity) {
				delete(t.sessions, session)
				return
			}
			if t.admissible(p, v.self()) {
				add(p, true)
			}
		}
	}
	for session := range t.sessions {
		inSession(session)
	}
	for len(queue) > 0 {
		p := queue[0]
		queue = queue[1:]
		if !p.Zombie() {
			living = append(living, p)
		}
		m := t.members[p.Identity]
		if !t.sessions[p.Session] && t.ownsSession(m, p.Session, byPid) {
			t.sessions[p.Session] = true
			inSession(p.Session)
		}
		for _, child := range v.children(p) {
			if t.admissible(child, v.self()) && p.Start <= child.Start {
				add(child, m.descends)
			}
		}
	}
	return living
}

// known returns the members that may be alive, without looking for new ones.
func (t *Tree) known() []proc.Stat {
	var living []proc.Stat
	for id, m := range t.members {
		if !m.gone && id.Pid > 0 && id.Alive() {
			living = append(living, proc.Stat{Identity: id})
		}
	}
	return living
}

// ownsSession reports whether a member's session belongs to the tree. A descendant's session does: the leader
// began a session of its own, so any other was begun on the way down. Someone who merely holds a stream may be in
// a stranger's session, unless a member is seen to lead it.
func (t *Tree) ownsSession(m *member, session int, byPid map[int]proc.Stat) bool {
	if m.descends {
		return session != 0
	}
	first, seen := byPid[session]
	return seen && t.has(first.Identity)
}

// hasEnds reports whether there are streams by which to recognize holders.
func (t *Tree) hasEnds() bool { return len(t.Ends.Pipes) > 0 || t.Ends.Terminal }

// mayBeHeld reports whether other processes' descriptors must be searched, which is expensive. Once no member
// lives, the pipes themselves tell whether anyone holds them; while members live, they do not. There are two
// special cases:
//
//   - A terminal never tells.
//   - If processes have lost their parents since the leader began, some may be the leader's. They should be asked
//     to end together with the others.
//     to be asked to end together with the others.
func (t *Tree) mayBeHeld(living []proc.Stat, orphans bool) bool {
	switch {
	case t.Ends.Terminal:
		return true
	case len(t.Ends.Pipes) == 0:
		return false
	case len(living) == 0:
		return t.Pipes.Held()
	default:
		return orphans && !t.Killing
	}
}

// Ask sends a signal, once, to every member that has not been asked yet, including those that appear later. It
// returns when nothing of the tree lives or at the deadline, with those still alive. If cut is closed, it returns
// at once.
func (t *Tree) Ask(living []proc.Stat, signal unix.Signal, deadline time.Time, cut <-chan struct{}) []proc.Stat {
	for len(living) > 0 {
		for _, p := range living {
			if m := t.members[p.Identity]; m != nil && !m.asked {
				m.asked = true
				// A stopped process receives only SIGKILL until it is continued. It is not an error if it has
				// ended meanwhile.
				_ = p.Signal(signal, unix.SIGCONT)
			}
		}
		switch AwaitEnds(living, deadline, cut) {
		case AllEnded:
			living = t.Living()
		case TimeOver:
			return t.Living()
		case WasCut:
			return living
		}
	}
	return living
}

const (
	stopRounds = 20 // after so many looks a tree that keeps forking is killed as it is
	// KillTimeout is how long killed processes may take to disappear. In a frozen cgroup they take longer.
	KillTimeout = 5 * time.Second
)

// Kill ends the whole tree. It returns true when nothing of it lives, and false after KillTimeout.
func (t *Tree) Kill() bool { return t.KillUntil(time.Now().Add(KillTimeout), nil) == AllEnded }

// KillUntil ends the whole tree. It returns when nothing of it lives, at the deadline, or when cut is closed. It
// first stops the members until no new ones appear: a stopped process cannot fork.
func (t *Tree) KillUntil(deadline time.Time, cut <-chan struct{}) Result {
	t.Killing = true
	for {
		living := t.stop(cut)
		if len(living) == 0 {
			return t.unlessBlind(AllEnded)
		}
		for _, p := range living {
			_ = p.Signal(unix.SIGKILL)
		}
		switch AwaitEnds(living, deadline, cut) {
		case WasCut:
			return WasCut
		case TimeOver:
			if len(t.Living()) == 0 {
				return t.unlessBlind(AllEnded)
			}
			return t.unlessBlind(TimeOver)
		}
	}
}

// unlessBlind returns result, or WasCut if the last look was cut short.
func (t *Tree) unlessBlind(result Result) Result {
	if t.Blind {
		return WasCut
	}
	return result
}

// stop stops the members with SIGSTOP and returns them.
func (t *Tree) stop(cut <-chan struct{}) []proc.Stat {
	stopped := map[proc.Identity]bool{}
	for range stopRounds {
		living := t.Living()
		fresh := slices.ContainsFunc(living, func(p proc.Stat) bool { return !stopped[p.Identity] })
		if !fresh || closed(cut) {
			return living
		}
		for _, p := range living {
			stopped[p.Identity] = true
			_ = p.Signal(unix.SIGSTOP)
		}
	}
	return t.Living()
}

// Result says how a wait ended.
type Result int

// The results of a wait.
const (
	AllEnded Result = iota
	TimeOver
	WasCut
)

// AwaitEnds waits until all of the processes have ended, until the deadline, or until cut is closed. cut may be
// nil.
func AwaitEnds(processes []proc.Stat, deadline time.Time, cut <-chan struct{}) Result {
	r, err := reaper.Acquire()
	if err != nil {
		return TimeOver // cannot fail: a reaper exists already
	}
	defer r.Release()
	timer := time.NewTimer(time.Until(deadline))
	defer timer.Stop()
	select {
	case <-cut: // even if there is nothing to wait for
		if !time.Now().Before(deadline) {
			return TimeOver // so that repeated cuts cannot extend the deadline
		}
		return WasCut
	default:
	}
	for _, p := range processes {
		result := awaitEnd(r, p.Identity, timer.C, cut)
		if result != AllEnded {
			return result
		}
	}
	return AllEnded
}

func awaitEnd(r *reaper.Reaper, id proc.Identity, over <-chan time.Time, cut <-chan struct{}) Result {
	if !id.Alive() {
		return AllEnded
	}
	w, err := r.WatchContainer(id.Pid)
	if err != nil {
		// It has usually just ended. If instead there is no free descriptor, poll.
		for id.Alive() {
			pause := time.NewTimer(blindPoll)
			select {
			case <-over:
				pause.Stop()
				return TimeOver
			case <-cut:
				pause.Stop()
				return WasCut
			case <-pause.C:
			}
		}
		return AllEnded
	}
	defer r.DropContainer(w)
	if !id.Alive() { // check again: the pidfd now keeps the pid from being reused
		return AllEnded
	}
	select {
	case <-w.Exited:
		return AllEnded
	case <-over:
		return TimeOver
	case <-cut:
		return WasCut
	}
}

// blindPoll is how often to check a process that cannot be watched.
const blindPoll = 100 * time.Millisecond

func closed(c <-chan struct{}) bool {
	select {
	case <-c:
		return true
	default:
		return false
	}
}
