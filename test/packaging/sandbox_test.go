package packaging

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/streamshim/streamshim/test/internal/node"
	"github.com/streamshim/streamshim/test/internal/wire"
)

// sandboxInside says that this process has a mount namespace of its own, whose mounts propagate as systemd has it.
const sandboxInside = "STREAMSHIM_SANDBOX_INSIDE"

// sandboxes are what streamshim is started in: nothing, what the unit's settings do, and for each way in which a setting can
// reach commands one that does (namespaces are none: runc joins all those of the main process). $RW is the node's folder,
// $DEVICES a cgroup of the devices controller or nothing; the program and its arguments follow.
var sandboxes = map[string]string{
	"none": `exec "$@"`,
	// ProtectSystem=strict, ReadWritePaths=-/run and, for -/tmp, the node's folder in it, DevicePolicy=closed:
	// systemd.exec(5), systemd.resource-control(5).
	"unit": `if [ -z "$IN_NAMESPACE" ]; then
	export IN_NAMESPACE=1
	exec unshare --mount --propagation slave /bin/sh "$0" "$@"
fi
unset IN_NAMESPACE
mount --bind /run /run
mount --bind "$RW" "$RW"
cut -d' ' -f5 /proc/self/mountinfo | sort -ru | while read -r at; do
	case $at in
	/run | /run/* | "$RW" | "$RW"/* | /dev | /dev/* | /proc | /proc/* | /sys | /sys/*) ;;
	*) mount -o remount,bind,ro "$at" ;;
	esac
done
if [ -n "$DEVICES" ]; then
	echo a > "$DEVICES/devices.deny"
	for device in 'c 1:3 rwm' 'c 1:5 rwm' 'c 1:7 rwm' 'c 1:8 rwm' 'c 1:9 rwm' 'c 5:0 rwm' 'c 5:2 rwm' 'c 136:* rw'; do
		echo "$device" > "$DEVICES/devices.allow"
	done
	echo $$ > "$DEVICES/cgroup.procs"
fi
cd "$RW"
exec "$@"`,
	"NoNewPrivileges":       `exec setpriv --no-new-privs "$@"`,
	"CapabilityBoundingSet": `exec setpriv --bounding-set -sys_module "$@"`,
	"UMask":                 `umask 0077; exec "$@"`,
	"LimitCORE":             `exec prlimit --core=0:0 "$@"`,
}

// what a command says of itself that must not depend on what its starter is in.
const ownState = `grep -E '^(Uid|Gid|Groups|Sig(Ign|Blk)|Cap|NoNewPrivs|Seccomp|Specul|Cpus_allowed|Mems_allowed)' /proc/self/status
cat /proc/self/limits /proc/self/mountinfo /proc/self/cgroup /proc/self/oom_score_adj
for n in mnt pid net ipc uts cgroup user; do readlink /proc/self/ns/$n; done
umask; hostname; id; pwd; env | sort
echo x > /tmp/written && echo x > /dev/null && head -c 1 /dev/zero | wc -c; ls /dev`

// No setting of the unit reaches a command: it is the same with them and without. With settings that the unit must not
// have it is another.
func TestSettingsDoNotReachCommands(t *testing.T) {
	node.Require(t)
	need(t, "unshare", "setpriv", "prlimit", "mount")
	if os.Getenv(sandboxInside) == "" {
		inside(t)
		return
	}
	dir := t.TempDir()
	script, mode := filepath.Join(dir, "start"), filepath.Join(dir, "mode")
	devices := devicesCgroup(t)
	text := fmt.Sprintf("#!/bin/sh -e\nexport RW=%[1]s DEVICES=%[2]s\nexec /bin/sh -e \"$(cat %[3]s)\" %[4]s \"$@\"\n",
		filepath.Join(os.TempDir(), "streamshim-test"), devices, mode, node.Binary(t))
	for name, commands := range sandboxes {
		write(t, filepath.Join(dir, name), commands+"\n")
	}
	write(t, script, text)
	write(t, mode, filepath.Join(dir, "none"))
	n := node.StartForTest(t, node.Config{Name: "sandbox", Streamshim: script})
	pods := map[string]string{}
	for name, spec := range map[string]struct {
		pod       node.PodSpec
		container node.ContainerSpec
	}{
		"default":          {},
		"privileged":       {node.PodSpec{Privileged: true}, node.ContainerSpec{Privileged: true}},
		"host's":           {node.PodSpec{HostNetwork: true, HostPID: true, Change: hostIPC}, node.ContainerSpec{}},
		"no_new_privs":     {node.PodSpec{}, node.ContainerSpec{NoNewPrivileges: true}},
		"user and one cap": {node.PodSpec{}, node.ContainerSpec{DropCapabilities: []string{"ALL"}, AddCapabilities: []string{"CHOWN"}}},
	} {
		spec.pod.Name = strings.NewReplacer(" ", "-", "'", "", "_", "-").Replace(name)
		pods[name] = container(t, n, spec.pod, spec.container)
	}
	plain := states(t, n, pods)
	for name, state := range plain {
		if !strings.Contains(state, "CapEff:") || !strings.Contains(state, "Max core file size") {
			t.Fatalf("%s: %s", name, state)
		}
	}

	for name := range sandboxes {
		if name == "none" {
			continue
		}
		t.Run(name, func(t *testing.T) {
			if err := n.StopStreamshim(time.Minute); err != nil {
				t.Fatal(err)
			}
			write(t, mode, filepath.Join(dir, name))
			if err := n.StartStreamshim(t.Context()); err != nil {
				t.Fatal(err)
			}
			differing := differences(plain, states(t, n, pods))
			if name != "unit" {
				if len(differing) == 0 {
					t.Errorf("%s is not seen in commands: this test sees nothing", name)
				}
				t.Logf("seen: %.200q", differing)
				return
			}
			for _, difference := range differing {
				t.Error(difference)
			}
			inEffect(t, n, devices != "")
			// What the runtime mounts later is seen, and the pods' namespaces are entered.
			later := container(t, n, node.PodSpec{Name: "later"}, node.ContainerSpec{})
			if out := execSync(t, n, later, "echo here; cat /proc/1/comm"); !strings.HasPrefix(out, "here\n") {
				t.Errorf("in a container that is younger than streamshim: %q", out)
			}
			session, err := wire.StartExec(t.Context(), n.Runtime(), later, wire.Command{Args: []string{"sh", "-c", "test -t 0 && stty size"}, TTY: true})
			if err != nil {
				t.Fatal(err)
			}
			if received, err := session.Finish(); err != nil || received == 0 {
				t.Errorf("a terminal: %d bytes, %v", received, err)
			}
		})
	}
}

// inside runs this test again in a mount namespace of its own, shared as systemd has it.
func inside(t *testing.T) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Minute)
	defer cancel()
	program, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	again := exec.CommandContext(ctx, "unshare", "--mount", "--propagation", "shared", program,
		"-test.run", "^"+t.Name()+"$", "-test.v", "-test.count", "1")
	again.Env = append(os.Environ(), sandboxInside+"=1")
	again.WaitDelay = time.Second
	out, err := again.CombinedOutput()
	t.Logf("%s", out)
	if err != nil {
		t.Error(err)
	}
}

func hostIPC(config *runtimeapi.PodSandboxConfig) {
	config.Linux.SecurityContext.NamespaceOptions.Ipc = runtimeapi.NamespaceMode_NODE
}

func write(t *testing.T, path, text string) {
	t.Helper()
	if err := os.WriteFile(path, []byte(text), 0o755); err != nil {
		t.Fatal(err)
	}
}

// devicesCgroup makes a cgroup for DevicePolicy, or returns "" where the controller is not of version 1.
func devicesCgroup(t *testing.T) string {
	t.Helper()
	path := fmt.Sprintf("/sys/fs/cgroup/devices/streamshim-sandbox-%d", os.Getpid())
	if err := os.Mkdir(path, 0o755); err != nil {
		t.Logf("without DevicePolicy: %v", err)
		return ""
	}
	t.Cleanup(func() {
		for deadline := time.Now().Add(time.Minute); os.Remove(path) != nil; time.Sleep(10 * time.Millisecond) {
			if time.Now().After(deadline) {
				t.Errorf("%s does not go", path)
				return
			}
		}
	})
	return path
}

func container(t *testing.T, n *node.Node, pod node.PodSpec, spec node.ContainerSpec) string {
	t.Helper()
	id, err := n.RunPod(t.Context(), pod)
	if err != nil {
		t.Fatal(err)
	}
	container, err := n.RunContainer(t.Context(), id, spec)
	if err != nil {
		t.Fatal(err)
	}
	return container
}

func execSync(t *testing.T, n *node.Node, container, script string) string {
	t.Helper()
	answer, err := n.Runtime().ExecSync(t.Context(), &runtimeapi.ExecSyncRequest{ContainerId: container, Cmd: []string{"sh", "-c", script}, Timeout: 60})
	if err != nil || answer.ExitCode != 0 {
		t.Fatalf("%v, exit code %d: %s%s", err, answer.GetExitCode(), answer.GetStdout(), answer.GetStderr())
	}
	return string(answer.Stdout)
}

func states(t *testing.T, n *node.Node, containers map[string]string) map[string]string {
	t.Helper()
	all := map[string]string{}
	for name, container := range containers {
		answer, err := n.Runtime().ExecSync(t.Context(), &runtimeapi.ExecSyncRequest{ContainerId: container, Cmd: []string{"sh", "-c", ownState}, Timeout: 60})
		if err != nil {
			all[name] = err.Error() // also a state
			continue
		}
		all[name] = fmt.Sprintf("%s%s%d", answer.Stdout, answer.Stderr, answer.ExitCode)
	}
	return all
}

// differences are the lines that only one of the two has.
func differences(before, after map[string]string) (found []string) {
	for name, text := range before {
		old, now := strings.Split(text, "\n"), strings.Split(after[name], "\n")
		for _, line := range old {
			if !slices.Contains(now, line) {
				found = append(found, name+": without the setting: "+line)
			}
		}
		for _, line := range now {
			if !slices.Contains(old, line) {
				found = append(found, name+": with it: "+line)
			}
		}
	}
	return found
}

// inEffect sees whether the settings of the unit bind streamshim.
func inEffect(t *testing.T, n *node.Node, devices bool) {
	t.Helper()
	mounts, err := os.ReadFile(fmt.Sprintf("/proc/%d/mountinfo", n.PID("streamshim")))
	if err != nil {
		t.Fatal(err)
	}
	if !regexp.MustCompile(`(?m)^\d+ \d+ \S+ \S+ / ro[, ]`).Match(mounts) {
		t.Errorf("streamshim can write to /:\n%s", mounts)
	}
	if groups, err := os.ReadFile(fmt.Sprintf("/proc/%d/cgroup", n.PID("streamshim"))); devices && !strings.Contains(string(groups), "/streamshim-sandbox-") {
		t.Errorf("streamshim's cgroups: %v %s", err, groups)
	}
}
