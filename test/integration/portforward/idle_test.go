package portforward

import (
	"context"
	"errors"
	"io"
	"net/http"
	"net/url"
	"os"
	"os/exec"
	"strconv"
	"sync"
	"testing"
	"time"

	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/remotecommand"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/streamshim/streamshim/test/internal/node"
)

// TestIdleTerminalsAreSmall measures the streamshim program with many idle shells, each on a terminal
// of a real container: under 100 KiB each, where the runtimes' own servers take several hundred.
func TestIdleTerminalsAreSmall(t *testing.T) {
	const sessions, mostKiB = 100, 100
	// What is held is measured, and not what has been let go of and waits for the next collection, which
	// in an idle process is up to two minutes away.
	t.Setenv("GOGC", "10")
	n := node.StartForTest(t, node.Config{Name: "idle", Streamshim: node.Binary(t)})
	pid := n.PID("streamshim")
	for _, transport := range transports {
		t.Run(transport, func(t *testing.T) {
			pod, err := n.RunPod(t.Context(), node.PodSpec{Name: "pod-" + transport[:1] + strconv.Itoa(os.Getpid())})
			if err != nil {
				t.Fatal(err)
			}
			container, err := n.RunContainer(t.Context(), pod, node.ContainerSpec{})
			if err != nil {
				t.Fatal(err)
			}
			ctx, cancel := context.WithCancel(t.Context())
			var clients sync.WaitGroup
			defer clients.Wait()
			defer cancel()
			open := func() {
				response, err := n.Runtime().Exec(t.Context(), &runtimeapi.ExecRequest{
					ContainerId: container, Cmd: []string{"sh", "-c", "echo ready; exec sleep 3600"}, Tty: true, Stdin: true, Stdout: true,
				})
				if err != nil {
					t.Fatal(err)
				}
				u, err := url.Parse(response.Url)
				if err != nil {
					t.Fatal(err)
				}
				stdin, typing := io.Pipe()
				screen, stdout := io.Pipe()
				config := &rest.Config{Host: u.Host}
				executor, err := remotecommand.NewSPDYExecutor(config, http.MethodPost, u)
				if transport == "WebSocket" {
					executor, err = remotecommand.NewWebSocketExecutor(config, http.MethodGet, u.String())
				}
				if err != nil {
					t.Fatal(err)
				}
				clients.Go(func() {
					defer typing.Close()
					executor.StreamWithContext(ctx, remotecommand.StreamOptions{Stdin: stdin, Stdout: stdout, Tty: true}) //nolint:errcheck // cancelled
					stdout.Close()
				})
				tooLate := time.AfterFunc(patience, func() { screen.CloseWithError(errors.New("the shell is not ready")) })
				if _, err := io.ReadFull(screen, make([]byte, len("ready"))); err != nil {
					t.Fatal(err)
				}
				tooLate.Stop()
				clients.Go(func() { io.Copy(io.Discard, screen) })
			}
			for range 10 { // what is made once is there afterwards
				open()
			}
			before := usageOf(t, pid)
			for range sessions {
				open()
			}
			// Memory that is free goes back to the kernel after a while; until then it counts too.
			deadline := time.Now().Add(patience)
			after := usageOf(t, pid)
			for ; (after.rssKiB-before.rssKiB)/sessions >= mostKiB && time.Now().Before(deadline); after = usageOf(t, pid) {
				time.Sleep(time.Second)
			}
			each := (after.rssKiB - before.rssKiB) / sessions
			t.Logf("%d KiB and %d descriptors for each of %d sessions", each, (after.descriptors-before.descriptors)/sessions, sessions)
			if each >= mostKiB {
				t.Errorf("an idle session with a terminal takes %d KiB of streamshim, want less than %d", each, mostKiB)
			}
			if after.threads > before.threads+20 {
				t.Errorf("%d threads before, %d with %d more sessions", before.threads, after.threads, sessions)
			}
		})
	}
}

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
		ctx, cancel := context.WithTimeout(t.Context(), patience)
		defer cancel()
		out, err := exec.CommandContext(ctx, program, arguments...).CombinedOutput()
		return string(out), err
	}
	p := newPod(t, n, node.PodSpec{})
	container, err := n.RunContainer(t.Context(), p.id, node.ContainerSpec{})
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
		port := p.listen("127.0.0.1", answer)
		forward, err := n.Runtime().PortForward(t.Context(), &runtimeapi.PortForwardRequest{PodSandboxId: p.id, Port: []int32{int32(port)}}) //nolint:gosec // a port
		if err != nil {
			t.Fatal(err)
		}
		if out, err := run("portforward", method, forward.Url, strconv.Itoa(port)); out != "answer to abc\nanswer to abc\nanswer to abc\n" || err != nil {
			t.Errorf("port-forward by %s: %q, %v", method, out, err)
		}
	}
}
