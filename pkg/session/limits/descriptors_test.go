package limits

import (
	"errors"
	"log/slog"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/streamshim/streamshim/pkg/session"
)

// New sessions are refused while files can still be opened, and probes never are.
func TestSpareDescriptors(t *testing.T) {
	open, failing := 100, false
	l := New(Config{SpareDescriptors: 200})
	limit := uint64(1000)
	l.descriptors.limit = func() uint64 { return limit }
	l.descriptors.count = func() (int, error) {
		if failing {
			return 0, errors.New("too many open files")
		}
		return open, nil
	}
	registry := session.NewRegistry(slog.New(slog.DiscardHandler), l)
	begin := func() error {
		s, err := registry.Begin(t.Context(), exec("p", "c"))
		if err == nil {
			defer s.End(session.Outcome{})
		}
		return err
	}
	const room = (1000 - 200 - 100) / perSession
	for i := range room + 1 {
		if err := begin(); err != nil {
			t.Fatalf("session %d of %d since the count: %v", i+1, room, err)
		}
	}
	err := begin()
	if refusal(err) != session.TooMany || !strings.Contains(err.Error(), "limits.spare_descriptors") {
		t.Errorf("beyond it: %v", err)
	}
	if err := l.Check(session.Info{Kind: session.ExecSync}); err != nil {
		t.Errorf("a probe: %v", err)
	}
	again := func() { l.descriptors.counted = time.Now().Add(-countAfter) }
	if again(); begin() != nil {
		t.Error("refused after a new count")
	}
	open = 801
	if again(); refusal(begin()) != session.TooMany {
		t.Error("not refused with 199 left")
	}
	l.Update(Config{SpareDescriptors: -1}) // 125
	if begin() != nil {
		t.Error("an eighth: refused with 199 left")
	}
	open = 876
	if again(); refusal(begin()) != session.TooMany {
		t.Error("an eighth: not refused with 124 left")
	}
	if limit = 2000; begin() != nil {
		t.Error("refused with more files allowed since the count")
	}
	limit, failing = 1000, true
	if again(); begin() != nil {
		t.Error("refused because files could not be counted")
	}
	l.Update(Config{})
	failing, open = false, 1000
	if again(); begin() != nil {
		t.Error("refused without a limit")
	}
}

func TestCountDescriptors(t *testing.T) {
	before, err := OpenDescriptors()
	if err != nil || before < 3 {
		t.Fatal(before, err)
	}
	for range 20 {
		r, w, err := os.Pipe()
		if err != nil {
			t.Fatal(err)
		}
		defer r.Close()
		defer w.Close()
	}
	after, err := OpenDescriptors()
	if err != nil || after < before+40 {
		t.Errorf("%d, then %d, %v", before, after, err)
	}
}
