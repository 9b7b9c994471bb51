package stdin

import (
	"io"
	"testing"
	"time"

	"github.com/streamshim/streamshim/internal/testutil"
	"github.com/streamshim/streamshim/pkg/rescue"
	"github.com/streamshim/streamshim/pkg/streaming/internal/spdy/spdytest"
)

func say(t *testing.T, w io.Writer, text string) {
	t.Helper()
	if _, err := io.WriteString(w, text); err != nil {
		t.Fatal(err)
	}
}

// TestInputThatEnds checks that the end of the client's input ends that of the command. Then nothing is held, and only what
// the command has not read is pending.
func TestInputThatEnds(t *testing.T) {
	ours, client := spdytest.Stream(t)
	r, w := testutil.Pipe(t)
	in, group := New(), rescue.Group{Report: rescue.Die}
	defer in.Close()
	in.Copy(&group, ours, w)
	say(t, client, "all of it")
	client.CloseWrite()
	<-in.ClientLeft()
	in.EndSeen()
	if held := in.Hold(); held != nil || in.cut {
		t.Errorf("held: %v, cut: %v", held, in.cut)
	}
	if pending := in.progress().Pending; pending != 9 {
		t.Errorf("%d bytes are pending", pending)
	}
	in.last, in.since = in.progress(), time.Now().Add(-time.Minute)
	if !in.Stalled(time.Second, true) {
		t.Error("a command that does not read does not stall")
	}
	got, err := io.ReadAll(r)
	if string(got) != "all of it" || err != nil {
		t.Errorf("the command has %q, %v", got, err)
	}
	if in.Stalled(time.Hour, true) {
		t.Error("a command that has just read everything stalls")
	}
	group.Wait()
}

// TestInputThatIsCut checks that input that was cut does not end for the command while it is held.
func TestInputThatIsCut(t *testing.T) {
	ours, client := spdytest.Stream(t)
	r, w := testutil.Pipe(t)
	in, group := New(), rescue.Group{Report: rescue.Die}
	defer in.Close()
	in.Copy(&group, ours, w)
	say(t, client, "half")
	got := make([]byte, 4)
	if _, err := io.ReadFull(r, got); err != nil {
		t.Fatal(err)
	}
	client.Reset()
	<-in.ClientLeft()
	in.EndSeen()
	group.Wait()
	held := in.Hold()
	if held == nil || !in.cut {
		t.Fatalf("held: %v, cut: %v", held, in.cut)
	}
	w.Close()
	r.SetReadDeadline(time.Now().Add(10 * time.Millisecond))
	if n, err := r.Read(got); err == io.EOF {
		t.Errorf("the command reads %d bytes, %v", n, err)
	}
	held.Close()
	r.SetReadDeadline(time.Time{})
	if n, err := r.Read(got); n != 0 || err != io.EOF {
		t.Errorf("then the command reads %d bytes, %v", n, err)
	}
}
