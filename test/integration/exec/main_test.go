package exec

import (
	"context"
	"fmt"
	"hash/fnv"
	"os"
	"path/filepath"
	"sync/atomic"
	"testing"
	"time"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/streamshim/streamshim/test/internal/node"
)

// testTimeout only bounds what would hang; so do the limits of the tests themselves, which leave
// room for a busy machine. The times that were really taken are logged.
const testTimeout = 2 * time.Minute

// sessionTimeout does so for sessions that are long on purpose.
const sessionTimeout = 5 * time.Minute

// shared is the node of all tests, with the pod that their containers run in unless a test needs
// another.
var shared struct {
	node *node.Node
	pod  string
	shim *streamshim
}

func TestMain(m *testing.M) {
	if os.Getenv(clientVariable) != "" {
		os.Exit(clientMain())
	}
	os.Exit(runTests(m))
}

func runTests(m *testing.M) int {
	binary, err := filepath.Abs("../../../bin/streamshim")
	if err == nil {
		_, err = os.Stat(binary)
	}
	if ready := node.Ready(""); ready != nil {
		err = ready
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "symptoms:", err)
		if os.Getenv("STREAMSHIM_REAL") == "required" {
			return 1
		}
		return 0
	}
	// The same for each run in this working copy, so that a run that was killed is cleaned up after.
	name := fnv.New32a()
	name.Write([]byte(binary)) //nolint:errcheck // never fails
	folder := filepath.Join(os.TempDir(), "streamshim-test", fmt.Sprintf("symptoms-%08x", name.Sum32()))
	ctx := context.Background()
	n, err := node.Start(ctx, node.Config{Dir: folder, Streamshim: binary})
	if err != nil {
		fmt.Fprintln(os.Stderr, "symptoms:", err)
		return 1
	}
	code := 1
	shared.node = n
	shared.shim = &streamshim{
		runtime: n.Runtime(), socket: n.Socket(), log: n.LogPath("streamshim"),
		pid: func() int { return n.PID("streamshim") },
	}
	if shared.pod, err = n.RunPod(ctx, node.PodSpec{Name: "shared"}); err != nil {
		fmt.Fprintln(os.Stderr, "symptoms:", err)
	} else {
		code = m.Run()
	}
	if err := n.Close(); err != nil {
		fmt.Fprintln(os.Stderr, "symptoms:", err)
		return 1
	}
	if code != 0 {
		fmt.Fprintf(os.Stderr, "symptoms: the logs of containerd and streamshim are in %s/log\n", folder)
	} else if err := os.RemoveAll(folder); err != nil {
		fmt.Fprintln(os.Stderr, "symptoms:", err)
		return 1
	}
	return code
}

var counter atomic.Int64

// unique is a name that no other test has.
func unique(prefix string) string { return fmt.Sprintf("%s-%d", prefix, counter.Add(1)) }

// runPod runs a pod for one test.
func runPod(t *testing.T, spec node.PodSpec) string {
	t.Helper()
	spec.Name = unique("pod")
	pod, err := shared.node.RunPod(t.Context(), spec)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := shared.node.RemovePod(context.Background(), pod); err != nil {
			t.Error(err)
		}
	})
	return pod
}

// runContainer runs a container in the shared pod for one test.
func runContainer(t *testing.T, spec node.ContainerSpec) string {
	t.Helper()
	return runContainerIn(t, shared.pod, spec)
}

func runContainerIn(t *testing.T, pod string, spec node.ContainerSpec) string {
	t.Helper()
	if spec.Name == "" {
		spec.Name = unique("container")
	}
	id, err := shared.node.RunContainer(t.Context(), pod, spec)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		// Of containerd itself: the test may have ended its streamshim.
		_, err := shared.node.Upstream().RemoveContainer(context.Background(), &runtimeapi.RemoveContainerRequest{ContainerId: id})
		if err != nil {
			t.Error(err)
		}
	})
	return id
}

// eventually waits for a condition that is due to come true by itself, and returns how long it took.
func eventually(t *testing.T, limit time.Duration, what string, condition func() bool) time.Duration {
	t.Helper()
	begin := time.Now()
	for !condition() {
		if time.Since(begin) > limit {
			t.Fatalf("not within %v: %s", limit, what)
		}
		time.Sleep(20 * time.Millisecond)
	}
	return time.Since(begin)
}
