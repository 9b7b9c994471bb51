package hostile

import (
	"context"
	"maps"
	"os"
	"slices"
	"strings"
	"testing"

	"github.com/containerd/containerd/v2/contrib/seccomp"
	"github.com/opencontainers/runtime-spec/specs-go"
)

// configuration is what the attacker's container, or that of the victim, is like.
type configuration struct {
	name   string
	change func(*specs.Spec)
	// sharesPID: the attacker is in another container of the same pid namespace (shareProcessNamespace).
	sharesPID bool
}

func withCapability(name string) func(*specs.Spec) {
	return func(spec *specs.Spec) { setCapabilities(spec, append(slices.Clone(kubernetesCapabilities), name)) }
}

func withUserNamespace(spec *specs.Spec) {
	spec.Linux.Namespaces = append(spec.Linux.Namespaces, specs.LinuxNamespace{Type: specs.UserNamespace})
	mapping := []specs.LinuxIDMapping{{ContainerID: 0, HostID: 200000, Size: 65536}}
	spec.Linux.UIDMappings, spec.Linux.GIDMappings = mapping, mapping
}

func withHostPID(spec *specs.Spec) {
	spec.Linux.Namespaces = slices.DeleteFunc(spec.Linux.Namespaces, func(n specs.LinuxNamespace) bool { return n.Type == specs.PIDNamespace })
}

var configurations = []configuration{
	{name: "default", change: func(*specs.Spec) {}},
	{name: "user", change: func(s *specs.Spec) { s.Process.User = specs.User{UID: 1000, GID: 1000} }},
	{name: "no_new_privs", change: func(s *specs.Spec) { s.Process.NoNewPrivileges = true }},
	{name: "RuntimeDefault", change: func(s *specs.Spec) { s.Linux.Seccomp = seccomp.DefaultProfile(s) }},
	{name: "CAP_SYS_PTRACE", change: withCapability("CAP_SYS_PTRACE")},
	{name: "CAP_SYS_ADMIN", change: withCapability("CAP_SYS_ADMIN")},
	{name: "hostPID", change: withHostPID},
	{name: "shareProcessNamespace", change: func(*specs.Spec) {}, sharesPID: true},
	{name: "user namespace", change: withUserNamespace},
	{name: "user namespace, CAP_SYS_PTRACE", change: func(s *specs.Spec) { withUserNamespace(s); withCapability("CAP_SYS_PTRACE")(s) }},
}

// passive are the attacks that only look, and so can be made together on one process.
var passive = []string{
	"root", "cwd", "exe", "fd", "mem", "maps", "environ", "auxv", "ns", "cmdline", "process_vm_readv", "pidfd_getfd", "kcmp", "exe-write",
}

// active are those that change the process.
var active = []string{"ptrace", "plant"}

// givenByRunc is the rule "no more than runc exec gives": why a container that gains this of an entering
// process gains it of runc exec as well. It is "" if nothing excuses it. What comes of the host's files,
// namespaces, environment and arguments is never excused: runc exec gives none of it.
func givenByRunc(configuration, what string) string {
	if strings.Contains(what, "the host") {
		return ""
	}
	// In the host's user namespace CAP_SYS_PTRACE is over all processes that the container sees, undumpable or not,
	// with more capabilities or not (ptrace_may_access in kernel/ptrace.c). runc's init is seen by the
	// container once it has joined all namespaces, and then still has all capabilities. So who has it can have
	// the host's by way of runc exec: such a container is to be trusted like a privileged one.
	if configuration == "CAP_SYS_PTRACE" {
		for _, kind := range []string{
			"exe:", "fd:", "mem", "maps", "auxv", "environ", "process_vm_readv", "pidfd_getfd:", "kcmp", "ptrace:", "plant:",
			"command: other capabilities", "command: other filters", "command: other no_new_privs",
		} {
			if strings.HasPrefix(what, kind) {
				return "CAP_SYS_PTRACE"
			}
		}
	}
	// runc's init becomes dumpable when it takes the command's user, with fs.suid_dumpable=1. Its capabilities
	// are the container's by then.
	if strings.HasSuffix(configuration, ", "+suidDumpable) && what != "command: other capabilities" {
		return suidDumpable
	}
	// CAP_SYS_ADMIN has CAP_PERFMON, with which the layout of any process may be read, and what it was executed with,
	// but not its memory (may_access_mm in kernel/fork.c).
	if configuration == "CAP_SYS_ADMIN" && slices.Contains([]string{"maps", "auxv", "environ"}, what) {
		return "CAP_PERFMON"
	}
	return ""
}

// Whatever a container does to a command on its way in, it gains nothing of the host and the command gets
// what the specification says.
func TestAttacks(t *testing.T) {
	attacks := append([]string{"together"}, active...)
	if *alone {
		attacks = append(slices.Clone(passive), active...)
	}
	if *only != "" {
		attacks = strings.Split(*only, ",")
	}
	for _, configuration := range configurations {
		if *configs != "" && !slices.Contains(strings.Split(*configs, ","), configuration.name) {
			continue
		}
		t.Run(configuration.name, func(t *testing.T) {
			attacker, victim := configuration.containers(t)
			for _, entrance := range entrances(t) {
				commands := *count
				if entrance.runner == nil { // runc exec is there to compare, not to be proven
					commands = max(2, commands/20)
				}
				for _, attack := range attacks {
					r := makeAttack(t, attack, attacker, victim, entrance, commands)
					r.configuration = configuration.name
					note(r)
					judge(t, r)
				}
			}
		})
	}
}

// containers runs the container of the attacker and that of the victim, mostly the same one.
func (c configuration) containers(t testing.TB) (attacker, victim *container) {
	t.Helper()
	attacker = newContainer(t, c.change)
	if !c.sharesPID {
		return attacker, attacker
	}
	victim = newContainer(t, c.change, func(s *specs.Spec) {
		s.Process.Args = []string{"/attacker", "idle"}
		for i := range s.Linux.Namespaces {
			if s.Linux.Namespaces[i].Type == specs.PIDNamespace {
				s.Linux.Namespaces[i].Path = namespacePath(attacker, "pid")
			}
		}
	})
	return attacker, victim
}

// attempts bounds how often an attack is made that came too late each time.
const attempts = 50

// makeAttack makes the attack while commands are started, and again until it has met one of them.
func makeAttack(t testing.TB, attack string, attacker, victim *container, e *entrance, commands int) row {
	t.Helper()
	r := attackOnce(t, attack, attacker, victim, e, commands)
	for range attempts - 1 {
		if len(r.tooLate()) == 0 {
			break
		}
		r.add(attackOnce(t, attack, attacker, victim, e, commands))
	}
	return r
}

// attackOnce makes the attack while commands are started.
func attackOnce(t testing.TB, attack string, attacker, victim *container, e *entrance, commands int) row {
	t.Helper()
	r := row{attack: attack, entrance: e.name, commands: commands, gained: map[string]int{}}
	attacker.attacker.begin(attack)
	for range commands {
		wait := startTimeout + patience
		if slices.Contains(active, attack) { // after which it may never end
			wait = startTimeout
		}
		ctx, cancel := context.WithTimeout(context.Background(), wait)
		output, err := e.enter(ctx, victim, "/victim", hostFile)
		cancel()
		var s state
		if err == nil {
			s, err = parseState(output)
		}
		if err != nil {
			if r.failed++; r.failed <= 3 {
				t.Logf("%s, %s: %v", attack, e.name, err)
			}
			continue
		}
		for _, wrong := range s.wrongs(t, victim) {
			if r.gained[wrong]++; r.gained[wrong] == 1 {
				t.Logf("%s, %s: %s: %v", attack, e.name, wrong, s)
			}
		}
	}
	end := attacker.attacker.end()
	maps.Copy(r.gained, end.gained)
	r.seen, r.met = end.seen, end.met
	return r
}

// judge fails the test for what was gained and is not given by runc exec.
func judge(t testing.TB, r row) {
	t.Helper()
	for what, times := range r.gained {
		if givenByRunc(r.configuration, what) == "" {
			t.Errorf("%s, %s, %s: gained %q, %d times with %d commands", r.attack, r.configuration, r.entrance, what, times, r.commands)
		}
	}
	if r.failed > 0 && !slices.Contains(active, r.attack) {
		t.Errorf("%s, %s, %s: %d of %d commands did not run", r.attack, r.configuration, r.entrance, r.failed, r.commands)
	}
	for _, attack := range r.tooLate() {
		t.Errorf("%s, %s, %s: the attack %s met none of %d commands", r.attack, r.configuration, r.entrance, attack, r.commands)
	}
}

// tooLate are the attacks of which none has met a command. An attacker does not come in time each time; the tables say how often.
func (r row) tooLate() []string {
	made := []string{r.attack}
	if r.attack == "together" {
		made = slices.Clone(passive)
	}
	return slices.DeleteFunc(made, func(attack string) bool { return r.met[attack] != 0 })
}

// add adds what came of making the same attack again.
func (r *row) add(again row) {
	r.commands, r.failed, r.seen = r.commands+again.commands, r.failed+again.failed, r.seen+again.seen
	for attack, times := range again.met {
		r.met[attack] += times
	}
	for what, times := range again.gained {
		r.gained[what] += times
	}
}

const suidDumpable = "suid_dumpable"

// Where the kernel makes processes dumpable that change their credentials, that of a command is not so all the same.
// This sets fs.suid_dumpable for the whole machine, for seconds, and so is not part of make test.
func TestSuidDumpable(t *testing.T) {
	if !*alone {
		t.Skip("make hostile does this")
	}
	const file = "/proc/sys/fs/suid_dumpable"
	before, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.WriteFile(file, before, 0o644) })
	if err := os.WriteFile(file, []byte("1"), 0o644); err != nil {
		t.Skipf("set suid_dumpable: %v", err)
	}
	for _, configuration := range configurations {
		if configuration.name != "user" && configuration.name != "user namespace" {
			continue
		}
		attacker, victim := configuration.containers(t)
		for _, entrance := range entrances(t) {
			for _, attack := range append([]string{"together"}, active...) {
				r := makeAttack(t, attack, attacker, victim, entrance, min(*count, 200))
				r.configuration = configuration.name + ", " + suidDumpable
				note(r)
				judge(t, r)
			}
		}
	}
}

func TestYama(t *testing.T) {
	const file = "/proc/sys/kernel/yama/ptrace_scope"
	scope, err := os.ReadFile(file)
	if err != nil {
		t.Skip("this kernel has no Yama: TestAttacks has run as with ptrace_scope 0")
	}
	for _, other := range []string{"0", "1"} {
		if other == strings.TrimSpace(string(scope)) {
			continue // TestAttacks has run with it
		}
		if err := os.WriteFile(file, []byte(other), 0o644); err != nil {
			t.Skipf("set ptrace_scope to %s: %v", other, err)
		}
		t.Cleanup(func() { os.WriteFile(file, scope, 0o644) })
		t.Run("ptrace_scope "+other, TestAttacks)
	}
}
