package spdy

import (
	"io"
	"sync/atomic"
	"testing"

	"github.com/streamshim/streamshim/internal/testutil"
	"github.com/streamshim/streamshim/pkg/rescue"
)

// faultyRoom panics when something is returned to it, once it is told to.
type faultyRoom struct {
	testutil.Room
	faulty atomic.Bool
}

func (r *faultyRoom) Return(n int) {
	r.Room.Return(n)
	if r.faulty.Swap(false) {
		panic("a fault of the test in Return")
	}
}

// TestPanicLeavesNoLock checks that a panic while a stream is read leaves no lock for which the end of the session, or another
// stream, would wait.
func TestPanicLeavesNoLock(t *testing.T) {
	for name, panics := range map[string]func(*Stream){
		"Read":      func(s *Stream) { s.Read(make([]byte, 1<<20)) },
		"WriteTo":   func(s *Stream) { s.WriteTo(io.Discard) },
		"CloseRead": func(s *Stream) { s.CloseRead() },
	} {
		t.Run(name, func(t *testing.T) {
			room := &faultyRoom{}
			accepted := make(chan *Stream, 2)
			_, client := pair(t, Config{Room: room, OnStream: func(s *Stream) { accepted <- s }}, Config{})
			var streams [2]*Stream
			for i := range streams {
				s, err := client.OpenStream(headers("n", "v"))
				if err != nil {
					t.Fatal(err)
				}
				streams[i] = s
			}
			s, other := testutil.Receive(t, "a stream", accepted), testutil.Receive(t, "a stream", accepted)
			if _, err := streams[0].Write(make([]byte, 64<<10)); err != nil {
				t.Fatal(err)
			}
			testutil.Eventually(t, "the data", func() bool { return s.held() > 0 })
			room.faulty.Store(true)
			var fault *rescue.Panic
			rescue.Call(func(p *rescue.Panic) { fault = p }, func() { panics(s) })
			if fault == nil {
				t.Fatal("nothing has panicked")
			}
			ended := make(chan struct{})
			go func() {
				defer close(ended)
				s.CloseRead()
				s.Reset()
			}()
			testutil.Receive(t, "the end of the stream", ended)
			if _, err := streams[1].Write([]byte("x")); err != nil {
				t.Error(err)
			}
			if n, err := other.Read(make([]byte, 10)); n != 1 || err != nil {
				t.Errorf("another stream reads %d, %v", n, err)
			}
		})
	}
}
