package execproc

import (
	"os"
	"strconv"
	"strings"
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
// A tree is used by one goroutine at a time.
type tree struct {
	leader identity
	init   int // the container's main process, never touched
	ends   streamEnds

	// members are all ever seen; true for those that descend from the leader, false for those that
	// are here because they hold one of its streams, and their children.
	members  map[identity]bool
	sessions map[int]bool
	cgroups  map[string]string // of the leader, by hierarchy; nil until read
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
		members:  map[identity]bool{leader: true},
		sessions: map[int]bool{leader.pid: true},
	}
}

// living looks for new members and returns all that are alive.
func (t *tree) living() []procStat {
	all, err := allProcesses()
	if err != nil {
		return nil
	}
	byPid := make(map[int]procStat, len(all))
	for _, p := range all {
		byPid[p.pid] = p
	}
	// A session keeps its number as long as it has a member; afterwards a stranger may get it as pid.
	for session := range t.sessions {
		if p, exists := byPid[session]; exists && !t.has(p) {
			delete(t.sessions, session)
		}
	}
	self := os.Getpid()
	candidate := func(p procStat) bool {
		return !t.has(p) && p.pid != self && p.pid != t.init && p.start >= t.leader.start
	}
	for grown := true; grown; {
		grown = false
		for _, p := range all {
			if t.has(p) {
				if !t.sessions[p.session] && t.ownsSession(p, byPid) {
					t.sessions[p.session] = true
					grown = true
				}
				continue
			}
			if !candidate(p) {
				continue
			}
			parent, known := byPid[p.ppid]
			switch {
			case t.sessions[p.session]:
				t.members[p.identity] = true
				grown = true
			case known && t.has(parent) && parent.start <= p.start:
				t.members[p.identity] = t.members[parent.identity]
				grown = true
			}
		}
		if grown {
			continue
		}
		for _, p := range t.holders(all, candidate) {
			t.members[p.identity] = false
			grown = true
		}
	}
	var living []procStat
	for _, p := range all {
		if t.has(p) && !p.zombie() {
			living = append(living, p)
		}
	}
	return living
}

func (t *tree) has(p procStat) bool {
	_, found := t.members[p.identity]
	return found
}

// ownsSession reports whether a member's session belongs to the tree. It does for a descendant: the
// leader began a session of its own, so any other one was begun on the way down. A mere holder of a
// stream may live in the session of a stranger, unless a member is seen to lead it.
func (t *tree) ownsSession(member procStat, byPid map[int]procStat) bool {
	if t.members[member.identity] {
		return member.session != 0
	}
	leader, exists := byPid[member.session]
	return exists && t.has(leader)
}

// holders returns the candidates that hold one of the process's ends.
func (t *tree) holders(all []procStat, candidate func(procStat) bool) []procStat {
	if len(t.ends.pipes) == 0 && !t.ends.terminal {
		return nil
	}
	if t.cgroups == nil {
		if t.cgroups = readCgroups(t.leader.pid); t.cgroups == nil {
			t.cgroups = readCgroups(t.init) // near enough, when the leader has ended
		}
	}
	own, _ := os.Readlink("/proc/self/exe")
	var found []procStat
	for _, p := range all {
		if !candidate(p) || p.zombie() || !t.inCgroup(p.pid) || !t.holdsEnd(p.pid) {
			continue
		}
		// A child of ours between fork and exec still holds copies of all our descriptors, but also
		// still runs our own binary.
		if exe, err := os.Readlink("/proc/" + strconv.Itoa(p.pid) + "/exe"); err == nil && exe == own {
			continue
		}
		found = append(found, p)
	}
	return found
}

func (t *tree) holdsEnd(pid int) bool {
	dir := "/proc/" + strconv.Itoa(pid) + "/fd"
	fds, err := os.Open(dir)
	if err != nil {
		return false
	}
	defer fds.Close()
	names, _ := fds.Readdirnames(-1)
	for _, name := range names {
		target, err := os.Readlink(dir + "/" + name)
		if err != nil {
			continue
		}
		if t.ends.pipes[target] {
			return true
		}
		// The path means nothing outside the container, but it saves the stat of everything else.
		if t.ends.terminal && strings.Contains(target, "/pts/") {
			var stat unix.Stat_t
			if unix.Stat(dir+"/"+name, &stat) == nil && uint64(stat.Dev) == t.ends.dev && stat.Ino == t.ends.ino {
				return true
			}
		}
	}
	return false
}

// inCgroup reports whether a process is in the leader's cgroup or below it, in any hierarchy in
// which the leader is not in the root.
func (t *tree) inCgroup(pid int) bool {
	if len(t.cgroups) == 0 {
		return false
	}
	for hierarchy, path := range readCgroups(pid) {
		leader := t.cgroups[hierarchy]
		if leader != "" && leader != "/" && (path == leader || strings.HasPrefix(path, leader+"/")) {
			return true
		}
	}
	return false
}

// readCgroups reads /proc/PID/cgroup: lines of "hierarchy:controllers:path", cgroups(7).
func readCgroups(pid int) map[string]string {
	data, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/cgroup")
	if err != nil {
		return nil
	}
	cgroups := map[string]string{}
	for line := range strings.Lines(string(data)) {
		if parts := strings.SplitN(strings.TrimSuffix(line, "\n"), ":", 3); len(parts) == 3 {
			cgroups[parts[0]] = parts[2]
		}
	}
	return cgroups
}

// signalAll sends the signals in this order to each process. One that has ended meanwhile is no error.
func signalAll(processes []procStat, signals ...unix.Signal) {
	for _, p := range processes {
		for _, s := range signals {
			_ = p.sendSignal(s)
		}
	}
}

const (
	freezeRounds = 20              // snapshots until a tree that goes on forking is killed as it is
	killTimeout  = 5 * time.Second // for killed processes to be gone; a frozen cgroup keeps them longer
)

// kill ends the whole tree and returns when nothing of it lives, or false after killTimeout. The
// members are stopped first, until no new ones appear: a process that cannot run cannot fork away.
func (t *tree) kill() bool {
	for known, round := -1, 0; round < freezeRounds && len(t.members) != known; round++ {
		known = len(t.members)
		signalAll(t.living(), unix.SIGSTOP)
	}
	deadline := time.Now().Add(killTimeout)
	for pause := time.Millisecond; ; pause = min(2*pause, 100*time.Millisecond) {
		living := t.living()
		if len(living) == 0 {
			return true
		}
		if time.Now().After(deadline) {
			return false
		}
		signalAll(living, unix.SIGKILL)
		time.Sleep(pause) // nothing announces the end of a process that is not our child
	}
}
