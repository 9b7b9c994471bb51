// Package proc reads /proc. A pid is trusted only while it names the same process, which its start time tells.
package proc

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// Identity names one process for good: the kernel reuses pids, but not with the same start time (field 22 of
// /proc/PID/stat, in clock ticks since boot).
type Identity struct {
	Pid   int
	Start uint64
}

// Stat is the part of /proc/PID/stat that is needed here.
type Stat struct {
	Identity
	Name    string
	State   byte
	Parent  int
	Session int
	Threads int  // that have not ended
	Exiting bool // has begun to exit
	Killed  bool // SIGKILL is pending; it will do nothing but exit
}

// Zombie reports whether the process has ended. A process of which only the first thread has ended looks the same,
// except that it has other threads.
func (p Stat) Zombie() bool { return p.State == 'X' || p.State == 'Z' && p.Threads <= 1 }

// ReadStat reads /proc/PID/stat. It works for zombies too.
func ReadStat(pid int) (Stat, error) {
	buffer := Buffers.Get().(*[]byte)
	defer Buffers.Put(buffer)
	data, err := ReadFile("/proc/"+strconv.Itoa(pid)+"/stat", buffer)
	if err != nil {
		return Stat{}, err
	}
	return ParseStat(data)
}

// Buffers holds buffers for ReadFile.
var Buffers = sync.Pool{New: func() any { buffer := make([]byte, 4<<10); return &buffer }}

// ReadFile reads a file of /proc into the buffer, growing it if necessary. It makes half the system calls of
// os.ReadFile, and thousands of files are read when many sessions end at once.
func ReadFile(path string, buffer *[]byte) ([]byte, error) {
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

// ParseStat parses a line of proc_pid_stat(5). The program's name is in parentheses and may itself contain blanks
// and parentheses, so the last ')' counts.
func ParseStat(line []byte) (Stat, error) {
	open, end := bytes.IndexByte(line, '('), bytes.LastIndexByte(line, ')')
	if open < 1 || end < open {
		return Stat{}, errors.New("proc stat: no program name")
	}
	pid, err := strconv.Atoi(strings.TrimSpace(string(line[:open])))
	if err != nil {
		return Stat{}, fmt.Errorf("proc stat: pid: %w", err)
	}
	fields := strings.Fields(string(line[end+1:]))
	const state, ppid, session, flags, threads, start, pending = 0, 1, 3, 6, 17, 19, 28
	if len(fields) <= pending || len(fields[state]) != 1 {
		return Stat{}, errors.New("proc stat: too few fields")
	}
	stat := Stat{Name: string(line[open+1 : end]), State: fields[state][0]}
	stat.Pid = pid
	if stat.Parent, err = strconv.Atoi(fields[ppid]); err != nil {
		return Stat{}, fmt.Errorf("proc stat: parent: %w", err)
	}
	if stat.Session, err = strconv.Atoi(fields[session]); err != nil {
		return Stat{}, fmt.Errorf("proc stat: session: %w", err)
	}
	bits, err := strconv.ParseUint(fields[flags], 10, 64)
	if err != nil {
		return Stat{}, fmt.Errorf("proc stat: flags: %w", err)
	}
	const exiting = 4 // PF_EXITING, include/linux/sched.h
	stat.Exiting = bits&exiting != 0
	if stat.Threads, err = strconv.Atoi(fields[threads]); err != nil {
		return Stat{}, fmt.Errorf("proc stat: threads: %w", err)
	}
	if stat.Start, err = strconv.ParseUint(fields[start], 10, 64); err != nil {
		return Stat{}, fmt.Errorf("proc stat: start time: %w", err)
	}
	signals, err := strconv.ParseUint(fields[pending], 10, 64)
	if err != nil {
		return Stat{}, fmt.Errorf("proc stat: pending signals: %w", err)
	}
	stat.Killed = signals&(1<<(unix.SIGKILL-1)) != 0
	return stat, nil
}

// All reads the stat of every process. It skips those that end meanwhile.
func All() ([]Stat, error) {
	proc, err := os.Open("/proc")
	if err != nil {
		return nil, err
	}
	defer proc.Close()
	names, err := proc.Readdirnames(-1)
	if err != nil {
		return nil, err
	}
	processes := make([]Stat, 0, len(names))
	for _, name := range names {
		pid, err := strconv.Atoi(name)
		if err != nil {
			continue
		}
		stat, err := ReadStat(pid)
		if errors.Is(err, unix.EMFILE) || errors.Is(err, unix.ENFILE) {
			return nil, err // otherwise some would seem to have ended
		}
		if err == nil {
			processes = append(processes, stat)
		}
	}
	return processes, nil
}

// OwnChildren returns the children of this process, of all its threads. It neither reads nor returns those for
// which known, if not nil, returns true.
func OwnChildren(known func(pid int) bool) ([]Stat, error) {
	if known == nil {
		known = func(int) bool { return false }
	}
	pids, err := ChildrenOf(os.Getpid(), Many)
	if errors.Is(err, errNoChildrenFile) {
		children, err := childrenByScan()
		return slices.DeleteFunc(children, func(p Stat) bool { return known(p.Pid) }), err
	}
	if err != nil {
		return nil, err
	}
	var children []Stat
	for _, pid := range pids {
		if known(pid) {
			continue
		}
		if stat, err := ReadStat(pid); err == nil {
			children = append(children, stat)
		}
	}
	return children, nil
}

// errNoChildrenFile is returned by ChildrenOf on a kernel without CONFIG_PROC_CHILDREN.
var errNoChildrenFile = errors.New("this kernel does not list the children of processes (CONFIG_PROC_CHILDREN)")

// Many is a number of threads for a process that may have more than one.
const Many = 2

// ChildrenOf returns the pids of a process's children, each of which belongs to one of its threads. While children
// end, the kernel may omit others (proc_pid_children(5)). A process that has ended has none.
func ChildrenOf(pid, threads int) ([]int, error) {
	dir := "/proc/" + strconv.Itoa(pid) + "/task/"
	tasks := []string{strconv.Itoa(pid)}
	if threads > 1 {
		names, err := readNames(dir)
		if err != nil {
			return nil, err
		}
		tasks = names
	}
	buffer := Buffers.Get().(*[]byte)
	defer Buffers.Put(buffer)
	var children []int
	for _, task := range tasks {
		list, err := ReadFile(dir+task+"/children", buffer)
		if Gone(err) {
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
	if Gone(err) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	defer file.Close()
	names, err := file.Readdirnames(-1)
	if Gone(err) {
		return nil, nil
	}
	return names, err
}

func childrenByScan() ([]Stat, error) {
	all, err := All()
	if err != nil {
		return nil, err
	}
	var children []Stat
	for _, stat := range all {
		if stat.Parent == os.Getpid() {
			children = append(children, stat)
		}
	}
	return children, nil
}

// Signal sends the signals to exactly this process. It opens a pidfd first and checks the identity afterwards:
// from then on the pid may be reused without a signal going astray.
func (id Identity) Signal(signals ...unix.Signal) error {
	pidfd, err := unix.PidfdOpen(id.Pid, 0)
	if err != nil {
		return err
	}
	defer unix.Close(pidfd)
	now, err := ReadStat(id.Pid)
	if err != nil {
		return err
	}
	if now.Identity != id {
		return unix.ESRCH
	}
	for _, signal := range signals {
		if err := unix.PidfdSendSignal(pidfd, signal, nil, 0); err != nil {
			return err
		}
	}
	return nil
}

// Alive reports whether this very process still runs. A zombie does not. If it cannot tell, such as when there is
// no free descriptor, it returns true: signals check the identity anyway, and the next step fails with the true
// reason.
func (id Identity) Alive() bool {
	now, err := ReadStat(id.Pid)
	return !Gone(err) && (err != nil || now.Identity == id && !now.Zombie())
}

// Gone reports whether an error of ReadStat means that there is no such process.
func Gone(err error) bool { return errors.Is(err, os.ErrNotExist) || errors.Is(err, unix.ESRCH) }

// BootID identifies the current boot of the machine. Start times are comparable only within one boot.
func BootID() string {
	id, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return ""
	}
	return strings.TrimSpace(string(id))
}

// TicksSinceBoot returns the time since boot in the unit of /proc/PID/stat.
func TicksSinceBoot() (uint64, error) {
	const tick = 10 * time.Millisecond // USER_HZ is 100 on every architecture that Go runs on
	var now unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_BOOTTIME, &now); err != nil {
		return 0, fmt.Errorf("time since boot: %w", err)
	}
	return uint64(time.Duration(now.Nano()) / tick), nil
}

// SameMountNamespace reports whether two processes have the same mount namespace. A container shares its own with
// no other.
func SameMountNamespace(a, b int) bool {
	first, err := os.Readlink("/proc/" + strconv.Itoa(a) + "/ns/mnt")
	if err != nil {
		return false
	}
	second, err := os.Readlink("/proc/" + strconv.Itoa(b) + "/ns/mnt")
	return err == nil && first == second
}

// FirstOfNamespace returns the first process of pid's pid namespace, or 0 if it is unknown. It reports whether the
// namespace is this process's own, and then returns no process.
func FirstOfNamespace(pid int) (first int, same bool) {
	path := "/proc/" + strconv.Itoa(pid) + "/ns/pid"
	own, err := os.Readlink("/proc/self/ns/pid")
	if err != nil {
		return 0, false
	}
	if its, err := os.Readlink(path); err != nil || its == own {
		return 0, err == nil
	}
	fd, err := unix.Open(path, unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err == nil {
		defer unix.Close(fd)
		if first, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), unix.NS_GET_TGID_FROM_PIDNS, 1); errno == 0 {
			return int(first), false
		}
	}
	// The kernel is older than 6.11. The first process is usually the container's main process.
	status, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/status")
	if err != nil {
		return 0, false
	}
	_, rest, _ := strings.Cut(string(status), "\nNSpid:")
	line, _, _ := strings.Cut(rest, "\n")
	if numbers := strings.Fields(line); len(numbers) > 0 && numbers[len(numbers)-1] == "1" {
		return pid, false
	}
	return 0, false
}

// WithArgument returns the processes that have one of the paths among their arguments, by path. They are OCI
// runtimes that were told to start what the path describes, and are still in our mount namespace. Processes of
// containers are not read: their memory may be backed by a file system of their own that never answers.
func WithArgument(paths map[string]bool) map[string][]Stat {
	all, err := All()
	if err != nil {
		return nil
	}
	own, err := os.Readlink("/proc/self/ns/mnt")
	if err != nil {
		return nil
	}
	found := map[string][]Stat{}
	buffer := make([]byte, 4<<10)
	for _, p := range all {
		if its, err := os.Readlink("/proc/" + strconv.Itoa(p.Pid) + "/ns/mnt"); err != nil || its != own {
			continue
		}
		arguments, err := ReadFile("/proc/"+strconv.Itoa(p.Pid)+"/cmdline", &buffer)
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
