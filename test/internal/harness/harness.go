// Package harness supports the tests of test/integration: a node that the tests of a package share, clients as users have
// them, what sessions leave behind, and port-forwards.
package harness

import (
	"context"
	"fmt"
	"hash/fnv"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/streamshim/streamshim/test/internal/node"
)

// sessionTimeout bounds sessions that are long on purpose.
const sessionTimeout = 5 * time.Minute

// Shared is the node of all tests of a package, with a pod for their containers. Main makes it.
var Shared struct {
	Node *node.Node
	Pod  string
	Shim *Streamshim
}

// Main starts the shared node, runs a package's tests, takes the node down and returns the exit code. name is the name of
// the package. Without root or the programs it runs nothing, which is a failure with STREAMSHIM_REAL=required.
func Main(m *testing.M, name string) int {
	binary, err := node.FindBinary()
	if ready := node.Ready(""); ready != nil {
		err = ready
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, name+":", err)
		if os.Getenv("STREAMSHIM_REAL") == "required" {
			return 1
		}
		return 0
	}
	// The name is the same for each run in this working copy, so that the next run cleans up after one that was killed.
	sum := fnv.New32a()
	sum.Write([]byte(binary)) //nolint:errcheck // never fails
	folder := filepath.Join(os.TempDir(), "streamshim-test", fmt.Sprintf("%s-%08x", name, sum.Sum32()))
	ctx := context.Background()
	config := folder + ".toml"
	err = os.MkdirAll(filepath.Dir(config), 0o755)
	if err == nil {
		err = os.WriteFile(config, []byte(patient("")), 0o600)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, name+":", err)
		return 1
	}
	defer os.Remove(config) //nolint:errcheck // the next run writes it again
	n, err := node.Start(ctx, node.Config{Dir: folder, Streamshim: binary, StreamshimArgs: []string{"--config", config}})
	if err != nil {
		fmt.Fprintln(os.Stderr, name+":", err)
		return 1
	}
	code := 1
	Shared.Node = n
	Shared.Shim = &Streamshim{
		Runtime: n.Runtime(), Socket: n.Socket(), Log: n.LogPath("streamshim"),
		PID: func() int { return n.PID("streamshim") },
	}
	if Shared.Pod, err = n.RunPod(ctx, node.PodSpec{Name: "shared"}); err != nil {
		fmt.Fprintln(os.Stderr, name+":", err)
	} else {
		code = m.Run()
	}
	if err := n.Close(); err != nil {
		fmt.Fprintln(os.Stderr, name+":", err)
		return 1
	}
	if code != 0 {
		fmt.Fprintf(os.Stderr, "%s: the logs of containerd and streamshim are in %s/log\n", name, folder)
	} else if err := os.RemoveAll(folder); err != nil {
		fmt.Fprintln(os.Stderr, name+":", err)
		return 1
	}
	return code
}

// patient allows long starts unless the configuration sets a limit. On a busy machine the OCI runtime takes longer than the
// 30 s that users wait for it.
func patient(configuration string) string {
	const exec, longer = "[exec]\n", "start_timeout = \"2m\"\n"
	switch {
	case strings.Contains(configuration, "start_timeout"):
		return configuration
	case strings.Contains(configuration, exec):
		return strings.Replace(configuration, exec, exec+longer, 1)
	}
	return configuration + "\n" + exec + longer
}

var counter atomic.Int64

// Unique returns a name that no other test has.
func Unique(prefix string) string { return fmt.Sprintf("%s-%d", prefix, counter.Add(1)) }

// RunPod runs a pod for one test.
func RunPod(t *testing.T, spec node.PodSpec) string {
	t.Helper()
	spec.Name = Unique("pod")
	pod, err := Shared.Node.RunPod(t.Context(), spec)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := Shared.Node.RemovePod(context.Background(), pod); err != nil {
			t.Error(err)
		}
	})
	return pod
}

// RunContainer runs a container in the shared pod for one test.
func RunContainer(t *testing.T, spec node.ContainerSpec) string {
	t.Helper()
	return RunContainerIn(t, Shared.Pod, spec)
}

// RunContainerIn runs a container in a pod for one test.
func RunContainerIn(t *testing.T, pod string, spec node.ContainerSpec) string {
	t.Helper()
	if spec.Name == "" {
		spec.Name = Unique("container")
	}
	id, err := Shared.Node.RunContainer(t.Context(), pod, spec)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		// Ask containerd itself: the test may have ended its streamshim.
		_, err := Shared.Node.Upstream().RemoveContainer(context.Background(), &runtimeapi.RemoveContainerRequest{ContainerId: id})
		if err != nil {
			t.Error(err)
		}
	})
	return id
}
