package attach

import (
	"io"
	"testing"
	"time"

	"k8s.io/client-go/tools/remotecommand"

	"github.com/streamshim/streamshim/test/internal/harness"
)

// TestAttachEndsWithItsContainer checks that an attach ends with its container (A5).
func TestAttachEndsWithItsContainer(t *testing.T) {
	t.Parallel()
	for _, e := range harness.Endings {
		t.Run(e.Name, func(t *testing.T) {
			t.Parallel()
			pod := harness.RunPod(t, e.Pod)
			e.Container.Stdin = true
			container := harness.RunContainerIn(t, pod, e.Container)
			var ended []<-chan error
			for _, transport := range harness.Transports {
				options := remotecommand.StreamOptions{Stdin: harness.OpenStdin(t), Stdout: io.Discard, Stderr: io.Discard}
				session, _ := harness.Begin(t, transport, harness.Shared.Shim.AttachURL(t, container, options), options)
				ended = append(ended, session)
			}
			e.End(t, pod, container)
			for i, session := range ended {
				select {
				case err := <-session:
					t.Logf("%s: %v", harness.Transports[i], err)
				case <-time.After(harness.EndLimit):
					t.Errorf("%s: the session did not end", harness.Transports[i])
				}
			}
		})
	}
}
