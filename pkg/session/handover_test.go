package session

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"reflect"
	"testing"

	"github.com/streamshim/streamshim/internal/testutil"
	"github.com/streamshim/streamshim/pkg/handover"
	"github.com/streamshim/streamshim/pkg/workload"
)

// carrier is a guard that keeps one text for each session.
type carrier struct {
	guard
	kept map[string]string
	fail error
}

func (c *carrier) Admit(_ context.Context, s *Session) error {
	c.kept[s.ID] = "kept of " + s.ID
	return nil
}

func (c *carrier) Ended(s *Session, _ Outcome) { delete(c.kept, s.ID) }

func (c *carrier) Carried() string { return "carrier" }

func (c *carrier) Freeze(s *Session, _ *handover.Files) ([]byte, error) {
	kept := c.kept[s.ID]
	delete(c.kept, s.ID)
	return []byte(kept), c.fail
}

func (c *carrier) Resume(s *Session, state []byte, _ *handover.Files) error {
	c.kept[s.ID] = string(state)
	return c.fail
}

func newCarrier() *carrier { return &carrier{kept: map[string]string{}} }

func registryOf(guards ...Guard) (*Registry, *witness) {
	r, w := NewRegistry(slog.New(slog.DiscardHandler), guards...), &witness{}
	r.Observe(w)
	return r, w
}

// handOver brings a session into another registry, by way of its encoded state.
func handOver(t *testing.T, s *Session, to *Registry, change func(*State)) (*Session, error) {
	t.Helper()
	files := handover.NewFiles()
	encoded, err := handover.Encode(s.Freeze(files))
	if err != nil {
		t.Fatal(err)
	}
	var state State
	if err := handover.Decode(encoded, &state); err != nil {
		t.Fatal(err)
	}
	change(&state)
	return to.Resume(t.Context(), state, files)
}

func everything() Info {
	return Info{
		Kind: Exec,
		Target: workload.Target{
			ContainerID: "container", SandboxID: "sandbox", ContainerName: "name", PodName: "pod", PodNamespace: "namespace", PodUID: "uid",
		},
		PodLabels: map[string]string{"a": "b"}, Protocol: "protocol", Peer: "peer", Command: []string{"sh", "-c", "secret"}, TTY: true,
		User: &User{UID: 1, GID: 2}, AuditID: "audit", Trace: map[string]string{"traceparent": "t"},
	}
}

func TestSessionGoesOnElsewhere(t *testing.T) {
	testutil.DropEachField(t, func(t *testing.T, change func(*State)) error {
		before, _ := registryOf(newCarrier())
		s, err := before.Begin(t.Context(), everything())
		if err != nil {
			t.Fatal(err)
		}
		s.SetPhase(Running)
		s.SetHelper("tar")
		s.Told("a watch")
		s.Taps.Open()
		s.Taps.Resize(workload.Size{Width: 1, Height: 2})
		s.Stop(&EndError{Reason: "operator", Message: "told to end"})
		kept := newCarrier()
		after, witness := registryOf(kept)
		resumed, err := handOver(t, s, after, change)
		if err != nil {
			return err
		}
		var end *EndError
		switch {
		case !reflect.DeepEqual(resumed.Info, everything()):
			return fmt.Errorf("info %+v", resumed.Info)
		case resumed.ID != s.ID || !resumed.Start.Equal(s.Start) || resumed.Phase() != Running:
			return fmt.Errorf("%s since %v, %s", resumed.ID, resumed.Start, resumed.Phase())
		case !resumed.Taps.Opened() || resumed.Taps.Size() != workload.Size{Width: 1, Height: 2}:
			return errors.New("its terminal is another one")
		case kept.kept[s.ID] != "kept of "+s.ID:
			return fmt.Errorf("the guard keeps %q", kept.kept[s.ID])
		case resumed.Context().Err() == nil || !errors.As(context.Cause(resumed.Context()), &end) || end.Reason != "operator" || end.Message != "told to end":
			return fmt.Errorf("it ends for %v", context.Cause(resumed.Context()))
		case len(after.List()) != 1:
			return errors.New("it is not in the list")
		case resumed.TakeTold("another watch") || !resumed.TakeTold("a watch") || resumed.TakeTold("a watch"):
			return errors.New("its user has been told of other watches")
		}
		empty := after.Empty()
		resumed.End(Outcome{Reason: "exited"})
		<-empty
		if len(kept.kept) != 0 {
			return errors.New("the guard keeps something of a session that has ended")
		}
		// As observers see it: the helper's name comes with the outcome.
		if fmt.Sprint(witness.saw) != "[resumed running ended exited]" || witness.helper != "tar" {
			return fmt.Errorf("observers saw %v, helper %q", witness.saw, witness.helper)
		}
		return nil
	})
}

// When a hand-over fails, sessions go on as the same ones: whoever looks at them sees nothing of it.
func TestSessionThawsAsTheSame(t *testing.T) {
	kept := newCarrier()
	r, witness := registryOf(kept)
	s, err := r.Begin(t.Context(), everything())
	if err != nil {
		t.Fatal(err)
	}
	for range 3 {
		same, err := handOver(t, s, r, func(*State) {})
		if err != nil || same != s || kept.kept[s.ID] == "" {
			t.Fatalf("%p %v, keeps %q", same, err, kept.kept[s.ID])
		}
	}
	if s.Context().Err() != nil || fmt.Sprint(witness.saw) != "[began]" || len(r.List()) != 1 {
		t.Errorf("%v, observers saw %v", s.Context().Err(), witness.saw)
	}
	s.End(Outcome{})
}

// A guard that cannot carry a session ends it, and nothing else.
func TestGuardFails(t *testing.T) {
	for _, where := range []string{"freeze", "resume"} {
		before, after := newCarrier(), newCarrier()
		from, _ := registryOf(before)
		to, _ := registryOf(after)
		s, err := from.Begin(t.Context(), everything())
		if err != nil {
			t.Fatal(err)
		}
		map[string]*carrier{"freeze": before, "resume": after}[where].fail = errors.New("no disk")
		resumed, err := handOver(t, s, to, func(*State) {})
		var end *EndError
		if err != nil || !errors.As(context.Cause(resumed.Context()), &end) || end.Reason != reasonGuard {
			t.Errorf("%s: %v, %v", where, err, context.Cause(resumed.Context()))
		}
	}
}

func TestStateThatCannotBeRead(t *testing.T) {
	from, _ := registryOf()
	to, _ := registryOf()
	s, err := from.Begin(t.Context(), everything())
	if err != nil {
		t.Fatal(err)
	}
	for name, change := range map[string]func(*State){
		"version": func(s *State) { s.Version++ },
		"id":      func(s *State) { s.ID = "../../../../etc" },
		"phase":   func(s *State) { s.Phase = "dreaming" },
	} {
		if _, err := handOver(t, s, to, change); err == nil {
			t.Errorf("%s was accepted", name)
		}
	}
	if len(to.List()) != 0 {
		t.Error("a session was begun")
	}
	to.Close()
	if _, err := handOver(t, s, to, func(*State) {}); !errors.Is(err, ErrClosed) {
		t.Errorf("closed: %v", err)
	}
}

func FuzzState(f *testing.F) {
	r, _ := registryOf(newCarrier())
	s, err := r.Begin(f.Context(), everything())
	if err != nil {
		f.Fatal(err)
	}
	encoded, err := handover.Encode(s.Freeze(handover.NewFiles()))
	if err != nil {
		f.Fatal(err)
	}
	f.Add(encoded)
	f.Fuzz(func(t *testing.T, encoded []byte) {
		var state State
		if handover.Decode(encoded, &state) != nil {
			return
		}
		to, _ := registryOf(newCarrier())
		if s, err := to.Resume(t.Context(), state, handover.NewFiles()); err == nil {
			s.End(Outcome{})
		}
	})
}
