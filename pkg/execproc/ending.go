package execproc

import (
	"os"
	"time"

	"golang.org/x/sys/unix"

	"github.com/streamshim/streamshim/pkg/execproc/internal/proc"
	"github.com/streamshim/streamshim/pkg/execproc/internal/stdio"
	"github.com/streamshim/streamshim/pkg/execproc/internal/tree"
	"github.com/streamshim/streamshim/pkg/rescue"
)

// stage is how far the ending of a process has come.
type stage int

const (
	stageLook   stage = iota // looking for the tree; nothing is closed or signalled yet
	stageHangup              // SIGHUP was sent
	stageTerm                // SIGTERM was sent
	stageKill                // SIGKILL is sent
)

// ending ends a process and everything that descends from it.
type ending struct {
	process *Process
	tree    *tree.Tree
	stage   stage
	// When the next stage begins, and when to give up on what survives SIGKILL.
	termAt, killAt, giveUpAt time.Time

	stopped chan struct{} // closed when run has returned
}

// beginEnd starts the ending, once.
func (p *Process) beginEnd() {
	p.mu.Lock()
	if p.ending != nil {
		p.mu.Unlock()
		return
	}
	t := tree.New(p.leader, p.container.InitPid, p.ends)
	t.Urgent = p.probe.Load()
	t.Stranger, t.Frozen = p.stranger, p.freezing
	if p.stranger && p.hasExited() {
		t.Mounts = p.container.InitPid
	}
	e := &ending{process: p, tree: t, stopped: make(chan struct{})}
	p.ending, p.looking = e, true
	p.mu.Unlock()
	e.begin()
}

// begin runs the ending in the background.
func (e *ending) begin() {
	p, r := e.process, e.process.runner
	r.mu.Lock()
	r.ending[p] = struct{}{}
	r.mu.Unlock()
	started := r.background(r.panicked, func() {
		defer close(e.stopped)
		rescue.Call(e.panicked, func() {
			if e.run() {
				e.removeRecord()
				e.over()
			}
		})
	})
	if !started {
		p.endLook()
		e.over()
		close(e.stopped)
	}
}

// panicked ends an ending that has panicked. What has failed may fail again: it kills what it finds at once. If that fails as
// well only the process itself gets the signal, and the recovery record stays, for the next start of streamshim.
func (e *ending) panicked(fault *rescue.Panic) {
	p := e.process
	p.runner.panicked(fault)
	gone := false
	rescue.Call(p.runner.panicked, func() {
		tree.New(p.leader, p.container.InitPid, p.ends).Kill()
		gone = true
	})
	if gone {
		e.removeRecord()
	} else {
		p.leader.Signal(unix.SIGKILL) //nolint:errcheck // it may have ended
	}
	p.endLook()
	e.over()
}

// removeRecord removes the recovery record, unless the process itself survived: then the reaper removes it.
func (e *ending) removeRecord() {
	p := e.process
	p.mu.Lock()
	p.endOver = true
	p.mu.Unlock()
	if p.stranger || p.hasExited() {
		os.Remove(p.record)
	}
}

func (e *ending) over() {
	p, r := e.process, e.process.runner
	e.tree.ClosePipes()
	if p.stranger {
		r.reaper.DropContainer(p.watch)
	}
	r.mu.Lock()
	delete(r.ending, p)
	r.mu.Unlock()
	close(p.ended)
}

// run reports whether the ending is over. It returns false when it was frozen.
func (e *ending) run() bool {
	p, t, config := e.process, e.tree, e.process.runner.config
	var living []proc.Stat
	if e.stage == stageLook {
		p.recordEnd()
		if p.pipes != nil {
			t.Pipes = tree.WatchPipes(p.pipes.Stdin, p.pipes.Stdout, p.pipes.Stderr)
		}
		// Look before anything is closed or signalled: later the leader may be gone, and its children untraceable.
		var looked bool
		if living, looked = p.firstLook(t); !looked {
			return false
		}
		e.stage = stageKill
		if !p.killed() {
			p.closeStreams()
			e.stage, e.termAt = stageHangup, time.Now().Add(config.TermAfter)
			e.killAt = e.termAt.Add(config.KillAfter - config.TermAfter)
		}
	} else {
		t.Killing = e.stage == stageKill || p.killed()
		living = t.Living()
	}
	// Repeated hand-overs must not delay an ending: when a stage's time is up, the next signal is sent before
	// freezing, and when nothing lives the ending is over.
	frozenBefore := func(end time.Time) bool {
		return isClosed(p.freezing) && (t.Blind && len(living) == 0 || len(living) > 0 && time.Now().Before(end))
	}
	if e.stage == stageHangup {
		if !p.killed() {
			living = t.Ask(living, unix.SIGHUP, e.termAt, p.cut)
		}
		if frozenBefore(e.termAt) {
			return false
		}
		e.stage = stageTerm
		t.NextStage()
	}
	if e.stage == stageTerm {
		if !p.killed() {
			living = t.Ask(living, unix.SIGTERM, e.killAt, p.cut)
		}
		if frozenBefore(e.killAt) {
			return false
		}
		e.stage = stageKill
		if len(living) > 0 && !p.killed() && config.OnKill != nil {
			config.OnKill()
		}
	}
	if len(living) > 0 || t.Blind {
		if e.giveUpAt.IsZero() {
			e.giveUpAt = time.Now().Add(tree.KillTimeout)
		}
		switch t.KillUntil(e.giveUpAt, p.freezing) {
		case tree.WasCut:
			return false
		case tree.TimeOver:
			p.runner.log.Warn("processes of an exec survived SIGKILL; is the container paused, or I/O stuck?",
				"container", p.container.ContainerID, "pid", p.leader.Pid)
			return true
		}
	}
	if p.hasExited() {
		return true
	}
	select {
	case <-p.watch.Exited: // a zombie by now, and the reaper knows
		return true
	case <-p.freezing:
		return false
	}
}

// firstLook finds the tree while the terminal certainly belongs to the process. Once its master is closed, the
// kernel may give the same number to another terminal, so later looks ignore terminals.
//
// A Close right after Disconnect or Kill takes effect only after this look: closing a terminal ends its leader,
// and then children in sessions of their own can no longer be traced.
//
// It returns false when it was frozen, and must then be repeated.
func (p *Process) firstLook(t *tree.Tree) (living []proc.Stat, looked bool) {
	if t.Ends.Terminal {
		master, err := stdio.Duplicate(p.tty)
		if err != nil { // already closed
			t.Ends.Terminal = false
		} else {
			defer master.Close()
		}
	}
	t.Killing = p.killed()
	if living = t.Living(); t.Blind {
		return nil, false
	}
	t.Ends.Terminal = false
	p.endLook()
	return living, true
}

func (p *Process) endLook() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.looking = false
	if p.closed {
		p.closeStreams()
	}
}
