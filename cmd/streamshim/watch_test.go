package main

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"log/slog"
	"net"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/streamshim/streamshim/internal/testutil"
	"github.com/streamshim/streamshim/internal/testutil/leak"
	"github.com/streamshim/streamshim/pkg/admin"
	"github.com/streamshim/streamshim/pkg/asciicast"
	"github.com/streamshim/streamshim/pkg/handover"
	"github.com/streamshim/streamshim/pkg/session"
)

// operated is the operators' side of a streamshim, which one program after the other serves on the same socket.
type operated struct {
	t        *testing.T
	registry *session.Registry
	client   *admin.Client
	listener *handover.Listener
	server   *admin.Server
	served   chan error
}

func newOperated(t *testing.T) *operated {
	t.Helper()
	leak.Check(t)
	o := &operated{t: t, registry: session.NewRegistry(slog.New(slog.DiscardHandler))}
	path := filepath.Join(t.TempDir(), "admin.sock")
	listener, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	listener.(*net.UnixListener).SetUnlinkOnClose(false)
	o.client = admin.NewClient(path)
	o.serve(listener)
	t.Cleanup(func() {
		o.client.Close()
		o.end()
	})
	return o
}

func (o *operated) serve(listener net.Listener) {
	o.t.Helper()
	var err error
	if o.listener, err = handover.NewListener(listener); err != nil {
		o.t.Fatal(err)
	}
	o.server = admin.NewServer(admin.Config{
		Sessions: o.registry, Log: slog.New(slog.DiscardHandler), Settings: func() admin.Settings { return admin.Settings{} },
	})
	server, paused := o.server, o.listener
	o.served = make(chan error, 1)
	served := o.served
	go func() { served <- server.Serve(paused) }()
}

func (o *operated) end() {
	o.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	if err := o.server.Shutdown(ctx); err != nil {
		o.t.Error(err)
	}
	if err := <-o.served; err != nil {
		o.t.Error(err)
	}
}

// handOver has another server take over. Meanwhile is called when none serves.
func (o *operated) handOver(meanwhile func()) {
	o.t.Helper()
	files := handover.NewFiles()
	defer files.Close()
	o.server.Quiesce(context.Background())
	kept, err := o.listener.Keep(files)
	if err != nil {
		o.t.Fatal(err)
	}
	meanwhile()
	o.end()
	next, err := files.TakeListener(kept)
	if err != nil {
		o.t.Fatal(err)
	}
	o.serve(next)
}

// watchable is a session that can be watched, and whose client has got so many bytes.
type watchable struct {
	*session.Session
	mu   sync.Mutex
	sent int64
}

func (w *watchable) LastActivity() time.Time { return time.Now() }

func (w *watchable) Transferred() (received, sent int64) {
	w.mu.Lock()
	defer w.mu.Unlock()
	return 0, w.sent
}

func (w *watchable) say(text string) {
	w.Taps.Output(session.Stdout, []byte(text)) //nolint:errcheck // no recorder
	w.mu.Lock()
	defer w.mu.Unlock()
	w.sent += int64(len(text))
}

func (o *operated) begin() *watchable {
	o.t.Helper()
	live, err := o.registry.Begin(context.Background(), session.Info{Kind: session.Exec, TTY: true})
	if err != nil {
		o.t.Fatal(err)
	}
	w := &watchable{Session: live}
	live.Connect(w)
	live.Taps.Open()
	return w
}

// shown is what a test has seen.
type shown struct {
	mu   sync.Mutex
	text bytes.Buffer
}

func (s *shown) Write(p []byte) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.text.Write(p)
}

func (s *shown) String() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.text.String()
}

// A watch goes on behind a hand-over and says what it has missed.
func TestWatchSurvivesHandOvers(t *testing.T) {
	o := newOperated(t)
	w := o.begin()
	var out shown
	ended := make(chan error, 1)
	go func() {
		ended <- watch(context.Background(), o.client, w.ID[:8], &castScreen{out: &out, began: time.Now()})
	}()
	watched := func() bool { return w.Taps.Count() == 1 }
	for i := range 3 {
		testutil.Eventually(t, "the watch", watched)
		w.say(fmt.Sprintf("<%d>", i))
		testutil.Eventually(t, "what was said", func() bool { return strings.Contains(out.String(), fmt.Sprintf("<%d>", i)) })
		o.handOver(func() {
			testutil.Eventually(t, "the end of the watch", func() bool { return w.Taps.Count() == 0 })
			if i > 0 {
				w.say("missed")
			}
		})
	}
	testutil.Eventually(t, "the watch", watched)
	w.say("<end>")
	w.End(session.Outcome{})
	if err := <-ended; err != nil {
		t.Error(err)
	}
	cast, err := asciicast.NewReader(strings.NewReader(out.String()))
	if err != nil {
		t.Fatal(err)
	}
	const interrupted = "streamshim: the watch was interrupted by a hand-over; "
	want := []string{
		"o<0>", "m" + interrupted + "nothing is missing", "r80x24", "o<1>", "m" + interrupted + "about 6 bytes are missing here", "r80x24", "o<2>",
		"m" + interrupted + "about 6 bytes are missing here", "r80x24", "o<end>",
	}
	var got []string
	for last := time.Duration(0); ; {
		event, err := cast.Next()
		if err == io.EOF {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		if event.Time < last {
			t.Errorf("time goes back to %v from %v", event.Time, last)
		}
		last = event.Time
		got = append(got, event.Code+event.Data)
	}
	if strings.Join(got, "|") != strings.Join(want, "|") {
		t.Errorf("the cast has %q, want %q", got, want)
	}
}

// A watch whose session ends in a hand-over ends as well; that of a streamshim that ends says so.
func TestEndOfWatch(t *testing.T) {
	o := newOperated(t)
	w := o.begin()
	ended := make(chan error, 1)
	begin := func() {
		go func() { ended <- watch(context.Background(), o.client, w.ID, terminalScreen{io.Discard}) }()
		testutil.Eventually(t, "the watch", func() bool { return w.Taps.Count() == 1 })
	}
	begin()
	o.handOver(func() {
		testutil.Eventually(t, "the end of the watch", func() bool { return w.Taps.Count() == 0 })
		w.End(session.Outcome{})
	})
	if err := <-ended; err != nil {
		t.Errorf("the session has ended, and the watch says %v", err)
	}
	w = o.begin()
	begin()
	if err := o.server.Shutdown(context.Background()); err != nil {
		t.Error(err)
	}
	if err := <-ended; err == nil || !strings.Contains(err.Error(), "streamshim has ended") {
		t.Errorf("streamshim has ended, and the watch says %v", err)
	}
	w.End(session.Outcome{})
}
