package drain

import (
	"io"
	"sync/atomic"
	"testing"
	"time"

	"github.com/streamshim/streamshim/internal/testutil"
	"github.com/streamshim/streamshim/pkg/rescue"
	"github.com/streamshim/streamshim/pkg/session"
	"github.com/streamshim/streamshim/pkg/streaming/event"
	"github.com/streamshim/streamshim/pkg/streaming/internal/spdy/spdytest"
)

func say(t *testing.T, w io.Writer, text string) {
	t.Helper()
	if _, err := io.WriteString(w, text); err != nil {
		t.Fatal(err)
	}
}

// TestOutputThatIsHeld checks that output counts as complete once a background child that keeps it open is silent.
func TestOutputThatIsHeld(t *testing.T) {
	ours, client := spdytest.Stream(t)
	r, w := testutil.Pipe(t)
	var cuts atomic.Int32
	d := &Drain{Config: Config{Idle: 20 * time.Millisecond, Observe: func(e event.Event) {
		if e == event.DrainCut {
			cuts.Add(1)
		}
	}}}
	group := rescue.Group{Report: rescue.Die}
	d.Copy(&group, session.Stdout, r, ours, true)
	d.Copy(&group, session.Stderr, nil, nil, false)
	say(t, w, "all of it")
	got := make([]byte, 9)
	if _, err := io.ReadFull(client, got); err != nil {
		t.Fatal(err)
	}
	d.Begin(time.Hour)
	group.Wait()
	rest, err := io.ReadAll(client)
	if string(got) != "all of it" || len(rest) > 0 || err != nil || cuts.Load() != 1 || !d.Over() {
		t.Errorf("the client has %q, %v; %d cuts, over: %v", got, err, cuts.Load(), d.Over())
	}
}

// TestOutputThatIsFrozen checks that an output that was frozen continues where it was, and that one that has ended does not
// begin again.
func TestOutputThatIsFrozen(t *testing.T) {
	ours, client := spdytest.Stream(t)
	r, w := testutil.Pipe(t)
	group := rescue.Group{Report: rescue.Die}
	d := &Drain{Config: Config{Idle: time.Hour, Observe: func(event.Event) {}}}
	d.Copy(&group, session.Stdout, r, ours, true)
	d.Copy(&group, session.Stderr, nil, nil, false)
	say(t, w, "one ")
	got := make([]byte, 4)
	if _, err := io.ReadFull(client, got); err != nil {
		t.Fatal(err)
	}
	d.Freeze()
	group.Wait()
	state := d.State()
	if err := state.Check(); err != nil || d.Over() || len(state.Outputs) != 2 || !state.Outputs[1].Ended {
		t.Fatalf("%v, over: %v, %+v", err, d.Over(), state)
	}
	r.SetReadDeadline(time.Time{}) // as another descriptor in another program would have it
	d = &Drain{Config: d.Config}
	d.Resume(state)
	d.Copy(&group, session.Stdout, r, ours, true)
	d.Copy(&group, session.Stderr, r, ours, false)
	say(t, w, "two")
	w.Close()
	group.Wait()
	rest, err := io.ReadAll(client)
	if string(got)+string(rest) != "one two" || err != nil || !d.Over() {
		t.Errorf("the client has %q and %q, %v; over: %v", got, rest, err, d.Over())
	}
}
