package nodeinstall

import (
	"errors"
	"runtime"
	"testing"

	"golang.org/x/sys/unix"
)

// The first thread's namespaces are the process's: a command that kubectl exec starts in the agent's container
// would be on the node.
func TestFirstThreadStays(t *testing.T) {
	want := errors.New("as it was")
	for range 200 {
		if err := onThread(func() error {
			if unix.Gettid() == unix.Getpid() {
				return errors.New("on the first thread")
			}
			return want
		}); !errors.Is(err, want) {
			t.Fatal(err)
		}
		runtime.Gosched()
	}
}
