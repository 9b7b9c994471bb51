package ociruntime

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"

	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/streamshim/streamshim/pkg/workload"
)

// ProcessSpec returns the spec of a process that joins the container. It is a copy of the spec of the container's
// own process, so user, groups, capabilities, no-new-privileges, AppArmor, SELinux, rlimits (see CompleteLimits),
// scheduler and CPU affinity are the container's; exec paths that built the spec anew forgot some of them
// (kubernetes#73275). Only what makes it another command is changed.
func ProcessSpec(container *specs.Process, command workload.Command) (*specs.Process, error) {
	if container == nil {
		return nil, errors.New("the container's OCI spec has no process")
	}
	if len(command.Args) == 0 {
		return nil, errors.New("the command is empty")
	}
	for _, arg := range command.Args {
		if strings.ContainsRune(arg, 0) {
			return nil, errors.New("an argument contains a NUL byte")
		}
	}
	env, err := mergeEnv(container.Env, command.Env)
	if err != nil {
		return nil, err
	}
	spec := *container
	spec.Args = command.Args
	spec.CommandLine = ""
	spec.Env = env
	spec.Terminal = command.TTY
	spec.ConsoleSize = nil
	if command.TTY {
		if !hasEnv(env, "TERM") {
			spec.Env = append(spec.Env, "TERM=xterm")
		}
		// Without it, a program that asks for the size at once gets 0x0 (kubernetes#47990).
		if size := command.Size; size.Known() {
			spec.ConsoleSize = &specs.Box{Width: uint(size.Width), Height: uint(size.Height)}
		}
	}
	return &spec, nil
}

// limitNumbers maps the OCI spec's names to the resources of setrlimit(2).
var limitNumbers = map[string]int{
	"RLIMIT_CPU": unix.RLIMIT_CPU, "RLIMIT_FSIZE": unix.RLIMIT_FSIZE, "RLIMIT_DATA": unix.RLIMIT_DATA,
	"RLIMIT_STACK": unix.RLIMIT_STACK, "RLIMIT_CORE": unix.RLIMIT_CORE, "RLIMIT_RSS": unix.RLIMIT_RSS,
	"RLIMIT_NPROC": unix.RLIMIT_NPROC, "RLIMIT_NOFILE": unix.RLIMIT_NOFILE, "RLIMIT_MEMLOCK": unix.RLIMIT_MEMLOCK,
	"RLIMIT_AS": unix.RLIMIT_AS, "RLIMIT_LOCKS": unix.RLIMIT_LOCKS, "RLIMIT_SIGPENDING": unix.RLIMIT_SIGPENDING,
	"RLIMIT_MSGQUEUE": unix.RLIMIT_MSGQUEUE, "RLIMIT_NICE": unix.RLIMIT_NICE, "RLIMIT_RTPRIO": unix.RLIMIT_RTPRIO,
	"RLIMIT_RTTIME": unix.RLIMIT_RTTIME,
}

// mayRaiseLimits reports whether this process has CAP_SYS_RESOURCE.
var mayRaiseLimits = sync.OnceValue(func() bool {
	header := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var sets [2]unix.CapUserData
	return unix.Capget(&header, &sets[0]) == nil && sets[0].Effective&(1<<unix.CAP_SYS_RESOURCE) != 0
})

// CompleteLimits adds to a spec's limits those of the container's main process that the spec does not name. That
// process inherited them from its runtime; a command would inherit streamshim's, which systemd may set
// differently. It skips limits that cannot be read, and those above this process's own hard limit if it lacks
// CAP_SYS_RESOURCE.
func CompleteLimits(limits []specs.POSIXRlimit, initPid int) []specs.POSIXRlimit {
	complete := slices.Clone(limits)
	for name, resource := range limitNumbers {
		if slices.ContainsFunc(limits, func(l specs.POSIXRlimit) bool { return l.Type == name }) {
			continue
		}
		var limit, own unix.Rlimit
		if unix.Prlimit(initPid, resource, nil, &limit) != nil || unix.Prlimit(0, resource, nil, &own) != nil {
			continue
		}
		if limit.Max <= own.Max || mayRaiseLimits() {
			complete = append(complete, specs.POSIXRlimit{Type: name, Soft: limit.Cur, Hard: limit.Max})
		}
	}
	return complete
}

// containerOOMScoreAdj returns the container's oom_score_adj: that of the spec, or else of the main process. It is empty if
// that has ended.
func containerOOMScoreAdj(spec *specs.Process, initPid int) []byte {
	if spec.OOMScoreAdj != nil {
		return strconv.AppendInt(nil, int64(*spec.OOMScoreAdj), 10)
	}
	if initPid <= 0 {
		return nil
	}
	value, _ := os.ReadFile(oomScoreAdj(initPid)) //nolint:errcheck // it has ended
	return value
}

// giveOOMScoreAdj gives a process that still has the oom_score_adj of this one the container's. crun does not set it for a
// command, which would inherit streamshim's (-999 in its unit) and be the last in the container that the kernel
// kills. It is best effort: lowering the value needs CAP_SYS_RESOURCE. runc sets it itself.
func giveOOMScoreAdj(pid int, value []byte) {
	inherited, err := os.ReadFile(oomScoreAdj(os.Getpid()))
	now, nowErr := os.ReadFile(oomScoreAdj(pid))
	if len(value) > 0 && err == nil && nowErr == nil && bytes.Equal(now, inherited) {
		os.WriteFile(oomScoreAdj(pid), value, 0) //nolint:errcheck // see above
	}
}

func oomScoreAdj(pid int) string { return fmt.Sprintf("/proc/%d/oom_score_adj", pid) }

// mergeEnv overlays extra on base in a new slice. A name that extra sets keeps its place in base. Names repeated
// only in base stay as they are.
func mergeEnv(base, extra []string) ([]string, error) {
	merged := append(make([]string, 0, len(base)+len(extra)+1), base...)
	for i, variable := range extra {
		name, _, found := strings.Cut(variable, "=")
		if !found || name == "" || strings.ContainsRune(variable, 0) {
			// Do not show the variable itself: its value may be a secret.
			return nil, fmt.Errorf("environment variable %d of the command is not NAME=value", i)
		}
		kept := merged[:0]
		replaced := false
		for _, old := range merged {
			if oldName, _, _ := strings.Cut(old, "="); oldName != name {
				kept = append(kept, old)
			} else if !replaced {
				kept = append(kept, variable)
				replaced = true
			}
		}
		if !replaced {
			kept = append(kept, variable)
		}
		merged = kept
	}
	return merged, nil
}

func hasEnv(env []string, name string) bool {
	for _, variable := range env {
		if strings.HasPrefix(variable, name+"=") {
			return true
		}
	}
	return false
}
