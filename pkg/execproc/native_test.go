package execproc

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/contrib/seccomp"
	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/net/bpf"
	"golang.org/x/sys/unix"

	"github.com/streamshim/streamshim/pkg/execproc/internal/enter"
)

// defaultProfile is what Kubernetes calls RuntimeDefault, as containerd has it.
func defaultProfile(spec *specs.Spec) { spec.Linux.Seccomp = seccomp.DefaultProfile(spec) }

func asUser(spec *specs.Spec) {
	spec.Process.User = specs.User{UID: 1000, GID: 2000, AdditionalGids: []uint32{3000, 4000}}
}

func mayGainPrivileges(spec *specs.Spec) { spec.Process.NoNewPrivileges = false }

// What a native start comes to is what runc's exec comes to, in everything that the kernel tells of a
// process. This looks at commands, not at the program of the proof, and does the comparing again.
func TestNativeIsTheSame(t *testing.T) {
	if testEngine() == EngineRunc {
		t.Skip("compares both engines, once")
	}
	umask, score := uint32(0o027), 777
	for name, changes := range map[string][]func(*specs.Spec){
		"plain":                             nil,
		"user":                              {asUser},
		"privileges may grow":               {mayGainPrivileges},
		"user, privileges may grow":         {asUser, mayGainPrivileges},
		"profile":                           {defaultProfile},
		"profile, privileges may grow":      {defaultProfile, mayGainPrivileges},
		"profile, user":                     {asUser, defaultProfile},
		"profile, user, may grow":           {asUser, defaultProfile, mayGainPrivileges},
		"user namespace":                    {userNamespace},
		"user namespace, user, profile":     {userNamespace, asUser, defaultProfile},
		"user namespace, profile, may grow": {userNamespace, defaultProfile, mayGainPrivileges},
		"umask":                             {func(spec *specs.Spec) { spec.Process.User.Umask = &umask }},
		"oom score":                         {func(spec *specs.Spec) { spec.Process.OOMScoreAdj = &score }},
		"no capabilities":                   {func(spec *specs.Spec) { spec.Process.Capabilities = &specs.LinuxCapabilities{} }},
		"ambient capability": {asUser, func(spec *specs.Spec) {
			all := []string{"CAP_NET_BIND_SERVICE", "CAP_KILL"}
			spec.Process.Capabilities = &specs.LinuxCapabilities{Bounding: all, Effective: all, Permitted: all, Inheritable: all, Ambient: all}
		}},
		"many capabilities": {func(spec *specs.Spec) {
			var all []string
			for _, c := range capabilityNames {
				if c != "SYS_RESOURCE" { // which the tests' machine may not have
					all = append(all, "CAP_"+c)
				}
			}
			spec.Process.Capabilities = &specs.LinuxCapabilities{Bounding: all, Effective: all, Permitted: all}
		}},
		"limits": {func(spec *specs.Spec) {
			spec.Process.Rlimits = []specs.POSIXRlimit{{Type: "RLIMIT_NOFILE", Soft: 77, Hard: 88}, {Type: "RLIMIT_CORE", Soft: 0, Hard: 0}, {Type: "RLIMIT_NPROC", Soft: 500, Hard: 600}}
		}},
		"host's pid namespace": {func(spec *specs.Spec) { withoutNamespace(spec, specs.PIDNamespace) }},
		"host's network":       {func(spec *specs.Spec) { withoutNamespace(spec, specs.NetworkNamespace) }},
		"cgroup namespace":     {func(spec *specs.Spec) { withNamespace(spec, specs.CgroupNamespace) }},
		"read-only":            {func(spec *specs.Spec) { spec.Root.Readonly = true }},
		"directory":            {func(spec *specs.Spec) { spec.Process.Cwd = "/tmp" }},
		"environment": {asUser, func(spec *specs.Spec) {
			spec.Process.Env = []string{"PATH=/bin", "A=1", "HOME=/elsewhere", "B=", "A=2", "HOME=", "C==x"}
		}},
	} {
		t.Run(name, func(t *testing.T) {
			c := newContainer(t, changes...)
			took := map[Engine]snapshot{}
			filters := map[Engine][]enter.Filter{}
			for _, engine := range []Engine{EngineRunc, EngineNative} {
				r := newRunner(t, func(config *Config) { config.Engine = engine })
				command := Command{Args: shell("echo running; read line"), Env: []string{"OWN=x"}, Stdin: true, Stdout: true, Stderr: true}
				p, err := r.Start(context.Background(), c, command)
				if err != nil {
					t.Fatal(err)
				}
				defer p.Close()
				if p.Native() != (engine == EngineNative) {
					t.Errorf("%s: started natively: %v", engine, p.Native())
				}
				if _, err := p.Stdout().Read(make([]byte, 16)); err != nil {
					t.Fatal(err)
				}
				if took[engine], err = takeSnapshot(p.PID()); err != nil {
					t.Fatal(err)
				}
				if took[engine]["status Seccomp"] == "2" {
					if filters[engine], err = seccompFilters(p.PID()); err != nil {
						t.Fatal(err)
					}
				}
				result, err := r.RunSync(context.Background(), c, SyncCommand{Args: shell(`id; umask; ulimit -a; pwd; env; ls /proc/self/fd; cat /proc/keys; touch /tmp/x`)})
				if err != nil {
					t.Fatal(err)
				}
				took[engine]["inside"] = fmt.Sprintf("%s %s %d", result.Stdout, result.Stderr, result.ExitCode)
			}
			if differences := took[EngineRunc].differences(took[EngineNative]); len(differences) > 0 {
				t.Errorf("not the same:\n%s", strings.Join(differences, "\n"))
			}
			compareFilters(t, filters[EngineRunc], filters[EngineNative])
			if strings.Contains(name, "profile") && len(filters[EngineNative]) == 0 {
				t.Error("no seccomp filter")
			}
			if len(took[EngineNative]) < 50 || !strings.Contains(took[EngineNative]["environ"], "OWN=x") {
				t.Errorf("the snapshot does not tell enough: %v", took[EngineNative])
			}
		})
	}
}

// compareFilters runs both over all system calls. Two execs by runc itself have filters that do the same
// in another order.
func compareFilters(t *testing.T, want, got []enter.Filter) {
	t.Helper()
	if len(got) != len(want) {
		t.Fatalf("%d filters, not %d", len(got), len(want))
	}
	for i := range want {
		wanted, gotten := newFilterMachine(t, want[i]), newFilterMachine(t, got[i])
		for _, arch := range []uint32{unix.AUDIT_ARCH_X86_64, unix.AUDIT_ARCH_I386, unix.AUDIT_ARCH_AARCH64} {
			for _, base := range []uint32{0, 0x40000000} { // of x32
				for number := range uint32(600) {
					for _, arg := range []uint64{0, 1, 8, 0x7e020000, 0xffffffff, 1 << 32, 0x20000000, 16, 40} {
						w, g := wanted.run(t, arch, base+number, arg), gotten.run(t, arch, base+number, arg)
						if w != g {
							t.Fatalf("system call %d of %#x with %#x: %#x, not %#x", base+number, arch, arg, g, w)
						}
					}
				}
			}
		}
	}
}

type filterMachine struct{ vm *bpf.VM }

func newFilterMachine(t *testing.T, filter enter.Filter) filterMachine {
	t.Helper()
	var program []bpf.Instruction
	for b := filter.Instructions; len(b) > 0; b = b[8:] {
		raw := bpf.RawInstruction{Op: binary.NativeEndian.Uint16(b), Jt: b[2], Jf: b[3], K: binary.NativeEndian.Uint32(b[4:])}
		program = append(program, raw.Disassemble())
	}
	vm, err := bpf.NewVM(program)
	if err != nil {
		t.Fatal(err)
	}
	return filterMachine{vm}
}

// run returns the verdict on a system call all of whose arguments are arg.
func (m filterMachine) run(t *testing.T, arch, number uint32, arg uint64) int {
	t.Helper()
	// struct seccomp_data: words that the machine reads as the network has them.
	var data []byte
	for _, word := range []uint32{number, arch, 0, 0} {
		data = binary.BigEndian.AppendUint32(data, word)
	}
	for range 6 {
		data = binary.BigEndian.AppendUint32(binary.BigEndian.AppendUint32(data, uint32(arg)), uint32(arg>>32))
	}
	verdict, err := m.vm.Run(data)
	if err != nil {
		t.Fatal(err)
	}
	return verdict
}

func withoutNamespace(spec *specs.Spec, kind specs.LinuxNamespaceType) {
	var kept []specs.LinuxNamespace
	for _, namespace := range spec.Linux.Namespaces {
		if namespace.Type != kind {
			kept = append(kept, namespace)
		}
	}
	spec.Linux.Namespaces = kept
}

func withNamespace(spec *specs.Spec, kind specs.LinuxNamespaceType) {
	withoutNamespace(spec, kind)
	spec.Linux.Namespaces = append(spec.Linux.Namespaces, specs.LinuxNamespace{Type: kind})
}

// The proof finds whatever a native start would do differently. Each of these changes is a mistake that an
// engine could make.
func TestProofFindsMistakes(t *testing.T) {
	if testEngine() == EngineRunc {
		t.Skip("is about the native engine")
	}
	r := newRunner(t)
	c := newContainer(t, asUser, mayGainPrivileges, func(spec *specs.Spec) {
		umask := uint32(0o027)
		spec.Process.User.Umask = &umask
		spec.Process.Cwd = "/tmp"
		spec.Process.Rlimits = []specs.POSIXRlimit{{Type: "RLIMIT_NOFILE", Soft: 77, Hard: 88}}
		withNamespace(spec, specs.CgroupNamespace)
	}, defaultProfile)
	prove := func(mistake func(*plan)) error {
		t.Helper()
		p, err := newPlan(c)
		if err != nil {
			t.Fatal(err)
		}
		mistaken := mistake
		return r.native.prove(context.Background(), c, p, func() { mistaken(p) })
	}
	if err := prove(func(*plan) {}); err != nil {
		t.Fatalf("without a mistake: %v", err)
	}
	zero := uint32(0)
	worst := 1000
	for name, test := range map[string]struct {
		mistake func(*plan)
		want    string
	}{
		"uid":              {func(p *plan) { p.request.UID = 1001 }, "status Uid"},
		"gid":              {func(p *plan) { p.request.GID = 0 }, "status Gid"},
		"groups":           {func(p *plan) { p.request.Groups = p.request.Groups[:1] }, "status Groups"},
		"no groups":        {func(p *plan) { p.request.Groups = nil }, "status Groups"},
		"umask":            {func(p *plan) { p.request.Umask = &zero }, "status Umask"},
		"no_new_privs":     {func(p *plan) { p.request.NoNewPrivileges = true }, "status NoNewPrivs"},
		"bounding set":     {func(p *plan) { p.request.Capabilities.Bounding |= 1 << unix.CAP_SYS_ADMIN }, "status CapBnd"},
		"all capabilities": {func(p *plan) { p.request.Capabilities = nil }, "status CapBnd"},
		"ambient set": {func(p *plan) {
			p.request.Capabilities.Inheritable, p.request.Capabilities.Ambient = p.request.Capabilities.Permitted, p.request.Capabilities.Permitted
		}, "status CapAmb"},
		"no filter":         {func(p *plan) { p.request.Filters = nil }, "status Seccomp"},
		"filter twice":      {func(p *plan) { p.request.Filters = append(p.request.Filters, p.request.Filters[0]) }, "Seccomp_filters"},
		"another filter":    {func(p *plan) { p.request.Filters = []enter.Filter{allowAll()} }, "seccomp filters"},
		"oom score":         {func(p *plan) { p.request.OOMScoreAdj = &worst }, "oom_score_adj"},
		"directory":         {func(p *plan) { p.request.Directory = "/" }, "cwd"},
		"keyring":           {func(p *plan) { p.request.SessionKeyring = "" }, ""}, // not to be seen under this profile; see below
		"cgroup":            {func(p *plan) { p.request.Cgroups = p.request.Cgroups[1:] }, "cgroup"},
		"no cgroups":        {func(p *plan) { p.request.Cgroups, p.cgroup = nil, "" }, "cgroup"},
		"mount namespace":   {func(p *plan) { p.request.Namespaces &^= unix.CLONE_NEWNS }, "ns/mnt"},
		"pid namespace":     {func(p *plan) { p.request.Namespaces &^= unix.CLONE_NEWPID }, "ns/pid"},
		"network namespace": {func(p *plan) { p.request.Namespaces &^= unix.CLONE_NEWNET }, "ns/net"},
		"ipc namespace":     {func(p *plan) { p.request.Namespaces &^= unix.CLONE_NEWIPC }, "ns/ipc"},
		"uts namespace":     {func(p *plan) { p.request.Namespaces &^= unix.CLONE_NEWUTS }, "ns/uts"},
		"cgroup namespace":  {func(p *plan) { p.request.Namespaces &^= unix.CLONE_NEWCGROUP }, "ns/cgroup"},
	} {
		t.Run(name, func(t *testing.T) {
			err := prove(test.mistake)
			if test.want == "" {
				return
			}
			if err == nil || !strings.Contains(err.Error(), test.want) {
				t.Errorf("%v, want something about %q", err, test.want)
			}
		})
	}
	c = newContainer(t)
	if err := prove(func(p *plan) { p.request.SessionKeyring = "" }); err == nil || !strings.Contains(err.Error(), "answer") {
		t.Errorf("without the container's keyring: %v", err)
	}
	c = newContainer(t, userNamespace)
	if err := prove(func(p *plan) { p.request.Namespaces &^= unix.CLONE_NEWUSER }); err == nil {
		t.Error("without the container's user namespace: no error")
	}
}

// allowAll is a filter of one instruction, which allows everything.
func allowAll() enter.Filter { return oneInstruction(unix.SECCOMP_RET_ALLOW) }

func oneInstruction(result uint32) enter.Filter {
	const returnConstant = 0x06 // BPF_RET | BPF_K
	b := binary.NativeEndian.AppendUint16(nil, returnConstant)
	return enter.Filter{Instructions: binary.NativeEndian.AppendUint32(append(b, 0, 0), result)}
}

// A container that is to be started in otherwise than the native engine can is left to runc, and the
// reason is logged once.
func TestLeftToRuntime(t *testing.T) {
	if testEngine() == EngineRunc {
		t.Skip("is about the native engine")
	}
	priority := specs.LinuxIOPriority{Class: specs.IOPRIO_CLASS_BE, Priority: 7}
	for name, test := range map[string]struct {
		change func(*specs.Spec)
		then   func(*Container)
		want   string
	}{
		"io priority":      {change: func(spec *specs.Spec) { spec.Process.IOPriority = &priority }, want: "I/O priority"},
		"personality":      {change: func(spec *specs.Spec) { spec.Linux.Personality = &specs.LinuxPersonality{Domain: specs.PerLinux32} }, want: "personality"},
		"another spec":     {then: func(c *Container) { other := *c.Process; other.Scheduler = &specs.Scheduler{}; c.Process = &other }, want: "scheduler"},
		"SELinux":          {then: func(c *Container) { other := *c.Process; other.SelinuxLabel = "x"; c.Process = &other }, want: "SELinux"},
		"no state of runc": {then: func(c *Container) { moveRoot(t, c) }, want: "state"},
	} {
		t.Run(name, func(t *testing.T) {
			var log syncBuffer
			r := newRunner(t, func(config *Config) { config.Logger = slog.New(slog.NewTextHandler(&log, nil)) })
			change := test.change
			if change == nil {
				change = func(*specs.Spec) {}
			}
			c := newContainer(t, change)
			if test.then != nil {
				test.then(&c)
			}
			for range 3 {
				p, err := r.Start(context.Background(), c, Command{Args: []string{"true"}})
				if name == "no state of runc" || name == "another spec" || name == "SELinux" {
					if err == nil { // runc itself may not take it
						p.Close()
						<-p.Exited()
					}
					continue
				}
				if err != nil {
					t.Fatal(err)
				}
				<-p.Exited()
				if p.Native() || p.ExitCode() != 0 {
					t.Errorf("native %v, exit code %d", p.Native(), p.ExitCode())
				}
				p.Close()
			}
			if strings.Count(log.String(), "by its OCI runtime alone") != 1 || !strings.Contains(log.String(), test.want) {
				t.Errorf("log: %s", &log)
			}
		})
	}
}

// moveRoot has the runtime look for its states where there are none.
func moveRoot(t *testing.T, c *Container) { c.Root = t.TempDir() }

type syncBuffer struct {
	mu   sync.Mutex
	text bytes.Buffer
}

func (b *syncBuffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.text.Write(p)
}

func (b *syncBuffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.text.String()
}

// A state of a runc that knows more than this engine is no state to go by.
func TestRuncStateIsKnown(t *testing.T) {
	c := Container{ID: "c", InitPid: 12, InitStartTime: 34}
	const good = `{"id":"c","init_process_pid":12,"init_process_start":34,"rootless":false,"cgroup_paths":{"":"/sys/fs/cgroup/c"},
		"namespace_paths":{"NEWNET":"/proc/12/ns/net"},"intel_rdt_path":"","config":{"no_new_keyring":true,"seccomp":null,"scheduler":null}}`
	if state, err := parseRuncState([]byte(good), c); err != nil || state.newKeyring || state.seccomp || state.cgroups[""] != "/sys/fs/cgroup/c" {
		t.Fatalf("%+v, %v", state, err)
	}
	for change, want := range map[string]string{
		`"id":"c"|"id":"d"`:                               "of container",
		`"init_process_pid":12|"init_process_pid":13`:     "of container",
		`"init_process_start":34|"init_process_start":35`: "main process",
		`"rootless":false|"rootless":true`:                "rootless",
		`"intel_rdt_path":""|"intel_rdt_path":"/x"`:       "RDT",
		`"seccomp":null|"seccomp":{"listener_path":"/x"}`: "notifies",
		`"scheduler":null|"scheduler":{"policy":"x"}`:     "scheduler",
		`"scheduler":null|"invented":{"a":1}`:             "invented",
		`"rootless":false|"invented":true`:                "invented",
		`{"":"/sys/fs/cgroup/c"}|{}`:                      "no cgroup",
		`"config":{|"config":[`:                           "runc's state",
	} {
		from, to, _ := strings.Cut(change, "|")
		if !strings.Contains(good, from) {
			t.Fatalf("%q is not there", from)
		}
		if _, err := parseRuncState([]byte(strings.Replace(good, from, to, 1)), c); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v, want something about %q", to, err, want)
		}
	}
}

func FuzzRuncState(f *testing.F) {
	f.Add([]byte(`{"id":"c","init_process_pid":12,"cgroup_paths":{"":"/x"},"config":{"seccomp":{}}}`))
	f.Fuzz(func(t *testing.T, data []byte) {
		parseRuncState(data, Container{ID: "c", InitPid: 12}) //nolint:errcheck // it must not panic
	})
}

func TestRuncEnvironment(t *testing.T) {
	for _, test := range []struct {
		env, want []string
		find      bool
	}{
		{nil, []string{}, true},
		{[]string{"A=1", "B=2", "A=3"}, []string{"B=2", "A=3"}, true},
		{[]string{"HOME=/x"}, []string{"HOME=/x"}, false},
		{[]string{"HOME="}, []string{}, true},
		{[]string{"HOME=/x", "A=1", "HOME="}, []string{"A=1"}, true},
		{[]string{"HOME=", "HOME=/y"}, []string{"HOME=/y"}, false},
		{[]string{"A", "B=1"}, nil, false},
		{[]string{"=1"}, nil, false},
	} {
		env, find, err := runcEnvironment(test.env)
		if (err != nil) != (test.want == nil) || (err == nil && (find != test.find || !reflect.DeepEqual(env, test.want))) {
			t.Errorf("%q: %q, %v, %v", test.env, env, find, err)
		}
	}
}

// HOME is found in the container's /etc/passwd at the time of the exec, as runc does it: users are added
// by entrypoints.
func TestHomeIsLookedUpEachTime(t *testing.T) {
	for name, test := range map[string]struct{ passwd, want string }{
		"found":        {"root:x:0:0:root:/root:/bin/sh\nsomebody:x:1000:1000::/home/somebody:/bin/sh\n", "/home/somebody"},
		"not found":    {"root:x:0:0:root:/root:/bin/sh\n", "/"},
		"empty":        {"", "/"},
		"short line":   {"root\nsomebody:x:1000\n", ""},
		"blanks":       {"\n \n  somebody:x:1000:1000:Some Body:/home/some body \n", "/home/some body"},
		"first wins":   {"a:x:1000:1:::\nb:x:1000:1::/b:\n", ""},
		"no line end":  {"somebody:x:1000:1000::/last", "/last"},
		"not a number": {"weird:x:one:1::/weird:\nsomebody:x:1000:1000::/found:", "/found"},
	} {
		t.Run(name, func(t *testing.T) {
			r := newRunner(t)
			own := t.TempDir()
			passwd := filepath.Join(own, "passwd")
			writeFile(t, passwd, "root:x:0:0:root:/root:/bin/sh\n", 0o644)
			c := newContainer(t, asUser, func(spec *specs.Spec) {
				spec.Mounts = append(spec.Mounts, specs.Mount{Destination: "/etc/passwd", Type: "bind", Source: passwd, Options: []string{"rbind", "ro"}})
			})
			if home, _ := output(t, r, c, Command{Args: shell("echo $HOME")}); home != "/\n" {
				t.Errorf("at first %q", home)
			}
			if err := os.WriteFile(passwd, []byte(test.passwd), 0o644); err != nil { // the same inode
				t.Fatal(err)
			}
			if home, _ := output(t, r, c, Command{Args: shell("echo $HOME")}); home != test.want+"\n" {
				t.Errorf("%q, want %q", home, test.want)
			}
		})
	}
}

// With the engine auto the first two commands are runc's, and later ones native once the proof is done.
func TestAutoProvesInTheBackground(t *testing.T) {
	var native, runtime int
	r := newRunner(t, func(config *Config) {
		config.Engine = EngineAuto
		config.OnStart = func(isNative bool) {
			if isNative {
				native++
			} else {
				runtime++
			}
		}
	})
	c := newContainer(t, defaultProfile)
	run := func() bool {
		p, err := r.Start(context.Background(), c, Command{Args: []string{"true"}})
		if err != nil {
			t.Fatal(err)
		}
		defer p.Close()
		if exitCode(t, p) != 0 {
			t.Errorf("exit code %d", p.ExitCode())
		}
		return p.Native()
	}
	if run() || run() {
		t.Error("native before there was a reason to")
	}
	eventually(t, "a native start", run)
	if native != 1 || runtime < 2 {
		t.Errorf("told of %d native starts and %d others", native, runtime)
	}
}

// What "streamshim check" says of a machine on which these tests pass.
func TestCheckNative(t *testing.T) {
	if err := CheckNative(context.Background()); err != nil {
		t.Error(err)
	}
	ended, cancel := context.WithCancel(context.Background())
	cancel()
	if err := CheckNative(ended); !errors.Is(err, context.Canceled) {
		t.Errorf("when there is no time: %v", err)
	}
}

// A command cannot be named by way of a descriptor that only its start had open: from a folder of the
// host, such as a cgroup's, the way up leads out of the container (CVE-2024-21626).
func TestNoWayOut(t *testing.T) {
	r := newRunner(t)
	c := newContainer(t)
	start(t, r, c, Command{Args: []string{"true"}}) // proves the container
	for fd := range 32 {
		for _, program := range []string{"bin/true", "usr/bin/true"} {
			path := fmt.Sprintf("/proc/self/fd/%d/%s%s", fd, strings.Repeat("../", 12), program)
			p, err := r.Start(context.Background(), c, Command{Args: []string{path}})
			var failed *StartError
			if !errors.As(err, &failed) {
				t.Errorf("%s: %v", path, err)
			}
			if err == nil {
				p.Kill()
				p.Close()
			}
		}
	}
}

// A process that is killed on its way into the container is no command that was killed: the runtime
// starts it.
func TestKilledOnItsWay(t *testing.T) {
	if testEngine() == EngineRunc {
		t.Skip("is about the native engine")
	}
	r := newRunner(t)
	c := newContainer(t, mayGainPrivileges)
	start(t, r, c, Command{Args: []string{"true"}}) // proves the container
	container := r.native.lookup(c)
	broken := *container.plan
	const killProcess = 0x80000000 // SECCOMP_RET_KILL_PROCESS
	broken.request.Filters = []enter.Filter{oneInstruction(killProcess)}
	r.native.mu.Lock()
	container.plan = &broken
	r.native.mu.Unlock()
	for range 5 {
		p, err := r.Start(context.Background(), c, Command{Args: shell("exit 7")})
		if err != nil {
			t.Fatal(err)
		}
		if code := exitCode(t, p); code != 7 || p.Native() {
			t.Errorf("exit code %d, native %v", code, p.Native())
		}
		p.Close()
	}
	if failures := container.failures.Load(); failures != maxFailures {
		t.Errorf("%d failures; after %d the container is the runtime's", failures, maxFailures)
	}
}

// A container that is paused when its proof is due is proven later.
func TestProofWaitsForResume(t *testing.T) {
	if testEngine() == EngineRunc {
		t.Skip("is about the native engine")
	}
	r := newRunner(t)
	c := newContainer(t)
	runc(t, c, "pause", c.ID)
	if _, err := r.Start(context.Background(), c, Command{Args: []string{"true"}}); !errors.Is(err, ErrNotRunning) {
		t.Errorf("in a paused container: %v", err)
	}
	runc(t, c, "resume", c.ID)
	start(t, r, c, Command{Args: []string{"true"}}) // expects a native start
}

// A container that is paused at the worst moment, when it was looked at and before the process has
// joined it, does not hold up the start longer than it may take.
func TestPausedOnItsWay(t *testing.T) {
	if testEngine() == EngineRunc {
		t.Skip("is about the native engine")
	}
	r := newRunner(t)
	c := newContainer(t)
	start(t, r, c, Command{Args: []string{"true"}})
	container := r.native.lookup(c)
	blind := *container.plan
	blind.frozen = nil // so that it does not see the pause
	r.native.mu.Lock()
	container.plan = &blind
	r.native.mu.Unlock()
	runc(t, c, "pause", c.ID)
	marker := newMarker()
	ctx, cancel := context.WithTimeout(context.Background(), 200*time.Millisecond)
	defer cancel()
	if _, err := r.Start(ctx, c, Command{Args: []string{"sleep", marker}}); err == nil {
		t.Error("started in a paused container")
	}
	runc(t, c, "resume", c.ID)
	if _, code := output(t, r, c, Command{Args: []string{"true"}}); code != 0 {
		t.Errorf("after the pause: exit code %d", code)
	}
	if left := marked(t, marker); len(left) > 0 {
		t.Errorf("left: %v", left)
	}
}
