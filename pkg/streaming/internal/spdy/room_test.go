package spdy

import (
	"io"
	"os"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/streamshim/streamshim/pkg/streaming/internal/spdy/frames"
)

// fullPipe returns the end of a full pipe that is written to, and the other.
func fullPipe(t *testing.T) (write, read *os.File, raw syscall.RawConn) {
	t.Helper()
	read, write, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { read.Close(); write.Close() })
	if raw, err = write.SyscallConn(); err != nil {
		t.Fatal(err)
	}
	raw.Control(func(fd uintptr) {
		for err == nil {
			_, err = unix.Write(int(fd), make([]byte, 64<<10))
		}
	})
	return write, read, raw
}

// Uploads to commands that do not read hold no threads, however many there are.
func TestWaitingForRoomHoldsNoThread(t *testing.T) {
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
		_, read, raw := fullPipe(t)
		reads[i] = read
		waiting.Go(func() {
			var r room
			defer r.close()
			if r.await(raw, testTimeout) {
				ready.Add(1)
			}
		})
	}
	time.Sleep(200 * time.Millisecond) // for all of them to wait
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

func TestRoom(t *testing.T) {
	var r room
	defer r.close()
	write, read, raw := fullPipe(t)
	if r.await(raw, 20*time.Millisecond) {
		t.Error("a full pipe has room")
	}
	for range 3 { // once more with the same descriptor, which had been in the set
		if _, err := io.ReadFull(read, make([]byte, 8<<10)); err != nil {
			t.Fatal(err)
		}
		if !r.await(raw, testTimeout) {
			t.Error("a pipe that is read has no room")
		}
	}
	if r.await(raw, 0) {
		t.Error("room without any time to look for it")
	}
	read.Close()
	write.Close()
	if r.await(raw, testTimeout) {
		t.Error("a closed pipe has room")
	}
}

// Pings are answered while a command takes its input in drops.
func TestPingsBehindSlowUpload(t *testing.T) {
	read, write, err := os.Pipe() // of 64 KiB
	if err != nil {
		t.Fatal(err)
	}
	defer read.Close()
	u := upload(t, Config{ConnBuffer: 1 << 20, Stall: -1}, write)
	u.peer.data(1, 0, make([]byte, 60<<10)) // WriteTo waits for more, so that the read loop writes itself
	if _, err := io.ReadFull(read, make([]byte, 60<<10)); err != nil {
		t.Fatal(err)
	}
	var batch []byte
	const number, size = 6, 32 << 10
	for range number {
		header := make([]byte, frames.HeaderLen)
		frames.PutDataHeader(header, 1, 0, size)
		batch = append(append(batch, header...), make([]byte, size)...)
	}
	u.peer.send(append(batch, ping(7)...))
	taken := 0
	answered := make(chan struct{})
	goDo(t, func() {
		defer close(answered)
		for {
			if h, _ := u.peer.next(); h.Control && h.Kind == frames.TypePing {
				return
			}
		}
	})
	for drop := make([]byte, 4<<10); taken < number*size; {
		time.Sleep(directWait * 3 / 4)
		n, err := read.Read(drop)
		if err != nil {
			t.Fatal(err)
		}
		taken += n
		select {
		case <-answered:
			if taken > number*size/3 {
				t.Errorf("the ping was answered when %d of %d bytes had been taken", taken, number*size)
			}
			goDo(t, func() { io.Copy(io.Discard, read) })
			u.peer.data(1, frames.FlagFin, nil)
			await(t, u.done, "WriteTo")
			return
		default:
		}
	}
	t.Error("the ping was not answered before everything had been taken")
}
