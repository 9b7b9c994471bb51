package execproc

import (
	"bytes"
	"encoding/json"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/streamshim/streamshim/pkg/workload"
)

// record is what a successor must know of a command, should this process be killed. It is one small file in
// the state directory, removed when the command ends. It is written twice: before the start, when there is no
// pid yet, and once the command is known, then into the room of the first, so that a full disk cannot prevent it.
// Between the two, what was started is found by what the runtime left and by the command's pipes.
type record struct {
	Container string   `json:"container"`
	InitPid   int      `json:"initPid"`
	InitStart uint64   `json:"initStart,omitempty"` // as Start
	Pid       int      `json:"pid,omitempty"`
	Start     uint64   `json:"start,omitempty"` // clock ticks since boot, /proc/PID/stat
	Since     uint64   `json:"since,omitempty"` // without a pid: what was started is not older
	Pipes     []string `json:"pipes,omitempty"` // without a pid: as in streamEnds
	Boot      string   `json:"boot"`
	Policy    Policy   `json:"policy"`
}

// recordSize is the least size of a record's file, in bytes, the rest being blanks: a record with a pid fits in.
const recordSize = 4 << 10

// writeIntent writes down that a command is about to be started. It returns the file, locked, to be closed
// when the runtime has ended: as each descriptor it is copied into the process that is forked to become
// the runtime, and closed there by execve, so that the lock tells a successor of a process that does not look like
// a runtime yet.
func (p *Process) writeIntent() (*os.File, error) {
	since, err := ticksSinceBoot()
	if err != nil {
		return nil, err
	}
	intent := p.newRecord()
	intent.Since, intent.Pipes = since, slices.Sorted(maps.Keys(p.ends.pipes))
	if err := intent.write(p.record); err != nil {
		return nil, err
	}
	file, err := os.OpenFile(p.record, os.O_RDWR, 0)
	if err != nil {
		return nil, err
	}
	if err := unix.Flock(int(file.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		file.Close()
		return nil, fmt.Errorf("lock: %w", err)
	}
	return file, nil
}

// awaitExecve waits until no process is left that was forked to become the start's runtime and has not
// executed it, at most until the deadline or until the channel is closed.
func awaitExecve(recordFile string, deadline time.Time, cut <-chan struct{}) {
	file, err := os.Open(recordFile)
	if err != nil {
		return
	}
	defer file.Close()
	for unix.Flock(int(file.Fd()), unix.LOCK_EX|unix.LOCK_NB) == unix.EWOULDBLOCK && time.Now().Before(deadline) {
		select {
		case <-cut:
			return
		case <-time.After(5 * time.Millisecond): // flock(2) itself waits without a deadline
		}
	}
}

// writeRecord writes down which process the command is, in place of the intent. It is one write within a page:
// whoever is killed meanwhile leaves the one or the other.
func (p *Process) writeRecord(intent *os.File) error {
	r := p.newRecord()
	r.Pid, r.Start = p.leader.pid, p.leader.start
	data, err := r.encode()
	if err != nil {
		return err
	}
	_, err = intent.WriteAt(data, 0)
	return err
}

func (p *Process) newRecord() record {
	return record{
		Container: p.container.ContainerID, InitPid: p.container.InitPid, InitStart: p.container.InitStartTime,
		Boot: p.runner.boot, Policy: p.policy,
	}
}

func (r record) encode() ([]byte, error) {
	data, err := json.Marshal(r)
	if err != nil {
		return nil, fmt.Errorf("encode recovery record: %w", err)
	}
	if blanks := recordSize - len(data); blanks > 0 {
		data = append(data, bytes.Repeat([]byte{' '}, blanks)...)
	}
	return data, nil
}

// write replaces the file as a whole: whoever is killed meanwhile leaves the old one.
func (r record) write(path string) error {
	data, err := r.encode()
	if err != nil {
		return err
	}
	unfinished := unfinishedFile(path)
	err = os.WriteFile(unfinished, data, 0o600)
	if err == nil {
		err = os.Rename(unfinished, path)
	}
	if err != nil {
		os.Remove(unfinished)
	}
	return err
}

// ticksSinceBoot is the time in the unit of /proc/PID/stat.
func ticksSinceBoot() (uint64, error) {
	const tick = 10 * time.Millisecond // USER_HZ is 100 on every architecture that Go runs on
	var now unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_BOOTTIME, &now); err != nil {
		return 0, fmt.Errorf("time since boot: %w", err)
	}
	return uint64(time.Duration(now.Nano()) / tick), nil
}

func parseRecord(data []byte) (record, error) {
	var found record
	if err := json.Unmarshal(data, &found); err != nil {
		return record{}, fmt.Errorf("recovery record: %w", err)
	}
	if found.Pid < 0 || found.Pid == 1 || found.Pid == 0 && found.Since == 0 {
		return record{}, fmt.Errorf("recovery record: no pid")
	}
	return found, nil
}

// ownerOf reads which process a file of the state directory belongs to: PID-START-NUMBER.ending, with a
// dot in front where runc was writing it.
func ownerOf(name string) (identity, bool) {
	base, _, hasEnding := strings.Cut(strings.TrimPrefix(name, "."), ".")
	parts := strings.Split(base, "-")
	if !hasEnding || len(parts) != 3 {
		return identity{}, false
	}
	pid, err := strconv.Atoi(parts[0])
	if err != nil || pid <= 0 {
		return identity{}, false
	}
	start, err := strconv.ParseUint(parts[1], 10, 64)
	return identity{pid, start}, err == nil
}

// recover ends the processes of predecessors that were killed, and removes their files. Files of a
// streamshim that still lives, such as one that finishes its sessions during an upgrade, are left.
func (r *Runner) recover() {
	entries, err := os.ReadDir(r.config.StateDir)
	if err != nil {
		r.log.Warn("cannot look for processes left by a predecessor", "error", err)
		return
	}
	var rest []string
	var starts []interruptedStart
	interrupted := map[string]bool{} // by the name of their files
	for _, entry := range entries {
		owner, ok := ownerOf(entry.Name())
		if !ok || owner.alive() {
			continue
		}
		if base, isRecord := strings.CutSuffix(entry.Name(), ".record"); isRecord && base[0] != '.' {
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
		r.background(func() { r.endInterrupted(starts) })
	}
}

// interruptedStart is a start during which the predecessor was killed.
type interruptedStart struct {
	record record
	files  files
}

// recoverRecord deals with one command of a predecessor. Of a start that was interrupted, whose files are still
// needed, it only tells.
func (r *Runner) recoverRecord(base string) (start interruptedStart, interrupted bool) {
	path := filesOf(base).record
	data, err := os.ReadFile(path)
	if err != nil {
		return interruptedStart{}, false
	}
	left, err := parseRecord(data)
	leader := identity{left.Pid, left.Start}
	switch {
	case err != nil || left.Boot != r.boot || left.Policy == PolicyKeep:
		os.Remove(path)
	case left.Pid == 0:
		r.log.Info("ending what a predecessor was starting", "container", left.Container)
		return interruptedStart{left, filesOf(base)}, true
	case !leader.alive():
		os.Remove(path)
	default:
		r.log.Info("ending a process left by a predecessor", "container", left.Container, "pid", left.Pid)
		r.endLeftover(left, path)
	}
	return interruptedStart{}, false
}

// interruptedTimeout is how long a runtime that lost its streamshim may go on starting a command.
const interruptedTimeout = 5 * time.Second

// endInterrupted kills the commands of starts during which the predecessor was killed: nobody ever had their
// streams. The runtimes may still be at it, and are left to finish, so that they undo or name what they began. They
// are looked for once for all starts.
func (r *Runner) endInterrupted(starts []interruptedStart) {
	deadline := time.Now().Add(interruptedTimeout)
	paths := make(map[string]bool, len(starts))
	for _, s := range starts {
		awaitExecve(s.files.record, deadline, r.ctx.Done())
		paths[s.files.process] = true
	}
	runtimes := processesWithArgument(paths)
	for _, s := range starts {
		r.background(func() { r.endOne(s.record, s.files, runtimes[s.files.process]) })
	}
}

// endOne ends one interrupted start, of which these runtimes run.
func (r *Runner) endOne(left record, f files, runtimes []procStat) {
	if awaitEnds(runtimes, time.Now().Add(interruptedTimeout), r.ctx.Done()) == wasCut {
		return // for the next one to do
	}
	for _, p := range runtimes {
		t := newTree(p.identity, 0, streamEnds{})
		t.stranger = true
		t.kill()
	}
	ends := streamEnds{pipes: map[string]bool{}}
	for _, pipe := range left.Pipes {
		ends.pipes[pipe] = true
	}
	leader := identity{pid: -1, start: left.Since}
	if pid, err := readPidFile(f.pid); err == nil {
		if stat, err := readStat(pid); err == nil && stat.start >= left.Since && sameMountNamespace(pid, left.InitPid) {
			leader = stat.identity
		}
	}
	// When the container has ended nothing of it is left, and its main process's pid may be another's.
	if left.InitStart == 0 || (identity{left.InitPid, left.InitStart}).alive() {
		t := newTree(leader, left.InitPid, ends)
		t.stranger = true
		t.kill()
	}
	f.removeStart()
	os.RemoveAll(f.socket)
	os.Remove(unfinishedFile(f.record))
	os.Remove(f.record)
}

// processesWithArgument finds the processes that have one of the paths among their arguments, by path: OCI runtimes
// that were told to start what it describes. They have not left our mount namespace. The memory of a container's
// process is not read, which could be backed by a file system of its own that never answers.
func processesWithArgument(paths map[string]bool) map[string][]procStat {
	all, err := allProcesses()
	if err != nil {
		return nil
	}
	own, err := os.Readlink("/proc/self/ns/mnt")
	if err != nil {
		return nil
	}
	found := map[string][]procStat{}
	buffer := make([]byte, 4<<10)
	for _, p := range all {
		if its, err := os.Readlink("/proc/" + strconv.Itoa(p.pid) + "/ns/mnt"); err != nil || its != own {
			continue
		}
		arguments, err := readProc("/proc/"+strconv.Itoa(p.pid)+"/cmdline", &buffer)
		if err != nil {
			continue
		}
		for argument := range bytes.SplitSeq(arguments, []byte{0}) {
			if paths[string(argument)] {
				found[string(argument)] = append(found[string(argument)], p)
				break
			}
		}
	}
	return found
}

// sameMountNamespace reports whether two processes have the same mount namespace. A container shares its own
// with no other.
func sameMountNamespace(a, b int) bool {
	first, err := os.Readlink("/proc/" + strconv.Itoa(a) + "/ns/mnt")
	if err != nil {
		return false
	}
	second, err := os.Readlink("/proc/" + strconv.Itoa(b) + "/ns/mnt")
	return err == nil && first == second
}

// endLeftover ends a process as its policy says, in the background. It is no child of ours, so that
// its status is somebody else's affair.
func (r *Runner) endLeftover(left record, path string) {
	p := &Process{
		runner:    r,
		container: workload.Container{Target: workload.Target{ContainerID: left.Container}, InitPid: left.InitPid},
		leader:    identity{left.Pid, left.Start},
		policy:    left.Policy,
		killNow:   make(chan struct{}),
		ended:     make(chan struct{}),
	}
	var err error
	p.watch, err = r.reaper.watchContainer(left.Pid)
	if err == nil && !p.leader.alive() {
		r.reaper.dropContainer(p.watch) // not the process any more, or about to say so
		err = unix.ESRCH
	}
	if err != nil {
		os.Remove(path)
		return
	}
	r.background(func() {
		p.Disconnect()
		<-p.ended
		r.reaper.dropContainer(p.watch)
		os.Remove(path)
	})
}
