package execproc

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// identity names one process for good: the kernel reuses pids, but not together with the time at
// which the process began (field 22 of /proc/PID/stat, in clock ticks since boot).
type identity struct {
	pid   int
	start uint64
}

// procStat is what this package needs of /proc/PID/stat.
type procStat struct {
	identity
	comm    string
	state   byte
	ppid    int
	session int
	exiting bool // it has begun to end
}

func (p procStat) zombie() bool { return p.state == 'Z' || p.state == 'X' }

// readStat reads /proc/PID/stat, which also works for a zombie.
func readStat(pid int) (procStat, error) {
	data, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/stat")
	if err != nil {
		return procStat{}, err
	}
	return parseStat(data)
}

// parseStat parses a line of proc_pid_stat(5). The name of the program stands in parentheses and
// may itself hold blanks and parentheses, so that the last ')' is the one that counts.
func parseStat(line []byte) (procStat, error) {
	open, end := bytes.IndexByte(line, '('), bytes.LastIndexByte(line, ')')
	if open < 1 || end < open {
		return procStat{}, errors.New("proc stat: no program name")
	}
	pid, err := strconv.Atoi(strings.TrimSpace(string(line[:open])))
	if err != nil {
		return procStat{}, fmt.Errorf("proc stat: pid: %w", err)
	}
	fields := strings.Fields(string(line[end+1:]))
	const state, ppid, session, flags, start = 0, 1, 3, 6, 19
	if len(fields) <= start || len(fields[state]) != 1 {
		return procStat{}, errors.New("proc stat: too few fields")
	}
	stat := procStat{comm: string(line[open+1 : end]), state: fields[state][0]}
	stat.pid = pid
	if stat.ppid, err = strconv.Atoi(fields[ppid]); err != nil {
		return procStat{}, fmt.Errorf("proc stat: parent: %w", err)
	}
	if stat.session, err = strconv.Atoi(fields[session]); err != nil {
		return procStat{}, fmt.Errorf("proc stat: session: %w", err)
	}
	bits, err := strconv.ParseUint(fields[flags], 10, 64)
	if err != nil {
		return procStat{}, fmt.Errorf("proc stat: flags: %w", err)
	}
	const exiting = 4 // PF_EXITING, include/linux/sched.h
	stat.exiting = bits&exiting != 0
	if stat.start, err = strconv.ParseUint(fields[start], 10, 64); err != nil {
		return procStat{}, fmt.Errorf("proc stat: start time: %w", err)
	}
	return stat, nil
}

// allProcesses reads the stat of every process. Those that end meanwhile are left out.
func allProcesses() ([]procStat, error) {
	proc, err := os.Open("/proc")
	if err != nil {
		return nil, err
	}
	defer proc.Close()
	names, err := proc.Readdirnames(-1)
	if err != nil {
		return nil, err
	}
	processes := make([]procStat, 0, len(names))
	for _, name := range names {
		pid, err := strconv.Atoi(name)
		if err != nil {
			continue
		}
		if stat, err := readStat(pid); err == nil {
			processes = append(processes, stat)
		}
	}
	return processes, nil
}

// ownChildren lists the children of this process, whichever thread they belong to.
func ownChildren() ([]procStat, error) {
	tasks, err := os.ReadDir("/proc/self/task")
	if err != nil {
		return nil, err
	}
	var children []procStat
	for _, task := range tasks {
		list, err := os.ReadFile("/proc/self/task/" + task.Name() + "/children")
		if errors.Is(err, os.ErrNotExist) {
			if _, gone := os.Stat("/proc/self/task/" + task.Name()); gone != nil {
				continue // the thread ended
			}
			return childrenByScan() // a kernel without CONFIG_PROC_CHILDREN
		}
		if err != nil {
			continue
		}
		for _, field := range strings.Fields(string(list)) {
			pid, err := strconv.Atoi(field)
			if err != nil {
				continue
			}
			if stat, err := readStat(pid); err == nil {
				children = append(children, stat)
			}
		}
	}
	return children, nil
}

func childrenByScan() ([]procStat, error) {
	all, err := allProcesses()
	if err != nil {
		return nil, err
	}
	var children []procStat
	for _, stat := range all {
		if stat.ppid == os.Getpid() {
			children = append(children, stat)
		}
	}
	return children, nil
}

// sendSignal signals exactly this process. The descriptor is opened first and the identity checked
// afterwards: from then on the pid may be reused without the signal going astray.
func (id identity) sendSignal(signal unix.Signal) error {
	pidfd, err := unix.PidfdOpen(id.pid, 0)
	if err != nil {
		return err
	}
	defer unix.Close(pidfd)
	now, err := readStat(id.pid)
	if err != nil {
		return err
	}
	if now.identity != id {
		return unix.ESRCH
	}
	return unix.PidfdSendSignal(pidfd, signal, nil, 0)
}

// alive reports whether this very process still runs; a zombie does not. When that cannot be known,
// because there is no descriptor free for instance, it is taken to run: what ends here is ended by its
// identity, and what is needed next will fail with the true reason.
func (id identity) alive() bool {
	now, err := readStat(id.pid)
	return !gone(err) && (err != nil || now.identity == id && !now.zombie())
}

// gone reports whether an error of readStat means that there is no such process.
func gone(err error) bool { return errors.Is(err, os.ErrNotExist) || errors.Is(err, unix.ESRCH) }

// bootID tells one boot of the machine from another; start times are only comparable within one.
func bootID() string {
	id, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return ""
	}
	return strings.TrimSpace(string(id))
}
