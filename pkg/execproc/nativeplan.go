package execproc

import (
	"errors"
	"fmt"
	"math"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/streamshim/streamshim/pkg/execproc/internal/enter"
)

// plan is how the native engine starts a process in one container.
type plan struct {
	// request is all of it but for the command: Args, Env, FindHome, and Limits, of which those that the
	// spec does not name are the main process's at the time.
	request enter.Request
	// seccomp says that the container has a profile.
	seccomp bool
	// cgroup is the directory of the version 2 cgroup, empty with version 1 alone.
	cgroup string
	// freezer is the file that says whether the container is paused, and the words for it.
	freezer string
	frozen  []string
}

// newPlan works out what must be done from the container's spec and from runc's state. It does not
// have the seccomp filters, which only runc makes. An error says why the container is to be left to
// its runtime.
func newPlan(c Container) (*plan, error) {
	spec := c.Process
	switch {
	case spec.SelinuxLabel != "":
		return nil, errors.New("the process has an SELinux label")
	case spec.Scheduler != nil:
		return nil, errors.New("the process has a scheduler of its own")
	case spec.IOPriority != nil:
		return nil, errors.New("the process has an I/O priority of its own")
	case spec.ExecCPUAffinity != nil:
		return nil, errors.New("commands have a CPU affinity of their own")
	}
	state, err := readRuncState(c)
	if err != nil {
		return nil, err
	}
	p := &plan{seccomp: state.seccomp, request: enter.Request{
		OOMScoreAdj:     spec.OOMScoreAdj,
		NoNewPrivileges: spec.NoNewPrivileges,
		Umask:           spec.User.Umask,
		Directory:       spec.Cwd,
		UID:             spec.User.UID,
		GID:             spec.User.GID,
		Groups:          spec.User.AdditionalGids,
		AppArmor:        spec.ApparmorProfile,
	}}
	if p.request.Directory == "" {
		return nil, errors.New("the process has no working directory")
	}
	if state.newKeyring {
		p.request.SessionKeyring = "_ses." + c.ID // runc's name for it
	}
	if p.request.Namespaces, err = namespacesToJoin(state.namespaces, c.InitPid); err != nil {
		return nil, err
	}
	if spec.Capabilities != nil {
		if p.request.Capabilities, err = capabilitySets(spec.Capabilities); err != nil {
			return nil, err
		}
	}
	return p, p.placeInCgroups(state.cgroups)
}

// namespaceFlags are runc's names of namespaces.
var namespaceFlags = map[string]struct {
	flag uint32
	file string // in /proc/PID/ns
}{
	"NEWNS":     {unix.CLONE_NEWNS, "mnt"},
	"NEWPID":    {unix.CLONE_NEWPID, "pid"},
	"NEWNET":    {unix.CLONE_NEWNET, "net"},
	"NEWIPC":    {unix.CLONE_NEWIPC, "ipc"},
	"NEWUTS":    {unix.CLONE_NEWUTS, "uts"},
	"NEWUSER":   {unix.CLONE_NEWUSER, "user"},
	"NEWCGROUP": {unix.CLONE_NEWCGROUP, "cgroup"},
	"NEWTIME":   {unix.CLONE_NEWTIME, "time"},
}

// namespacesToJoin are those of the container that are not ours already.
func namespacesToJoin(paths map[string]string, init int) (uint32, error) {
	var flags uint32
	for name := range paths {
		namespace, known := namespaceFlags[name]
		if !known {
			return 0, fmt.Errorf("the container has a namespace %q", name)
		}
		theirs, err := os.Readlink("/proc/" + strconv.Itoa(init) + "/ns/" + namespace.file)
		if err != nil {
			return 0, fmt.Errorf("namespaces of the container: %w", err)
		}
		ours, err := os.Readlink("/proc/self/ns/" + namespace.file)
		if err != nil {
			return 0, fmt.Errorf("own namespaces: %w", err)
		}
		if theirs != ours {
			flags |= namespace.flag
		}
	}
	return flags, nil
}

// placeInCgroups finds the files by which a process joins the container's cgroups: those of version 1,
// the one of version 2, or, on a node with both, all of them.
func (p *plan) placeInCgroups(paths map[string]string) error {
	for controller, path := range paths {
		if controller == "" {
			p.cgroup = path
			if p.freezer == "" {
				p.freezer, p.frozen = filepath.Join(path, "cgroup.freeze"), []string{"1"}
			}
			continue
		}
		if controller == "freezer" {
			p.freezer, p.frozen = filepath.Join(path, "freezer.state"), []string{"FROZEN", "FREEZING"}
		}
		tasks := filepath.Join(path, "tasks")
		if _, err := os.Stat(tasks); err != nil {
			return fmt.Errorf("cgroup of controller %s: %w", controller, err)
		}
		if !slices.Contains(p.request.Cgroups, tasks) { // cpu and cpuacct may be one
			p.request.Cgroups = append(p.request.Cgroups, tasks)
		}
	}
	slices.Sort(p.request.Cgroups)
	if p.freezer == "" {
		return errors.New("the container has no cgroup that says whether it is paused")
	}
	return nil
}

// paused reports whether the container is paused, or that it cannot be told. A process would be
// stopped on its way into it.
func (p *plan) paused() bool {
	state, err := os.ReadFile(p.freezer)
	return err != nil || slices.Contains(p.frozen, strings.TrimSpace(string(state)))
}

func limits(spec []specs.POSIXRlimit) ([]enter.Limit, error) {
	var all []enter.Limit
	for _, limit := range spec {
		number, known := limitNumbers[limit.Type]
		if !known {
			return nil, fmt.Errorf("the process has a limit %q", limit.Type)
		}
		all = append(all, enter.Limit{Resource: uint32(number), Soft: limit.Soft, Hard: limit.Hard})
	}
	return all, nil
}

// capabilityNames are capabilities(7) in the order of their numbers.
var capabilityNames = []string{
	"CHOWN", "DAC_OVERRIDE", "DAC_READ_SEARCH", "FOWNER", "FSETID", "KILL", "SETGID", "SETUID", "SETPCAP",
	"LINUX_IMMUTABLE", "NET_BIND_SERVICE", "NET_BROADCAST", "NET_ADMIN", "NET_RAW", "IPC_LOCK", "IPC_OWNER", "SYS_MODULE",
	"SYS_RAWIO", "SYS_CHROOT", "SYS_PTRACE", "SYS_PACCT", "SYS_ADMIN", "SYS_BOOT", "SYS_NICE", "SYS_RESOURCE", "SYS_TIME",
	"SYS_TTY_CONFIG", "MKNOD", "LEASE", "AUDIT_WRITE", "AUDIT_CONTROL", "SETFCAP", "MAC_OVERRIDE", "MAC_ADMIN", "SYSLOG",
	"WAKE_ALARM", "BLOCK_SUSPEND", "AUDIT_READ", "PERFMON", "BPF", "CHECKPOINT_RESTORE",
}

// capabilitySets translates names to masks. Like runc it leaves out what the kernel does not have.
func capabilitySets(spec *specs.LinuxCapabilities) (*enter.Capabilities, error) {
	text, err := os.ReadFile("/proc/sys/kernel/cap_last_cap")
	if err != nil {
		return nil, fmt.Errorf("capabilities of the kernel: %w", err)
	}
	last, err := strconv.ParseUint(strings.TrimSpace(string(text)), 10, 6)
	if err != nil {
		return nil, fmt.Errorf("capabilities of the kernel: %w", err)
	}
	sets := &enter.Capabilities{Last: uint32(last)}
	for _, set := range []struct {
		mask  *uint64
		names []string
	}{
		{&sets.Bounding, spec.Bounding},
		{&sets.Effective, spec.Effective},
		{&sets.Permitted, spec.Permitted},
		{&sets.Inheritable, spec.Inheritable},
		{&sets.Ambient, spec.Ambient},
	} {
		for _, name := range set.names {
			number := slices.Index(capabilityNames, strings.TrimPrefix(name, "CAP_"))
			if number < 0 {
				return nil, fmt.Errorf("the process has a capability %q", name)
			}
			if number <= int(last) {
				*set.mask |= 1 << number
			}
		}
	}
	return sets, nil
}

// runcEnvironment is what runc makes of a spec's environment: the last of a name wins, an empty HOME
// does not count (libcontainer/env.go, prepareEnv). findHome says that HOME must be looked up. It fails
// where runc does.
func runcEnvironment(env []string) (prepared []string, findHome bool, err error) {
	findHome = true
	last := make(map[string]int, len(env))
	for i, variable := range env {
		name, _, found := strings.Cut(variable, "=")
		if !found || name == "" {
			return nil, false, errors.New("an environment variable is not NAME=value")
		}
		last[name] = i
	}
	prepared = make([]string, 0, len(env))
	for i, variable := range env {
		name, value, _ := strings.Cut(variable, "=")
		if last[name] != i {
			continue
		}
		if name == "HOME" {
			if value == "" {
				continue
			}
			findHome = false
		}
		prepared = append(prepared, variable)
	}
	return prepared, findHome, nil
}

// filtersToInstall are the filters of a process that runc has started, without those that every child
// of this process has anyway, with the flags that must be given again.
func filtersToInstall(reference []enter.Filter, inherited int, speculation bool) []enter.Filter {
	if inherited > len(reference) {
		inherited = len(reference)
	}
	const specAllow = 1 << 2 // SECCOMP_FILTER_FLAG_SPEC_ALLOW, which the kernel does not tell of a filter
	var filters []enter.Filter
	for _, filter := range reference[inherited:] {
		if speculation {
			filter.Flags |= specAllow
		}
		filters = append(filters, filter)
	}
	return filters
}

// inheritedFilters is how many seccomp filters this process has.
func inheritedFilters() (int, error) {
	status, err := os.ReadFile("/proc/thread-self/status")
	if err != nil {
		return 0, err
	}
	for line := range strings.Lines(string(status)) {
		if value, found := strings.CutPrefix(line, "Seccomp_filters:"); found {
			n, err := strconv.ParseUint(strings.TrimSpace(value), 10, 31)
			return int(min(n, math.MaxInt32)), err
		}
	}
	return 0, errors.New("the kernel does not tell how many seccomp filters a process has")
}
