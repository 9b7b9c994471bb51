package limits

import (
	"log/slog"
	"testing"

	"github.com/streamshim/streamshim/pkg/handover"
	"github.com/streamshim/streamshim/pkg/session"
)

// Sessions that are handed over count where they go on, also beyond a limit that would refuse them, and do not count where
// they were.
func TestCountsGoWithSessions(t *testing.T) {
	log := slog.New(slog.DiscardHandler)
	before, after := New(Config{}), New(Config{SessionsPerPod: 1})
	from, to := session.NewRegistry(log, before), session.NewRegistry(log, after)
	var live []*session.Session
	for range 2 {
		s, err := from.Begin(t.Context(), exec("pod", "c"))
		if err != nil {
			t.Fatal(err)
		}
		live = append(live, s)
	}
	files := handover.NewFiles()
	for i, s := range live {
		state := s.Freeze(files)
		if before.sessions != 1-i {
			t.Errorf("%d are counted that are not frozen, of %d", before.sessions, 1-i)
		}
		resumed, err := to.Resume(t.Context(), state, files)
		if err != nil || resumed.Context().Err() != nil {
			t.Fatal(err)
		}
		live[i] = resumed
	}
	if after.sessions != 2 || after.pods["pod"] != 2 || after.containers["c"] != 2 {
		t.Errorf("counted: %d, %v, %v", after.sessions, after.pods, after.containers)
	}
	if _, err := to.Begin(t.Context(), exec("pod", "c")); refusal(err) != session.TooMany {
		t.Errorf("another one: %v", err)
	}
	for _, s := range live {
		s.End(session.Outcome{})
	}
	if after.sessions != 0 || len(after.pods)+len(after.containers) != 0 {
		t.Errorf("counted at the end: %d, %v, %v", after.sessions, after.pods, after.containers)
	}
}
