package hostile

import (
	"bufio"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/streamshim/streamshim/internal/testutil"
	"github.com/streamshim/streamshim/pkg/workload"
	"github.com/streamshim/streamshim/test/internal/node"
)

// container is a real one, of runc, whose main process is the attacker unless it is said otherwise.
type container struct {
	workload.Container
	spec     *specs.Spec
	rootfs   string
	attacker *attacker // nil if the main process is another
}

// kubernetesCapabilities are what a container has that asks for nothing.
var kubernetesCapabilities = []string{
	"CAP_CHOWN", "CAP_DAC_OVERRIDE", "CAP_FSETID", "CAP_FOWNER", "CAP_MKNOD", "CAP_NET_RAW", "CAP_SETGID", "CAP_SETUID",
	"CAP_SETFCAP", "CAP_SETPCAP", "CAP_NET_BIND_SERVICE", "CAP_SYS_CHROOT", "CAP_KILL", "CAP_AUDIT_WRITE",
}

func setCapabilities(spec *specs.Spec, names []string) {
	spec.Process.Capabilities = &specs.LinuxCapabilities{Bounding: names, Effective: names, Permitted: names}
}

var (
	containers atomic.Int64
	template   = sync.OnceValues(func() ([]byte, error) {
		spec := exec.Command(runc(), "spec")
		spec.Dir = base
		if out, err := spec.CombinedOutput(); err != nil {
			return nil, fmt.Errorf("runc spec: %w: %s", err, out)
		}
		return os.ReadFile(filepath.Join(base, "config.json"))
	})
)

func runc() string { return filepath.Join(node.DefaultPrograms(), "runc") }

// newContainer runs a container as Kubernetes would, changed by the functions. Its main process is the
// attacker if the arguments are not changed.
func newContainer(t testing.TB, changes ...func(*specs.Spec)) *container {
	t.Helper()
	node.Require(t)
	data, err := template()
	if err != nil {
		t.Fatal(err)
	}
	spec := new(specs.Spec)
	if err := json.Unmarshal(data, spec); err != nil {
		t.Fatal(err)
	}
	bundle, root := newFolder(t), newFolder(t)
	c := &container{spec: spec, rootfs: filepath.Join(bundle, "rootfs")}
	for _, folder := range []string{"dev", "proc", "sys", "tmp", "etc", "work"} {
		if err := os.MkdirAll(filepath.Join(c.rootfs, folder), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Link(attackerProgram, filepath.Join(c.rootfs, "attacker")); err != nil {
		t.Fatal(err)
	}
	if err := os.Link(attackerProgram, filepath.Join(c.rootfs, "victim")); err != nil {
		t.Fatal(err)
	}
	for name, text := range map[string]string{"etc/passwd": "root:x:0:0:root:/:/\n", "etc/group": "root:x:0:\n", "runs": ""} {
		if err := os.WriteFile(filepath.Join(c.rootfs, name), []byte(text), 0o666); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Chmod(filepath.Join(c.rootfs, "runs"), 0o666); err != nil {
		t.Fatal(err)
	}

	id := fmt.Sprintf("hostile-%d-%d-", time.Now().UnixNano(), containers.Add(1))
	id += strings.Repeat("0", 64-len(id)) // as long as those of containerd
	spec.Root = &specs.Root{Path: c.rootfs}
	spec.Process.Terminal = false
	spec.Process.Args = nil
	spec.Process.Env = []string{"PATH=/", "INSIDE=1"}
	spec.Process.NoNewPrivileges = false
	spec.Linux.CgroupsPath = "/" + id
	setCapabilities(spec, kubernetesCapabilities)
	for _, change := range changes {
		change(spec)
	}
	serves := spec.Process.Args == nil
	if serves {
		spec.Process.Args = append([]string{"/attacker", "serve", hostFile}, foreignNamespaces(t, spec)...)
	}
	if data, err = json.Marshal(spec); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(bundle, "config.json"), data, 0o600); err != nil {
		t.Fatal(err)
	}
	pidFile := filepath.Join(bundle, "pid")
	run := exec.Command(runc(), "--root", root, "run", "--detach", "--bundle", bundle, "--pid-file", pidFile, id)
	run.Env = []string{"PATH=" + os.Getenv("PATH")}
	stdin, toAttacker, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	fromAttacker, stdout, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	run.Stdin, run.Stdout, run.Stderr = stdin, stdout, stdout
	err = run.Run()
	stdin.Close()
	stdout.Close()
	if err != nil {
		toAttacker.Close()
		text, _ := io.ReadAll(fromAttacker)
		t.Fatalf("runc run: %v: %s", err, text)
	}
	text, err := os.ReadFile(pidFile)
	if err != nil {
		t.Fatal(err)
	}
	pid, err := strconv.Atoi(string(text))
	if err != nil {
		t.Fatal(err)
	}
	c.Container = workload.Container{
		Target:  workload.Target{ContainerID: id},
		Runtime: runc(), Root: root, InitPid: pid, InitStartTime: startTime(t, pid), Process: spec.Process,
		UIDMappings: spec.Linux.UIDMappings, GIDMappings: spec.Linux.GIDMappings,
	}
	if serves {
		c.attacker = &attacker{t: t, commands: toAttacker, answers: bufio.NewReader(fromAttacker)}
	}
	t.Cleanup(func() {
		toAttacker.Close()
		fromAttacker.Close()
		// Once a subreaper, always: without a Runner nobody else reaps what lost its parent, and while one of the
		// container is a zombie its main process does not end.
		testutil.Eventually(t, "the container's processes end and are reaped", func() bool {
			_ = unix.Kill(pid, unix.SIGKILL)
			for reaped := 1; reaped > 0; {
				reaped, _ = unix.Wait4(-1, nil, unix.WNOHANG|unix.WALL, nil)
			}
			return unix.Kill(pid, 0) == unix.ESRCH
		})
		c.runc(t, "delete", "--force", id)
	})
	return c
}

// runc does something to the container.
func (c *container) runc(t testing.TB, arguments ...string) {
	t.Helper()
	if out, err := exec.Command(runc(), append([]string{"--root", c.Root}, arguments...)...).CombinedOutput(); err != nil {
		t.Errorf("runc %v: %v: %s", arguments, err, out)
	}
}

// processes counts what runs in the container, its main process included.
func (c *container) processes(t testing.TB) int {
	t.Helper()
	entries, err := os.ReadDir("/proc")
	if err != nil {
		t.Fatal(err)
	}
	number := 0
	want := "/" + c.ContainerID
	for _, entry := range entries {
		text, err := os.ReadFile(filepath.Join("/proc", entry.Name(), "cgroup"))
		if err == nil && strings.Contains(string(text), want) {
			if stat, err := os.ReadFile(filepath.Join("/proc", entry.Name(), "stat")); err == nil {
				if after := string(stat[strings.LastIndexByte(string(stat), ')')+1:]); !strings.HasPrefix(after, " Z") {
					number++
				}
			}
		}
	}
	return number
}

// runs is how often a victim that was told to count its runs has run.
func (c *container) runs(t testing.TB) int64 {
	t.Helper()
	info, err := os.Stat(filepath.Join(c.rootfs, "runs"))
	if err != nil {
		t.Fatal(err)
	}
	return info.Size()
}

// newFolder is t.TempDir for containers with a user namespace too.
func newFolder(t testing.TB) string {
	t.Helper()
	folder, err := os.MkdirTemp(base, "container")
	if err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(folder, 0o755); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(folder) })
	return folder
}

// startTime is field 22 of /proc/PID/stat.
func startTime(t testing.TB, pid int) uint64 {
	t.Helper()
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		t.Fatal(err)
	}
	fields := strings.Fields(string(text[strings.LastIndexByte(string(text), ')')+1:]))
	start, err := strconv.ParseUint(fields[19], 10, 64)
	if err != nil {
		t.Fatal(err)
	}
	return start
}

// foreignNamespaces are the links of this process's namespaces that the container does not share.
func foreignNamespaces(t testing.TB, spec *specs.Spec) []string {
	t.Helper()
	var links []string
	for _, namespace := range spec.Linux.Namespaces {
		name := map[specs.LinuxNamespaceType]string{
			specs.MountNamespace: "mnt", specs.PIDNamespace: "pid", specs.NetworkNamespace: "net", specs.IPCNamespace: "ipc",
			specs.UTSNamespace: "uts", specs.CgroupNamespace: "cgroup", specs.UserNamespace: "user",
		}[namespace.Type]
		link, err := os.Readlink("/proc/self/ns/" + name)
		if err != nil {
			t.Fatal(err)
		}
		links = append(links, link)
	}
	return links
}

// attacker is the main process of a container.
type attacker struct {
	t        testing.TB
	commands io.Writer
	answers  *bufio.Reader
}

func (a *attacker) say(command string) {
	a.t.Helper()
	if _, err := io.WriteString(a.commands, command+"\n"); err != nil {
		a.t.Fatalf("tell the attacker to %s: %v", command, err)
	}
}

func (a *attacker) hear() string {
	a.t.Helper()
	line, err := a.answers.ReadString('\n')
	if err != nil {
		a.t.Fatalf("the attacker said %q and then: %v", line, err)
	}
	return strings.TrimSuffix(line, "\n")
}

// begin starts an attack on all that appears in the container.
func (a *attacker) begin(attack string) {
	a.t.Helper()
	a.say("attack " + attack)
	if answer := a.hear(); answer != "ready" {
		a.t.Fatalf("the attacker says: %s", answer)
	}
}

// outcome is what an attack has come to.
type outcome struct {
	gained map[string]int // how often what
	met    map[string]int // how many entering processes each attack was made on
	seen   int            // processes
}

// end ends the attack.
func (a *attacker) end() outcome {
	a.t.Helper()
	a.say("stop")
	o := outcome{gained: map[string]int{}, met: map[string]int{}}
	for {
		line := a.hear()
		kind, rest, _ := strings.Cut(line, " ")
		number, what, _ := strings.Cut(rest, " ")
		n, err := strconv.Atoi(number)
		if err != nil {
			a.t.Fatalf("the attacker said %q", line)
		}
		switch kind {
		case "done":
			o.seen = n
			return o
		case "met":
			o.met[what] = n
		default:
			o.gained[what] = n
		}
	}
}
