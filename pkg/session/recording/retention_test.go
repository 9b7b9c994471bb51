package recording

import (
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/streamshim/streamshim/pkg/session"
)

// A directory is listed once in a while, not for each recording; what others do there is seen then.
func TestListedOnceInAWhile(t *testing.T) {
	f := newFixture(t, func(c *Config) { c.MaxFiles = 2 })
	record := func() {
		f.begin(t, info).End(session.Outcome{Reason: "exited"})
		f.writers.Wait()
	}
	record()
	place := f.place(f.config.Directory)
	first := place.listed
	for i := range 3 {
		name := fmt.Sprintf("2020010%dT000000.000Z_foreign%s", i+1, Suffix)
		if err := os.WriteFile(filepath.Join(f.config.Directory, name), nil, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	record()
	if place.listed != first {
		t.Error("listed again for the second recording")
	}
	if files := f.files(t); len(files) != 5 {
		t.Errorf("before the next listing there are %v", files)
	}
	place.listed = time.Now().Add(-relistAfter)
	record()
	if files := f.files(t); len(files) != 2 {
		t.Errorf("after the next listing there are %v", files)
	}
}

// Where others remove recordings, no more are removed than the limits say once that is seen, and their
// absence is no error.
func TestOthersRemove(t *testing.T) {
	f := newFixture(t, func(c *Config) { c.MaxFiles = 4 })
	for range 4 {
		f.begin(t, info).End(session.Outcome{Reason: "exited"})
		f.writers.Wait()
	}
	place := f.place(f.config.Directory)
	for _, path := range f.files(t)[:3] {
		if err := os.Remove(path); err != nil {
			t.Fatal(err)
		}
	}
	place.listed = time.Now().Add(-relistAfter)
	f.begin(t, info).End(session.Outcome{Reason: "exited"})
	f.writers.Wait()
	if files := f.files(t); len(files) != 2 {
		t.Errorf("there are %v", files)
	}
}

// The size of what is being written counts.
func TestLiveSizeCounts(t *testing.T) {
	f := newFixture(t, func(c *Config) { c.MaxTotal = 2000 })
	f.begin(t, info).End(session.Outcome{Reason: "exited"})
	f.writers.Wait()
	live := f.begin(t, info)
	live.Taps.Output(session.Stdout, make([]byte, 4000))
	place := f.place(f.config.Directory)
	for end := time.Now().Add(time.Minute); ; time.Sleep(time.Millisecond) {
		place.mu.Lock()
		size := place.liveBytes
		place.mu.Unlock()
		if size > 4000 {
			break
		}
		if time.Now().After(end) {
			t.Fatalf("%d bytes are counted", size)
		}
	}
	place.retain(f.config)
	if files := f.files(t); len(files) != 1 {
		t.Errorf("there are %v", files)
	}
	live.End(session.Outcome{Reason: "exited"})
	f.writers.Wait()
	if place.liveBytes != 0 || len(place.live) != 0 {
		t.Errorf("nothing is written, and %d bytes of %v are counted", place.liveBytes, place.live)
	}
}

// BenchmarkRetention is one recording among N that are kept.
func BenchmarkRetention(b *testing.B) {
	for _, n := range []int{10, 100, 1000, 4000} {
		b.Run(fmt.Sprint(n), func(b *testing.B) {
			config := Config{
				Directory: b.TempDir(), Buffer: 1 << 20, MaxFiles: n, NonTTY: true, Command: session.CommandArg0,
				Rules: []session.Selector{{}},
			}
			r := New(config, nil, slog.New(slog.DiscardHandler))
			registry := session.NewRegistry(slog.New(slog.DiscardHandler), r)
			for i := range n {
				name := fmt.Sprintf("20200101T000000.000Z_%06d%s", i, Suffix)
				if err := os.WriteFile(filepath.Join(config.Directory, name), []byte("x"), 0o600); err != nil {
					b.Fatal(err)
				}
			}
			for b.Loop() {
				s, err := registry.Begin(b.Context(), info)
				if err != nil {
					b.Fatal(err)
				}
				s.End(session.Outcome{Reason: "exited"})
				r.writers.Wait()
			}
			r.Close()
		})
	}
}

// A pod that begins one short session after the other pushes out its own recordings, not those of others.
func TestOnePodDoesNotPushOutOthers(t *testing.T) {
	f := newFixture(t, func(c *Config) { c.MaxFiles = 6 })
	record := func(pod string) {
		other := info
		other.Target.PodName = pod
		f.begin(t, other).End(session.Outcome{Reason: "exited"})
		f.writers.Wait()
	}
	record("first")
	record("second")
	for range 30 {
		record("busy")
	}
	of := map[string]int{}
	for _, path := range f.files(t) {
		of[podOf(filepath.Base(path))]++
	}
	namespace := info.Target.PodNamespace
	if of[namespace+"_first"] != 1 || of[namespace+"_second"] != 1 || of[namespace+"_busy"] != 4 {
		t.Errorf("kept: %v", of)
	}
}

// What is younger than recording.min_age stays, however many come, and what has no room then is not recorded and not
// begun where that is demanded.
func TestMinimumAge(t *testing.T) {
	for _, deny := range []bool{false, true} {
		f := newFixture(t, func(c *Config) { c.MaxFiles, c.MinAge, c.Deny = 2, time.Hour, deny })
		for range 2 {
			f.begin(t, info).End(session.Outcome{Reason: "exited"})
			f.writers.Wait()
		}
		kept := f.files(t)
		s, err := f.registry.Begin(t.Context(), info)
		if (err != nil) != deny {
			t.Errorf("deny: %v, and a session without room for its recording: %v", deny, err)
		}
		if err == nil {
			s.End(session.Outcome{Reason: "exited"})
			f.writers.Wait()
		}
		if now := f.files(t); fmt.Sprint(now) != fmt.Sprint(kept) || f.Incomplete() != 1 {
			t.Errorf("kept %v of %v, %d are counted as incomplete", now, kept, f.Incomplete())
		}
		// When they are old enough they go.
		old := time.Now().Add(-2 * time.Hour)
		for _, path := range kept {
			if err := os.Chtimes(path, old, old); err != nil {
				t.Fatal(err)
			}
		}
		f.place(f.config.Directory).listed = time.Time{}
		for _, file := range f.place(f.config.Directory).known {
			file.modified = old
		}
		f.begin(t, info).End(session.Outcome{Reason: "exited"})
		f.writers.Wait()
		if now := f.files(t); len(now) != 2 || now[0] == kept[0] {
			t.Errorf("after an hour: %v", now)
		}
	}
}
