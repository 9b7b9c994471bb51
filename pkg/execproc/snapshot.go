package execproc

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/streamshim/streamshim/pkg/execproc/internal/enter"
)

// snapshot is everything that the kernel tells of a process about what it may do and where it is. Two
// processes with equal snapshots have the same identity.
type snapshot map[string]string

// changing are the lines of /proc/PID/status that differ from process to process. A line that the
// kernel may add one day counts until it is named here.
var changing = []string{
	"Name", "State", "Tgid", "Pid", "TracerPid", "FDSize", "NStgid", "NSpid", "NSpgid", "NSsid", "Threads", "SigQ",
	"VmPeak", "VmSize", "VmLck", "VmPin", "VmHWM", "VmRSS", "RssAnon", "RssFile", "RssShmem", "VmData", "VmStk", "VmExe", "VmLib",
	"VmPTE", "VmSwap", "HugetlbPages", "voluntary_ctxt_switches", "nonvoluntary_ctxt_switches",
}

// takeSnapshot looks at a process that has no threads and does nothing. The error says what could not
// be read.
func takeSnapshot(pid int) (snapshot, error) {
	s := snapshot{}
	dir := "/proc/" + strconv.Itoa(pid) + "/"
	status, err := os.ReadFile(dir + "status")
	if err != nil {
		return nil, err
	}
	for line := range strings.Lines(string(status)) {
		name, value, _ := strings.Cut(line, ":")
		if !slices.Contains(changing, name) {
			s["status "+name] = strings.TrimSpace(value)
		}
		if name == "NSpid" { // the numbers differ, how many there are does not
			s["depth of pid namespaces"] = strconv.Itoa(len(strings.Fields(value)))
		}
	}
	for _, name := range []string{
		"environ", "cgroup", "limits", "oom_score_adj", "personality", "coredump_filter", "timerslack_ns", "loginuid",
		"sessionid", "attr/current", "attr/apparmor/current", "uid_map", "gid_map", "setgroups", "projid_map", "timens_offsets", "cpuset",
	} {
		content, err := os.ReadFile(dir + name)
		if err != nil && !errors.Is(err, os.ErrNotExist) && !errors.Is(err, unix.EINVAL) { // of a module that is not active
			return nil, fmt.Errorf("read %s: %w", name, err)
		}
		s[name] = string(content)
	}
	links := []string{"cwd", "root", "exe"}
	namespaces, err := os.ReadDir(dir + "ns")
	if err != nil {
		return nil, err
	}
	for _, namespace := range namespaces {
		links = append(links, "ns/"+namespace.Name())
	}
	for _, name := range links {
		if s[name], err = os.Readlink(dir + name); err != nil {
			return nil, err
		}
	}
	var owner unix.Stat_t // not the user's, while the process is not dumpable
	if err := unix.Stat(dir+"environ", &owner); err != nil {
		return nil, err
	}
	s["owner"] = fmt.Sprintf("%d:%d", owner.Uid, owner.Gid)
	if s["descriptors"], err = describeDescriptors(dir); err != nil {
		return nil, err
	}
	if s["scheduling"], err = describeScheduling(pid); err != nil {
		return nil, err
	}
	return s, nil
}

// describeDescriptors lists what a process has open, but for the program itself, which one of the two
// ways to start it hands on.
func describeDescriptors(dir string) (string, error) {
	entries, err := os.ReadDir(dir + "fd")
	if err != nil {
		return "", err
	}
	var all []string
	for _, entry := range entries {
		target, err := os.Readlink(dir + "fd/" + entry.Name())
		if err != nil {
			return "", err
		}
		if strings.HasPrefix(target, "/memfd:streamshim-enter") {
			continue
		}
		kind, _, _ := strings.Cut(target, "[") // "pipe:[inode]"
		info, err := os.ReadFile(dir + "fdinfo/" + entry.Name())
		if err != nil {
			return "", err
		}
		flags := ""
		for line := range strings.Lines(string(info)) {
			if rest, found := strings.CutPrefix(line, "flags:"); found {
				flags = strings.TrimSpace(rest)
			}
		}
		all = append(all, entry.Name()+" "+kind+" "+flags)
	}
	slices.Sort(all)
	return strings.Join(all, ", "), nil
}

// describeScheduling says how a process is scheduled, and that it leads its session.
func describeScheduling(pid int) (string, error) {
	stat, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/stat")
	if err != nil {
		return "", err
	}
	fields := strings.Fields(string(stat[bytes.LastIndexByte(stat, ')')+1:]))
	const parent, group, session, terminal, priority, nice, exitSignal, realtime, policy = 1, 2, 3, 4, 15, 16, 35, 37, 38
	if len(fields) <= policy {
		return "", errors.New("proc stat: too few fields")
	}
	self := strconv.Itoa(pid)
	io, _, errno := unix.Syscall(unix.SYS_IOPRIO_GET, 1, uintptr(pid), 0) // 1: IOPRIO_WHO_PROCESS
	if errno != 0 {
		return "", fmt.Errorf("ioprio_get: %w", errno)
	}
	return fmt.Sprintf("parent %s, leads group %v and session %v, terminal %s, priority %s, nice %s, exit signal %s, realtime %s, policy %s, io priority %d",
		fields[parent], fields[group] == self, fields[session] == self, fields[terminal], fields[priority], fields[nice],
		fields[exitSignal], fields[realtime], fields[policy], io), nil
}

// differences names what is not the same, for an operator.
func (s snapshot) differences(other snapshot) []string {
	var names []string
	for name := range s {
		if s[name] != other[name] {
			names = append(names, fmt.Sprintf("%s is %q, not %q", name, oneLine(other[name]), oneLine(s[name])))
		}
	}
	for name := range other {
		if _, exists := s[name]; !exists {
			names = append(names, fmt.Sprintf("%s is %q, and not there otherwise", name, oneLine(other[name])))
		}
	}
	slices.Sort(names)
	return names
}

// seccompFilters reads the filters of a process, oldest first, by stopping it for a moment
// (PTRACE_SECCOMP_GET_FILTER, ptrace(2)). It needs a kernel with CONFIG_CHECKPOINT_RESTORE, the capabilities
// SYS_PTRACE and SYS_ADMIN, and that this process has no filter itself; else it is an error.
func seccompFilters(pid int) (filters []enter.Filter, err error) {
	runtime.LockOSThread() // the tracer is a thread
	defer runtime.UnlockOSThread()
	if err := ptrace(unix.PTRACE_SEIZE, pid, 0, 0); err != nil {
		return nil, fmt.Errorf("ptrace: %w", err)
	}
	if err := ptrace(unix.PTRACE_INTERRUPT, pid, 0, 0); err != nil {
		return nil, fmt.Errorf("ptrace: interrupt: %w", err) // it has ended, and with it the tracing
	}
	defer ptrace(unix.PTRACE_DETACH, pid, 0, 0) //nolint:errcheck // it has ended, then
	if err := awaitStop(pid); err != nil {
		return nil, err
	}
	for i := 0; ; i++ {
		count, err := ptraceCount(unix.PTRACE_SECCOMP_GET_FILTER, pid, uintptr(i), nil)
		if errors.Is(err, unix.ENOENT) {
			return filters, nil
		}
		if err != nil {
			return nil, fmt.Errorf("ptrace: read seccomp filter %d: %w", i, err)
		}
		instructions := make([]byte, count*8)
		if _, err := ptraceCount(unix.PTRACE_SECCOMP_GET_FILTER, pid, uintptr(i), unsafe.Pointer(&instructions[0])); err != nil {
			return nil, fmt.Errorf("ptrace: read seccomp filter %d: %w", i, err)
		}
		metadata := struct{ index, flags uint64 }{index: uint64(i)}
		if _, err := ptraceCount(unix.PTRACE_SECCOMP_GET_METADATA, pid, unsafe.Sizeof(metadata), unsafe.Pointer(&metadata)); err != nil {
			return nil, fmt.Errorf("ptrace: read flags of seccomp filter %d: %w", i, err)
		}
		filters = append(filters, enter.Filter{Flags: uint32(metadata.flags), Instructions: instructions})
	}
}

// stopTimeout bounds the wait for a process to stop; in a container that is being paused it does not.
const stopTimeout = 5 * time.Second

// awaitStop waits for a traced process to stop. It takes nothing but the stop: the end of the process
// is the reaper's.
func awaitStop(pid int) error {
	deadline := time.Now().Add(stopTimeout)
	for pause := 20 * time.Microsecond; ; pause = min(2*pause, 10*time.Millisecond) {
		var info unix.Siginfo
		err := unix.Waitid(unix.P_PID, pid, &info, unix.WSTOPPED|unix.WALL|unix.WNOHANG, nil)
		if err != nil && err != unix.EINTR {
			return fmt.Errorf("ptrace: wait for the stop: %w", err)
		}
		if err == nil && info.Signo != 0 {
			return nil
		}
		if time.Now().After(deadline) {
			return errors.New("ptrace: the process does not stop")
		}
		time.Sleep(pause) // a wait without a limit could not be ended
	}
}

func ptrace(request, pid int, address, data uintptr) error {
	_, _, errno := unix.Syscall6(unix.SYS_PTRACE, uintptr(request), uintptr(pid), address, data, 0, 0)
	if errno != 0 {
		return errno
	}
	return nil
}

// ptraceCount is a request that answers with a number.
func ptraceCount(request, pid int, address uintptr, data unsafe.Pointer) (int, error) {
	n, _, errno := unix.Syscall6(unix.SYS_PTRACE, uintptr(request), uintptr(pid), address, uintptr(data), 0, 0)
	if errno != 0 {
		return 0, errno
	}
	return int(n), nil
}
