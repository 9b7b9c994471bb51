package execproc

import (
	"os"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// processView is some or all of the machine's processes.
type processView interface {
	self() int // this process's pid
	// process fails as readStat does.
	process(pid int) (procStat, error)
	children(parent procStat) []procStat
	// inSession returns who is in a session and did not begin earlier than since, as far as it is in the view.
	inSession(session int, since uint64) []procStat
}

// census is what one round of the finder knows about processes. It reads no more than it is asked for, and
// nothing twice.
type census struct {
	own       int
	all       *processTable // nil until needed
	allRead   bool
	strays    *processTable         // children of ours that nobody waits for, and what descends from them
	orphans   map[int]*processTable // by container's main process: what descends from those it is the parent of
	cgroupsOf map[string]cgroups    // by the text of /proc/PID/cgroup
	textOf    map[int]string        // by pid: that text
	unlisted  bool                  // the kernel does not list children
}

func newCensus() *census {
	return &census{
		own: os.Getpid(), orphans: map[int]*processTable{}, cgroupsOf: map[string]cgroups{},
		textOf: map[int]string{},
	}
}

// grow looks for the members of a tree among those that can descend from its leader, and reports whether
// there are any that have lost their parents since the leader began.
//
// Whoever loses its parent gets the nearest subreaper above it in its pid namespace or else the first
// process there. Nothing between the leader and this process is in the leader's namespace, and above the
// leader there is only this process, which is a subreaper. So what descends from the leader is below the
// members that live, or below the first process of the namespace, or, where the namespace is ours as well,
// below this process; and below this one also if it was made with CLONE_PARENT. All of these began after
// the leader. When this is not the whole truth, all processes are looked at.
func (c *census) grow(l *look) (orphans bool) {
	t := l.tree
	if t.leader.pid > 0 && t.hasEnds() && t.cgroups.text == "" {
		t.cgroups = c.cgroups(t.leader.pid)
	}
	if t.init > 0 && t.leader.pid > 0 && !t.stranger {
		strays, adopted := c.strayChildren(), c.orphansIn(t.init)
		if strays != nil && adopted != nil && !c.unlisted {
			v := &relatives{census: c, tables: []*processTable{strays, adopted}}
			if l.living = t.grow(v); !c.unlisted {
				return adopted.others(t)
			}
		}
	}
	if table := c.table(); table != nil {
		l.living = t.grow(table)
		return true
	}
	l.living = t.known()
	return false
}

// table is all processes; nil when they cannot be read.
func (c *census) table() *processTable {
	if !c.allRead {
		c.allRead = true
		if all, err := allProcesses(); err == nil {
			c.all = newProcessTable(c.own, all)
		}
	}
	return c.all
}

// strayChildren are the children of this process that no Start has registered, with all that descends from
// them: the OCI runtime, the orphans of a container in this pid namespace, and what a command has made with
// CLONE_PARENT. nil when they cannot be read.
func (c *census) strayChildren() *processTable {
	if c.strays != nil {
		return c.strays
	}
	pids, err := childrenOf(c.own, many)
	if err != nil {
		c.unlisted = true
		return nil
	}
	session, pids := unregistered(pids)
	var roots []procStat
	for _, pid := range pids {
		if p, err := readStat(pid); err == nil && p.ppid == c.own && p.session != session {
			roots = append(roots, p)
		}
	}
	c.strays = c.below(roots)
	return c.strays
}

// unregistered returns which of the children are not to be reaped by a Process, and this process's session.
func unregistered(pids []int) (session int, left []int) {
	r, err := acquireReaper()
	if err != nil {
		return 0, pids
	}
	defer r.release()
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.session, slices.DeleteFunc(pids, func(pid int) bool { return r.processes[pid] != nil })
}

// orphansIn is what may have been orphaned in a container's pid namespace. nil when it is not known.
func (c *census) orphansIn(init int) *processTable {
	if known, ok := c.orphans[init]; ok {
		return known
	}
	c.orphans[init] = nil
	first, same := firstOfNamespace(init)
	switch {
	case same:
		c.orphans[init] = c.strayChildren()
	case first > 0:
		if p, err := readStat(first); err == nil && p.state != 'Z' && p.state != 'X' {
			// Orphans go to its first thread, as long as that lives, but the others' cost little.
			c.orphans[init] = c.below(c.childStats(p))
		}
	}
	return c.orphans[init]
}

// firstOfNamespace returns the first process of the pid namespace that a process is in, 0 when it is not
// known, or says that the namespace is this process's own.
func firstOfNamespace(pid int) (first int, same bool) {
	path := "/proc/" + strconv.Itoa(pid) + "/ns/pid"
	own, err := os.Readlink("/proc/self/ns/pid")
	if err != nil {
		return 0, false
	}
	if its, err := os.Readlink(path); err != nil || its == own {
		return 0, err == nil
	}
	fd, err := unix.Open(path, unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err == nil {
		defer unix.Close(fd)
		if first, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), unix.NS_GET_TGID_FROM_PIDNS, 1); errno == 0 {
			return int(first), false
		}
	}
	// A kernel before 6.11. The container's main process usually is the one.
	status, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/status")
	if err != nil {
		return 0, false
	}
	_, rest, _ := strings.Cut(string(status), "\nNSpid:")
	line, _, _ := strings.Cut(rest, "\n")
	if numbers := strings.Fields(line); len(numbers) > 0 && numbers[len(numbers)-1] == "1" {
		return pid, false
	}
	return 0, false
}

// below is a table of the processes and all that descends from them.
func (c *census) below(roots []procStat) *processTable {
	all := roots
	seen := map[int]bool{}
	for _, p := range roots {
		seen[p.pid] = true
	}
	for i := 0; i < len(all); i++ {
		for _, child := range c.childStats(all[i]) {
			if !seen[child.pid] {
				seen[child.pid] = true
				all = append(all, child)
			}
		}
	}
	return newProcessTable(c.own, all)
}

func (c *census) childStats(parent procStat) []procStat {
	pids, err := childrenOf(parent.pid, parent.threads)
	if err != nil {
		c.unlisted = true
		return nil
	}
	children := make([]procStat, 0, len(pids))
	for _, pid := range pids {
		if p, err := readStat(pid); err == nil && p.ppid == parent.pid {
			children = append(children, p)
		}
	}
	return children
}

// relatives is a view of what can descend from a tree's leader: of members by asking the kernel for their
// children, of others by tables.
type relatives struct {
	*census
	tables []*processTable
}

func (v *relatives) self() int { return v.own }

func (v *relatives) process(pid int) (procStat, error) { return readStat(pid) }

func (v *relatives) children(parent procStat) []procStat {
	if parent.zombie() {
		return nil
	}
	return v.childStats(parent)
}

func (v *relatives) inSession(session int, since uint64) []procStat {
	var found []procStat
	for _, table := range v.tables {
		found = append(found, table.inSession(session, since)...)
	}
	return found
}

// processTable is an index of processes.
type processTable struct {
	own       int
	byPid     map[int]procStat
	byParent  map[int][]procStat
	bySession map[int][]procStat
	starts    []uint64 // of those that live, sorted
}

func newProcessTable(own int, processes []procStat) *processTable {
	t := &processTable{
		own: own, byPid: make(map[int]procStat, len(processes)), byParent: map[int][]procStat{}, bySession: map[int][]procStat{},
	}
	for _, p := range processes {
		t.byPid[p.pid] = p
		t.byParent[p.ppid] = append(t.byParent[p.ppid], p)
		t.bySession[p.session] = append(t.bySession[p.session], p)
		if !p.zombie() {
			t.starts = append(t.starts, p.start)
		}
	}
	slices.Sort(t.starts)
	return t
}

func (t *processTable) self() int { return t.own }

func (t *processTable) process(pid int) (procStat, error) {
	if p, exists := t.byPid[pid]; exists {
		return p, nil
	}
	return procStat{}, os.ErrNotExist
}

func (t *processTable) children(parent procStat) []procStat { return t.byParent[parent.pid] }

func (t *processTable) inSession(session int, since uint64) []procStat {
	return slices.DeleteFunc(slices.Clone(t.bySession[session]), func(p procStat) bool { return p.start < since })
}

// others reports whether somebody in the table lives who began after the tree's leader and is no member.
func (t *processTable) others(tree *tree) bool {
	first, _ := slices.BinarySearch(t.starts, tree.leader.start)
	younger := len(t.starts) - first
	for id, m := range tree.members {
		if younger == 0 {
			return false
		}
		if p, exists := t.byPid[id.pid]; exists && !m.gone && p.identity == id {
			younger--
		}
	}
	return younger > 0
}
