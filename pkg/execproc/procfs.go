package execproc

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"

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
	threads int  // that have not ended
	exiting bool // it has begun to end
	killed  bool // SIGKILL is on its way: all that it does any more is to end
}

// zombie reports whether the process has ended. One whose first thread alone has ended looks the same but
// for its other threads.
func (p procStat) zombie() bool { return p.state == 'X' || p.state == 'Z' && p.threads <= 1 }

// readStat reads /proc/PID/stat, which also works for a zombie.
func readStat(pid int) (procStat, error) {
	buffer := procBuffers.Get().(*[]byte)
	defer procBuffers.Put(buffer)
	data, err := readProc("/proc/"+strconv.Itoa(pid)+"/stat", buffer)
	if err != nil {
		return procStat{}, err
	}
	return parseStat(data)
}

var procBuffers = sync.Pool{New: func() any { buffer := make([]byte, 4<<10); return &buffer }}

// readProc reads a file of /proc into the buffer, which grows if it must. It asks for half of what
// os.ReadFile does, and thousands of these are read when many sessions end at once.
func readProc(path string, buffer *[]byte) ([]byte, error) {
	fd, err := unix.Open(path, unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("open %s: %w", path, err)
	}
	defer unix.Close(fd)
	for length := 0; ; {
		if length == len(*buffer) {
			*buffer = append(*buffer, make([]byte, len(*buffer))...)
		}
		n, err := unix.Read(fd, (*buffer)[length:])
		if err == unix.EINTR {
			continue
		}
		if err != nil {
			return nil, fmt.Errorf("read %s: %w", path, err)
		}
		if length += n; n == 0 {
			return (*buffer)[:length], nil
		}
	}
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
	const state, ppid, session, flags, threads, start, pending = 0, 1, 3, 6, 17, 19, 28
	if len(fields) <= pending || len(fields[state]) != 1 {
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
	if stat.threads, err = strconv.Atoi(fields[threads]); err != nil {
		return procStat{}, fmt.Errorf("proc stat: threads: %w", err)
	}
	if stat.start, err = strconv.ParseUint(fields[start], 10, 64); err != nil {
		return procStat{}, fmt.Errorf("proc stat: start time: %w", err)
	}
	signals, err := strconv.ParseUint(fields[pending], 10, 64)
	if err != nil {
		return procStat{}, fmt.Errorf("proc stat: pending signals: %w", err)
	}
	stat.killed = signals&(1<<(unix.SIGKILL-1)) != 0
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
		stat, err := readStat(pid)
		if errors.Is(err, unix.EMFILE) || errors.Is(err, unix.ENFILE) {
			return nil, err // some would look as if they had ended
		}
		if err == nil {
			processes = append(processes, stat)
		}
	}
	return processes, nil
}

// ownChildren lists the children of this process, whichever thread they belong to, but for those that are known
// already, of which nothing is read; known may be nil.
func ownChildren(known map[int]*watch) ([]procStat, error) {
	pids, err := childrenOf(os.Getpid(), many)
	if errors.Is(err, errNoChildrenFile) {
		children, err := childrenByScan()
		return slices.DeleteFunc(children, func(p procStat) bool { return known[p.pid] != nil }), err
	}
	if err != nil {
		return nil, err
	}
	var children []procStat
	for _, pid := range pids {
		if known[pid] != nil {
			continue
		}
		if stat, err := readStat(pid); err == nil {
			children = append(children, stat)
		}
	}
	return children, nil
}

// errNoChildrenFile is what childrenOf answers on a kernel without CONFIG_PROC_CHILDREN.
var errNoChildrenFile = errors.New("this kernel does not list the children of processes (CONFIG_PROC_CHILDREN)")

const many = 2 // threads

// childrenOf lists the pids of a process's children, each of which belongs to one of its threads. While
// children end the kernel may leave others out (proc_pid_children(5)). A process that has ended has none.
func childrenOf(pid, threads int) ([]int, error) {
	dir := "/proc/" + strconv.Itoa(pid) + "/task/"
	tasks := []string{strconv.Itoa(pid)}
	if threads > 1 {
		names, err := readNames(dir)
		if err != nil {
			return nil, err
		}
		tasks = names
	}
	buffer := procBuffers.Get().(*[]byte)
	defer procBuffers.Put(buffer)
	var children []int
	for _, task := range tasks {
		list, err := readProc(dir+task+"/children", buffer)
		if gone(err) {
			if _, missing := os.Stat(dir + task + "/stat"); missing == nil {
				return nil, errNoChildrenFile
			}
			continue // the thread has ended
		}
		if err != nil {
			return nil, err
		}
		for field := range bytes.FieldsSeq(list) {
			if child, err := strconv.Atoi(string(field)); err == nil {
				children = append(children, child)
			}
		}
	}
	return children, nil
}

func readNames(dir string) ([]string, error) {
	file, err := os.Open(dir)
	if gone(err) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	defer file.Close()
	names, err := file.Readdirnames(-1)
	if gone(err) {
		return nil, nil
	}
	return names, err
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

// sendSignal sends the signals to exactly this process. The descriptor is opened first and the identity
// checked afterwards: from then on the pid may be reused without a signal going astray.
func (id identity) sendSignal(signals ...unix.Signal) error {
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
	for _, signal := range signals {
		if err := unix.PidfdSendSignal(pidfd, signal, nil, 0); err != nil {
			return err
		}
	}
	return nil
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
