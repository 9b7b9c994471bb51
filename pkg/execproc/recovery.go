package execproc

import (
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/streamshim/streamshim/pkg/execproc/internal/ociruntime"
	"github.com/streamshim/streamshim/pkg/execproc/internal/proc"
	"github.com/streamshim/streamshim/pkg/execproc/internal/record"
	"github.com/streamshim/streamshim/pkg/execproc/internal/tree"
	"github.com/streamshim/streamshim/pkg/workload"
)

// writeIntent records that a command is about to be started.
func (p *Process) writeIntent() (*os.File, error) {
	since, err := proc.TicksSinceBoot()
	if err != nil {
		return nil, err
	}
	intent := p.newRecord()
	intent.Since = since
	return intent.Begin(p.record)
}

// writeRecord replaces the intent with the process that the command has become.
func (p *Process) writeRecord(intent *os.File) error {
	return p.newRecord().Complete(intent)
}

// recordEnd records that the process's tree is being ended. From now on the record lives as long as the tree.
func (p *Process) recordEnd() {
	r := p.newRecord()
	r.Ending = true
	if p.killed() {
		r.Policy = PolicyKill
	}
	if err := r.Write(p.record); err != nil {
		p.runner.log.Warn("cannot write the recovery record of an exec that is being ended; were streamshim killed now, some of it might stay", "error", err)
	}
}

func (p *Process) newRecord() record.Record {
	return record.Record{
		Container: p.container.ContainerID, InitPid: p.container.InitPid, InitStart: p.container.InitStartTime,
		Pid: p.leader.Pid, Start: p.leader.Start, Pipes: slices.Sorted(maps.Keys(p.ends.Pipes)), Boot: p.runner.boot, Policy: p.policy,
	}
}

// recover ends the processes of predecessors that were killed, and removes their files. It leaves the files of a
// streamshim that is still alive, such as one that finishes its sessions during an upgrade.
func (r *Runner) recover() {
	entries, err := os.ReadDir(r.config.StateDir)
	if err != nil {
		r.log.Warn("cannot look for processes left by a predecessor", "error", err)
		return
	}
	owned := r.ownedRecords()
	var rest []string
	var starts []interruptedStart
	interrupted := map[string]bool{} // by file name without its ending
	for _, entry := range entries {
		owner, ok := record.OwnerOf(entry.Name())
		if !ok || owner.Alive() {
			continue
		}
		if base, isRecord := strings.CutSuffix(entry.Name(), ociruntime.RecordEnding); isRecord && base[0] != '.' {
			if owned[filepath.Join(r.config.StateDir, entry.Name())] {
				continue // begun before a hand-over
			}
			if left, ok := r.recoverRecord(filepath.Join(r.config.StateDir, base)); ok {
				interrupted[base] = true
				starts = append(starts, left)
			}
		} else {
			rest = append(rest, entry.Name())
		}
	}
	for _, name := range rest {
		base, _, _ := strings.Cut(strings.TrimPrefix(name, "."), ".")
		if !interrupted[base] {
			os.Remove(filepath.Join(r.config.StateDir, name))
		}
	}
	if len(starts) > 0 {
		r.recoverInBackground(func(cut <-chan struct{}) { r.endInterrupted(starts, cut) })
	}
}

// recoverInBackground runs f, which must return soon after cut is closed.
func (r *Runner) recoverInBackground(f func(cut <-chan struct{})) {
	r.mu.Lock()
	cut, recoveries := r.recovery.Done(), r.recoveries
	r.mu.Unlock()
	recoveries.Add(1)
	if !r.background(r.panicked, func() { defer recoveries.Done(); f(cut) }) {
		recoveries.Done()
	}
}

// ownedRecords returns the record paths of the processes that this program works for.
func (r *Runner) ownedRecords() map[string]bool {
	owned := map[string]bool{}
	for _, p := range r.watched() {
		owned[p.record] = true
	}
	return owned
}

// recoverOwn is recover for what this same process left before a hand-over whose state was not carried over or
// could not be read.
func (r *Runner) recoverOwn() {
	entries, err := os.ReadDir(r.config.StateDir)
	if err != nil {
		return // recover has reported it
	}
	owned := r.ownedRecords()
	for _, entry := range entries {
		path := filepath.Join(r.config.StateDir, entry.Name())
		base, isRecord := strings.CutSuffix(path, ociruntime.RecordEnding)
		if owner, ok := record.OwnerOf(entry.Name()); !ok || owner != r.owner || !isRecord || owned[path] || record.NumberOf(entry.Name()) > r.recoveredNames {
			continue
		}
		if left, interrupted := r.recoverRecord(base); interrupted {
			r.recoverInBackground(func(cut <-chan struct{}) { r.endInterrupted([]interruptedStart{left}, cut) })
		}
	}
}

// interruptedStart is a start that was in progress when the predecessor was killed.
type interruptedStart struct {
	record record.Record
	files  ociruntime.Files
}

// recoverRecord handles one command of a predecessor. It only returns an interrupted start, whose files are still
// needed.
func (r *Runner) recoverRecord(base string) (start interruptedStart, interrupted bool) {
	path := ociruntime.FilesOf(base).Record
	data, err := os.ReadFile(path)
	if err != nil {
		return interruptedStart{}, false
	}
	left, err := record.Parse(data)
	leader := proc.Identity{Pid: left.Pid, Start: left.Start}
	switch {
	case err != nil || left.Boot != r.boot || left.Policy == PolicyKeep:
		os.Remove(path)
	case left.Pid == 0:
		r.log.Info("ending what a predecessor was starting", "container", left.Container)
		return interruptedStart{left, ociruntime.FilesOf(base)}, true
	case !leader.Alive() && (!left.Ending || !r.mayLive(left)):
		os.Remove(path)
	default:
		r.log.Info("ending a process left by a predecessor", "container", left.Container, "pid", left.Pid)
		r.endLeftover(left, path)
	}
	return interruptedStart{}, false
}

// interruptedTimeout is how long a runtime that lost its streamshim may take to finish starting a command.
const interruptedTimeout = 5 * time.Second

// endInterrupted kills the commands of interrupted starts, whose streams nobody ever had. Runtimes that are still
// at work are left to finish first, so that they undo or name what they began. It searches for them once for all
// starts.
func (r *Runner) endInterrupted(starts []interruptedStart, cut <-chan struct{}) {
	deadline := time.Now().Add(interruptedTimeout)
	paths := make(map[string]bool, len(starts))
	for _, s := range starts {
		record.AwaitExecve(s.files.Record, deadline, cut)
		paths[s.files.Process] = true
	}
	runtimes := proc.WithArgument(paths)
	for _, s := range starts {
		r.recoverInBackground(func(cut <-chan struct{}) { r.endOne(s.record, s.files, runtimes[s.files.Process], cut) })
	}
}

// endOne ends one interrupted start. The runtimes are those still working on it.
func (r *Runner) endOne(left record.Record, f ociruntime.Files, runtimes []proc.Stat, cut <-chan struct{}) {
	if tree.AwaitEnds(runtimes, time.Now().Add(interruptedTimeout), cut) == tree.WasCut {
		return // the next recovery will do it
	}
	kill := func(t *tree.Tree) bool {
		t.Stranger = true
		return t.KillUntil(time.Now().Add(tree.KillTimeout), cut) != tree.WasCut
	}
	for _, p := range runtimes {
		if !kill(tree.New(p.Identity, 0, tree.StreamEnds{})) {
			return
		}
	}
	ends := tree.StreamEnds{Pipes: map[string]bool{}}
	for _, pipe := range left.Pipes {
		ends.Pipes[pipe] = true
	}
	leader := proc.Identity{Pid: -1, Start: left.Since}
	if pid, err := ociruntime.ReadPidFile(f.Pid); err == nil {
		if stat, err := proc.ReadStat(pid); err == nil && stat.Start >= left.Since && proc.SameMountNamespace(pid, left.InitPid) {
			leader = stat.Identity
		}
	}
	// If the container has ended, nothing of it is left, and the pid of its main process may be another's.
	if left.InitStart == 0 || (proc.Identity{Pid: left.InitPid, Start: left.InitStart}).Alive() {
		if !kill(tree.New(leader, left.InitPid, ends)) {
			return
		}
	}
	f.RemoveStart()
	os.RemoveAll(f.Socket)
	os.Remove(ociruntime.UnfinishedFile(f.Record))
	os.Remove(f.Record)
}

// endLeftover ends a process as its policy says, in the background. It is not our child, so we have no exit status
// to collect.
func (r *Runner) endLeftover(left record.Record, path string) {
	container := workload.Container{Target: workload.Target{ContainerID: left.Container}, InitPid: left.InitPid, InitStartTime: left.InitStart}
	p := newProcess(r, container, path, left.Policy)
	p.leader, p.stranger = proc.Identity{Pid: left.Pid, Start: left.Start}, true
	for _, pipe := range left.Pipes {
		if p.ends.Pipes == nil {
			p.ends.Pipes = map[string]bool{}
		}
		p.ends.Pipes[pipe] = true
	}
	var err error
	if p.watch, err = r.reaper.WatchKnown(p.leader, false); err != nil {
		r.log.Warn("a process left by a predecessor cannot be watched", "pid", left.Pid, "error", err)
		return // and leave its record
	}
	if p.hasExited() && !left.Ending {
		os.Remove(path)
		return
	}
	p.Disconnect()
}

// mayLive reports whether other processes of a command may outlive its own, which is possible as long as the
// container lives.
func (r *Runner) mayLive(left record.Record) bool {
	if left.InitStart == 0 {
		return left.InitPid > 0
	}
	return proc.Identity{Pid: left.InitPid, Start: left.InitStart}.Alive()
}
