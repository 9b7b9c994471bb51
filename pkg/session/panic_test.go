package session

import (
	"context"
	"slices"
	"testing"

	"github.com/streamshim/streamshim/pkg/handover"
)

// faulty is a guard and an observer one of whose methods panics.
type faulty struct {
	*carrier
	in string
}

func (f *faulty) fault(method string) {
	if f.in == method {
		panic("a fault of the test in " + method)
	}
}

func (f *faulty) Carried() string                       { return "faulty" }
func (f *faulty) Admit(context.Context, *Session) error { f.fault("Admit"); return nil }
func (f *faulty) Ended(*Session, Outcome)               { f.fault("Ended") }
func (f *faulty) Began(*Session)                        { f.fault("Began") }
func (f *faulty) Resumed(*Session)                      { f.fault("Resumed") }
func (f *faulty) PhaseChanged(*Session, Phase)          { f.fault("PhaseChanged") }
func (f *faulty) Freeze(*Session, *handover.Files) ([]byte, error) {
	f.fault("Freeze")
	return nil, nil
}
func (f *faulty) Resume(*Session, []byte, *handover.Files) error { f.fault("Resume"); return nil }

// TestPanicOfAGuard checks that a panic in a guard or an observer, such as the recorder, ends the session that it happens in at
// most. The other guards are told of all, and nothing of the session stays behind.
func TestPanicOfAGuard(t *testing.T) {
	for _, test := range []struct {
		in   string
		want []string // what the last observer sees of the session that is handed over
	}{
		{"Admit", nil},
		{"Began", []string{"resumed running", "ended exited"}},
		{"PhaseChanged", []string{"resumed running", "ended exited"}},
		{"Freeze", []string{"resumed running", "ended exited"}},
		{"Resume", []string{"resumed running", "ended exited"}},
		{"Resumed", []string{"resumed running", "ended exited"}},
		{"Ended", []string{"resumed running", "ended exited"}},
	} {
		t.Run(test.in, func(t *testing.T) {
			registry := func() (*Registry, *carrier, *witness) {
				first := newCarrier()
				fault := &faulty{newCarrier(), test.in}
				r, w := registryOf(first, fault)
				r.observers = slices.Insert(r.observers, 0, Observer(fault))
				return r, first, w
			}
			before, first, _ := registry()
			s, err := before.Begin(t.Context(), everything())
			if test.in == "Admit" {
				if err == nil || len(before.List()) != 0 || len(first.kept) != 0 {
					t.Errorf("%v, %d sessions, another guard has %v", err, len(before.List()), first.kept)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			s.SetPhase(Running)
			after, kept, seen := registry()
			resumed, err := handOver(t, s, after, func(*State) {})
			if err != nil {
				t.Fatal(err)
			}
			if kept.kept[s.ID] != "kept of "+s.ID {
				t.Errorf("another guard has %q", kept.kept[s.ID])
			}
			if must := test.in == "Freeze" || test.in == "Resume"; must != (resumed.Context().Err() != nil) {
				t.Errorf("it goes on: %v", resumed.Context().Err() == nil)
			}
			resumed.End(Outcome{Reason: "exited"})
			if len(after.List()) != 0 || len(kept.kept) != 0 || !slices.Equal(seen.saw, test.want) {
				t.Errorf("%d sessions, another guard has %v, an observer saw %q", len(after.List()), kept.kept, seen.saw)
			}
		})
	}
}
