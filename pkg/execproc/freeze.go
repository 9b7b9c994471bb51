package execproc

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"

	"github.com/streamshim/streamshim/pkg/execproc/internal/proc"
	"github.com/streamshim/streamshim/pkg/execproc/internal/reaper"
	"github.com/streamshim/streamshim/pkg/execproc/internal/stdio"
	"github.com/streamshim/streamshim/pkg/execproc/internal/tree"
	"github.com/streamshim/streamshim/pkg/handover"
	"github.com/streamshim/streamshim/pkg/workload"
)

// Freeze stops all work on the process and returns its state, for Runner.ResumeProcess in this program or in one
// that it executes. The caller must no longer use the process's streams; files gets duplicates of them. If the
// process ends from now on, it stays a zombie until it is resumed, so its exit code is not lost.
//
// Call Discard afterwards. Disconnect and Kill then do nothing. After an error the process carries on as before.
func (p *Process) Freeze(files *handover.Files) ([]byte, error) {
	s, err := p.freeze(files)
	if err != nil {
		return nil, err
	}
	encoded, err := handover.Encode(s)
	if err != nil {
		return nil, err // cannot happen with plain structs
	}
	p.runner.noteFrozen(p, encoded)
	return encoded, nil
}

// Discard closes what this program still holds of a frozen process. Its streams stay open in the files passed to
// Freeze.
func (p *Process) Discard() { p.Close() } //nolint:errcheck // always nil

func (p *Process) freeze(files *handover.Files) (processState, error) {
	p.life.Lock()
	defer p.life.Unlock()
	if p.frozen {
		return processState{}, errors.New("freeze process: it is frozen already")
	}
	// Do first what can fail.
	kept := stdio.NewDuplicates(files)
	if err := p.keepStreams(kept); err != nil {
		kept.Close()
		return processState{}, fmt.Errorf("freeze process %d: %w", p.leader.Pid, err)
	}
	p.frozen = true
	close(p.freezing)
	p.mu.Lock()
	p.cutLocked()
	p.mu.Unlock()
	// No lock is needed from here on: life keeps other writers out, and the background work has ended.
	if p.ending != nil {
		<-p.ending.stopped
	}
	for _, k := range p.kept {
		k.Freeze()
	}
	s := processState{
		Version: stateVersion, Pid: p.leader.Pid, Start: p.leader.Start,
		Container: p.container.ContainerID, InitPid: p.container.InitPid, InitStart: p.container.InitStartTime,
		Record: p.record, Policy: p.policy, StandIn: p.standIn, Stranger: p.stranger, Probe: p.probe.Load(),
		Closed: p.closed, Killed: p.isKilled, IsKept: p.isKept, Ends: p.ends.State(),
	}
	if p.stranger {
		s.Exited = isClosed(p.watch.Exited)
		p.runner.reaper.DropContainer(p.watch)
	} else if s.Exited = !p.runner.reaper.Reserve(p.watch); s.Exited {
		s.Status = p.watch.Status
	}
	p.freezeInit(&s)
	p.freezeStreams(&s, kept)
	if p.ending != nil {
		s.Ending = p.ending.state(isClosed(p.ended), files)
	}
	p.runner.forgetFrozen(p)
	return s, nil
}

// freezeInit records how to recognize the container's main process again.
func (p *Process) freezeInit(s *processState) {
	if p.init == nil || p.closed {
		return
	}
	s.Watched = true
	// The watch's pidfd keeps the pid from being reused until we know whether the process has ended.
	stat, err := proc.ReadStat(p.container.InitPid)
	s.InitEnded = p.runner.reaper.HasEnded(p.init)
	if !s.InitEnded && err == nil && s.InitStart == 0 {
		s.InitStart = stat.Start
	}
	p.runner.reaper.DropContainer(p.init)
}

// freezeStreams records which streams are open.
func (p *Process) freezeStreams(s *processState, kept *stdio.Duplicates) {
	if p.pipes != nil {
		stream := func(file *os.File, wanted bool) streamState {
			if file == nil {
				return streamState{Wanted: wanted}
			}
			return streamState{wanted, kept.Descriptor(file, file)}
		}
		s.Pipes = &pipesState{
			stream(p.pipes.Stdin, p.stdin != nil), stream(p.pipes.Stdout, p.stdout != nil), stream(p.pipes.Stderr, p.stderr != nil),
		}
	}
	if p.tty != nil {
		s.Terminal = &terminalState{
			Descriptor: kept.Descriptor(p.tty, p.tty.File), Output: p.stdout != nil,
		}
		if input, ok := p.stdin.(*stdio.TerminalInput); ok {
			s.Terminal.Input = input.Freeze()
		}
		if s.Terminal.Descriptor == 0 {
			s.Ends.Terminal = false // hung up: its number may belong to another terminal by now
		}
	}
	for _, k := range p.kept {
		if k.Shared {
			continue
		}
		file, terminal := k.File()
		if d := kept.Descriptor(k.Stream, file); d != 0 {
			s.Kept = append(s.Kept, keptState{Descriptor: d, Terminal: terminal, Input: k.Input})
			file.Close() // kept holds a duplicate
		}
	}
}

// keepStreams duplicates all open streams into d.
func (p *Process) keepStreams(d *stdio.Duplicates) error {
	var errs []error
	if p.pipes != nil {
		for _, file := range []*os.File{p.pipes.Stdin, p.pipes.Stdout, p.pipes.Stderr} {
			if file != nil {
				errs = append(errs, d.Add(file, file))
			}
		}
	}
	if p.tty != nil {
		errs = append(errs, d.Add(p.tty, p.tty.File))
	}
	p.mu.Lock()
	kept := slices.Clone(p.kept)
	p.mu.Unlock()
	for _, k := range kept {
		if !k.Shared {
			file, _ := k.File()
			errs = append(errs, d.Add(k.Stream, file))
		}
	}
	return errors.Join(errs...)
}

// state returns the state of a stopped ending.
func (e *ending) state(over bool, files *handover.Files) *endingState {
	if over {
		return &endingState{Over: true}
	}
	defer e.tree.ClosePipes()
	s := &endingState{Stage: e.stage, TermAt: handover.InstantOf(e.termAt), KillAt: handover.InstantOf(e.killAt), GiveUpAt: handover.InstantOf(e.giveUpAt)}
	if e.stage != stageLook { // before that nothing is known
		s.Tree = e.tree.State(files)
	}
	return s
}

// ResumeProcess resumes a process from the state that Freeze returned, and takes its streams out of files. It
// fails when this program cannot read the state or when the state is no longer true; the process is then left to
// EndUnclaimed.
func (r *Runner) ResumeProcess(_ context.Context, state []byte, files *handover.Files) (*Process, error) {
	s, err := decodeProcess(state)
	if err != nil {
		return nil, fmt.Errorf("resume process: %w", err)
	}
	p, err := r.resume(s, files)
	if err != nil {
		return nil, fmt.Errorf("resume process %d: %w", s.Pid, err)
	}
	return p, nil
}

func (r *Runner) resume(s processState, files *handover.Files) (_ *Process, err error) {
	container := workload.Container{
		Target: workload.Target{ContainerID: s.Container}, InitPid: s.InitPid, InitStartTime: s.InitStart,
	}
	p := newProcess(r, container, s.Record, s.Policy)
	p.leader, p.ends = s.leader(), s.Ends.Resume()
	p.standIn, p.stranger, p.isKept = s.StandIn, s.Stranger, s.IsKept
	p.probe.Store(s.Probe)
	if s.Killed {
		p.isKilled = true
		close(p.killNow)
		close(p.cut)
	}
	taken := stdio.TakeFrom(files)
	defer func() {
		if err != nil {
			taken.Close()
		}
	}()
	var watched, kept []*os.File
	if s.Ending != nil && !s.Ending.Over {
		for _, pipe := range s.Ending.Tree.Watched {
			watched = append(watched, taken.Take(pipe.Descriptor))
		}
	}
	for _, k := range s.Kept {
		kept = append(kept, taken.Take(k.Descriptor))
	}
	streams := takeStreams(taken, s)
	if taken.Err != nil {
		return nil, taken.Err
	}
	if s.Watched {
		if p.init, err = r.reaper.WatchKnown(proc.Identity{Pid: s.InitPid, Start: s.InitStart}, s.InitEnded); err != nil {
			return nil, err
		}
	}
	p.resumeEnding(s.Ending, watched) // before the reaper can report the process's exit
	if err := r.watchResumed(p, s); err != nil {
		if p.init != nil {
			r.reaper.DropContainer(p.init)
		}
		if p.ending != nil {
			p.ending.tree.ClosePipes()
		}
		return nil, err
	}
	// Nothing can fail from here on.
	p.closed = s.Closed
	p.resumeStreams(s, streams)
	for i, k := range s.Kept {
		stream := stdio.Keepable(kept[i])
		if k.Terminal {
			stream = stdio.NewTerminal(kept[i], p.watch.Exited)
		}
		p.keepStream(stdio.NewKept(stream, k.Input, false))
	}
	if p.ending != nil && !p.endOver {
		p.ending.begin()
	}
	r.noteResumed(p.leader)
	return p, nil
}

// resumedStreams are the streams that are still open.
type resumedStreams struct{ stdin, stdout, stderr, master *os.File }

func takeStreams(t *stdio.Taken, s processState) resumedStreams {
	stream := func(state streamState) *os.File {
		if !state.Wanted || state.Descriptor == 0 {
			return nil
		}
		return t.Take(state.Descriptor)
	}
	var r resumedStreams
	if s.Pipes != nil {
		r.stdin, r.stdout, r.stderr = stream(s.Pipes.Stdin), stream(s.Pipes.Stdout), stream(s.Pipes.Stderr)
	}
	if s.Terminal != nil {
		r.master = stream(streamState{true, s.Terminal.Descriptor})
	}
	return r
}

// watchResumed watches for the process's end, which may have come long ago.
func (r *Runner) watchResumed(p *Process, s processState) (err error) {
	switch {
	case s.Exited:
		p.watch = reaper.EndedWatch(s.Pid, s.Status)
	case s.Stranger:
		if p.watch, err = r.reaper.WatchKnown(p.leader, false); err != nil {
			return err
		}
	default:
		// It is still our child, if only as a zombie, unless somebody else has waited for it.
		if stat, err := proc.ReadStat(s.Pid); err != nil || stat.Identity != p.leader || stat.Parent != os.Getpid() {
			r.log.Warn("a process was lost in a hand-over: its exit code is not known", "container", s.Container, "pid", s.Pid)
			p.watch = reaper.EndedWatch(s.Pid, reaper.LostStatus)
			r.reaper.Unreserve(s.Pid)
			if p.ending == nil {
				os.Remove(p.record)
			}
			return nil
		}
		if p.watch, err = r.reaper.WatchProcess(s.Pid, p.onExit); err != nil {
			return err
		}
		r.mu.Lock()
		defer r.mu.Unlock()
		if !p.hasExited() {
			r.running[p] = struct{}{}
		}
	}
	return nil
}

// resumeStreams gives the process its streams back. Those that were closed are closed again.
func (p *Process) resumeStreams(s processState, open resumedStreams) {
	orClosed := func(file *os.File) *os.File {
		if file == nil {
			return stdio.ClosedFile()
		}
		return file
	}
	if s.Pipes != nil {
		p.pipes = &stdio.Pipes{Stdin: open.stdin, Stdout: open.stdout, Stderr: open.stderr}
		if s.Pipes.Stdin.Wanted {
			p.stdin = orClosed(open.stdin)
		}
		if s.Pipes.Stdout.Wanted {
			p.stdout = orClosed(open.stdout)
		}
		if s.Pipes.Stderr.Wanted {
			p.stderr = orClosed(open.stderr)
		}
	}
	if open.master == nil {
		p.ends.Terminal = false // hung up: its number may belong to another terminal by now
	}
	if s.Terminal == nil {
		return
	}
	p.tty = stdio.NewTerminal(orClosed(open.master), p.watch.Exited)
	if open.master == nil {
		p.tty.Close()
	}
	if s.Terminal.Output {
		p.stdout = p.tty
	} else if open.master != nil {
		p.keepStream(stdio.NewKept(p.tty, false, true))
	}
	if s.Terminal.Input != nil {
		p.stdin = stdio.ResumeInput(p.tty, s.Terminal.Input, p.panicked)
	}
}

// resumeEnding restores an ending, ready to continue.
func (p *Process) resumeEnding(s *endingState, watched []*os.File) {
	if s == nil {
		return
	}
	e := &ending{process: p, stopped: make(chan struct{})}
	if s.Over {
		e.tree = tree.New(p.leader, p.container.InitPid, p.ends)
		p.ending, p.endOver = e, true
		close(e.stopped)
		close(p.ended)
		return
	}
	e.stage, e.termAt, e.killAt, e.giveUpAt = s.Stage, s.TermAt.Time(), s.KillAt.Time(), s.GiveUpAt.Time()
	t := tree.New(p.leader, p.container.InitPid, p.ends)
	t.Urgent, t.Stranger, t.Frozen = p.probe.Load(), p.stranger, p.freezing
	if s.Stage == stageLook {
		p.looking = true
	} else {
		t.Resume(s.Tree, watched)
	}
	e.tree = t
	p.ending = e
}
