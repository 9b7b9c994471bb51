package node_test

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"go.uber.org/goleak"
	"golang.org/x/sys/unix"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/streamshim/streamshim/test/internal/images"
	"github.com/streamshim/streamshim/test/internal/node"
)

// ownerVariable makes the test binary the owner of a node in this folder. The test kills it.
const ownerVariable = "STREAMSHIM_TEST_NODE_OWNER"

func TestMain(m *testing.M) {
	if dir := os.Getenv(ownerVariable); dir != "" {
		if err := ownNode(dir); err != nil {
			fmt.Println("failed:", err)
			os.Exit(1)
		}
		return
	}
	goleak.VerifyTestMain(m)
}

// ownNode starts a node with pods, reports it, and waits to be killed.
func ownNode(dir string) error {
	n, err := node.Start(context.Background(), node.Config{Dir: dir, Name: nameOf(dir)})
	if err != nil {
		return err
	}
	if err := populate(context.Background(), n); err != nil {
		return errors.Join(err, n.Close())
	}
	fmt.Println("up")
	_, err = bufio.NewReader(os.Stdin).ReadString('\n') // until the test ends, should it not kill this process
	return errors.Join(err, n.Close())
}

// populate creates one pod of every kind that leaves its own traces.
func populate(ctx context.Context, n *node.Node) error {
	user := int64(1234)
	for _, test := range []struct {
		pod       node.PodSpec
		container node.ContainerSpec
	}{
		{
			node.PodSpec{Name: "hostport", PortMappings: []*runtimeapi.PortMapping{{Protocol: runtimeapi.Protocol_TCP, ContainerPort: 80, HostPort: 0}, {Protocol: runtimeapi.Protocol_TCP, ContainerPort: 80, HostPort: 18080, HostIp: "127.0.0.9"}}},
			node.ContainerSpec{Image: node.Image(images.Lab)},
		},
		{node.PodSpec{Name: "hostpid", HostPID: true, HostNetwork: true}, node.ContainerSpec{}},
		{node.PodSpec{Name: "sharedpid", SharedPID: true}, node.ContainerSpec{RunAsUser: &user, ReadOnlyRoot: true}},
		{node.PodSpec{Name: "userns", UserNamespace: true}, node.ContainerSpec{}},
		{node.PodSpec{Name: "privileged", Privileged: true}, node.ContainerSpec{Privileged: true, Stdin: true, TTY: true}},
	} {
		pod, err := n.RunPod(ctx, test.pod)
		if err != nil {
			return err
		}
		if _, err := n.RunContainer(ctx, pod, test.container); err != nil {
			return err
		}
	}
	return nil
}

// traces returns what can be seen of a node on this machine, by kind.
func traces(t *testing.T, dir string) map[string][]string {
	t.Helper()
	name := nameOf(dir)
	found := map[string][]string{}
	mounts, err := os.ReadFile("/proc/mounts")
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(mounts)) {
		fields := strings.Fields(line)
		switch {
		case strings.HasPrefix(fields[1], dir+"/") && strings.Contains(fields[1], "netns"):
			found["network namespace"] = append(found["network namespace"], fields[1])
		case strings.HasPrefix(fields[1], dir+"/"):
			found["mount"] = append(found["mount"], fields[1])
		case strings.HasPrefix(fields[2], "cgroup"):
			walk := func(path string, entry fs.DirEntry, err error) error {
				if err == nil && entry.IsDir() {
					found["cgroup"] = append(found["cgroup"], path)
				}
				return nil
			}
			if err := filepath.WalkDir(filepath.Join(fields[1], "streamshim-"+name), walk); err != nil {
				t.Fatal(err)
			}
		}
	}
	processes, err := filepath.Glob("/proc/[0-9]*")
	if err != nil {
		t.Fatal(err)
	}
	for _, process := range processes {
		arguments, _ := os.ReadFile(process + "/cmdline") // it may have ended meanwhile
		cgroups, _ := os.ReadFile(process + "/cgroup")
		status, _ := os.ReadFile(process + "/status")
		if strings.Contains(string(status), "\nState:\tZ") {
			continue // ended: process 1 reaps orphans, in its own time
		}
		daemon := strings.Contains(string(arguments), dir+"/")
		member := strings.Contains(string(cgroups), "/streamshim-"+name+"/")
		if daemon {
			found["daemon"] = append(found["daemon"], process+" "+strings.ReplaceAll(string(arguments), "\x00", " "))
		}
		if member {
			found["container process"] = append(found["container process"], process+" "+strings.ReplaceAll(string(arguments), "\x00", " "))
		}
	}
	if _, err := os.Stat("/sys/class/net/ss-" + name); err == nil {
		found["bridge"] = []string{"ss-" + name}
	}
	rules, err := exec.Command("iptables", "-w", "-t", "nat", "-S").Output()
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(rules)) {
		if strings.Contains(line, `"streamshim-`+name) || strings.Contains(line, `\"streamshim-`+name) {
			found["iptables rule"] = append(found["iptables rule"], strings.TrimSpace(line))
		}
	}
	records, _ := filepath.Glob("/var/lib/cni/results/streamshim-" + name + "-*")
	if len(records) > 0 {
		found["CNI record"] = records
	}
	return found
}

var kindsOfTraces = []string{"network namespace", "mount", "cgroup", "daemon", "container process", "bridge", "iptables rule", "CNI record"}

func expectAllTraces(t *testing.T, dir string) {
	t.Helper()
	found := traces(t, dir)
	for _, kind := range kindsOfTraces {
		if len(found[kind]) == 0 {
			t.Errorf("the running node shows no %s: this test would not see one that is left", kind)
		}
	}
}

func expectNoTraces(t *testing.T, dir string) {
	t.Helper()
	for kind, list := range traces(t, dir) {
		t.Errorf("left: %d times %s:\n%s", len(list), kind, strings.Join(list, "\n"))
	}
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	for _, entry := range entries {
		if entry.Name() != "log" && entry.Name() != "lock" {
			t.Errorf("left in the folder: %s", entry.Name())
		}
	}
}

// testFolder returns a folder whose path is short enough for sockets. That of t.TempDir may be too long.
func testFolder(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "node")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		err := node.Cleanup(dir, t.Logf)
		if err == nil { // otherwise something may still be mounted there
			err = os.RemoveAll(dir)
		}
		if err != nil {
			t.Error(err)
		}
	})
	return dir
}

// nameOf returns a node's name that is unique on this machine: the digits that os.MkdirTemp has chosen.
func nameOf(dir string) string { return strings.TrimPrefix(filepath.Base(dir), "node") }

func TestStartTwiceInARow(t *testing.T) {
	node.Require(t)
	dir := testFolder(t)
	for range 2 {
		n, err := node.Start(t.Context(), node.Config{Dir: dir, Name: nameOf(dir), Logf: t.Logf})
		if err != nil {
			t.Fatal(err)
		}
		if err := populate(t.Context(), n); err != nil {
			t.Error(err)
		}
		expectAllTraces(t, dir)
		if err := n.Close(); err != nil {
			t.Fatal(err)
		}
		expectNoTraces(t, dir)
		if err := n.Close(); err != nil {
			t.Errorf("the second Close: %v", err)
		}
	}
}

func TestCleanupAfterOwnerWasKilled(t *testing.T) {
	node.Require(t)
	for _, containerdToo := range []bool{false, true} {
		t.Run(fmt.Sprintf("containerd killed too=%v", containerdToo), func(t *testing.T) {
			dir := testFolder(t)
			owner := exec.Command(os.Args[0])
			owner.Env = append(os.Environ(), ownerVariable+"="+dir)
			stdin, err := owner.StdinPipe()
			if err != nil {
				t.Fatal(err)
			}
			defer stdin.Close()
			stdout, err := owner.StdoutPipe()
			if err != nil {
				t.Fatal(err)
			}
			owner.Stderr = os.Stderr
			if err := owner.Start(); err != nil {
				t.Fatal(err)
			}
			if line, err := bufio.NewReader(stdout).ReadString('\n'); line != "up\n" {
				t.Errorf("the owner said %q, %v", line, err)
			}
			expectAllTraces(t, dir)
			if err := node.Cleanup(dir, t.Logf); !errors.Is(err, node.ErrInUse) {
				t.Errorf("Cleanup beside a living owner: %v, want ErrInUse", err)
			}
			if err := owner.Process.Kill(); err != nil {
				t.Fatal(err)
			}
			_ = owner.Wait() // killed, as intended
			if containerdToo {
				n, err := node.Open(t.Context(), dir, t.Logf)
				if err != nil {
					t.Fatal(err)
				}
				if err := n.KillContainerd(); err != nil {
					t.Fatal(err)
				}
				n.Detach()
			}
			if err := node.Cleanup(dir, t.Logf); err != nil {
				t.Fatal(err)
			}
			expectNoTraces(t, dir)
		})
	}
}

func TestDetachAndOpen(t *testing.T) {
	node.Require(t)
	dir := testFolder(t)
	if _, err := node.Open(t.Context(), dir, nil); !errors.Is(err, node.ErrNotRunning) {
		t.Errorf("Open of an empty folder: %v, want ErrNotRunning", err)
	}
	first, err := node.Start(t.Context(), node.Config{Dir: dir, Name: nameOf(dir), Logf: t.Logf})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := node.Open(t.Context(), dir, nil); !errors.Is(err, node.ErrInUse) {
		t.Errorf("Open beside its owner: %v, want ErrInUse", err)
	}
	pid := first.PID("containerd")
	first.Detach()
	second, err := node.Open(t.Context(), dir, t.Logf)
	if err != nil {
		t.Fatal(err)
	}
	if got := second.PID("containerd"); got != pid || pid == 0 {
		t.Errorf("containerd is process %d, was %d", got, pid)
	}
	if err := second.Close(); err != nil {
		t.Fatal(err)
	}
	expectNoTraces(t, dir)
}

func TestPodsSurviveContainerd(t *testing.T) {
	n := node.StartForTest(t, node.Config{Name: "survive"})
	pod, err := n.RunPod(t.Context(), node.PodSpec{})
	if err != nil {
		t.Fatal(err)
	}
	container, err := n.RunContainer(t.Context(), pod, node.ContainerSpec{Env: map[string]string{"COLOUR": "green"}})
	if err != nil {
		t.Fatal(err)
	}
	if err := n.KillContainerd(); err != nil {
		t.Fatal(err)
	}
	if n.PID("containerd") != 0 {
		t.Error("containerd runs after KillContainerd")
	}
	if err := n.StartContainerd(t.Context()); err != nil {
		t.Fatal(err)
	}
	output, err := crictl(t, n, "exec", "-s", container, "sh", "-c", "echo $COLOUR").CombinedOutput()
	if strings.TrimSpace(string(output)) != "green" || err != nil {
		t.Errorf("got %q, %v", output, err)
	}
}

// TestCleanupWithoutRecord checks that after Cleanup nothing is mounted in the folder, so that removing it cannot remove
// what was mounted.
func TestCleanupWithoutRecord(t *testing.T) {
	node.Require(t)
	dir := testFolder(t)
	point := filepath.Join(dir, "mounted")
	if err := os.Mkdir(point, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mount("none", point, "tmpfs", 0, ""); err != nil {
		t.Fatal(err)
	}
	if err := node.Cleanup(dir, t.Logf); err != nil {
		t.Fatal(err)
	}
	if mounts := traces(t, dir)["mount"]; len(mounts) > 0 {
		t.Errorf("still mounted: %s", mounts)
	}
}

func TestTwoNodesSideBySide(t *testing.T) {
	one := node.StartForTest(t, node.Config{Name: "one"})
	two := node.StartForTest(t, node.Config{Name: "two"})
	for _, n := range []*node.Node{one, two} {
		pod, err := n.RunPod(t.Context(), node.PodSpec{Name: "web"})
		if err != nil {
			t.Fatal(err)
		}
		if _, err := n.RunContainer(t.Context(), pod, node.ContainerSpec{Image: node.Image(images.Lab)}); err != nil {
			t.Fatal(err)
		}
		pods, err := n.Runtime().ListPodSandbox(t.Context(), &runtimeapi.ListPodSandboxRequest{})
		if err != nil || len(pods.Items) != 1 {
			t.Errorf("%d pods, %v; want 1", len(pods.GetItems()), err)
		}
	}
}

func TestPodOptions(t *testing.T) {
	n := node.StartForTest(t, node.Config{Name: "options"})
	user, group := int64(1234), int64(2345)
	for _, test := range []struct {
		name      string
		pod       node.PodSpec
		container node.ContainerSpec
		command   string
		want      string
	}{
		{"users", node.PodSpec{}, node.ContainerSpec{RunAsUser: &user, RunAsGroup: &group, SupplementalGroups: []int64{33}}, "id -u; id -g; id -G", "1234\n2345\n2345 33\n"},
		{"read-only", node.PodSpec{}, node.ContainerSpec{ReadOnlyRoot: true}, "touch /x 2>/dev/null || echo refused", "refused\n"},
		{"shared-pid", node.PodSpec{SharedPID: true}, node.ContainerSpec{}, "cat /proc/1/comm", "pause\n"},
		{"own-pid", node.PodSpec{}, node.ContainerSpec{}, "cat /proc/1/comm", "sleep\n"},
		{"user-namespace", node.PodSpec{UserNamespace: true}, node.ContainerSpec{}, "tr -s ' ' < /proc/self/uid_map", " 0 100000 65536\n"},
		{"capabilities", node.PodSpec{}, node.ContainerSpec{AddCapabilities: []string{"NET_ADMIN"}}, "ip link set lo down && echo done", "done\n"},
		{"hostname", node.PodSpec{Name: "called-so"}, node.ContainerSpec{}, "hostname", "called-so\n"},
	} {
		t.Run(test.name, func(t *testing.T) {
			pod, err := n.RunPod(t.Context(), test.pod)
			if err != nil {
				t.Fatal(err)
			}
			container, err := n.RunContainer(t.Context(), pod, test.container)
			if err != nil {
				t.Fatal(err)
			}
			response, err := n.Runtime().ExecSync(t.Context(), &runtimeapi.ExecSyncRequest{ContainerId: container, Cmd: []string{"sh", "-c", test.command}})
			if err != nil {
				t.Fatal(err)
			}
			if string(response.Stdout) != test.want {
				t.Errorf("got %q and %q, want %q", response.Stdout, response.Stderr, test.want)
			}
			if err := n.RemovePod(t.Context(), pod); err != nil {
				t.Error(err)
			}
		})
	}
	t.Run("host namespaces", func(t *testing.T) {
		pod, err := n.RunPod(t.Context(), node.PodSpec{HostPID: true, HostNetwork: true})
		if err != nil {
			t.Fatal(err)
		}
		container, err := n.RunContainer(t.Context(), pod, node.ContainerSpec{})
		if err != nil {
			t.Fatal(err)
		}
		for _, namespace := range []string{"pid", "net"} {
			want, err := os.Readlink("/proc/self/ns/" + namespace)
			if err != nil {
				t.Fatal(err)
			}
			got, err := crictl(t, n, "exec", "-s", container, "readlink", "/proc/self/ns/"+namespace).Output()
			if strings.TrimSpace(string(got)) != want || err != nil {
				t.Errorf("%s namespace %q, %v; want the host's %s", namespace, got, err, want)
			}
		}
	})
	t.Run("log", func(t *testing.T) {
		pod, err := n.RunPod(t.Context(), node.PodSpec{Name: "log"})
		if err != nil {
			t.Fatal(err)
		}
		container, err := n.RunContainer(t.Context(), pod, node.ContainerSpec{Name: "writer", Command: []string{"echo", "hello, log"}})
		if err != nil {
			t.Fatal(err)
		}
		output, err := crictl(t, n, "logs", "--follow", container).CombinedOutput()
		if string(output) != "hello, log\n" || err != nil {
			t.Errorf("crictl logs: %q, %v", output, err)
		}
		if text, err := os.ReadFile(n.ContainerLog(pod, "writer")); err != nil || !strings.HasSuffix(string(text), " F hello, log\n") {
			t.Errorf("the log file: %q, %v", text, err)
		}
	})
}

func TestBadConfigurations(t *testing.T) {
	node.Require(t)
	for _, config := range []node.Config{
		{Dir: filepath.Join(os.TempDir(), strings.Repeat("long", 25))},
		{Dir: testFolder(t), Name: "Upper"},
		{Dir: testFolder(t), Name: "longer-than-12"},
		{Dir: testFolder(t), Programs: "/nonexistent"},
		{Dir: testFolder(t), Streamshim: "/nonexistent/streamshim"},
	} {
		n, err := node.Start(t.Context(), config)
		if err == nil {
			t.Errorf("%+v was accepted", config)
			if err := n.Close(); err != nil {
				t.Error(err)
			}
		}
	}
}

func TestKindsOfTracesAreDistinct(t *testing.T) {
	if sorted := slices.Sorted(slices.Values(kindsOfTraces)); len(slices.Compact(sorted)) != len(kindsOfTraces) {
		t.Error("a kind of trace is listed twice")
	}
}

// crictl returns a crictl command that is killed if it does not end.
func crictl(t *testing.T, n *node.Node, args ...string) *exec.Cmd {
	t.Helper()
	template := n.Crictl(args...)
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	t.Cleanup(cancel)
	return exec.CommandContext(ctx, template.Path, template.Args[1:]...)
}
