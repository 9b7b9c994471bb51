// Package inside is what runs in the virtual machine of test/vm: a Debian node with systemd, on which
// streamshim is installed from its package, used, upgraded and purged. It changes the machine it runs on, so it
// does nothing anywhere else.
package inside

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// The second disk: programs, packages, and this test.
const payload = "/mnt/run"

const (
	containerd = "unix:///run/containerd/containerd.sock"
	streamshim = "unix:///run/streamshim/streamshim.sock"
	imageHost  = "streamshim.test"
	registry   = "127.0.0.1:5000"
)

func TestMain(m *testing.M) {
	if os.Getenv("STREAMSHIM_VM") != "inside" {
		fmt.Println("this runs in the virtual machine of make vm only")
		return
	}
	if err := prepare(); err != nil {
		fmt.Println("FAIL: prepare the node:", err)
		os.Exit(1)
	}
	os.Exit(m.Run())
}

// containerdConfiguration is for containerd 1.6: Debian's own file with the systemd cgroup driver, images from this
// machine, and crun as a second runtime.
const containerdConfiguration = `version = 2
[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "` + imageHost + `/pause:sandbox"
  [plugins."io.containerd.grpc.v1.cri".cni]
    bin_dir = "/usr/lib/cni"
    conf_dir = "/etc/cni/net.d"
  [plugins."io.containerd.grpc.v1.cri".registry]
    config_path = "/etc/containerd/certs.d"
  [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
    runtime_type = "io.containerd.runc.v2"
    [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc.options]
      SystemdCgroup = true
  [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.crun]
    runtime_type = "io.containerd.runc.v2"
    [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.crun.options]
      BinaryName = "/usr/bin/crun"
      SystemdCgroup = true
`

const network = `{
  "cniVersion": "1.0.0",
  "name": "vm",
  "plugins": [
    {"type": "bridge", "bridge": "cni0", "isGateway": true,
     "ipam": {"type": "host-local", "ranges": [[{"subnet": "10.99.0.0/24"}]], "routes": [{"dst": "0.0.0.0/0"}]}},
    {"type": "portmap", "capabilities": {"portMappings": true}}
  ]
}
`

// prepare makes a node of the machine, as an administrator would before streamshim is installed.
func prepare() error {
	err := errors.Join(
		write("/etc/containerd/config.toml", containerdConfiguration),
		write("/etc/containerd/certs.d/"+imageHost+"/hosts.toml", "server = \"http://"+registry+"\"\n[host.\"http://"+registry+"\"]\n  capabilities = [\"pull\", \"resolve\"]\n"),
		write("/etc/cni/net.d/10-vm.conflist", network),
		write("/etc/crictl.yaml", "runtime-endpoint: "+containerd+"\nimage-endpoint: "+containerd+"\ntimeout: 600\n"),
	)
	if err != nil {
		return err
	}
	for _, command := range []string{
		"ip link set lo up",
		"systemd-run --unit=images " + payload + "/imageserver -busybox /bin/busybox -actor " + payload + "/actor -listen " + registry,
		"systemctl restart containerd",
	} {
		if out, err := shell(command); err != nil {
			return fmt.Errorf("%s: %w: %s", command, err, out)
		}
	}
	for _, image := range []string{"pause:sandbox", "busybox:latest", "lab:latest"} {
		if err := await("image "+image, func() error {
			out, err := shell("crictl pull " + imageHost + "/" + image)
			if err != nil {
				return fmt.Errorf("%w: %s", err, out)
			}
			return nil
		}); err != nil {
			return err
		}
	}
	return nil
}

func write(path, text string) error {
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return err
	}
	return os.WriteFile(path, []byte(text), 0o644)
}

// shell runs a command line and returns what it says on either stream. Nothing here is bounded by less than the time
// of the whole run: an emulated machine is slow, and how slow depends on who else uses the host.
func shell(line string) (string, error) {
	out, err := exec.Command("sh", "-c", line).CombinedOutput()
	return strings.TrimSpace(string(out)), err
}

// must is shell for what has to succeed.
func must(t *testing.T, format string, args ...any) string {
	t.Helper()
	line := fmt.Sprintf(format, args...)
	out, err := shell(line)
	if err != nil {
		t.Fatalf("%s: %v: %s", line, err, out)
	}
	return out
}

// await repeats what has to succeed some time: after ten minutes it never will.
func await(what string, condition func() error) error {
	var err error
	for end := time.Now().Add(10 * time.Minute); time.Now().Before(end); time.Sleep(500 * time.Millisecond) {
		if err = condition(); err == nil {
			return nil
		}
	}
	return fmt.Errorf("%s: %w", what, err)
}

// seen tells the host of a row of the table.
func seen(what, format string, args ...any) {
	fmt.Printf("seen: %s | %s\n", what, fmt.Sprintf(format, args...))
}
