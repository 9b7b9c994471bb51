package exec

import (
	"context"
	"errors"
	"io"
	"net/http"
	"net/url"
	"sync"
	"testing"
	"time"

	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/remotecommand"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/streamshim/streamshim/internal/testutil"
	"github.com/streamshim/streamshim/test/internal/harness"
	"github.com/streamshim/streamshim/test/internal/node"
)

// TestIdleTerminalsAreSmall measures the streamshim program with many idle shells, each on a terminal of a real container.
// Each must take less than 100 KiB. The runtimes' own servers take several hundred.
func TestIdleTerminalsAreSmall(t *testing.T) {
	const sessions, mostKiB = 100, 100
	// So that memory which was released does not count until the next collection, up to two minutes later in an idle
	// process.
	t.Setenv("GOGC", "10")
	shim := harness.StartStreamshim(t, "")
	pid := shim.PID()
	for _, transport := range harness.Transports {
		t.Run(transport, func(t *testing.T) {
			container := harness.RunContainer(t, node.ContainerSpec{})
			ctx, cancel := context.WithCancel(t.Context())
			var clients sync.WaitGroup
			defer clients.Wait()
			defer cancel()
			open := func() {
				response, err := shim.Runtime.Exec(t.Context(), &runtimeapi.ExecRequest{
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
				tooLate := time.AfterFunc(testutil.Patience, func() { screen.CloseWithError(errors.New("the shell is not ready")) })
				if _, err := io.ReadFull(screen, make([]byte, len("ready"))); err != nil {
					t.Fatal(err)
				}
				tooLate.Stop()
				clients.Go(func() { io.Copy(io.Discard, screen) })
			}
			for range 10 { // after this, what is made once exists
				open()
			}
			before := harness.UsageOf(t, pid)
			for range sessions {
				open()
			}
			// Free memory returns to the kernel after a while. Until then it counts, too.
			deadline := time.Now().Add(testutil.Patience)
			after := harness.UsageOf(t, pid)
			for ; (after.RSSKiB-before.RSSKiB)/sessions >= mostKiB && time.Now().Before(deadline); after = harness.UsageOf(t, pid) {
				time.Sleep(time.Second)
			}
			each := (after.RSSKiB - before.RSSKiB) / sessions
			t.Logf("%d KiB and %d descriptors for each of %d sessions", each, (after.Descriptors-before.Descriptors)/sessions, sessions)
			if each >= mostKiB {
				t.Errorf("an idle session with a terminal takes %d KiB of streamshim, want less than %d", each, mostKiB)
			}
			if after.Threads > before.Threads+20 {
				t.Errorf("%d threads before, %d with %d more sessions", before.Threads, after.Threads, sessions)
			}
		})
	}
}
