package check

import (
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/streamshim/streamshim/pkg/config"
)

func find(t *testing.T, results []Result, name string) Result {
	t.Helper()
	for _, r := range results {
		if r.Name == name {
			return r
		}
	}
	t.Fatalf("no check named %q", name)
	return Result{}
}

func write(t *testing.T, path, text string) {
	t.Helper()
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
}

// Every problem must be found, and come with a way to mend it.
func TestProblemsAreFound(t *testing.T) {
	dir := t.TempDir()
	c := config.Default()
	c.Listen = "unix://" + filepath.Join(dir, "a-file")
	c.Upstream = "unix://" + filepath.Join(dir, "nobody.sock")
	c.StateDir = filepath.Join(dir, "state")
	c.Runtime.Binary = filepath.Join(dir, "no-runc")
	write(t, filepath.Join(dir, "a-file"), "")
	kubelet := filepath.Join(dir, "kubelet.yaml")
	write(t, kubelet, "containerRuntimeEndpoint: unix:///run/containerd/containerd.sock\n")

	results := Run(t.Context(), c, kubelet)
	for name, want := range map[string]Level{
		"upstream": Failed, "OCI runtime": Warning, "listen socket": Failed, "kubelet": Warning,
	} {
		if r := find(t, results, name); r.Level != want || r.Mend == "" || r.Detail == "" {
			t.Errorf("%s: %+v, want %s with a way to mend it", name, r, want)
		}
	}
	if r := find(t, results, "kubelet"); !strings.Contains(r.Mend, "containerRuntimeEndpoint: "+c.Listen) {
		t.Errorf("the kubelet's mend is %q", r.Mend)
	}
}

func TestGoodNode(t *testing.T) {
	dir := t.TempDir()
	c := config.Default()
	c.Listen = "unix://" + filepath.Join(dir, "made", "s.sock")
	c.Runtime.Binary = "/bin/true" // answers --version
	kubelet := filepath.Join(dir, "kubelet.yaml")
	write(t, kubelet, "kind: KubeletConfiguration\ncontainerRuntimeEndpoint: "+c.Listen+"\n")
	results := Run(t.Context(), c, kubelet)
	for _, name := range []string{"privileges", "pidfd", "network namespaces", "child subreaper", "OCI runtime", "listen socket", "kubelet"} {
		if r := find(t, results, name); r.Level != OK {
			t.Errorf("%s: %+v", name, r)
		}
	}
	if _, err := os.Stat(filepath.Join(dir, "made")); err == nil {
		t.Error("the check made the socket's directory")
	}
}

func TestServedSocketIsSeen(t *testing.T) {
	c := config.Default()
	path := filepath.Join(t.TempDir(), "s.sock")
	c.Listen = "unix://" + path
	l, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	if r := listenSocket(c); r.Level != OK || !strings.Contains(r.Detail, "being served") {
		t.Errorf("%+v", r)
	}
}
