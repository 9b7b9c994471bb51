package recording

import (
	"bytes"
	"context"
	"errors"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/streamshim/streamshim/internal/testutil"
	"github.com/streamshim/streamshim/pkg/handover"
	"github.com/streamshim/streamshim/pkg/rescue"
	"github.com/streamshim/streamshim/pkg/session"
)

// faultyRoom panics once: in the session when it takes, in the writer of the recording when it returns.
type faultyRoom struct {
	take, returned atomic.Bool // to panic at the next one
}

func (r *faultyRoom) Take(int) bool {
	if r.take.Swap(false) {
		panic("a fault of the test in Take")
	}
	return true
}

func (r *faultyRoom) Return(int) {
	if r.returned.Swap(false) {
		panic("a fault of the test in Return")
	}
}

// large is more than a queue may hold without room.
var large = bytes.Repeat([]byte("x"), 64<<10)

// TestPanicOfAWriter checks that a panic in the goroutine of a recording ends that recording, and its session where that must be
// recorded. Another session and its recording go on.
func TestPanicOfAWriter(t *testing.T) {
	for name, deny := range map[string]bool{"allow": false, "deny": true} {
		t.Run(name, func(t *testing.T) {
			room := &faultyRoom{}
			f := newFixture(t, func(c *Config) { c.Deny = deny })
			f.room = room
			s, other := f.begin(t, info), f.begin(t, info)
			rec := f.recordings[s]
			room.returned.Store(true)
			// With Deny the queue has only sizes.
			testutil.Eventually(t, "the end of the recording", func() bool {
				for range 300 { // more of them than a queue may hold without room
					s.Taps.Resize(s.Taps.Size())
				}
				if !deny {
					s.Taps.Output(session.Stdout, large)
				}
				select {
				case <-rec.ended:
					return true
				default:
					return false
				}
			})
			err := s.Taps.Output(session.Stdout, []byte("later"))
			if stopped := s.Context().Err() != nil; stopped != deny || (err != nil) != deny {
				t.Errorf("the session ends: %v; its output: %v", stopped, err)
			}
			if err := other.Taps.Output(session.Stdout, []byte("still here")); err != nil || other.Context().Err() != nil {
				t.Errorf("the other session: %v, %v", err, other.Context().Err())
			}
			if _, err := rec.file.Write([]byte("x")); !errors.Is(err, os.ErrClosed) {
				t.Errorf("its file: %v", err)
			}
			next, resumed := f.handOver(t, s, func(*State) {})
			if err := resumed.Taps.Output(session.Stdout, []byte("later")); (err != nil) != deny {
				t.Errorf("after a hand-over its output: %v", err)
			}
			resumed.End(session.Outcome{Reason: "exited"})
			next.Close()
			other.End(session.Outcome{Reason: "exited"})
			f.Close()
			if n := f.Incomplete(); n != 1 {
				t.Errorf("%d recordings are incomplete", n)
			}
			if text := parseCast(t, f.recorded(t, other)).text("o"); text != "still here" {
				t.Errorf("the other recording has %q", text)
			}
		})
	}
}

// recorded returns the path of a session's recording.
func (f *fixture) recorded(t *testing.T, s *session.Session) string {
	t.Helper()
	for _, path := range f.files(t) {
		if strings.Contains(path, s.ID) {
			return path
		}
	}
	t.Fatal("it is not recorded")
	return ""
}

// TestPanicInATap checks that a panic within a session's output leaves no lock of its recording: the session can end, and its
// recording has all that came before.
func TestPanicInATap(t *testing.T) {
	room := &faultyRoom{}
	f := newFixture(t, nil)
	f.room = room
	s := f.begin(t, info)
	s.Taps.Output(session.Stdout, []byte("before"))
	room.take.Store(true)
	var fault *rescue.Panic
	rescue.Call(func(p *rescue.Panic) { fault = p }, func() { s.Taps.Output(session.Stdout, large) })
	if fault == nil {
		t.Fatal("nothing has panicked")
	}
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		s.End(session.Outcome{Reason: "panic", ExitCode: -1})
	}()
	testutil.Receive(t, "the end of the session", ended)
	c := f.only(t)
	if text := c.text("o"); text != "before" || !strings.Contains(c.text("m"), "the session has ended: panic") {
		t.Errorf("the recording has %q and %q", text, c.text("m"))
	}
}

// TestSlowDiskAtAFreeze checks that a write that does not return does not hold up a hand-over, during which all sessions stand
// still: the recording ends, and its session only where that must be recorded.
func TestSlowDiskAtAFreeze(t *testing.T) {
	for name, deny := range map[string]bool{"allow": false, "deny": true} {
		t.Run(name, func(t *testing.T) {
			f := newFixture(t, func(c *Config) { c.Rules = nil })
			s := f.begin(t, info)
			disk, file, err := os.Pipe()
			if err != nil {
				t.Fatal(err)
			}
			config := f.config
			config.Deny = deny
			rec := f.newRecording(config, s, filepath.Join(config.Directory, "slow"+Suffix), file)
			if err := rec.writeHeader(defaultWidth, defaultHeight); err != nil {
				t.Fatal(err)
			}
			f.listen(rec)
			f.recordings[s] = rec
			f.write(rec)
			// More than the pipe holds. Where all must be written first, the session waits for it.
			waiting := make(chan struct{})
			go func() {
				defer close(waiting)
				s.Taps.Output(session.Stdout, bytes.Repeat(large, 4))
			}()
			if !deny {
				<-waiting
			}
			testutil.Eventually(t, "the writer is stuck", func() bool { return full(t, file) })
			files := handover.NewFiles()
			defer files.Close()
			began := time.Now()
			state := s.Freeze(files)
			if took := time.Since(began); took > testutil.Patience/4 {
				t.Errorf("the freeze has taken %v", took)
			}
			if (state.Stopped != nil) != deny {
				t.Errorf("the session ends with %v", state.Stopped)
			}
			ctx, cancel := context.WithTimeout(t.Context(), time.Millisecond)
			defer cancel()
			if err := f.Settle(ctx); err == nil {
				t.Error("it is said to be written")
			}
			text, err := io.ReadAll(disk) // the disk answers
			if err != nil || !strings.Contains(string(text), "the recording ends here: "+errSlowDisk.Error()) {
				t.Errorf("%v; the recording ends with %q", err, text[max(0, len(text)-200):])
			}
			<-waiting
			after := session.NewRegistry(slog.New(slog.DiscardHandler), New(config, nil, slog.New(slog.DiscardHandler)))
			resumed, err := after.Resume(t.Context(), state, files)
			if err != nil {
				t.Fatal(err)
			}
			if err := resumed.Taps.Output(session.Stdout, []byte("x")); err != nil {
				t.Errorf("its output: %v", err)
			}
			resumed.End(session.Outcome{Reason: "exited"})
			s.End(session.Outcome{Reason: "exited"})
			f.Close()
			if n := f.Incomplete(); n != 1 {
				t.Errorf("%d recordings are incomplete", n)
			}
		})
	}
}

// full reports whether a write to the pipe would wait.
func full(t *testing.T, pipe *os.File) (is bool) {
	t.Helper()
	raw, err := pipe.SyscallConn()
	if err == nil {
		err = raw.Control(func(fd uintptr) {
			poll := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLOUT}}
			_, err := unix.Poll(poll, 0)
			is = err == nil && poll[0].Revents&unix.POLLOUT == 0
		})
	}
	if err != nil {
		t.Fatal(err)
	}
	return is
}
