package main

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// account is a cgroup of one side's server processes. Its CPU time is that of all that ever ran in
// it: children that were reaped long ago count too, unlike in /proc/PID/stat of those that live.
type account struct {
	dir string
	// group is its twin for the scheduler, where cgroup v1 has that apart: systemd gives services
	// one, and without it the kernel would make a group of each session of processes (autogroup),
	// which shares a busy CPU between the sides by how often they call setsid.
	group string
}

// accountRoot finds where CPU time is accounted: cpuacct of cgroup v1, else cgroup v2, whose
// cpu.stat has the time also where no controller is switched on.
func accountRoot() (string, error) {
	if root := mountOf("cpuacct"); root != "" {
		return root, nil
	}
	mounts, err := os.ReadFile("/proc/self/mounts")
	if err != nil {
		return "", err
	}
	for line := range strings.Lines(string(mounts)) {
		if fields := strings.Fields(line); fields[2] == "cgroup2" {
			return fields[1], nil
		}
	}
	return "", errors.New("no cgroup file system is mounted")
}

// mountOf is where a controller of cgroup v1 is mounted, empty if it is not.
func mountOf(controller string) string {
	mounts, err := os.ReadFile("/proc/self/mounts")
	if err != nil {
		return ""
	}
	for line := range strings.Lines(string(mounts)) {
		fields := strings.Fields(line)
		if fields[2] == "cgroup" && slices.Contains(strings.Split(fields[3], ","), controller) {
			return fields[1]
		}
	}
	return ""
}

// newAccount makes a cgroup and moves the processes into it; what they start later is born there.
func newAccount(name string, pids ...int) (*account, error) {
	root, err := accountRoot()
	if err != nil {
		return nil, err
	}
	own := "streamshim-bench-" + name
	a := &account{dir: filepath.Join(root, own)}
	if mount := mountOf("cpu"); mount != "" && mount != root {
		a.group = filepath.Join(mount, own)
	}
	for _, dir := range a.dirs() {
		_ = os.Remove(dir) //nolint:errcheck // left by a run that was killed, if there is one
		if err := os.Mkdir(dir, 0o755); err != nil {
			return nil, err
		}
		for _, pid := range pids {
			if err := os.WriteFile(filepath.Join(dir, "cgroup.procs"), []byte(strconv.Itoa(pid)), 0); err != nil {
				return nil, fmt.Errorf("move process %d to its account: %w", pid, errors.Join(err, a.remove()))
			}
		}
	}
	return a, nil
}

func (a *account) dirs() []string {
	if a.group == "" {
		return []string{a.dir}
	}
	return []string{a.dir, a.group}
}

// accountOf returns the cgroup that a process is in.
func accountOf(pid int) (*account, error) {
	root, err := accountRoot()
	if err != nil {
		return nil, err
	}
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/cgroup", pid))
	if err != nil {
		return nil, err
	}
	own := ""
	for line := range strings.Lines(string(text)) {
		fields := strings.SplitN(strings.TrimSpace(line), ":", 3)
		for _, controller := range strings.Split(fields[1], ",") {
			if controller == "cpuacct" {
				return &account{dir: filepath.Join(root, fields[2])}, nil
			}
		}
		if fields[1] == "" {
			own = fields[2]
		}
	}
	return &account{dir: filepath.Join(root, own)}, nil
}

// used is the CPU time that was spent, user and system.
func (a *account) used() (time.Duration, error) {
	text, err := os.ReadFile(filepath.Join(a.dir, "cpuacct.usage"))
	if err == nil {
		nanoseconds, err := strconv.ParseInt(strings.TrimSpace(string(text)), 10, 64)
		return time.Duration(nanoseconds), err
	}
	text, err = os.ReadFile(filepath.Join(a.dir, "cpu.stat"))
	if err != nil {
		return 0, err
	}
	for line := range strings.Lines(string(text)) {
		if value, ok := strings.CutPrefix(line, "usage_usec "); ok {
			microseconds, err := strconv.ParseInt(strings.TrimSpace(value), 10, 64)
			return time.Duration(microseconds) * time.Microsecond, err
		}
	}
	return 0, fmt.Errorf("%s has no usage_usec", a.dir)
}

// processes are those that are in the cgroup now.
func (a *account) processes() ([]int, error) {
	text, err := os.ReadFile(filepath.Join(a.dir, "cgroup.procs"))
	if err != nil {
		return nil, err
	}
	var pids []int
	for _, field := range strings.Fields(string(text)) {
		pid, err := strconv.Atoi(field)
		if err != nil {
			return nil, err
		}
		pids = append(pids, pid)
	}
	return pids, nil
}

// memory is what the processes hold themselves in KiB: pages of files, such as of their programs,
// are not counted.
func (a *account) memory() (int64, error) {
	pids, err := a.processes()
	if err != nil {
		return 0, err
	}
	total := int64(0)
	for _, pid := range pids {
		text, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
		if errors.Is(err, os.ErrNotExist) || errors.Is(err, unix.ESRCH) {
			continue // ended meanwhile
		}
		if err != nil {
			return 0, err
		}
		for lines := bufio.NewScanner(bytes.NewReader(text)); lines.Scan(); {
			if value, ok := strings.CutPrefix(lines.Text(), "RssAnon:"); ok {
				kib, err := strconv.ParseInt(strings.Fields(value)[0], 10, 64)
				if err != nil {
					return 0, err
				}
				total += kib
			}
		}
	}
	return total, nil
}

// remove removes the cgroup, once its processes have been moved or have ended.
func (a *account) remove() error {
	var errs []error
	for _, dir := range a.dirs() {
		errs = append(errs, os.Remove(dir))
	}
	return errors.Join(errs...)
}

// accounts are several of them, added up.
type accounts []*account

func (all accounts) used() (time.Duration, error) {
	total := time.Duration(0)
	for _, a := range all {
		used, err := a.used()
		if err != nil {
			return 0, err
		}
		total += used
	}
	return total, nil
}

func (all accounts) memory() (int64, error) {
	total := int64(0)
	for _, a := range all {
		kib, err := a.memory()
		if err != nil {
			return 0, err
		}
		total += kib
	}
	return total, nil
}
