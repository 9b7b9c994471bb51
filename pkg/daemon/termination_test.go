package daemon

import (
	"syscall"
	"testing"

	"github.com/streamshim/streamshim/internal/testutil/leak"
)

// A signal ends the context, also after signals had been left to their default for a while, and who leaves them again is told.
func TestTermination(t *testing.T) {
	leak.Check(t)
	for range 50 {
		end := newTermination(t.Context())
		end.begin()
		end.begin()
		if end.suspend() {
			t.Fatal("no signal has come")
		}
		end.resume()
		if err := syscall.Kill(syscall.Getpid(), syscall.SIGTERM); err != nil {
			t.Fatal(err)
		}
		<-end.ctx.Done()
		if !end.suspend() {
			t.Fatal("a signal that has come is not told")
		}
		end.stop()
		end.stop()
	}
}
