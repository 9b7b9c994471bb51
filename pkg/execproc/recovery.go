package execproc

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// record is what a successor must know of a running process, should this one be killed. It is one
// small file in the state directory, removed when the process ends.
type record struct {
	Container string `json:"container"`
	InitPid   int    `json:"initPid"`
	Pid       int    `json:"pid"`
	Start     uint64 `json:"start"` // clock ticks since boot, /proc/PID/stat
	Boot      string `json:"boot"`
	Policy    Policy `json:"policy"`
}

func (p *Process) writeRecord() error {
	data, err := json.Marshal(record{
		Container: p.container.ID, InitPid: p.container.InitPid,
		Pid: p.leader.pid, Start: p.leader.start, Boot: p.runner.boot, Policy: p.policy,
	})
	if err != nil {
		return fmt.Errorf("encode recovery record: %w", err)
	}
	return os.WriteFile(p.record, data, 0o600)
}

func parseRecord(data []byte) (record, error) {
	var found record
	if err := json.Unmarshal(data, &found); err != nil {
		return record{}, fmt.Errorf("recovery record: %w", err)
	}
	if found.Pid <= 1 {
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
	for _, entry := range entries {
		owner, ok := ownerOf(entry.Name())
		if !ok || owner.alive() {
			continue
		}
		path := filepath.Join(r.config.StateDir, entry.Name())
		if filepath.Ext(path) != ".record" {
			os.Remove(path)
			continue
		}
		data, err := os.ReadFile(path)
		if err != nil {
			continue
		}
		left, err := parseRecord(data)
		leader := identity{left.Pid, left.Start}
		if err != nil || left.Boot != r.boot || left.Policy == PolicyKeep || !leader.alive() {
			os.Remove(path)
			continue
		}
		r.log.Info("ending a process left by a predecessor", "container", left.Container, "pid", left.Pid)
		r.endLeftover(left, path)
	}
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
