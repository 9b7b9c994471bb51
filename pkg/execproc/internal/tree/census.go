package tree

import (
	"os"
	"slices"

	"github.com/streamshim/streamshim/pkg/execproc/internal/proc"
	"github.com/streamshim/streamshim/pkg/execproc/internal/reaper"
)

// processView is a view of some or all of the machine's processes.
type processView interface {
	self() int // this process's pid
	// process fails as proc.ReadStat does.
	process(pid int) (proc.Stat, error)
	children(parent proc.Stat) []proc.Stat
	// inSession returns the session's processes in this view that did not begin before since.
	inSession(session int, since uint64) []proc.Stat
}

// census is what one round of the finder knows about processes. It reads only what is asked for, and nothing
// twice.
type census struct {
	own       int
	all       *processTable // nil until needed
	allRead   bool
	strays    *processTable         // our children that nobody waits for, and their descendants
	orphans   map[int]*processTable // by container main process: descendants of the orphans it adopted
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

// grow finds the members of a tree among the processes that can descend from its leader. It reports whether some
// of them have lost their parents since the leader began.
//
// An orphan goes to the nearest subreaper above it in its pid namespace, or else to the first process there.
// Between the leader and this process nothing is in the leader's namespace, and above the leader only this process
// is a subreaper. So a descendant of the leader is below a living member, or below the first process of the
// namespace, or below this process if the namespace is ours or if it was made with CLONE_PARENT. All of them began
// after the leader. Where these assumptions do not hold, grow looks at all processes.
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

// Cost reports what a search for the tree has to read: all of the machine's processes, and the descriptors of
// processes outside the tree.
func (t *Tree) Cost() (living []proc.Stat, all, descriptors bool) {
	c, l := newCensus(), &look{Tree: t}
	orphans := c.grow(l)
	return l.living, c.allRead, t.mayBeHeld(l.living, orphans)
}

// table returns all processes, or nil if they cannot be read.
func (c *census) table() *processTable {
	if !c.allRead {
		c.allRead = true
		if all, err := proc.All(); err == nil {
			c.all = newProcessTable(c.own, all)
		}
	}
	return c.all
}

// strayChildren returns the children of this process that no Start has registered, with their descendants: the OCI
// runtime, orphans of a container in this pid namespace, and what a command made with CLONE_PARENT. It returns nil
// if they cannot be read.
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
		return nil // cannot fail: a reaper exists already
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

// orphansIn returns what may have been orphaned in a container's pid namespace, or nil if that is unknown.
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
			// Orphans go to the first thread while it lives, but reading the others' children costs little.
			c.orphans[init] = c.below(c.childStats(p))
		}
	}
	return c.orphans[init]
}

// below returns a table of roots and all their descendants.
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

// relatives is a view of the processes that can descend from a tree's leader. It asks the kernel for the children
// of members and looks up other processes in its tables.
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
	starts    []uint64 // of living processes, sorted
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

// others reports whether the table has a living process that began after the tree's leader and is not a member.
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
