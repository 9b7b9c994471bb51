package tree

import (
	"maps"
	"os"
	"slices"

	"golang.org/x/sys/unix"

	"github.com/streamshim/streamshim/pkg/execproc/internal/proc"
	"github.com/streamshim/streamshim/pkg/handover"
)

// State is a tree's state in a hand-over. Its field names are a contract with other versions of this program.
type State struct {
	Members         []MemberState
	Sessions        []int
	Cgroups         string // the leader's /proc/PID/cgroup
	Mounts          int    // see Tree.Mounts
	PipesAreWatched bool
	Watched         []WatchedPipeState
}

// MemberState is the state of one member.
type MemberState struct {
	Pid             int
	Start           uint64
	Descends, Asked bool
}

// WatchedPipeState is the state of one watched pipe.
type WatchedPipeState struct {
	Descriptor handover.Descriptor
	Input      bool
}

// EndsState is the state of StreamEnds in a hand-over.
type EndsState struct {
	Pipes    []string
	Terminal bool
	Dev, Ino uint64
}

// State returns the state of a tree that is no longer in use. Its watched pipes are kept in files.
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
		if err != nil { // unwatched pipes count as held, which only costs more searching
			s.PipesAreWatched, s.Watched = false, nil
			break
		}
		s.Watched = append(s.Watched, WatchedPipeState{d, pipe.input})
	}
	return s
}

// Resume restores a new tree from its state. It closes the files in watched, which are those of s.Watched.
func (t *Tree) Resume(s State, watched []*os.File) {
	t.Mounts, t.Ends.Terminal = s.Mounts, false
	for _, m := range s.Members {
		t.members[proc.Identity{Pid: m.Pid, Start: m.Start}] = &member{descends: m.Descends, asked: m.Asked} // the next look finds out who is gone
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
			// Not pollable, so pass on the descriptor itself.
			if fd, err := unix.FcntlInt(file.Fd(), unix.F_DUPFD_CLOEXEC, 0); err == nil {
				t.Pipes.pipes = append(t.Pipes.pipes, watchedPipe{fd, s.Watched[i].Input})
			} else {
				t.ClosePipes()
			}
		}
		file.Close()
	}
}

// ClosePipes stops watching the tree's pipes.
func (t *Tree) ClosePipes() {
	t.Pipes.Close()
	t.Pipes = nil
}

// State returns the state for a hand-over.
func (e StreamEnds) State() EndsState {
	return EndsState{Pipes: slices.Sorted(maps.Keys(e.Pipes)), Terminal: e.Terminal, Dev: e.Dev, Ino: e.Ino}
}

// Resume restores the StreamEnds of a state.
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
