package execproc

import (
	"slices"
	"time"

	"golang.org/x/sys/unix"
)

// tree finds a process and all that descends from it. Nothing in the kernel keeps such a list for
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
type tree struct {
	leader identity
	init   int // the container's main process, never touched
	// stranger is set for a leader that is no child of this process, whose orphans therefore may be anybody's.
	stranger bool
	// urgent trees are looked for first: somebody waits for the answer to a probe.
	urgent bool
	ends   streamEnds
	pipes  *pipeWatch // nil when it is not known who holds the pipes
	// killing is set once the tree is only to be killed: who else holds its pipes is looked for afterwards.
	killing bool

	members  map[identity]*member
	sessions map[int]bool
	cgroups  cgroups // of the leader, or empty
}

// member is a process that was found to belong to a tree.
type member struct {
	// descends is false for those that are here because they hold one of the leader's streams, and for
	// their children.
	descends bool
	gone     bool // it has ended; kept so that it is not taken for new
}

// streamEnds recognizes the process's ends of its streams among the descriptors of others.
type streamEnds struct {
	pipes    map[string]bool // as /proc/PID/fd shows them: "pipe:[inode]"
	terminal bool
	dev, ino uint64 // of the terminal's slave
}

func newTree(leader identity, init int, ends streamEnds) *tree {
	return &tree{
		leader:   leader,
		init:     init,
		ends:     ends,
		members:  map[identity]*member{leader: {descends: true}},
		sessions: map[int]bool{leader.pid: true},
	}
}

func (t *tree) has(id identity) bool { return t.members[id] != nil }

// admissible reports whether a process that is no member yet may become one.
func (t *tree) admissible(p procStat, self int) bool {
	return !t.has(p.identity) && p.pid != self && p.pid != t.init && p.start >= t.leader.start
}

// living looks for new members and returns all that are alive.
func (t *tree) living() []procStat { return trees.find(t) }

// grow adds what descends from the members and what is in their sessions, and returns all that are alive.
func (t *tree) grow(v processView) []procStat {
	var living []procStat
	byPid := map[int]procStat{}
	var queue []procStat
	for id, m := range t.members {
		if m.gone {
			continue
		}
		p, err := v.process(id.pid)
		if err != nil && !gone(err) {
			p, err = procStat{identity: id}, nil // there is no descriptor free, for instance
		}
		if m.gone = err != nil || p.identity != id || p.zombie(); !m.gone {
			queue = append(queue, p)
			byPid[p.pid] = p
		}
	}
	add := func(p procStat, descends bool) {
		t.members[p.identity] = &member{descends: descends, gone: p.zombie()}
		byPid[p.pid] = p
		queue = append(queue, p)
	}
	inSession := func(session int) {
		for _, p := range v.inSession(session, t.leader.start) {
			// A session keeps its number as long as it has a member; afterwards a stranger may get it as pid.
			if first, err := v.process(session); err == nil && !t.has(first.identity) {
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
		if !p.zombie() {
			living = append(living, p)
		}
		m := t.members[p.identity]
		if !t.sessions[p.session] && t.ownsSession(m, p.session, byPid) {
			t.sessions[p.session] = true
			inSession(p.session)
		}
		for _, child := range v.children(p) {
			if t.admissible(child, v.self()) && p.start <= child.start {
				add(child, m.descends)
			}
		}
	}
	return living
}

// known returns the members that may be alive, without looking for new ones.
func (t *tree) known() []procStat {
	var living []procStat
	for id, m := range t.members {
		if !m.gone && id.pid > 0 && id.alive() {
			living = append(living, procStat{identity: id})
		}
	}
	return living
}

// ownsSession reports whether a member's session belongs to the tree. It does for a descendant: the
// leader began a session of its own, so any other one was begun on the way down. A mere holder of a
// stream may live in the session of a stranger, unless a member is seen to lead it.
func (t *tree) ownsSession(m *member, session int, byPid map[int]procStat) bool {
	if m.descends {
		return session != 0
	}
	first, seen := byPid[session]
	return seen && t.has(first.identity)
}

// hasEnds reports whether there is anything by which a holder could be known.
func (t *tree) hasEnds() bool { return len(t.ends.pipes) > 0 || t.ends.terminal }

// mayBeHeld reports whether the descriptors of others have to be looked at. That is dear, and while members
// hold the pipes nothing says whether others do, too. Afterwards the pipes themselves say it.
//   - Of a terminal nothing ever says it.
//   - Where processes have lost their parents since the leader began, some may be the leader's. They are
//     to be asked to end together with the others.
func (t *tree) mayBeHeld(living []procStat, orphans bool) bool {
	switch {
	case t.ends.terminal:
		return true
	case len(t.ends.pipes) == 0:
		return false
	case len(living) == 0:
		return t.pipes.held()
	default:
		return orphans && !t.killing
	}
}

// ask sends a signal to the whole tree, also to those that appear later, and returns when nothing of it
// lives or the grace is over, with those that live then. When cut is closed it returns at once.
func (t *tree) ask(living []procStat, signal unix.Signal, grace time.Duration, cut <-chan struct{}) []procStat {
	deadline := time.Now().Add(grace)
	asked := map[identity]bool{}
	for len(living) > 0 {
		for _, p := range living {
			if !asked[p.identity] {
				asked[p.identity] = true
				// A stopped process gets no signal but KILL before it is continued. One that has ended
				// meanwhile is no error.
				_ = p.sendSignal(signal, unix.SIGCONT)
			}
		}
		switch awaitEnds(living, deadline, cut) {
		case allEnded:
			living = t.living()
		case timeOver:
			return t.living()
		case wasCut:
			return living
		}
	}
	return nil
}

const (
	freezeRounds = 20              // looks until a tree that goes on forking is killed as it is
	killTimeout  = 5 * time.Second // for killed processes to be gone; a frozen cgroup keeps them longer
)

// kill ends the whole tree and returns when nothing of it lives, or false after killTimeout. The
// members are stopped first, until no new ones appear: a process that cannot run cannot fork away.
func (t *tree) kill() bool {
	t.killing = true
	for deadline := time.Now().Add(killTimeout); ; {
		living := t.freeze()
		if len(living) == 0 {
			return true
		}
		for _, p := range living {
			_ = p.sendSignal(unix.SIGKILL)
		}
		if awaitEnds(living, deadline, nil) != allEnded {
			return len(t.living()) == 0
		}
	}
}

// freeze stops the members and returns them.
func (t *tree) freeze() []procStat {
	stopped := map[identity]bool{}
	for range freezeRounds {
		living := t.living()
		fresh := slices.ContainsFunc(living, func(p procStat) bool { return !stopped[p.identity] })
		if !fresh {
			return living
		}
		for _, p := range living {
			stopped[p.identity] = true
			_ = p.sendSignal(unix.SIGSTOP)
		}
	}
	return t.living()
}

// waitResult is how a wait ended.
type waitResult int

const (
	allEnded waitResult = iota
	timeOver
	wasCut
)

// awaitEnds waits until all of the processes have ended, one after the other, as all of them must; or until
// the deadline, or until cut is closed, which may be nil.
func awaitEnds(processes []procStat, deadline time.Time, cut <-chan struct{}) waitResult {
	reaper, err := acquireReaper()
	if err != nil {
		return timeOver // there is always one already
	}
	defer reaper.release()
	timer := time.NewTimer(time.Until(deadline))
	defer timer.Stop()
	select {
	case <-cut: // also when nobody is waited for
		return wasCut
	default:
	}
	for _, p := range processes {
		result := awaitEnd(reaper, p.identity, timer.C, cut)
		if result != allEnded {
			return result
		}
	}
	return allEnded
}

func awaitEnd(reaper *reaper, id identity, over <-chan time.Time, cut <-chan struct{}) waitResult {
	if !id.alive() {
		return allEnded
	}
	w, err := reaper.watchContainer(id.pid)
	if err != nil {
		// Usually it has just ended. But there may be no descriptor free, and then time has to do.
		for id.alive() {
			pause := time.NewTimer(blindPoll)
			select {
			case <-over:
				pause.Stop()
				return timeOver
			case <-cut:
				pause.Stop()
				return wasCut
			case <-pause.C:
			}
		}
		return allEnded
	}
	defer reaper.dropContainer(w)
	if !id.alive() { // looked at again, now that the descriptor keeps the pid from being mistaken
		return allEnded
	}
	select {
	case <-w.exited:
		return allEnded
	case <-over:
		return timeOver
	case <-cut:
		return wasCut
	}
}

// blindPoll is how often a process is looked at that cannot be waited for.
const blindPoll = 100 * time.Millisecond
