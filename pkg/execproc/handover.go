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

// program distinguishes this program from the one that it executes.
var program = rand.Text()

// handOver is a Runner's part in hand-overs. The Runner's mu guards its fields.
type handOver struct {
	quiet  chan struct{} // non-nil while starts are held back; closed to release them
	calls  int           // starts and RunSyncs in progress
	frozen bool          // waiting for Resume
	// carried holds the states of processes that sessions have frozen, until they are resumed.
	carried  map[proc.Identity][]byte
	adopting bool // the reaper waits for Resume
	// recovery covers starts that were interrupted when a predecessor was killed. Freeze leaves the rest of it to
	// the successor.
	recovery       context.Context
	endRecovery    context.CancelFunc
	recoveries     *sync.WaitGroup
	recoveredNames uint64 // the highest file name number used in this process before this program
}

// runnerState is a Runner's state in a hand-over. Like processState it is a contract between versions.
type runnerState struct {
	Version  int
	Program  string   // the program that wrote it
	Sessions [][]byte // processes that sessions resume
	Own      [][]byte // processes without a session
	Children []childState
	Unheard  []int // signals caught and discarded
}

// childState identifies a child that os/exec started, in this process's own session.
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

// CheckState returns an error if this program cannot read a state that Runner.Freeze returned.
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

// Quiesce waits until no start and no RunSync is in progress, and holds back new ones until Continue or Resume. If
// the context ends first, it releases them and returns the context's error.
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

// Continue releases the starts that Quiesce holds back.
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

// Freeze stops all work on processes and returns the state for Resume, in this program or in one that it executes.
// Call it after Quiesce, and after the sessions have frozen their processes. A process without a session that was
// not closed is disconnected when it is resumed. After an error everything carries on as before.
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

// complete adds everything that does not belong to a single process.
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
	for _, signal := range reaper.DiscardedSignals() {
		s.Unheard = append(s.Unheard, int(signal))
	}
	return nil
}

// watched returns the processes that this program still works for, without those that sessions have frozen.
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

func (r *Runner) noteFrozen(p *Process, state []byte) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.carried[p.leader] = state
}

// forgetFrozen removes a process from those that this program works for.
func (r *Runner) forgetFrozen(p *Process) {
	r.mu.Lock()
	defer r.mu.Unlock()
	delete(r.running, p)
	delete(r.ending, p)
	delete(r.keeping, p)
}

// Resume continues from the state that Freeze returned. It leaves the sessions' processes to ResumeProcess. It
// fails when the state cannot be read; the processes in it, as far as they are known, are then left to
// EndUnclaimed.
func (r *Runner) Resume(state []byte, files *handover.Files) error {
	r.mu.Lock()
	due := r.frozen
	r.mu.Unlock()
	if !due {
		return errors.New("resume processes: they are not frozen")
	}
	s, err := decodeRunner(state) // empty after an error
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
				reaper.Discard(unix.Signal(signal))
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

// adoptChild arranges for a child to be reaped whose starter, the previous program, no longer waits for it.
func (r *Runner) adoptChild(child proc.Identity) {
	stat, err := proc.ReadStat(child.Pid)
	if err != nil || stat.Identity != child || stat.Parent != os.Getpid() {
		return
	}
	if _, err := r.reaper.WatchProcess(child.Pid, nil); err != nil {
		r.log.Warn("a process of the program before cannot be waited for", "pid", child.Pid, "error", err)
	}
}

func (r *Runner) resumeOwn(states []processState, files *handover.Files) {
	for _, s := range states {
		p := r.resumeSomehow(s, files)
		if p != nil && !s.Closed {
			p.Disconnect()
			p.Close()
		}
	}
}

// resumeSomehow resumes a process, without its streams if there is no other way.
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
	if p, err = r.resume(s, files); err != nil { // out of descriptors
		r.log.Error("a process was given up in a hand-over", "container", s.Container, "pid", s.Pid, "error", err)
		r.reaper.Unreserve(s.Pid)
		return nil
	}
	return p
}

// resumed lets all work continue.
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

// noteResumed records that a process was resumed, or cannot be.
func (r *Runner) noteResumed(leader proc.Identity) {
	r.mu.Lock()
	defer r.mu.Unlock()
	delete(r.carried, leader)
}

// EndUnclaimed disconnects the processes that a session froze and none resumed. Call it after Resume and every
// ResumeProcess, and before closing files.
func (r *Runner) EndUnclaimed(files *handover.Files) {
	r.mu.Lock()
	states := slices.Collect(maps.Values(r.carried))
	r.mu.Unlock()
	for _, encoded := range states {
		s, err := decodeProcess(encoded)
		if err != nil {
			continue // readable: checked before
		}
		r.log.Info("ending a process whose session was not resumed", "container", s.Container, "pid", s.Pid)
		if p := r.resumeSomehow(s, files); p != nil {
			p.Disconnect()
			p.Close()
		}
		r.noteResumed(s.leader())
	}
	r.recoverOwn()
}

// takeNames skips file names that this process used before the hand-over.
func (r *Runner) takeNames() {
	entries, err := os.ReadDir(r.config.StateDir)
	if err != nil {
		return // recover reports it
	}
	for _, entry := range entries {
		if owner, ok := record.OwnerOf(entry.Name()); ok && owner == r.owner {
			r.recoveredNames = max(r.recoveredNames, record.NumberOf(entry.Name()))
		}
	}
	r.reaper.TakeName(r.recoveredNames)
}
