package clients

import (
	"context"
	"net/http"
	"os"
	"os/exec"
	"strconv"
	"testing"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/streamshim/streamshim/internal/testutil"
	"github.com/streamshim/streamshim/test/internal/harness"
	"github.com/streamshim/streamshim/test/internal/node"
)

// TestOldClient runs a client built from client-go v0.20, of Kubernetes 1.20, in a module of its own.
func TestOldClient(t *testing.T) {
	n := node.StartForTest(t, node.Config{Name: "oldclient", Streamshim: node.Binary(t)})
	program := os.Getenv("STREAMSHIM_OLDCLIENT")
	if program == "" {
		program = t.TempDir() + "/oldclient"
		build := exec.Command("go", "build", "-o", program, ".")
		build.Dir = "oldclient"
		build.Env = append(os.Environ(), "GOFLAGS=-buildvcs=false -mod=readonly", "GOWORK=off", "CGO_ENABLED=0")
		if out, err := build.CombinedOutput(); err != nil {
			t.Fatalf("build the old client: %v\n%s", err, out)
		}
	}
	run := func(arguments ...string) (string, error) {
		ctx, cancel := context.WithTimeout(t.Context(), testutil.Patience)
		defer cancel()
		out, err := exec.CommandContext(ctx, program, arguments...).CombinedOutput()
		return string(out), err
	}
	p := harness.NewPod(t, n, node.PodSpec{})
	container, err := n.RunContainer(t.Context(), p.ID, node.ContainerSpec{})
	if err != nil {
		t.Fatal(err)
	}
	for _, method := range []string{http.MethodGet, http.MethodPost} {
		response, err := n.Runtime().Exec(t.Context(), &runtimeapi.ExecRequest{
			ContainerId: container, Cmd: []string{"sh", "-c", "cat; echo error >&2; exit 7"}, Stdin: true, Stdout: true, Stderr: true,
		})
		if err != nil {
			t.Fatal(err)
		}
		if out, err := run("exec", method, response.Url); out != "stdout \"input\" stderr \"error\\n\" exit code 7\n" || err != nil {
			t.Errorf("exec by %s: %q, %v", method, out, err)
		}
		port := p.Listen("127.0.0.1", harness.Answer)
		forward, err := n.Runtime().PortForward(t.Context(), &runtimeapi.PortForwardRequest{PodSandboxId: p.ID, Port: []int32{int32(port)}}) //nolint:gosec // a port
		if err != nil {
			t.Fatal(err)
		}
		if out, err := run("portforward", method, forward.Url, strconv.Itoa(port)); out != "answer to abc\nanswer to abc\nanswer to abc\n" || err != nil {
			t.Errorf("port-forward by %s: %q, %v", method, out, err)
		}
	}
}
