package exec

import (
	"context"
	"fmt"
	"io"
	"strings"
	"testing"

	"k8s.io/client-go/tools/remotecommand"

	"github.com/streamshim/streamshim/internal/testutil"
	"github.com/streamshim/streamshim/test/internal/harness"
	"github.com/streamshim/streamshim/test/internal/node"
)

// TestExecLeaksNothing runs 1000 execs over both protocols. They succeed, fail, or are cut off.
func TestExecLeaksNothing(t *testing.T) {
	t.Parallel()
	container := harness.RunContainer(t, node.ContainerSpec{})
	harness.ExpectNoLeak(t, func(shim *harness.Streamshim, n int) {
		harness.InParallel(t, n, 8, func(i int) {
			ctx, cancel := context.WithTimeout(context.Background(), testutil.Patience)
			defer cancel()
			options := remotecommand.StreamOptions{Stdout: io.Discard, Stderr: io.Discard}
			var command []string
			want := 0
			switch i / 2 % 4 {
			case 0:
				command = []string{"echo", "good"}
				options.Stdin = strings.NewReader("input")
			case 1:
				command, want = []string{"false"}, 1
			case 2:
				command, want = []string{"/no/such/file"}, 127
			case 3: // the client leaves with the first output
				command, want = []string{"sh", "-c", "echo begin; exec sleep 1000"}, -1
				options.Stdout = harness.WriterFunc(func(p []byte) (int, error) { cancel(); return len(p), nil })
			}
			u := shim.ExecURL(t, container, options, command...)
			if err := harness.Stream(ctx, harness.Transports[i%2], u.String(), options); harness.ExitCodeOf(err) != want {
				t.Errorf("%s, %q: %v, want exit code %d", harness.Transports[i%2], command, err, want)
			}
		})
	}, 1000)
}

// TestOrphansAreReaped checks that no zombies stay. As a subreaper streamshim also inherits the orphans of containers that
// share the host's processes. No status that somebody waits for may be lost.
func TestOrphansAreReaped(t *testing.T) {
	t.Parallel()
	pod := harness.RunPod(t, node.PodSpec{HostPID: true})
	container := harness.RunContainerIn(t, pod, node.ContainerSpec{})
	shim := harness.StartStreamshim(t, "")
	harness.InParallel(t, 200, 8, func(i int) {
		code := i % 200
		// Orphans that end before, with and after the command.
		script := fmt.Sprintf("(sleep 0.2 &) ; (sh -c 'exit 9' &) ; (sleep 1 >/dev/null 2>&1 </dev/null &) ; exit %d", code)
		if i%2 == 0 {
			response, err := shim.ExecSync(context.Background(), container, 0, "sh", "-c", script)
			if err != nil || int(response.ExitCode) != code {
				t.Errorf("ExecSync: exit code %d, %v; want %d", response.GetExitCode(), err, code)
			}
			return
		}
		options := remotecommand.StreamOptions{Stdout: io.Discard}
		u := shim.ExecURL(t, container, options, "sh", "-c", script)
		ctx, cancel := context.WithTimeout(context.Background(), testutil.Patience)
		defer cancel()
		if err := harness.Stream(ctx, harness.Transports[i/2%2], u.String(), options); harness.ExitCodeOf(err) != code {
			t.Errorf("exec: %v, want exit code %d", err, code)
		}
	})
	testutil.Eventually(t, "no zombies are left", func() bool { return len(harness.Zombies(shim.PID())) == 0 })
}
