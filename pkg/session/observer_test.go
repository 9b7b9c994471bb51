package session

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"testing"
	"time"
)

type witness struct {
	saw    []string
	helper string
}

func (w *witness) Began(*Session)                   { w.saw = append(w.saw, "began") }
func (w *witness) Resumed(s *Session)               { w.saw = append(w.saw, "resumed "+string(s.Phase())) }
func (w *witness) PhaseChanged(_ *Session, p Phase) { w.saw = append(w.saw, string(p)) }
func (w *witness) Ended(_ *Session, o Outcome) {
	w.saw, w.helper = append(w.saw, "ended "+o.Reason), o.Helper
}
func (w *witness) Refused(i Info, err error) {
	w.saw = append(w.saw, fmt.Sprint("refused ", i.Kind, " ", err))
}

// guard refuses attaches at the CRI call and port-forwards when they begin.
type guard struct{}

func (guard) Check(i Info) error {
	if i.Kind == Attach {
		return errors.New("early")
	}
	return nil
}

func (guard) Admit(_ context.Context, s *Session) error {
	if s.Kind == PortForward {
		return errors.New("late")
	}
	return nil
}

func (guard) Ended(*Session, Outcome) {}
func (guard) Refused(Info, error)     {}

type still struct{}

func (still) LastActivity() time.Time             { return time.Time{} }
func (still) Transferred() (received, sent int64) { return 0, 0 }

func TestObserverSeesEachStepOnce(t *testing.T) {
	w := &witness{}
	r := NewRegistry(slog.New(slog.DiscardHandler), guard{})
	r.Observe(w)
	if err := r.Check(Info{Kind: Attach}); err == nil {
		t.Error("the guard was not asked")
	}
	if _, err := r.Begin(t.Context(), Info{Kind: PortForward}); err == nil {
		t.Error("the guard was not asked")
	}
	s, err := r.Begin(t.Context(), Info{Kind: Exec})
	if err != nil {
		t.Fatal(err)
	}
	s.Connect(still{})
	for _, p := range []Phase{Running, Running, Lingering, Lingering} {
		s.SetPhase(p)
	}
	s.End(Outcome{Reason: "exited"})
	want := []string{"refused attach early", "refused portforward late", "began", "running", "lingering", "ended exited"}
	if !slices.Equal(w.saw, want) {
		t.Errorf("saw %q, want %q", w.saw, want)
	}
}
