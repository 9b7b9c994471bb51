package attach

import (
	"context"
	"errors"
	"io"
	"testing"

	"k8s.io/client-go/tools/remotecommand"

	"github.com/streamshim/streamshim/internal/testutil"
	"github.com/streamshim/streamshim/test/internal/harness"
	"github.com/streamshim/streamshim/test/internal/node"
)

// TestAttachLeaksNothing checks that an attach leaks no goroutine, descriptor or memory (CVE-2025-64329, A7).
func TestAttachLeaksNothing(t *testing.T) {
	t.Parallel()
	container := harness.RunContainer(t, node.ContainerSpec{Stdin: true, Command: []string{"sh", "-c", "while :; do echo output; sleep 0.05; done"}})
	harness.ExpectNoLeak(t, func(shim *harness.Streamshim, n int) {
		harness.InParallel(t, n, 8, func(i int) {
			ctx, cancel := context.WithTimeout(context.Background(), testutil.Patience)
			defer cancel()
			// Dropped with the first output. Dropping earlier would test containerd 2.4: its containers may lose their
			// output for good when a client leaves while it is being attached.
			output := harness.WriterFunc(func(p []byte) (int, error) { cancel(); return len(p), nil })
			options := remotecommand.StreamOptions{Stdin: harness.OpenStdin(t), Stdout: output, Stderr: io.Discard}
			u := shim.AttachURL(t, container, options)
			err := harness.Stream(ctx, harness.Transports[i%2], u.String(), options)
			if !errors.Is(ctx.Err(), context.Canceled) {
				t.Errorf("%s: no output came within %v: %v", harness.Transports[i%2], testutil.Patience, err)
			}
		})
		if t.Failed() {
			harness.LogContainerdStacks(t, "WriterGroup", "spdystream")
		}
	}, 1000)
}
