package inside

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"os"
	"os/exec"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/creack/pty"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/remotecommand"
	utilexec "k8s.io/client-go/util/exec"
)

// TestNode is the life of streamshim on a node, in order: a later step needs the earlier ones.
func TestNode(t *testing.T) {
	before := files(t)
	for _, step := range []struct {
		name string
		run  func(t *testing.T)
	}{
		{"the machine", machine},
		{"install", install},
		{"exec and exit codes", execs},
		{"exec with crun", execsWithCrun},
		{"terminal", terminal},
		{"attach", attach},
		{"port-forward", portForward},
		{"probe", probe},
		{"identity", identity},
		{"apparmor", appArmor},
		{"reload", reload},
		{"restart of containerd", restartContainerd},
		{"kubelet", kubelet}, // not where the host has none for this architecture
		{"upgrade", upgrade},
		{"restart", restart},
		{"removal is refused", removalRefused},
		{"remove and purge", func(t *testing.T) { purge(t, before) }},
	} {
		if !t.Run(step.name, step.run) && step.name == "install" {
			t.Fatal("nothing else can be tried")
		}
	}
}

func machine(t *testing.T) {
	if out, err := shell("systemctl is-system-running --wait"); out != "running" {
		t.Errorf("the system is %s (%v): %s", out, err, must(t, "systemctl --failed --no-legend; systemctl list-jobs"))
	}
	if got := must(t, "stat -fc %%T /sys/fs/cgroup"); got != "cgroup2fs" {
		t.Errorf("/sys/fs/cgroup is %s", got)
	}
	if got := must(t, "cat /sys/module/apparmor/parameters/enabled"); got != "Y" {
		t.Errorf("AppArmor: %s", got)
	}
	seen("the machine", "%s, Linux %s, %s", must(t, ". /etc/os-release; echo $PRETTY_NAME"), must(t, "uname -rm"), must(t, "systemctl --version | head -n 1"))
	seen("cgroups", "v2, systemd cgroup driver")
	seen("container runtime", "%s, %s, %s", must(t, "containerd --version | cut -d ' ' -f 1,3"), must(t, "runc --version | head -n 1"), must(t, "crun --version | head -n 1"))
	seen("security modules", "%s", must(t, "cat /sys/kernel/security/lsm"))
}

func install(t *testing.T) {
	out := must(t, "dpkg -i %s/old.deb", payload)
	if !strings.Contains(out, "installed and not started") {
		t.Errorf("dpkg says %s", out)
	}
	if state, _ := shell("systemctl is-active streamshim"); state != "inactive" {
		t.Errorf("it is %s before anybody has started it", state)
	}
	if state, _ := shell("systemctl is-enabled streamshim"); state != "disabled" {
		t.Errorf("it is %s before anybody has enabled it", state)
	}
	// Not yet the kubelet's: one warning, no failure.
	check := must(t, "streamshim check")
	if n := len(regexp.MustCompile(`(?m)^warning`).FindAllString(check, -1)); n > 1 || strings.Contains(check, "\nfailed") {
		t.Errorf("check says:\n%s", check)
	}
	must(t, "systemctl enable --now streamshim")
	if state := must(t, "systemctl is-active streamshim"); state != "active" {
		t.Errorf("it is %s", state)
	}
	if version := must(t, "crictl -r %s version", streamshim); !strings.Contains(version, "containerd") {
		t.Errorf("crictl version: %s", version)
	}
	if warnings := must(t, "journalctl -u streamshim -u init.scope -o cat --no-pager | grep -i 'streamshim.service.*\\(ignor\\|unknown\\|deprecat\\)' || true"); warnings != "" {
		t.Errorf("systemd: %s", warnings)
	}
	seen("dpkg -i", "installed, not started; `streamshim check`: no failure; `systemctl enable --now`: ready when systemctl returns")
}

func execs(t *testing.T) { execBy(t, "", "exec with runc") }

func execsWithCrun(t *testing.T) { execBy(t, "crun", "exec with crun") }

func execBy(t *testing.T, handler, row string) {
	_, id := container{handler: handler}.run(t, streamshim)
	for _, transport := range []string{"spdy", "websocket"} {
		crictl := fmt.Sprintf("crictl -r %s exec -r %s ", streamshim, transport)
		out, err := shell(crictl + id + " sh -c 'echo out; echo err >&2; exit 7' 2>/tmp/err")
		if text := must(t, "cat /tmp/err"); err == nil || out != "out" || !strings.Contains(text, "err\n") || !strings.Contains(text, "exit code 7") {
			t.Errorf("%s: %v: stdout %q, stderr %q", transport, err, out, text)
		}
		must(t, "head -c 3000000 /dev/urandom >/tmp/in; %s -i %s cat </tmp/in >/tmp/out; cmp /tmp/in /tmp/out", crictl, id)
	}
	mine := must(t, "cat /sys/fs/cgroup/$(cut -d : -f 3 /proc/%s/cgroup)/cgroup.procs | wc -l", pid(t, id))
	if mine != "1" {
		t.Errorf("%s processes in the container after all execs", mine)
	}
	seen(row, "output, exit code, 3 MB through stdin, over SPDY and WebSocket; nothing left in the container")
}

func terminal(t *testing.T) {
	for _, handler := range []string{"", "crun"} {
		_, id := container{handler: handler}.run(t, streamshim)
		command := exec.Command("crictl", "-r", streamshim, "exec", "-it", id, "sh")
		console, err := pty.StartWithSize(command, &pty.Winsize{Rows: 33, Cols: 77})
		if err != nil {
			t.Fatal(err)
		}
		if _, err := io.WriteString(console, "tty; stty size; exit 5\n"); err != nil {
			t.Fatal(err)
		}
		out, _ := io.ReadAll(console) // ends with EIO when the last process has closed it
		if err := command.Wait(); err == nil || !bytes.Contains(out, []byte("exit code 5")) || !bytes.Contains(out, []byte("33 77")) || !bytes.Contains(out, []byte("/dev/pts/")) {
			t.Errorf("%q: %v: %q", handler, err, out)
		}
		_ = console.Close() // nothing is lost: it was read to its end
	}
	seen("exec -it", "a terminal of the client's size, exit code, with runc and crun")
}

func attach(t *testing.T) {
	_, id := container{image: "lab:latest", stdin: true}.run(t, streamshim)
	command := exec.Command("crictl", "-r", streamshim, "attach", "-i", id)
	stdin, err := command.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	stdout, err := command.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := command.Start(); err != nil {
		t.Fatal(err)
	}
	if _, err := io.WriteString(stdin, "hello\n"); err != nil {
		t.Fatal(err)
	}
	var got []byte
	for !bytes.Contains(got, []byte("you said: hello")) {
		part := make([]byte, 4096)
		n, err := stdout.Read(part)
		if got = append(got, part[:n]...); err != nil {
			t.Errorf("%v after %q", err, got)
			break
		}
	}
	_ = command.Process.Kill() // fails if it has ended
	_ = command.Wait()
	seen("attach -i", "a line is answered")
}

func portForward(t *testing.T) {
	pod, _ := container{image: "lab:latest"}.run(t, streamshim)
	command := exec.Command("crictl", "-r", streamshim, "port-forward", pod, "8080:80")
	if err := command.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() {
		_ = command.Process.Kill()
		_ = command.Wait()
	}()
	if err := await("GET", func() error {
		response, err := http.Get("http://127.0.0.1:8080/")
		if err != nil {
			return err
		}
		return errors.Join(func() error {
			if response.StatusCode != http.StatusOK {
				return errors.New(response.Status)
			}
			return nil
		}(), response.Body.Close())
	}); err != nil {
		t.Error(err)
	}
	seen("port-forward", "a server in the pod answers")
}

func probe(t *testing.T) {
	_, id := container{}.run(t, streamshim)
	if out := must(t, "crictl -r %s exec -s %s echo yes", streamshim, id); out != "yes" {
		t.Errorf("%q", out)
	}
	out, err := shell("crictl -r " + streamshim + " exec -s --timeout 3 " + id + " sh -c 'sleep 1000 & sleep 1000'")
	if err == nil {
		t.Errorf("a probe that hangs has passed: %s", out)
	}
	if err := await("the end of its processes", func() error {
		if left := must(t, "cat /sys/fs/cgroup/$(cut -d : -f 3 /proc/%s/cgroup)/cgroup.procs | wc -l", pid(t, id)); left != "1" {
			return fmt.Errorf("%s processes are in the container", left)
		}
		return nil
	}); err != nil {
		t.Error(err)
	}
	seen("ExecSync", "passes; one that hangs is ended with all of its processes")
}

// facts are what the kernel says of the process that looks.
const facts = `grep -E "^(Uid|Gid|Groups|Cap...|NoNewPrivs|Seccomp|Seccomp_filters):" /proc/self/status; cat /proc/self/attr/current; ` +
	`cat /proc/self/cgroup /proc/self/limits; for ns in /proc/self/ns/*; do readlink $ns; done`

// identity compares a command through streamshim with one that containerd starts.
func identity(t *testing.T) {
	for _, handler := range []string{"", "crun"} {
		_, id := container{handler: handler, memory: 64 << 20}.run(t, streamshim)
		ours := must(t, "crictl -r %s exec %s sh -c '%s'", streamshim, id, facts)
		theirs := must(t, "crictl -r %s exec %s sh -c '%s'", containerd, id, facts)
		if ours != theirs {
			t.Errorf("%q: through streamshim:\n%s\nby containerd:\n%s", handler, ours, theirs)
		}
		// As the specification says. With crun 1.8 the container itself, and a command that containerd starts, have the shim's, -998.
		want := must(t, "crictl -r %s inspect -o go-template --template '{{.info.runtimeSpec.process.oomScoreAdj}}' %s", containerd, id)
		if got := must(t, "crictl -r %s exec %s cat /proc/self/oom_score_adj", streamshim, id); got != want {
			t.Errorf("%q: a command has oom_score_adj %s, the container's specification %s", handler, got, want)
		}
		if !strings.Contains(ours, "Seccomp:\t2") {
			t.Errorf("no seccomp filter:\n%s", ours)
		}
		// Where the kernel counts it: the container's own scope under the pod's slice.
		cgroup := must(t, "cut -d : -f 3 /proc/%s/cgroup", pid(t, id))
		if !strings.Contains(cgroup, "kubepods-vm.slice/") || !strings.HasSuffix(cgroup, ".scope") && handler == "" {
			t.Errorf("the container's cgroup is %s", cgroup)
		}
		command := exec.Command("crictl", "-r", streamshim, "exec", id, "sleep", "86399")
		if err := command.Start(); err != nil {
			t.Fatal(err)
		}
		if err := await("the command", func() error {
			out, err := shell("pgrep -fx 'sleep 86399' | xargs -I PID cut -d : -f 3 /proc/PID/cgroup")
			// crun makes a cgroup of its own in the container's for what is executed.
			if err != nil || out != cgroup && !strings.HasPrefix(out, cgroup+"/") {
				return fmt.Errorf("it is in %q, the container in %q (%w)", out, cgroup, err)
			}
			return nil
		}); err != nil {
			t.Error(err)
		}
		_ = command.Process.Kill()
		_ = command.Wait()
		if err := await("its end", func() error {
			if out, _ := shell("pgrep -fx 'sleep 86399'"); out != "" {
				return fmt.Errorf("it runs on: %s", out)
			}
			return nil
		}); err != nil {
			t.Error(err)
		}
	}
	seen("identity", "ids, capabilities, seccomp, label, limits, namespaces and cgroup are those of containerd's own exec, with runc and crun")
	seen("client gone", "the command is ended")
}

const ownProfile = `#include <tunables/global>
profile vm-own flags=(attach_disconnected,mediate_deleted) {
  #include <abstractions/base>
  network, capability, file, umount, signal, ptrace,
  deny /forbidden/** rw,
}
`

// appArmor compares the profile of a command, and what it forbids, with containerd's own exec.
func appArmor(t *testing.T) {
	if err := os.WriteFile("/tmp/vm-own", []byte(ownProfile), 0o644); err != nil {
		t.Fatal(err)
	}
	must(t, "apparmor_parser --replace /tmp/vm-own")
	t.Cleanup(func() { must(t, "apparmor_parser --remove /tmp/vm-own; rm /tmp/vm-own") })
	for _, handler := range []string{"", "crun"} {
		for _, profile := range []struct{ name, json, want string }{
			{"the default", "", "cri-containerd.apparmor.d (enforce)"},
			{"RuntimeDefault", `{"profile_type": 0}`, "cri-containerd.apparmor.d (enforce)"},
			{"Unconfined", `{"profile_type": 1}`, "unconfined"},
			{"its own", `{"profile_type": 2, "localhost_ref": "localhost/vm-own"}`, "vm-own (enforce)"},
		} {
			t.Run(handler+" "+profile.name, func(t *testing.T) {
				_, id := container{handler: handler, apparmor: profile.json}.run(t, streamshim)
				ours := must(t, "crictl -r %s exec %s cat /proc/self/attr/current", streamshim, id)
				theirs := must(t, "crictl -r %s exec %s cat /proc/self/attr/current", containerd, id)
				main := must(t, "cat /proc/%s/attr/current", pid(t, id))
				synchronous := must(t, "crictl -r %s exec -s %s cat /proc/self/attr/current", streamshim, id)
				if ours != profile.want || theirs != ours || main != ours || synchronous != ours {
					t.Errorf("expected %q; exec has %q, containerd's exec %q, ExecSync %q, the container %q", profile.want, ours, theirs, synchronous, main)
				}
				// Not only the label: what the profile denies is denied.
				out, err := shell("crictl -r " + streamshim + " exec " + id + " sh -c 'mkdir /forbidden && echo x >/forbidden/x'")
				if denied := err != nil && strings.Contains(out, "ermission denied"); denied != (profile.name == "its own") {
					t.Errorf("a write that only the container's own profile denies: %v %s", err, out)
				}
			})
		}
	}
	seen("AppArmor", "a container with the default profile, with a profile of its own, and unconfined: exec and ExecSync have the same label as the container and as containerd's exec, and what the profile denies is denied; with runc and crun")
}

func reload(t *testing.T) {
	text, err := os.ReadFile("/etc/streamshim/config.toml")
	if err != nil {
		t.Fatal(err)
	}
	before := must(t, "systemctl show -p MainPID --value streamshim")
	_, id := container{}.run(t, streamshim)
	session := start(t, id)
	if err := os.WriteFile("/etc/streamshim/config.toml", append(text, "\n# a change\n"...), 0o644); err != nil {
		t.Fatal(err)
	}
	must(t, "systemctl reload streamshim")
	if after := must(t, "systemctl show -p MainPID --value streamshim"); after != before {
		t.Errorf("reload has started another process: %s, %s", before, after)
	}
	if err := await("the log of the reload", func() error {
		if out := must(t, "journalctl -u streamshim -o cat --no-pager | grep -ci reload || true"); out == "0" {
			return errors.New("there is none")
		}
		return nil
	}); err != nil {
		t.Error(err)
	}
	session.answers(t)
	session.end(t)
	seen("systemctl reload", "the same process, sessions go on")
}

func restartContainerd(t *testing.T) {
	_, id := container{}.run(t, streamshim)
	session := start(t, id)
	must(t, "systemctl restart containerd")
	session.answers(t)
	session.end(t)
	if err := await("exec afterwards", func() error {
		out, err := shell("crictl -r " + streamshim + " exec " + id + " echo again")
		if err != nil || out != "again" {
			return fmt.Errorf("%q: %w", out, err)
		}
		return nil
	}); err != nil {
		t.Error(err)
	}
	seen("systemctl restart containerd", "sessions go on, new ones work")
}

// session is an exec that answers lines.
type session struct {
	command *exec.Cmd
	stdin   io.WriteCloser
	stdout  io.Reader
	stderr  *bytes.Buffer
}

func start(t *testing.T, id string, flags ...string) *session {
	t.Helper()
	arguments := slices.Concat([]string{"-r", streamshim, "exec"}, flags, []string{"-i", id, "cat"})
	s := &session{command: exec.Command("crictl", arguments...), stderr: &bytes.Buffer{}}
	s.command.Stderr = s.stderr
	var err error
	if s.stdin, err = s.command.StdinPipe(); err != nil {
		t.Fatal(err)
	}
	if s.stdout, err = s.command.StdoutPipe(); err != nil {
		t.Fatal(err)
	}
	if err := s.command.Start(); err != nil {
		t.Fatal(err)
	}
	s.answers(t)
	return s
}

func (s *session) answers(t *testing.T) {
	t.Helper()
	line := fmt.Sprintln("line at", time.Now().UnixNano())
	got := make([]byte, len(line))
	if _, err := io.WriteString(s.stdin, line); err != nil {
		t.Fatal(err)
	}
	if _, err := io.ReadFull(s.stdout, got); err != nil || string(got) != line {
		t.Fatalf("%v: %q instead of %q", err, got, line)
	}
}

func (s *session) end(t *testing.T) {
	t.Helper()
	if err := s.stdin.Close(); err != nil {
		t.Error(err)
	}
	if err := s.command.Wait(); err != nil {
		t.Errorf("%v: %s", err, s.stderr)
	}
}

func needKubelet(t *testing.T) {
	t.Helper()
	if _, err := os.Stat(payload + "/kubelet"); err != nil {
		t.Skip(err)
	}
}

const kubeletUnit = `[Unit]
Description=kubelet
After=containerd.service
[Service]
ExecStart=` + payload + `/kubelet --config=/var/lib/kubelet/config.yaml --v=2
Restart=always
`

const kubeletConfiguration = `apiVersion: kubelet.config.k8s.io/v1beta1
kind: KubeletConfiguration
authentication: {anonymous: {enabled: true}, webhook: {enabled: false}}
authorization: {mode: AlwaysAllow}
cgroupDriver: systemd
containerRuntimeEndpoint: unix:///run/streamshim/streamshim.sock
staticPodPath: /etc/kubernetes/manifests
failSwapOn: false
resolvConf: ""
makeIPTablesUtilChains: false
localStorageCapacityIsolation: false
evictionHard: {memory.available: "1Mi", nodefs.available: "0%", imagefs.available: "0%"}
`

const staticPod = `apiVersion: v1
kind: Pod
metadata: {name: probed, namespace: default}
spec:
  terminationGracePeriodSeconds: 1
  containers:
  - name: main
    image: ` + imageHost + `/busybox:latest
    imagePullPolicy: IfNotPresent
    command: [sleep, "2147483647"]
    readinessProbe:
      exec: {command: [sh, -c, "date >>/probes"]}
      periodSeconds: 1
      timeoutSeconds: 60
`

// kubelet is one without an API server, whose pods are files.
func kubelet(t *testing.T) {
	needKubelet(t)
	for path, text := range map[string]string{
		"/etc/systemd/system/kubelet.service":   kubeletUnit,
		"/var/lib/kubelet/config.yaml":          kubeletConfiguration,
		"/etc/kubernetes/manifests/probed.yaml": staticPod,
	} {
		if err := write(path, text); err != nil {
			t.Fatal(err)
		}
	}
	must(t, "systemctl daemon-reload; systemctl start kubelet")
	failed := func() string {
		out, _ := shell("systemctl status kubelet --no-pager; journalctl -u kubelet -o cat --no-pager | grep -E '^[EF]' | tail -n 20")
		return out
	}
	var id string
	if err := await("the static pod", func() error {
		id = must(t, "crictl -r %s ps -q --label io.kubernetes.pod.name=probed-vm --state running", streamshim)
		if id == "" {
			return errors.New("it does not run")
		}
		return nil
	}); err != nil {
		t.Fatalf("%v: %s", err, failed())
	}
	if err := await("its probes", func() error {
		out, err := shell("crictl -r " + containerd + " exec " + id + " wc -l /probes")
		if count, _, _ := strings.Cut(out, " "); err != nil || len(count) == 1 && count < "3" {
			return fmt.Errorf("%w: %s", err, out)
		}
		return nil
	}); err != nil {
		t.Errorf("%v: %s", err, failed())
	}
	check := must(t, "streamshim check")
	if !regexp.MustCompile(`(?m)^ok +kubelet`).MatchString(check) {
		t.Errorf("check says:\n%s", check)
	}
	address := &url.URL{Scheme: "https", Host: "127.0.0.1:10250", Path: "/exec/default/probed-vm/main",
		RawQuery: url.Values{"command": {"sh", "-c", "read x; echo $x; exit 6"}, "input": {"1"}, "output": {"1"}, "error": {"1"}}.Encode()}
	config := &rest.Config{Host: address.Host, TLSClientConfig: rest.TLSClientConfig{Insecure: true}}
	webSocket, err := remotecommand.NewWebSocketExecutor(config, http.MethodGet, address.String())
	if err != nil {
		t.Fatal(err)
	}
	spdy, err := remotecommand.NewSPDYExecutor(config, http.MethodPost, address)
	if err != nil {
		t.Fatal(err)
	}
	for name, executor := range map[string]remotecommand.Executor{"WebSocket": webSocket, "SPDY": spdy} {
		var out, stderr bytes.Buffer
		err := executor.StreamWithContext(context.Background(), remotecommand.StreamOptions{Stdin: strings.NewReader("hello\n"), Stdout: &out, Stderr: &stderr})
		var code utilexec.CodeExitError
		if !errors.As(err, &code) || code.Code != 6 || out.String() != "hello\n" || stderr.Len() > 0 {
			t.Errorf("%s: %v, %q, %q", name, err, out.String(), stderr.String())
		}
	}
	must(t, "systemctl stop kubelet") // it ends pods that it has not made
	seen("kubelet", "%s, with a static pod: readiness probes each second and exec over WebSocket and SPDY go through streamshim; `streamshim check` says that it talks to streamshim", must(t, "%s/kubelet --version", payload))
}

func upgrade(t *testing.T) {
	config := must(t, "cat /etc/streamshim/config.toml")
	const mainPID = "systemctl show -p MainPID --value streamshim"
	before := must(t, mainPID)
	_, id := container{}.run(t, streamshim)
	all := startAll(t, id)
	// To a newer version, back to the older one, and to the newer one again.
	for _, version := range []string{"new", "old", "new"} {
		must(t, "dpkg -i --force-downgrade %s/%s.deb", payload, version)
		if installed := must(t, "streamshim version"); !strings.Contains(installed, version) {
			t.Errorf("%q is installed, want %q", installed, version)
		}
		if log := must(t, "journalctl -u streamshim -o cat --no-pager | grep 'this program has taken over' | tail -n 1"); !strings.Contains(log, "version="+version) ||
			!strings.Contains(log, fmt.Sprintf("carried=%d ended=0", all.number)) {
			t.Errorf("the log says %q, with %d sessions", log, all.number)
		}
		if after := must(t, mainPID); after != before {
			t.Errorf("systemd's main process was %s and is %s", before, after)
		}
		all.answer(t)
	}
	pause := must(t, "journalctl -u streamshim -o cat --no-pager | sed -n 's/.*this program has taken over.* pause=\\([^ ]*\\).*/\\1/p' | tail -n 3 | paste -s -d ' '")
	moved := all.end(t)
	if state := must(t, "systemctl is-active streamshim; systemctl is-enabled streamshim; systemctl is-system-running"); state != "active\nenabled\nrunning" {
		t.Errorf("after the upgrade it is %s", state)
	}
	if must(t, "cat /etc/streamshim/config.toml") != config {
		t.Error("the upgrade has changed the configuration")
	}
	if out := must(t, "crictl -r %s exec %s echo again", streamshim, id); out != "again" {
		t.Errorf("exec afterwards: %q", out)
	}
	seen("upgrade (dpkg -i)", "to a newer version, back, and again: the same main process, configuration kept, all %d sessions go on (exec over SPDY and WebSocket, a terminal, attach, a connection through port-forward; %d MB went through one exec meanwhile, no byte was lost); they stood still for %s", all.number, moved>>20, pause)
}

func restart(t *testing.T) {
	_, id := container{}.run(t, streamshim)
	session := start(t, id)
	must(t, "systemctl restart streamshim")
	// After shutdown.drain the session ends, with a status that says why.
	err := session.command.Wait()
	if err == nil || !strings.Contains(session.stderr.String(), "streamshim") {
		t.Errorf("the session that was cut ended with %v: %s", err, session.stderr)
	}
	if err := await("its process", func() error {
		if left := must(t, "cat /sys/fs/cgroup/$(cut -d : -f 3 /proc/%s/cgroup)/cgroup.procs | wc -l", pid(t, id)); left != "1" {
			return fmt.Errorf("%s processes are in the container", left)
		}
		return nil
	}); err != nil {
		t.Error(err)
	}
	if out := must(t, "crictl -r %s exec %s echo again", streamshim, id); out != "again" {
		t.Errorf("exec afterwards: %q", out)
	}
	seen("systemctl restart", "a session ends after `shutdown.drain` with a status, its process with it; exec works when systemctl returns")
}

func removalRefused(t *testing.T) {
	needKubelet(t)
	out, err := shell("dpkg --remove streamshim")
	if err == nil || !strings.Contains(out, "containerRuntimeEndpoint in /var/lib/kubelet/config.yaml") {
		t.Errorf("%v: %s", err, out)
	}
	if state := must(t, "systemctl is-active streamshim"); state != "active" {
		t.Errorf("afterwards it is %s", state)
	}
	seen("removal while the kubelet uses it", "refused, says where to change it, the service runs on")
}

// purge goes back as docs/install.md says, and compares the node with what it was.
func purge(t *testing.T, before []string) {
	if _, err := os.Stat("/var/lib/kubelet/config.yaml"); err == nil {
		must(t, "sed -i 's#unix:///run/streamshim/streamshim.sock#%s#' /var/lib/kubelet/config.yaml && systemctl restart kubelet", containerd)
	}
	running := must(t, "crictl ps -q")
	must(t, "dpkg --remove streamshim")
	if state, _ := shell("systemctl is-active streamshim"); state == "active" {
		t.Error("it still runs")
	}
	if out, err := shell("pgrep -x streamshim"); err == nil {
		t.Errorf("processes: %s", out)
	}
	must(t, "test -e /etc/streamshim/config.toml")
	must(t, "dpkg --purge streamshim")
	if left, _ := shell("dpkg -s streamshim 2>/dev/null; systemctl cat streamshim 2>/dev/null; pgrep -x streamshim"); left != "" {
		t.Errorf("left: %s", left)
	}
	for _, file := range files(t) {
		if !slices.Contains(before, file) {
			t.Errorf("left: %s", file)
		}
	}
	if after := must(t, "crictl ps -q"); after != running {
		t.Errorf("containers before %q, after %q", running, after)
	}
	if state, _ := shell("systemctl is-system-running"); state != "running" {
		t.Errorf("the system is %s: %s", state, must(t, "systemctl --failed --no-legend"))
	}
	seen("remove, purge", "the service is stopped, containers go on; after the purge no file, process or unit is left")
}

// files are all that have streamshim in their name, and all in the folders where it could have put something.
func files(t *testing.T) []string {
	t.Helper()
	return strings.Fields(must(t, `find / -xdev \( -path /proc -o -path /sys -o -path /mnt -o -path /tmp -o -path /var/lib/containerd -o -path /etc/containerd -o -path /run/containerd \) -prune -o -iname '*streamshim*' -print; find /run -iname '*streamshim*' -not -path '/run/containerd/*'; find /etc/systemd /usr/lib/systemd /usr/bin /usr/sbin /usr/share/man/man8 -not -type d -not -name kubelet.service`))
}
