package tree

import (
	"os"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/streamshim/streamshim/pkg/execproc/internal/proc"
)

// These bound what a round reads of other processes' descriptors: a container can open as many as it likes, and
// reading them costs the node. A command's streams have low numbers in every process that inherits them.
const (
	descriptorsOfProcess   = 1 << 10
	descriptorsOfContainer = 1 << 15
)

// wanted holds the trees of one container whose stream holders are searched for.
type wanted struct {
	cgroups  cgroups
	pipes    map[string][]*Tree
	terminal map[string][]*Tree
	budget   int
	since    uint64 // processes that began earlier cannot belong to any of the trees
}

// addHolders adds to each tree the processes that hold an end of its streams and are in its leader's cgroup.
func (c *census) addHolders(looks []*look) {
	table := c.table()
	if table == nil {
		return
	}
	containers := map[string]*wanted{}
	for _, l := range looks {
		t := l.Tree
		if t.cgroups.text == "" {
			t.cgroups = c.cgroups(t.init) // close enough if the leader has ended
		}
		if len(t.cgroups.paths) == 0 {
			continue
		}
		w := containers[t.cgroups.text]
		if w == nil {
			w = &wanted{
				cgroups: t.cgroups, pipes: map[string][]*Tree{}, terminal: map[string][]*Tree{},
				budget: descriptorsOfContainer, since: t.leader.Start,
			}
			containers[t.cgroups.text] = w
		}
		w.since = min(w.since, t.leader.Start)
		for pipe := range t.Ends.Pipes {
			w.pipes[pipe] = append(w.pipes[pipe], t)
		}
		if t.Ends.Terminal {
			key := terminalKey(t.Ends.Dev, t.Ends.Ino)
			w.terminal[key] = append(w.terminal[key], t)
		}
	}
	own, _ := os.Readlink("/proc/self/exe")
	for _, w := range containers {
		for _, p := range table.byPid {
			if p.Start < w.since || p.Zombie() || p.Pid == c.own || w.budget <= 0 || !c.inside(p.Pid, w.cgroups) {
				continue
			}
			holds := w.heldBy(p)
			if len(holds) == 0 {
				continue
			}
			// A child of ours between fork and exec still holds copies of all our descriptors. It also still runs
			// our own binary.
			if exe, err := os.Readlink("/proc/" + strconv.Itoa(p.Pid) + "/exe"); err == nil && exe == own {
				continue
			}
			for _, t := range holds {
				if t.admissible(p, c.own) {
					t.members[p.Identity] = &member{}
				}
			}
		}
	}
}

func terminalKey(dev, ino uint64) string {
	return strconv.FormatUint(dev, 10) + ":" + strconv.FormatUint(ino, 10)
}

// heldBy returns the trees whose streams a process holds.
func (w *wanted) heldBy(p proc.Stat) []*Tree {
	dir := "/proc/" + strconv.Itoa(p.Pid) + "/fd"
	fds, err := os.Open(dir)
	if err != nil {
		return nil
	}
	defer fds.Close()
	var found []*Tree
	target := make([]byte, 128) // longer than any name of a pipe or terminal
	for left := min(descriptorsOfProcess, w.budget); left > 0; {
		names, err := fds.Readdirnames(min(left, 256))
		w.budget -= len(names)
		left -= len(names)
		for _, name := range names {
			path := dir + "/" + name
			n, err := unix.Readlink(path, target)
			if err != nil {
				continue
			}
			found = append(found, w.pipes[string(target[:n])]...)
			// The path means nothing outside the container, but it saves a stat of everything else.
			if len(w.terminal) > 0 && strings.Contains(string(target[:n]), "/pts/") {
				var stat unix.Stat_t
				if unix.Stat(path, &stat) == nil {
					found = append(found, w.terminal[terminalKey(uint64(stat.Dev), stat.Ino)]...)
				}
			}
		}
		if err != nil || len(names) == 0 {
			break
		}
	}
	return found
}

// cgroups is where a process is, from /proc/PID/cgroup: lines of "hierarchy:controllers:path", cgroups(7).
type cgroups struct {
	text  string
	paths map[string]string // by hierarchy
}

// cgroups reads where a process is. The result is empty if it cannot be read.
func (c *census) cgroups(pid int) cgroups {
	text, known := c.textOf[pid]
	if !known {
		buffer := proc.Buffers.Get().(*[]byte)
		data, err := proc.ReadFile("/proc/"+strconv.Itoa(pid)+"/cgroup", buffer)
		if err == nil {
			text = string(data)
		}
		proc.Buffers.Put(buffer)
		c.textOf[pid] = text
	}
	found, known := c.cgroupsOf[text]
	if !known {
		found = parseCgroups(text)
		c.cgroupsOf[text] = found
	}
	return found
}

func parseCgroups(text string) cgroups {
	found := cgroups{text: text, paths: map[string]string{}}
	for line := range strings.Lines(text) {
		if parts := strings.SplitN(strings.TrimSuffix(line, "\n"), ":", 3); len(parts) == 3 {
			found.paths[parts[0]] = parts[2]
		}
	}
	return found
}

// inside reports whether a process is in the leader's cgroup or below it, in any hierarchy whose root is not the
// leader's cgroup.
func (c *census) inside(pid int, leader cgroups) bool {
	its := c.cgroups(pid)
	if its.text == leader.text { // usual in a container
		for _, path := range leader.paths {
			if path != "/" {
				return true
			}
		}
		return false
	}
	for hierarchy, path := range its.paths {
		leader := leader.paths[hierarchy]
		if leader != "" && leader != "/" && (path == leader || strings.HasPrefix(path, leader+"/")) {
			return true
		}
	}
	return false
}
