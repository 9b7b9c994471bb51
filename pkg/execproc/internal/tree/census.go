package tree

import (
	"os"
	"slices"

	"github.com/streamshim/streamshim/pkg/execproc/internal/proc"
	"github.com/streamshim/streamshim/pkg/execproc/internal/reaper"
)

// processView is some or all of the machine's processes.
type processView interface {
	self() int // this process's pid
	// process fails as readStat does.
	process(pid int) (proc.Stat, error)
	children(parent proc.Stat) []proc.Stat
	// inSession returns who is in a session and did not begin earlier than since, as far as it is in the view.
	inSession(session int, since uint64) []proc.Stat
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
	t := l.Tree
	if t.leader.Pid > 0 && t.hasEnds() && t.cgroups.text == "" {
		t.cgroups = c.cgroups(t.leader.Pid)
	}
	if t.init > 0 && t.leader.Pid > 0 && !t.Stranger {
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

// Cost says what a look for the tree has to read: all processes of the machine, and the descriptors of others.
func (t *Tree) Cost() (living []proc.Stat, all, descriptors bool) {
	c, l := newCensus(), &look{Tree: t}
	orphans := c.grow(l)
	return l.living, c.allRead, t.mayBeHeld(l.living, orphans)
}

// table is all processes; nil when they cannot be read.
func (c *census) table() *processTable {
	if !c.allRead {
		c.allRead = true
		if all, err := proc.All(); err == nil {
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
	pids, err := proc.ChildrenOf(c.own, proc.Many)
	if err != nil {
		c.unlisted = true
		return nil
	}
	r, err := reaper.Acquire()
	if err != nil {
		return nil // there is always one already
	}
	defer r.Release()
	var roots []proc.Stat
	for _, pid := range r.Unregistered(pids) {
		if p, err := proc.ReadStat(pid); err == nil && p.Parent == c.own && p.Session != r.Session {
			roots = append(roots, p)
		}
	}
	c.strays = c.below(roots)
	return c.strays
}

// orphansIn is what may have been orphaned in a container's pid namespace. nil when it is not known.
func (c *census) orphansIn(init int) *processTable {
	if known, ok := c.orphans[init]; ok {
		return known
	}
	c.orphans[init] = nil
	first, same := proc.FirstOfNamespace(init)
	switch {
	case same:
		c.orphans[init] = c.strayChildren()
	case first > 0:
		if p, err := proc.ReadStat(first); err == nil && p.State != 'Z' && p.State != 'X' {
			// Orphans go to its first thread, as long as that lives, but the others' cost little.
			c.orphans[init] = c.below(c.childStats(p))
		}
	}
	return c.orphans[init]
}

// below is a table of the processes and all that descends from them.
func (c *census) below(roots []proc.Stat) *processTable {
	all := roots
	seen := map[int]bool{}
	for _, p := range roots {
		seen[p.Pid] = true
	}
	for i := 0; i < len(all); i++ {
		for _, child := range c.childStats(all[i]) {
			if !seen[child.Pid] {
				seen[child.Pid] = true
				all = append(all, child)
			}
		}
	}
	return newProcessTable(c.own, all)
}

func (c *census) childStats(parent proc.Stat) []proc.Stat {
	pids, err := proc.ChildrenOf(parent.Pid, parent.Threads)
	if err != nil {
		c.unlisted = true
		return nil
	}
	children := make([]proc.Stat, 0, len(pids))
	for _, pid := range pids {
		if p, err := proc.ReadStat(pid); err == nil && p.Parent == parent.Pid {
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

func (v *relatives) process(pid int) (proc.Stat, error) { return proc.ReadStat(pid) }

func (v *relatives) children(parent proc.Stat) []proc.Stat {
	if parent.Zombie() {
		return nil
	}
	return v.childStats(parent)
}

func (v *relatives) inSession(session int, since uint64) []proc.Stat {
	var found []proc.Stat
	for _, table := range v.tables {
		found = append(found, table.inSession(session, since)...)
	}
	return found
}

// processTable is an index of processes.
type processTable struct {
	own       int
	byPid     map[int]proc.Stat
	byParent  map[int][]proc.Stat
	bySession map[int][]proc.Stat
	starts    []uint64 // of those that live, sorted
}

func newProcessTable(own int, processes []proc.Stat) *processTable {
	t := &processTable{
		own: own, byPid: make(map[int]proc.Stat, len(processes)), byParent: map[int][]proc.Stat{}, bySession: map[int][]proc.Stat{},
	}
	for _, p := range processes {
		t.byPid[p.Pid] = p
		t.byParent[p.Parent] = append(t.byParent[p.Parent], p)
		t.bySession[p.Session] = append(t.bySession[p.Session], p)
		if !p.Zombie() {
			t.starts = append(t.starts, p.Start)
		}
	}
	slices.Sort(t.starts)
	return t
}

func (t *processTable) self() int { return t.own }

func (t *processTable) process(pid int) (proc.Stat, error) {
	if p, exists := t.byPid[pid]; exists {
		return p, nil
	}
	return proc.Stat{}, os.ErrNotExist
}

func (t *processTable) children(parent proc.Stat) []proc.Stat { return t.byParent[parent.Pid] }

func (t *processTable) inSession(session int, since uint64) []proc.Stat {
	return slices.DeleteFunc(slices.Clone(t.bySession[session]), func(p proc.Stat) bool { return p.Start < since })
}

// others reports whether somebody in the table lives who began after the tree's leader and is no member.
func (t *processTable) others(tree *Tree) bool {
	first, _ := slices.BinarySearch(t.starts, tree.leader.Start)
	younger := len(t.starts) - first
	for id, m := range tree.members {
		if younger == 0 {
			return false
		}
		if p, exists := t.byPid[id.Pid]; exists && !m.gone && p.Identity == id {
			younger--
		}
	}
	return younger > 0
}
