package execproc

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"maps"
	"os"
	"slices"
	"sync"

	"golang.org/x/sys/unix"

	"github.com/streamshim/streamshim/pkg/execproc/internal/proc"
	"github.com/streamshim/streamshim/pkg/execproc/internal/reaper"
	"github.com/streamshim/streamshim/pkg/execproc/internal/record"
	"github.com/streamshim/streamshim/pkg/handover"
)

// program tells this program from the one that it executes.
var program = rand.Text()

// handOver is what a Runner knows of a hand-over. Its fields are guarded by the Runner's mu.
type handOver struct {
	quiet  chan struct{} // not nil while no start may begin; closed when they may
	calls  int           // starts and RunSyncs under way
	frozen bool          // Resume is due
	// carried are the states of processes that a session has frozen, until they are resumed.
	carried  map[proc.Identity][]byte
	adopting bool // the reaper waits for Resume
	// recovery is the work on starts that a killed predecessor was interrupted in. Freeze leaves it to who resumes.
	recovery       context.Context
	endRecovery    context.CancelFunc
	recoveries     *sync.WaitGroup
	recoveredNames uint64 // the highest in a file's name that this process has made before this program
}

// runnerState is what a hand-over carries of a Runner. As processState it is a contract.
type runnerState struct {
	Version  int
	Program  string   // who has written it
	Sessions [][]byte // states of processes that their sessions resume
	Own      [][]byte // of those without a session
	Children []childState
	Unheard  []int // signals that are caught and thrown away
}

// childState is a process in this process's own session, which was started by os/exec.
type childState struct {
	Pid   int
	Start uint64
}

func decodeRunner(encoded []byte) (runnerState, error) {
	var s runnerState
	if err := handover.Decode(encoded, &s); err != nil {
		return runnerState{}, err
	}
	if s.Version != stateVersion {
		return runnerState{}, fmt.Errorf("the state of processes has version %d, this program knows %d", s.Version, stateVersion)
	}
	return s, nil
}

// CheckState tells whether this program can read what Runner.Freeze has returned.
func CheckState(state []byte) error {
	s, err := decodeRunner(state)
	if err != nil {
		return err
	}
	for _, encoded := range slices.Concat(s.Own, s.Sessions) {
		if _, err := decodeProcess(encoded); err != nil {
			return err
		}
	}
	return nil
}

// Quiesce waits until no start and no RunSync is under way; those that come from now on wait until Continue or Resume.
// When the context is done first, they go on, and its error is returned.
func (r *Runner) Quiesce(ctx context.Context) error {
	defer context.AfterFunc(ctx, func() {
		r.mu.Lock()
		defer r.mu.Unlock()
		r.idle.Broadcast()
	})()
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.closing {
		return ErrClosed
	}
	if r.quiet == nil {
		r.quiet = make(chan struct{})
	}
	for r.calls > 0 {
		if ctx.Err() != nil {
			r.continueLocked()
			return fmt.Errorf("wait for commands that are being started: %w", context.Cause(ctx))
		}
		r.idle.Wait()
	}
	return nil
}

// Continue lets starts go on after Quiesce.
func (r *Runner) Continue() {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.continueLocked()
}

func (r *Runner) continueLocked() {
	if r.quiet != nil && !r.frozen {
		close(r.quiet)
		r.quiet = nil
	}
}

// Freeze ends all work on processes and returns the state from which Resume goes on, in this program or in one that
// this one executes. It comes after Quiesce, and after the sessions have frozen their processes; a process that is left
// and was not closed is disconnected when it is resumed. After an error all goes on as before.
func (r *Runner) Freeze(files *handover.Files) ([]byte, error) {
	r.mu.Lock()
	switch {
	case r.closing:
		r.mu.Unlock()
		return nil, ErrClosed
	case r.frozen || r.quiet == nil || r.calls > 0:
		r.mu.Unlock()
		return nil, errors.New("freeze processes: Quiesce has not succeeded before, or they are frozen already")
	}
	r.frozen = true
	r.endRecovery()
	r.mu.Unlock()
	r.recoveries.Wait()

	s := runnerState{Version: stateVersion, Program: program}
	var frozen []processState
	var err error
	for _, p := range r.watched() {
		var state processState
		if state, err = p.freeze(files); err != nil {
			break
		}
		p.Discard()
		frozen = append(frozen, state)
	}
	if err == nil {
		err = s.complete(r, frozen)
	}
	encoded, encodeErr := handover.Encode(s)
	if err = errors.Join(err, encodeErr); err != nil {
		r.resumeOwn(frozen, files)
		r.resumed()
		return nil, err
	}
	return encoded, nil
}

// complete adds what is not a process's.
func (s *runnerState) complete(r *Runner, own []processState) error {
	for _, state := range own {
		encoded, err := handover.Encode(state)
		if err != nil {
			return err
		}
		s.Own = append(s.Own, encoded)
	}
	r.mu.Lock()
	s.Sessions = slices.Collect(maps.Values(r.carried))
	r.mu.Unlock()
	children, err := r.reaper.Others()
	if err != nil {
		return fmt.Errorf("read own children: %w", err)
	}
	for _, child := range children {
		if child.Session == r.reaper.Session {
			s.Children = append(s.Children, childState{child.Pid, child.Start})
		}
	}
	for _, signal := range reaper.UnheardSignals() {
		s.Unheard = append(s.Unheard, int(signal))
	}
	return nil
}

// watched are the processes that this program does something for and no session has frozen.
func (r *Runner) watched() []*Process {
	r.mu.Lock()
	defer r.mu.Unlock()
	all := maps.Clone(r.running)
	maps.Copy(all, r.ending)
	for p := range r.keeping {
		all[p] = struct{}{}
	}
	return slices.Collect(maps.Keys(all))
}

// noteFrozen remembers the state of a process until it is resumed.
func (r *Runner) noteFrozen(p *Process, state []byte) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.carried[p.leader] = state
}

// forgetFrozen takes a process out of those that something is done for.
func (r *Runner) forgetFrozen(p *Process) {
	r.mu.Lock()
	defer r.mu.Unlock()
	delete(r.running, p)
	delete(r.ending, p)
	delete(r.keeping, p)
}

// Resume goes on from the state that Freeze has returned. The processes of sessions are left to ResumeProcess. An error
// says that the state cannot be read, and that everything in it is left to EndUnclaimed, as far as it is known.
func (r *Runner) Resume(state []byte, files *handover.Files) error {
	r.mu.Lock()
	due := r.frozen
	r.mu.Unlock()
	if !due {
		return errors.New("resume processes: they are not frozen")
	}
	s, err := decodeRunner(state) // nothing is in it after an error
	for _, encoded := range s.Sessions {
		process, stateErr := decodeProcess(encoded)
		if stateErr != nil {
			err = errors.Join(err, stateErr)
			continue
		}
		if !process.Exited && !process.Stranger {
			r.reaper.ReservePid(process.Pid)
		}
		r.mu.Lock()
		r.carried[process.leader()] = encoded
		r.mu.Unlock()
	}
	var own []processState
	for _, encoded := range s.Own {
		process, stateErr := decodeProcess(encoded)
		err = errors.Join(err, stateErr)
		if stateErr == nil {
			own = append(own, process)
		}
	}
	r.resumeOwn(own, files)
	if s.Program != program {
		for _, child := range s.Children {
			r.adoptChild(proc.Identity{Pid: child.Pid, Start: child.Start})
		}
		for _, signal := range s.Unheard {
			if signal > 0 && signal <= maxSignal {
				reaper.ThrowAway(unix.Signal(signal))
			}
		}
	}
	r.resumed()
	if err != nil {
		return fmt.Errorf("resume processes: %w", err)
	}
	return nil
}

const maxSignal = 64

// adoptChild reaps, when it ends, a child of ours for which the program that has started it waits no more.
func (r *Runner) adoptChild(child proc.Identity) {
	stat, err := proc.ReadStat(child.Pid)
	if err != nil || stat.Identity != child || stat.Parent != os.Getpid() {
		return
	}
	if _, err := r.reaper.WatchProcess(child.Pid, nil); err != nil {
		r.log.Warn("a process of the program before cannot be waited for", "pid", child.Pid, "error", err)
	}
}

// resumeOwn resumes processes without a session.
func (r *Runner) resumeOwn(states []processState, files *handover.Files) {
	for _, s := range states {
		p := r.resumeSomehow(s, files)
		if p != nil && !s.Closed {
			p.Disconnect()
			p.Close()
		}
	}
}

// resumeSomehow resumes a process without its streams where it must be.
func (r *Runner) resumeSomehow(s processState, files *handover.Files) *Process {
	p, err := r.resume(s, files)
	if err == nil {
		return p
	}
	r.log.Warn("a process goes on without its streams after a hand-over", "container", s.Container, "pid", s.Pid, "error", err)
	s.Pipes, s.Terminal, s.Kept = nil, nil, nil
	if s.Ending != nil {
		s.Ending.Tree.PipesAreWatched, s.Ending.Tree.Watched = false, nil
	}
	if p, err = r.resume(s, files); err != nil { // there is no descriptor free
		r.log.Error("a process was given up in a hand-over", "container", s.Container, "pid", s.Pid, "error", err)
		r.reaper.Unreserve(s.Pid)
		return nil
	}
	return p
}

// resumed lets everything go on.
func (r *Runner) resumed() {
	r.mu.Lock()
	r.frozen = false
	r.recovery, r.endRecovery = context.WithCancel(r.ctx)
	r.continueLocked()
	adopted := r.adopting
	r.adopting = false
	r.mu.Unlock()
	if adopted {
		r.reaper.Adopted()
	} else {
		r.reaper.Look()
	}
	r.recover()
}

// noteResumed takes a process for one that has been resumed.
func (r *Runner) noteResumed(p *Process) {
	r.mu.Lock()
	defer r.mu.Unlock()
	delete(r.carried, p.leader)
}

// EndUnclaimed disconnects the processes that were frozen by a session and are resumed by none. It comes after Resume
// and all ResumeProcess, and before the files are closed.
func (r *Runner) EndUnclaimed(files *handover.Files) {
	r.mu.Lock()
	states := slices.Collect(maps.Values(r.carried))
	r.mu.Unlock()
	for _, encoded := range states {
		s, err := decodeProcess(encoded)
		if err != nil {
			continue // it was read before
		}
		r.log.Info("ending a process whose session was not resumed", "container", s.Container, "pid", s.Pid)
		if p := r.resumeSomehow(s, files); p != nil {
			p.Disconnect()
			p.Close()
		}
		r.mu.Lock()
		delete(r.carried, s.leader())
		r.mu.Unlock()
	}
	r.recoverOwn()
}

// takeNames keeps away from the names of files that this same process has made before.
func (r *Runner) takeNames() {
	entries, err := os.ReadDir(r.config.StateDir)
	if err != nil {
		return // recover tells
	}
	for _, entry := range entries {
		if owner, ok := record.OwnerOf(entry.Name()); ok && owner == r.owner {
			r.recoveredNames = max(r.recoveredNames, record.NumberOf(entry.Name()))
		}
	}
	r.reaper.TakeName(r.recoveredNames)
}
