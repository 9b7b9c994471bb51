package exec

import (
	"bytes"
	"encoding/json"
	"fmt"
	"os"
	"slices"
	"strings"
	"testing"

	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"
	"k8s.io/client-go/tools/remotecommand"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/streamshim/streamshim/internal/testutil"
	"github.com/streamshim/streamshim/test/internal/harness"
	"github.com/streamshim/streamshim/test/internal/node"
)

// identity returns what a process may do and where it is, as the kernel shows it from outside.
func identity(t *testing.T, pid int) map[string]string {
	t.Helper()
	found := map[string]string{}
	read := func(name string) string {
		text, err := os.ReadFile(fmt.Sprintf("/proc/%d/%s", pid, name))
		if err != nil {
			t.Fatal(err)
		}
		return string(text)
	}
	for line := range strings.Lines(read("status")) {
		name, value, _ := strings.Cut(line, ":")
		switch name {
		case "Uid", "Gid", "Groups", "Umask", "NoNewPrivs", "Seccomp", "Seccomp_filters", "Cpus_allowed", "Mems_allowed",
			"CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb":
			found[name] = strings.Join(strings.Fields(value), " ")
		}
	}
	environment := strings.Split(strings.Trim(read("environ"), "\x00"), "\x00")
	slices.Sort(environment)
	found["environment"] = strings.Join(environment, "\n")
	for _, name := range []string{"limits", "cgroup", "uid_map", "gid_map", "oom_score_adj", "setgroups"} {
		found[name] = read(name)
	}
	for _, name := range []string{"cwd", "root", "ns/mnt", "ns/pid", "ns/net", "ns/ipc", "ns/uts", "ns/user", "ns/cgroup"} {
		target, err := os.Readlink(fmt.Sprintf("/proc/%d/%s", pid, name))
		if err != nil {
			t.Fatal(err)
		}
		found[name] = target
	}
	return found
}

// TestCommandHasTheContainersIdentity checks that a command has the identity of its container (E14-E18): user, groups,
// umask, capabilities, NoNewPrivs, seccomp, limits, cgroup, namespaces, environment and working directory are those of the
// container's main process. Its /dev/stdin and /dev/stdout can be opened again, whatever its user (containerd#10598,
// cri-o#5391, E17).
func TestCommandHasTheContainersIdentity(t *testing.T) {
	t.Parallel()
	user, group := int64(1234), int64(2345)
	shim := harness.Shared.Shim
	for _, test := range []struct {
		name      string
		pod       node.PodSpec
		container node.ContainerSpec
	}{
		{name: "root"},
		{name: "user", container: node.ContainerSpec{RunAsUser: &user, RunAsGroup: &group}},
		{name: "supplemental-groups", container: node.ContainerSpec{RunAsUser: &user, SupplementalGroups: []int64{33, 44, 5555}}},
		{name: "user-namespace", pod: node.PodSpec{UserNamespace: true}},
		{name: "user-in-user-namespace", pod: node.PodSpec{UserNamespace: true}, container: node.ContainerSpec{RunAsUser: &user, RunAsGroup: &group}},
		{name: "privileged", pod: node.PodSpec{Privileged: true}, container: node.ContainerSpec{Privileged: true}},
		{name: "read-only-root", container: node.ContainerSpec{ReadOnlyRoot: true, RunAsUser: &user}},
		{name: "no-new-privileges", container: node.ContainerSpec{NoNewPrivileges: true, RunAsUser: &user}},
		{name: "capabilities", container: node.ContainerSpec{AddCapabilities: []string{"NET_ADMIN"}, DropCapabilities: []string{"CHOWN"}}},
		{name: "environment", container: node.ContainerSpec{Env: map[string]string{"COLOUR": "green and blue", "EMPTY": "", "HOME": "/tmp"}, WorkingDir: "/tmp"}},
		{name: "host-namespaces", pod: node.PodSpec{HostPID: true, HostNetwork: true}},
		{name: "shared-pid", pod: node.PodSpec{SharedPID: true}},
		{name: "seccomp", container: node.ContainerSpec{RunAsUser: &user, Change: runtimeDefault}},
		{name: "seccomp-root", container: node.ContainerSpec{Change: runtimeDefault}},
		{name: "limited", container: node.ContainerSpec{MemoryLimit: 100 << 20}},
	} {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			if test.pod.UserNamespace && !harness.Shared.Node.HasUserNamespaces(t) {
				t.Skip("the runtime has no user namespaces for pods")
			}
			pod := harness.RunPod(t, test.pod)
			container := harness.RunContainerIn(t, pod, test.container)
			main := initPid(t, container)
			// StartContainer returns a moment before runc's own process has become the container's.
			testutil.Eventually(t, "the main process runs", func() bool { return strings.HasPrefix(harness.CommandLine(main), "sleep ") })
			want := identity(t, main)
			// As the specification says: with crun 1.8 the container itself has the shim's.
			want["oom_score_adj"] = specifiedOOMScoreAdj(t, container)
			for _, transport := range harness.Transports {
				for _, tty := range []bool{false, true} {
					mark := harness.Unique("identity")
					options := remotecommand.StreamOptions{Stdin: harness.OpenStdin(t), Stdout: &testutil.Buffer{}, Tty: tty}
					_, cancel := harness.Begin(t, transport, shim.ExecURL(t, container, options, "sh", "-c", "sleep 1000; : "+mark), options)
					pid := 0
					testutil.Eventually(t, "the command runs", func() bool {
						for _, path := range harness.Glob("/proc/[0-9]*/cmdline") {
							text, _ := os.ReadFile(path) //nolint:errcheck // it may have ended
							if bytes.HasSuffix(text, []byte(": "+mark+"\x00")) && bytes.HasPrefix(text, []byte("sh\x00")) {
								fmt.Sscanf(path, "/proc/%d/", &pid) //nolint:errcheck // it is a number
								return true
							}
						}
						return false
					})
					got := identity(t, pid)
					if tty {
						got["environment"] = strings.Replace(got["environment"], "\nTERM=xterm", "", 1)
					}
					for name := range want {
						if got[name] != want[name] {
							t.Errorf("%s, tty %v: %s is %q, the container's %q", transport, tty, name, got[name], want[name])
						}
					}
					cancel()
				}
				var output, errors testutil.Buffer
				err := shim.Exec(t, transport, container,
					remotecommand.StreamOptions{Stdin: strings.NewReader("input\n"), Stdout: &output, Stderr: &errors},
					"sh", "-c", "cat /dev/stdin; echo out > /dev/stdout; echo err > /dev/stderr; cat < /proc/self/fd/0")
				if err != nil || output.String() != "input\nout\n" || errors.String() != "err\n" {
					t.Errorf("%s: reopened streams: %q, %q, %v", transport, &output, &errors, err)
				}
			}
			// ExecSync must give the same identity.
			response, err := shim.ExecSync(t.Context(), container, 0, "cat", "/proc/self/status")
			if err != nil {
				t.Fatal(err)
			}
			for _, name := range []string{"Groups", "Umask", "NoNewPrivs", "CapEff", "CapBnd", "CapPrm", "Seccomp"} {
				if !strings.Contains(strings.Join(strings.Fields(string(response.Stdout)), " "), name+": "+want[name]) && test.pod.UserNamespace == false {
					t.Errorf("ExecSync: %s is not %q:\n%s", name, want[name], response.Stdout)
				}
			}
		})
	}
}

// runtimeDefault gives a container the seccomp profile that is containerd's default.
func runtimeDefault(c *runtimeapi.ContainerConfig) {
	c.Linux.SecurityContext.Seccomp = &runtimeapi.SecurityProfile{ProfileType: runtimeapi.SecurityProfile_RuntimeDefault}
}

// initPid returns the pid of the container's main process.
func initPid(t *testing.T, container string) int {
	t.Helper()
	response, err := harness.Shared.Node.Upstream().ContainerStatus(t.Context(), &runtimeapi.ContainerStatusRequest{ContainerId: container, Verbose: true})
	if err != nil {
		t.Fatal(err)
	}
	_, rest, _ := strings.Cut(response.Info["info"], `"pid":`)
	pid := 0
	if _, err := fmt.Sscanf(rest, "%d", &pid); err != nil {
		t.Fatalf("no pid in %s", response.Info["info"])
	}
	return pid
}

// specifiedOOMScoreAdj returns a container's oom_score_adj as the kernel would show it.
func specifiedOOMScoreAdj(t *testing.T, container string) string {
	t.Helper()
	response, err := harness.Shared.Node.Upstream().ContainerStatus(t.Context(), &runtimeapi.ContainerStatusRequest{ContainerId: container, Verbose: true})
	if err != nil {
		t.Fatal(err)
	}
	var info struct {
		RuntimeSpec struct {
			Process struct{ OOMScoreAdj *int }
		}
	}
	if err := json.Unmarshal([]byte(response.Info["info"]), &info); err != nil || info.RuntimeSpec.Process.OOMScoreAdj == nil {
		t.Fatalf("no oomScoreAdj in %s: %v", response.Info["info"], err)
	}
	return fmt.Sprintln(*info.RuntimeSpec.Process.OOMScoreAdj)
}

// TestCommandHasEnvironmentOfItsOwn checks that a command can have its own environment (kubernetes#11815, E15): field 7 of
// KEP-6035 is honoured, although the cri-api of this module does not have it.
func TestCommandHasEnvironmentOfItsOwn(t *testing.T) {
	t.Parallel()
	container := harness.RunContainer(t, node.ContainerSpec{Env: map[string]string{"COLOUR": "green", "SHAPE": "round"}})
	variable := func(field protowire.Number, name, value string) []byte {
		var message []byte
		message = protowire.AppendTag(message, 1, protowire.BytesType)
		message = protowire.AppendString(message, name)
		message = protowire.AppendTag(message, 2, protowire.BytesType)
		message = protowire.AppendString(message, value)
		return protowire.AppendBytes(protowire.AppendTag(nil, field, protowire.BytesType), message)
	}
	with := func(field protowire.Number, request proto.Message) {
		unknown := append(variable(field, "COLOUR", "blue"), variable(field, "SIZE", "a = $b")...)
		request.ProtoReflect().SetUnknown(unknown)
	}
	const script = `echo "$COLOUR, $SHAPE, $SIZE"`
	const want = "blue, round, a = $b\n"
	for _, transport := range harness.Transports {
		request := &runtimeapi.ExecRequest{ContainerId: container, Cmd: []string{"sh", "-c", script}, Stdout: true}
		with(7, request)
		response, err := harness.Shared.Shim.Runtime.Exec(t.Context(), request)
		if err != nil {
			t.Fatal(err)
		}
		output := &testutil.Buffer{}
		if err := harness.Stream(t.Context(), transport, response.Url, remotecommand.StreamOptions{Stdout: output}); err != nil || output.String() != want {
			t.Errorf("%s: %q, %v; want %q", transport, output, err, want)
		}
	}
}
