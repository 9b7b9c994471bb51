package drain

import (
	"context"
	"io"
	"net"
	"net/http"
	"os"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/streamshim/streamshim/pkg/rescue"
	"github.com/streamshim/streamshim/pkg/session"
	"github.com/streamshim/streamshim/pkg/streaming/event"
	"github.com/streamshim/streamshim/pkg/streaming/internal/spdy"
)

// stream is a stream over a real connection: our end, and the client's.
func stream(t *testing.T) (ours, client *spdy.Stream) {
	t.Helper()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer listener.Close()
	dialled, err := net.Dial("tcp", listener.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	accepted, err := listener.Accept()
	if err != nil {
		t.Fatal(err)
	}
	opened := make(chan *spdy.Stream, 1)
	server := spdy.NewServer(accepted, nil, spdy.Config{OnStream: func(s *spdy.Stream) { opened <- s }})
	peer := spdy.NewClient(dialled, nil, spdy.Config{})
	var served sync.WaitGroup
	served.Go(func() { server.Serve(context.Background()) })
	served.Go(func() { peer.Serve(context.Background()) })
	t.Cleanup(func() {
		peer.Close()
		server.Close()
		served.Wait()
	})
	if client, err = peer.OpenStream(http.Header{}); err != nil {
		t.Fatal(err)
	}
	return <-opened, client
}

func pipe(t *testing.T) (r, w *os.File) {
	t.Helper()
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { r.Close(); w.Close() })
	return r, w
}

func say(t *testing.T, w io.Writer, text string) {
	t.Helper()
	if _, err := io.WriteString(w, text); err != nil {
		t.Fatal(err)
	}
}

// A background child that holds the output does not keep it from being complete once it is silent.
func TestOutputThatIsHeld(t *testing.T) {
	ours, client := stream(t)
	r, w := pipe(t)
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

// An output that was frozen continues where it was, and one that has ended does not begin again.
func TestOutputThatIsFrozen(t *testing.T) {
	ours, client := stream(t)
	r, w := pipe(t)
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
	r.SetReadDeadline(time.Time{}) // as of another descriptor in another program
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
