package audit

import (
	"context"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/streamshim/streamshim/internal/testutil"
	"github.com/streamshim/streamshim/internal/testutil/leak"
	"github.com/streamshim/streamshim/pkg/handover"
	"github.com/streamshim/streamshim/pkg/session"
)

// Of three sessions one goes on after the hand-over, one cannot be resumed, and one lives until the program is killed: each has one
// start and one end.
func TestOneStartAndOneEnd(t *testing.T) {
	testutil.DropEachField(t, func(t *testing.T, change func(*State)) error {
		leak.Check(t)
		c := fileConfig(t)
		c.OpenDir = filepath.Join(t.TempDir(), "open")
		log := slog.New(slog.DiscardHandler)
		before, err := New(c, log)
		if err != nil {
			t.Fatal(err)
		}
		from := session.NewRegistry(log, before)
		var live []*session.Session
		for range 3 {
			s, err := from.Begin(t.Context(), info)
			if err != nil {
				t.Fatal(err)
			}
			live = append(live, s)
		}
		files := handover.NewFiles()
		var states []session.State
		for _, s := range live {
			states = append(states, s.Freeze(files))
		}
		if _, err := before.FreezeLog(t.Context()); err != nil {
			t.Fatal(err)
		}
		before.mu.Lock()
		before.lost = 7
		before.mu.Unlock()
		hideFile(t, c.File) // nothing can be noted before the hand-over
		encoded, err := before.FreezeLog(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		showFile(t, c.File)
		var state State
		if err := handover.Decode(encoded, &state); err != nil {
			t.Fatal(err)
		}
		change(&state)
		if encoded, err = handover.Encode(state); err != nil {
			t.Fatal(err)
		}
		// The program is executed: its goroutines are gone, without a word.
		before.mu.Lock()
		before.lost = 0
		before.mu.Unlock()

		c.HandedOver = true
		after, err := New(c, log)
		if err != nil {
			t.Fatal(err)
		}
		to := session.NewRegistry(log, after)
		var resumed []*session.Session
		for _, state := range []session.State{states[0], states[2]} {
			s, err := to.Resume(t.Context(), state, files)
			if err != nil {
				t.Fatal(err)
			}
			resumed = append(resumed, s)
		}
		if err := after.Settle(encoded); err != nil {
			t.Fatal(err)
		}
		after.HandedOver(2, 1, 150*time.Millisecond)
		resumed[0].End(session.Outcome{Reason: "exited"})
		after.Close() // stands for the kill: the third session's note stays

		c.HandedOver = false
		restarted, err := New(c, log)
		if err != nil {
			t.Fatal(err)
		}
		restarted.Close()
		starts, ends, lost, handovers := map[string]int{}, map[string]string{}, int64(0), 0
		for _, r := range records(t, c.File) {
			switch r.Event {
			case Start:
				starts[r.Session]++
			case End:
				ends[r.Session] += r.Reason
			case Lost:
				lost += r.LostRecords
			case Handover:
				handovers++
				if *r.Carried != 2 || *r.NotCarried != 1 || *r.Pause != 0.15 {
					t.Errorf("hand-over: %+v", r)
				}
			}
		}
		before.Close()
		if left, err := os.ReadDir(c.OpenDir); err != nil || len(left) != 0 {
			t.Errorf("left open: %v, %v", left, err)
		}
		for i, want := range []string{"exited", "interrupted", "interrupted"} {
			if id := live[i].ID; starts[id] != 1 || ends[id] != want {
				return fmt.Errorf("session %d: %d starts, ends %q, want %q", i, starts[id], ends[id], want)
			}
		}
		if lost != 7 || handovers != 1 {
			return fmt.Errorf("%d records are said to be lost, %d hand-overs", lost, handovers)
		}
		return nil
	})
}

// hideFile makes it impossible to write to the log.
func hideFile(t *testing.T, path string) {
	t.Helper()
	if err := os.Rename(path, path+".hidden"); err != nil {
		t.Fatal(err)
	}
	if err := os.Mkdir(path, 0o700); err != nil {
		t.Fatal(err)
	}
}

func showFile(t *testing.T, path string) {
	t.Helper()
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(path+".hidden", path); err != nil {
		t.Fatal(err)
	}
}

// What is queued is in the file when the log is frozen; a disk that does not answer is an error, and no reason to wait for ever.
func TestFreezeWritesWhatWaits(t *testing.T) {
	c := fileConfig(t)
	c.Fsync = FsyncInterval
	l := newLog(t, c)
	const many = 500
	for range many {
		l.Refused(info, context.Canceled)
	}
	if _, err := l.FreezeLog(t.Context()); err != nil {
		t.Fatal(err)
	}
	if n := len(records(t, c.File)); n != many {
		t.Errorf("%d of %d records are written", n, many)
	}

	sink := &stuckSink{release: make(chan struct{})}
	stuck := stuckLog(sink, c)
	stuck.Refused(info, context.Canceled)
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	if _, err := stuck.FreezeLog(ctx); err == nil {
		t.Error("a log was frozen that cannot be written")
	}
	close(sink.release)
	stuck.Close()
}

func TestSettleOfNonsense(t *testing.T) {
	l := newLog(t, fileConfig(t))
	if err := l.Settle([]byte("nonsense")); err == nil {
		t.Error("a state was read that is none")
	}
	if err := l.Settle(nil); err != nil {
		t.Error(err)
	}
}
