package execproc

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// record is what a successor must know of a process, should this one be killed. It is one small file in
// the state directory that lasts until the process has ended. Its first line is written before anything
// is started and has no pid; the second, with the pid, when the process is known.
type record struct {
	Container string   `json:"container"`
	InitPid   int      `json:"initPid"`
	Boot      string   `json:"boot"`
	Policy    Policy   `json:"policy"`
	Began     uint64   `json:"began,omitempty"` // nothing of the start is older; clock ticks since boot
	Pipes     []string `json:"pipes,omitempty"` // as streamEnds has them
	Pid       int      `json:"pid,omitempty"`   // 0 while the process is being started
	Start     uint64   `json:"start,omitempty"` // clock ticks since boot, /proc/PID/stat
}

// beginRecord writes the first line. The file stays open, and locked, until the runtime is executed: as each
// descriptor it is copied into the process that is forked to become the runtime, so that the lock tells a
// successor that there is one which does not look like a runtime yet.
func (p *Process) beginRecord() (*os.File, error) {
	file, err := os.OpenFile(p.record, os.O_WRONLY|os.O_APPEND|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return nil, fmt.Errorf("recovery record: %w", err)
	}
	if err = unix.Flock(int(file.Fd()), unix.LOCK_EX|unix.LOCK_NB); err == nil {
		err = p.appendRecord(file, record{Began: ticksSinceBoot(), Pipes: slices.Collect(maps.Keys(p.ends.pipes))})
	}
	if err != nil {
		file.Close()
		os.Remove(p.record)
		return nil, fmt.Errorf("recovery record: %w", err)
	}
	return file, nil
}

// completeRecord writes the second line: the process is known.
func (p *Process) completeRecord(file *os.File) error {
	return p.appendRecord(file, record{Pid: p.leader.pid, Start: p.leader.start})
}

// appendRecord adds a line: whenever this process is killed, the lines before it stay whole.
func (p *Process) appendRecord(file *os.File, line record) error {
	line.Container, line.InitPid, line.Boot, line.Policy = p.container.ID, p.container.InitPid, p.runner.boot, p.policy
	data, err := json.Marshal(line)
	if err != nil {
		return err
	}
	_, err = file.Write(append(data, '\n'))
	return err
}

// parseRecord returns the last line that was written whole.
func parseRecord(data []byte) (record, error) {
	var last record
	err := errors.New("empty")
	for line := range bytes.Lines(data) {
		var found record
		lineErr := json.Unmarshal(line, &found)
		if lineErr == nil {
			last, err = found, nil
			continue
		}
		if err != nil {
			err = lineErr
		}
		break // cut off when its writer was killed: what stands before it counts
	}
	if err == nil && (last.Pid < 0 || last.Pid == 1 || last.Pid == 0 && last.Began == 0) {
		err = errors.New("no pid")
	}
	if err != nil {
		return record{}, fmt.Errorf("recovery record: %w", err)
	}
	return last, nil
}

// ticksPerSecond is the unit of /proc/PID/stat, USER_HZ, 100 wherever Go runs.
const ticksPerSecond = 100

// ticksSinceBoot is now, on the clock of the start times in /proc/PID/stat.
func ticksSinceBoot() uint64 {
	var now unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_BOOTTIME, &now); err != nil {
		return 1 // at boot: everything is younger
	}
	return uint64(max(1, now.Nano()/(int64(time.Second)/ticksPerSecond)))
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
	var unfinished []unfinishedStart
	kept := map[string]bool{} // paths without endings, of unfinished starts, whose files are still needed
	for _, entry := range entries {
		owner, ok := ownerOf(entry.Name())
		base, isRecord := strings.CutSuffix(filepath.Join(r.config.StateDir, entry.Name()), recordEnding)
		if !ok || !isRecord || owner.alive() {
			continue
		}
		files := filesOf(base)
		data, err := os.ReadFile(files.record)
		if err != nil {
			continue
		}
		left, err := parseRecord(data)
		leader := identity{left.Pid, left.Start}
		switch {
		case err == nil && left.Boot == r.boot && left.Pid == 0:
			kept[base] = true
			unfinished = append(unfinished, unfinishedStart{left, files})
		case err != nil || left.Boot != r.boot || left.Policy == PolicyKeep || !leader.alive():
			os.Remove(files.record)
		default:
			r.log.Info("ending a process left by a predecessor", "container", left.Container, "pid", left.Pid)
			r.endLeftover(left, files.record)
		}
	}
	for _, entry := range entries {
		owner, ok := ownerOf(entry.Name())
		if !ok || owner.alive() || filepath.Ext(entry.Name()) == recordEnding {
			continue
		}
		name, _, _ := strings.Cut(strings.TrimPrefix(entry.Name(), "."), ".")
		if !kept[filepath.Join(r.config.StateDir, name)] {
			os.Remove(filepath.Join(r.config.StateDir, entry.Name()))
		}
	}
	if len(unfinished) > 0 {
		r.background(func() { r.endUnfinished(unfinished) })
	}
}

// unfinishedStart is a start during which a predecessor was killed.
type unfinishedStart struct {
	record
	files files
}

// endUnfinished ends what starts have come to that nobody saw the end of, whatever the policy: no client
// was ever told that its command runs.
//
// The runtime goes on without the streamshim that began it. While it lives, the command is its child. Once
// it has ended by itself it has written the pid. And if it was killed as well, what it started holds the
// pipes of the start.
func (r *Runner) endUnfinished(starts []unfinishedStart) {
	for _, start := range starts {
		if !start.forked() {
			r.log.Warn("a start that a predecessor began has not come to run its runtime", "container", start.Container)
		}
	}
	runtimes := findRuntimes(starts)
	for i, start := range starts {
		log := r.log.With("container", start.Container)
		ended := true
		if runtime := runtimes[i]; runtime.pid != 0 {
			log.Info("ending a start left by a predecessor", "runtime", runtime.pid)
			ended = newTree(runtime, start.InitPid, streamEnds{}).kill()
		}
		ends := streamEnds{pipes: map[string]bool{}}
		for _, pipe := range start.Pipes {
			ends.pipes[pipe] = true
		}
		leader := identity{pid: -1, start: start.Began} // no process has this pid, but pipes have holders
		if command, found := start.command(); found {
			log.Info("ending a process left by a predecessor", "pid", command.pid)
			leader = command
		}
		if !newTree(leader, start.InitPid, ends).kill() || !ended {
			log.Warn("processes of a start that a predecessor began survived SIGKILL; is the container paused, or I/O stuck?")
		}
		os.Remove(start.files.record)
		start.files.removeStart()
		os.Remove(start.files.socket)
	}
}

// forkTimeout bounds the time from fork to execve, which is milliseconds.
const forkTimeout = 10 * time.Second

// forked waits until no process is left that was forked to become the runtime and has not executed it.
func (s unfinishedStart) forked() bool {
	file, err := os.Open(s.files.record)
	if err != nil {
		return true
	}
	defer file.Close()
	for deadline := time.Now().Add(forkTimeout); unix.Flock(int(file.Fd()), unix.LOCK_EX|unix.LOCK_NB) == unix.EWOULDBLOCK; {
		if time.Now().After(deadline) {
			return false
		}
		time.Sleep(5 * time.Millisecond) // waiting in flock(2) has no deadline
	}
	return true
}

// command is the process whose pid the runtime has written. As the pid may be another's by now, it must
// have begun between the start and the writing, and be in the container's cgroup.
func (s unfinishedStart) command() (identity, bool) {
	pid, err := readPidFile(s.files.pid)
	if err != nil {
		return identity{}, false
	}
	info, err := os.Stat(s.files.pid)
	if err != nil {
		return identity{}, false
	}
	stat, err := readStat(pid)
	if err != nil || stat.zombie() || stat.start < s.Began || pid == s.InitPid {
		return identity{}, false
	}
	age := time.Since(info.ModTime()).Nanoseconds() / (int64(time.Second) / ticksPerSecond)
	if written := int64(ticksSinceBoot()) - age; int64(stat.start) > written+1 { // rounding
		return identity{}, false
	}
	t := newTree(identity{pid: -1}, s.InitPid, streamEnds{})
	t.cgroups = readCgroups(s.InitPid)
	return stat.identity, t.inCgroup(pid)
}

// findRuntimes returns the runtimes that still work on the starts, zero where there is none.
func findRuntimes(starts []unfinishedStart) []identity {
	deadline := time.Now().Add(forkTimeout)
	for {
		found, settled := lookForRuntimes(starts)
		if settled || time.Now().After(deadline) {
			return found
		}
		time.Sleep(5 * time.Millisecond) // nothing announces the end of an execve
	}
}

// lookForRuntimes looks once. A runtime is known by its command line, which names the start's files. It is
// not settled while there is a process that has none, as in the middle of execve. The command line is
// only read of processes in our own mount namespace: of others the reading itself can be held up (a command
// line is memory, and memory may be a file of FUSE).
func lookForRuntimes(starts []unfinishedStart) (found []identity, settled bool) {
	found = make([]identity, len(starts))
	own, err := os.Readlink("/proc/self/ns/mnt")
	if err != nil {
		return found, true
	}
	all, err := allProcesses()
	if err != nil {
		return found, true
	}
	settled = true
	for _, p := range all {
		dir := "/proc/" + strconv.Itoa(p.pid)
		if p.session != p.pid || p.zombie() || p.exiting {
			continue // runtimes are started in a session of their own
		}
		if namespace, err := os.Readlink(dir + "/ns/mnt"); err != nil || namespace != own {
			continue
		}
		line, err := os.ReadFile(dir + "/cmdline")
		if err != nil {
			continue
		}
		for i, start := range starts {
			if p.start < start.Began {
				continue
			}
			if len(line) == 0 {
				settled = false
			}
			if bytes.Contains(line, []byte("\x00"+start.files.pid+"\x00")) {
				found[i] = p.identity
			}
		}
	}
	return found, settled
}

// endLeftover ends a process as its policy says, in the background. It is no child of ours, so that
// its status is somebody else's affair.
func (r *Runner) endLeftover(left record, path string) {
	p := &Process{
		runner:    r,
		container: Container{ID: left.Container, InitPid: left.InitPid},
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
