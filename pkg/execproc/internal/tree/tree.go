// Package tree finds a process and all that descends from it, and ends them.
package tree

import (
	"slices"
	"time"

	"golang.org/x/sys/unix"

	"github.com/streamshim/streamshim/pkg/execproc/internal/proc"
	"github.com/streamshim/streamshim/pkg/execproc/internal/reaper"
)

// Tree finds a process and all that descends from it. Nothing in the kernel keeps such a list for
// us, so it is put together from what /proc shows, again and again until nothing new appears:
//
//   - children of a member, by parent pid;
//   - everybody in a member's session: the runtime gives every process it starts a session of its
//     own, and a session can only be joined by being born into it;
//   - whoever holds the process's end of our pipes or of our terminal and is in the same cgroup.
//
// What was once found stays known, so that the children of a parent that has ended in between are
// not lost. A terminal's number in /proc/PID/stat is of no use: each container counts its own.
//
// A tree is used by one goroutine at a time; finder looks for it.
type Tree struct {
	leader proc.Identity
	init   int // the container's main process, never touched
	// Stranger is set for a leader that is no child of this process, whose orphans therefore may be anybody's.
	Stranger bool
	// Mounts, if it is not 0, is a process: whoever is not in its mount namespace is no member. It is for a leader that
	// has ended, whose number may be another's by now.
	Mounts int
	// Urgent trees are looked for first: somebody waits for the answer to a probe.
	Urgent bool
	// Frozen, once it is closed, lets nobody wait for a look that has not begun, and notes that in blind. Nil is never.
	Frozen <-chan struct{}
	Blind  bool
	Ends   StreamEnds
	Pipes  *PipeWatch // nil when it is not known who holds the pipes
	// Killing is set once the tree is only to be killed: who else holds its pipes is looked for afterwards.
	Killing bool

	members  map[proc.Identity]*member
	sessions map[int]bool
	cgroups  cgroups // of the leader, or empty
}

// member is a process that was found to belong to a tree.
type member struct {
	// descends is false for those that are here because they hold one of the leader's streams, and for
	// their children.
	descends bool
	gone     bool // it has ended; kept so that it is not taken for new
	asked    bool // it was sent the signal of this stage
}

// NextStage lets another signal be sent to all members.
func (t *Tree) NextStage() {
	for _, m := range t.members {
		m.asked = false
	}
}

// StreamEnds recognizes the process's ends of its streams among the descriptors of others.
type StreamEnds struct {
	Pipes    map[string]bool // as /proc/PID/fd shows them: "pipe:[inode]"
	Terminal bool
	Dev, Ino uint64 // of the terminal's slave
}

// New returns a tree of which only the leader is known. The container's main process, init, is never touched.
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

// admissible reports whether a process that is no member yet may become one.
func (t *Tree) admissible(p proc.Stat, self int) bool {
	return !t.has(p.Identity) && p.Pid != self && p.Pid != t.init && p.Start >= t.leader.Start &&
		(t.Mounts == 0 || proc.SameMountNamespace(p.Pid, t.Mounts))
}

// Living looks for new members and returns all that are alive, or, when it is blind, the known ones.
func (t *Tree) Living() []proc.Stat { return trees.find(t) }

// grow adds what descends from the members and what is in their sessions, and returns all that are alive.
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
			p, err = proc.Stat{Identity: id}, nil // there is no descriptor free, for instance
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
			// A session keeps its number as long as it has a member; afterwards a stranger may get it as pid.
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

// ownsSession reports whether a member's session belongs to the tree. It does for a descendant: the
// leader began a session of its own, so any other one was begun on the way down. A mere holder of a
// stream may live in the session of a stranger, unless a member is seen to lead it.
func (t *Tree) ownsSession(m *member, session int, byPid map[int]proc.Stat) bool {
	if m.descends {
		return session != 0
	}
	first, seen := byPid[session]
	return seen && t.has(first.Identity)
}

// hasEnds reports whether there is anything by which a holder could be known.
func (t *Tree) hasEnds() bool { return len(t.Ends.Pipes) > 0 || t.Ends.Terminal }

// mayBeHeld reports whether the descriptors of others have to be looked at. That is dear, and while members
// hold the pipes nothing says whether others do, too. Afterwards the pipes themselves say it.
//   - Of a terminal nothing ever says it.
//   - Where processes have lost their parents since the leader began, some may be the leader's. They are
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

// Ask sends a signal to the whole tree but for those that were asked before, also to those that appear later, and
// returns when nothing of it lives or the deadline is over, with those that live then. When cut is closed it
// returns at once.
func (t *Tree) Ask(living []proc.Stat, signal unix.Signal, deadline time.Time, cut <-chan struct{}) []proc.Stat {
	for len(living) > 0 {
		for _, p := range living {
			if m := t.members[p.Identity]; m != nil && !m.asked {
				m.asked = true
				// A stopped process gets no signal but KILL before it is continued. One that has ended
				// meanwhile is no error.
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
	stopRounds = 20 // looks until a tree that goes on forking is killed as it is
	// KillTimeout is for killed processes to be gone; a frozen cgroup keeps them longer.
	KillTimeout = 5 * time.Second
)

// Kill ends the whole tree and returns when nothing of it lives, or false after KillTimeout.
func (t *Tree) Kill() bool { return t.KillUntil(time.Now().Add(KillTimeout), nil) == AllEnded }

// KillUntil ends the whole tree and returns when nothing of it lives, after the deadline, or when cut is closed. The
// members are stopped first, until no new ones appear: a process that cannot run cannot fork away.
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

// unlessBlind is the result of a look.
func (t *Tree) unlessBlind(result Result) Result {
	if t.Blind {
		return WasCut
	}
	return result
}

// stop stops the members and returns them.
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

// Result is how a wait ended.
type Result int

// The results.
const (
	AllEnded Result = iota
	TimeOver
	WasCut
)

// AwaitEnds waits until all of the processes have ended, one after the other, as all of them must; or until
// the deadline, or until cut is closed, which may be nil.
func AwaitEnds(processes []proc.Stat, deadline time.Time, cut <-chan struct{}) Result {
	r, err := reaper.Acquire()
	if err != nil {
		return TimeOver // there is always one already
	}
	defer r.Release()
	timer := time.NewTimer(time.Until(deadline))
	defer timer.Stop()
	select {
	case <-cut: // also when nobody is waited for
		if !time.Now().Before(deadline) {
			return TimeOver // however often it is cut
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
		// Usually it has just ended. But there may be no descriptor free, and then time has to do.
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
	if !id.Alive() { // looked at again, now that the descriptor keeps the pid from being mistaken
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

// blindPoll is how often a process is looked at that cannot be waited for.
const blindPoll = 100 * time.Millisecond

func closed(c <-chan struct{}) bool {
	select {
	case <-c:
		return true
	default:
		return false
	}
}
