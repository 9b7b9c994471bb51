package direct

import (
	"io"
	"os"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

const testTimeout = 2 * time.Minute

// fullPipe returns both ends of a full pipe, and a Writer to it.
func fullPipe(t *testing.T) (write, read *os.File, to *Writer) {
	t.Helper()
	read, write, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { read.Close(); write.Close() })
	if to = To(write); to == nil {
		t.Fatal("a pipe is not written directly")
	}
	for to.Write(make([]byte, 64<<10)) > 0 {
	}
	if to.Failed() {
		t.Fatal(to.Err())
	}
	return write, read, to
}

// TestWaitingHoldsNoThread checks that uploads to commands that do not read hold no threads, however many there are.
func TestWaitingHoldsNoThread(t *testing.T) {
	threads := func() int {
		tasks, err := os.ReadDir("/proc/self/task")
		if err != nil {
			t.Fatal(err)
		}
		return len(tasks)
	}
	before := threads()
	const waits = 100
	var waiting sync.WaitGroup
	var ready atomic.Int32
	reads := make([]*os.File, waits)
	for i := range waits {
		_, read, to := fullPipe(t)
		reads[i] = read
		waiting.Go(func() {
			var w Waiter
			defer w.Close()
			if w.Await(to, testTimeout) {
				ready.Add(1)
			}
		})
	}
	time.Sleep(200 * time.Millisecond) // until all of them wait
	if more := threads() - before; more > waits/4 {
		t.Errorf("%d more threads with %d waiting", more, waits)
	}
	for _, read := range reads {
		if _, err := io.ReadFull(read, make([]byte, 64<<10)); err != nil {
			t.Fatal(err)
		}
	}
	waiting.Wait()
	if ready.Load() != waits {
		t.Errorf("%d of %d found room", ready.Load(), waits)
	}
}

func TestAwait(t *testing.T) {
	var w Waiter
	defer w.Close()
	write, read, to := fullPipe(t)
	if w.Await(to, 20*time.Millisecond) {
		t.Error("a full pipe has room")
	}
	for range 3 { // again with the same descriptor, which was in the set before
		if _, err := io.ReadFull(read, make([]byte, 8<<10)); err != nil {
			t.Fatal(err)
		}
		if !w.Await(to, testTimeout) {
			t.Error("a pipe that is read has no room")
		}
	}
	if w.Await(to, 0) {
		t.Error("room without any time to look for it")
	}
	read.Close()
	write.Close()
	if w.Await(to, testTimeout) {
		t.Error("a closed pipe has room")
	}
}
