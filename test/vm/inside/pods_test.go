package inside

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// container is what tests want of one; all else is as a kubelet would have it.
type container struct {
	handler  string // RuntimeClass, empty for the default
	image    string // busybox, sleeping, by default
	apparmor string // JSON of the security profile, empty for none: containerd's default
	memory   int64
	stdin    bool
}

// run starts a pod with one container, by crictl at the endpoint, and returns both ids. It ends with the test.
func (c container) run(t *testing.T, endpoint string) (pod, id string) {
	t.Helper()
	// A test has one pod for each runtime and image.
	image, _, _ := strings.Cut(c.image, ":")
	name := strings.ToLower(strings.NewReplacer("/", "-", "_", "-", " ", "-").Replace(t.Name()))
	for _, part := range []string{c.handler, image} {
		if part != "" {
			name += "-" + part
		}
	}
	dir := t.TempDir()
	file := func(name, text string) string {
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
		return path
	}
	sandbox := file("pod.json", fmt.Sprintf(`{
  "metadata": {"name": %q, "namespace": "vm", "uid": %q, "attempt": 0}, "log_directory": %q,
  "linux": {"cgroup_parent": "kubepods-vm.slice"}
}`, name, name, dir))
	reference, command := c.image, `[]`
	if reference == "" {
		reference, command = "busybox:latest", `["sleep", "2147483647"]`
	}
	security := ""
	if c.apparmor != "" {
		security = `, "apparmor": ` + c.apparmor
	}
	config := file("container.json", fmt.Sprintf(`{
  "metadata": {"name": "main"}, "image": {"image": "%s/%s"}, "command": %s, "log_path": "main.log", "stdin": %t,
  "linux": {"resources": {"memory_limit_in_bytes": %d}, "security_context": {"seccomp": {"profile_type": 0}%s}}
}`, imageHost, reference, command, c.stdin, c.memory, security))
	pod = must(t, "crictl -r %s runp --runtime '%s' %s", endpoint, c.handler, sandbox)
	t.Cleanup(func() { must(t, "crictl -r %s rmp -f %s", containerd, pod) })
	id = must(t, "crictl -r %s create %s %s %s", endpoint, pod, config, sandbox)
	must(t, "crictl -r %s start %s", endpoint, id)
	return pod, id
}

// pid is a container's main process's.
func pid(t *testing.T, id string) string {
	t.Helper()
	return must(t, "crictl -r %s inspect -o go-template --template '{{.info.pid}}' %s", containerd, id)
}
