package tree

import (
	"maps"
	"os"
	"slices"

	"golang.org/x/sys/unix"

	"github.com/streamshim/streamshim/pkg/execproc/internal/proc"
	"github.com/streamshim/streamshim/pkg/handover"
)

// State is what a hand-over carries of a tree. The names of its fields are a contract with other versions of this
// program.
type State struct {
	Members         []MemberState
	Sessions        []int
	Cgroups         string // text of /proc/PID/cgroup of the leader
	Mounts          int    // see Tree
	PipesAreWatched bool
	Watched         []WatchedPipeState
}

// MemberState is what State has of a process.
type MemberState struct {
	Pid             int
	Start           uint64
	Descends, Asked bool
}

// WatchedPipeState is what State has of a pipe.
type WatchedPipeState struct {
	Descriptor handover.Descriptor
	Input      bool
}

// EndsState is what a hand-over carries of streamEnds.
type EndsState struct {
	Pipes    []string
	Terminal bool
	Dev, Ino uint64
}

// State is that of a tree that nobody uses any more.
func (t *Tree) State(files *handover.Files) State {
	s := State{Sessions: slices.Sorted(maps.Keys(t.sessions)), Cgroups: t.cgroups.text, Mounts: t.Mounts}
	for id, m := range t.members {
		s.Members = append(s.Members, MemberState{Pid: id.Pid, Start: id.Start, Descends: m.descends, Asked: m.asked})
	}
	if t.Pipes == nil {
		return s
	}
	s.PipesAreWatched = true
	for _, pipe := range t.Pipes.pipes {
		d, err := files.KeepFD(pipe.fd)
		if err != nil { // without it the pipes are taken to be held, which costs more looks
			s.PipesAreWatched, s.Watched = false, nil
			break
		}
		s.Watched = append(s.Watched, WatchedPipeState{d, pipe.input})
	}
	return s
}

// Resume gives a new tree what its state has; the files are those of Watched, and are closed.
func (t *Tree) Resume(s State, watched []*os.File) {
	t.Mounts, t.Ends.Terminal = s.Mounts, false
	for _, m := range s.Members {
		t.members[proc.Identity{Pid: m.Pid, Start: m.Start}] = &member{descends: m.Descends, asked: m.Asked} // the next look sees who is gone
	}
	for _, session := range s.Sessions {
		t.sessions[session] = true
	}
	t.cgroups = parseCgroups(s.Cgroups)
	if s.PipesAreWatched {
		t.Pipes = &PipeWatch{}
	}
	for i, file := range watched {
		if t.Pipes != nil {
			// Not pollable, and so the descriptor itself.
			if fd, err := unix.FcntlInt(file.Fd(), unix.F_DUPFD_CLOEXEC, 0); err == nil {
				t.Pipes.pipes = append(t.Pipes.pipes, watchedPipe{fd, s.Watched[i].Input})
			} else {
				t.ClosePipes()
			}
		}
		file.Close()
	}
}

// ClosePipes ends the watch of the tree's pipes.
func (t *Tree) ClosePipes() {
	t.Pipes.Close()
	t.Pipes = nil
}

// State is what a hand-over carries.
func (e StreamEnds) State() EndsState {
	return EndsState{Pipes: slices.Sorted(maps.Keys(e.Pipes)), Terminal: e.Terminal, Dev: e.Dev, Ino: e.Ino}
}

// Resume is what the state was made of.
func (s EndsState) Resume() StreamEnds {
	ends := StreamEnds{Terminal: s.Terminal, Dev: s.Dev, Ino: s.Ino}
	for _, pipe := range s.Pipes {
		if ends.Pipes == nil {
			ends.Pipes = map[string]bool{}
		}
		ends.Pipes[pipe] = true
	}
	return ends
}
