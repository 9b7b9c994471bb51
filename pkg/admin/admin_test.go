package admin

import (
	"bytes"
	"context"
	"errors"
	"io"
	"log/slog"
	"net"
	"net/http"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/streamshim/streamshim/internal/testutil"
	"github.com/streamshim/streamshim/internal/testutil/leak"
	"github.com/streamshim/streamshim/pkg/asciicast"
	"github.com/streamshim/streamshim/pkg/session"
	"github.com/streamshim/streamshim/pkg/workload"
)

// fixture is a server on a socket with one live session behind it.
type fixture struct {
	*Client
	server   *Server
	registry *session.Registry
	live     *session.Session
	settings Settings
}

func newFixture(t *testing.T) *fixture {
	t.Helper()
	leak.Check(t)
	log := slog.New(slog.DiscardHandler)
	f := &fixture{registry: session.NewRegistry(log), settings: Settings{Command: session.CommandArg0}}
	path := filepath.Join(t.TempDir(), "admin.sock")
	listener, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	server := NewServer(Config{Sessions: f.registry, Log: log, Settings: func() Settings { return f.settings }})
	f.server = server
	served := make(chan error, 1)
	go func() { served <- server.Serve(listener) }()
	f.Client = NewClient(path)
	t.Cleanup(func() {
		f.Client.Close()
		ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
		defer cancel()
		if err := server.Shutdown(ctx); err != nil {
			t.Error(err)
		}
		if err := <-served; err != nil {
			t.Error(err)
		}
	})
	f.live = f.begin(t, session.Info{
		Kind: session.Exec, TTY: true, Command: []string{"sh", "-c", "secret"},
		Target: workload.Target{PodNamespace: "shop", PodName: "web", ContainerName: "app"},
	})
	return f
}

func (f *fixture) begin(t *testing.T, info session.Info) *session.Session {
	t.Helper()
	s, err := f.registry.Begin(context.Background(), info)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// controls stands for a process.
type controls struct {
	mu      sync.Mutex
	signals []syscall.Signal
	notices []string
	err     error
}

func (c *controls) PID() int { return 42 }
func (c *controls) Signal(s syscall.Signal) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.signals = append(c.signals, s)
	return c.err
}
func (c *controls) Notice(text string) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.notices = append(c.notices, text)
	return nil
}

func code(err error) int {
	var known *Error
	if errors.As(err, &known) {
		return known.Code
	}
	return 0
}

func TestListAndShow(t *testing.T) {
	f := newFixture(t)
	other := f.begin(t, session.Info{Kind: session.PortForward})
	list, err := f.List(t.Context())
	if err != nil || len(list) != 2 || list[0].ID != f.live.ID || strings.Join(list[0].Command, " ") != "sh" || list[0].Phase != session.Starting {
		t.Errorf("list %+v, %v", list, err)
	}
	f.settings.Command = session.CommandNone
	f.live.SetControls(&controls{})
	s, err := f.Show(t.Context(), f.live.ID[:10])
	if err != nil || s.ID != f.live.ID || s.Command != nil || s.PID != 42 || s.PodName != "web" {
		t.Errorf("show %+v, %v", s, err)
	}
	if _, err := f.Show(t.Context(), "x"); code(err) != http.StatusNotFound {
		t.Errorf("an unknown id: %v", err)
	}
	// Every id has the empty prefix in common, which the client cannot ask for; make two that share
	// their first digit.
	for f.live.ID[0] != other.ID[0] {
		other.End(session.Outcome{})
		other = f.begin(t, session.Info{})
	}
	if _, err := f.Show(t.Context(), other.ID[:1]); code(err) != http.StatusConflict {
		t.Errorf("an ambiguous id: %v", err)
	}
	other.End(session.Outcome{})
	f.live.End(session.Outcome{})
	if list, err := f.List(t.Context()); err != nil || list == nil || len(list) != 0 {
		t.Errorf("an empty list: %v, %v", list, err)
	}
}

func TestKill(t *testing.T) {
	f := newFixture(t)
	if err := f.Kill(t.Context(), f.live.ID, KillRequest{Signal: 15}); code(err) != http.StatusConflict {
		t.Errorf("a signal before there is a process: %v", err)
	}
	c := &controls{}
	f.live.SetControls(c)
	if err := f.Kill(t.Context(), f.live.ID, KillRequest{Signal: 15}); err != nil || len(c.signals) != 1 || c.signals[0] != syscall.SIGTERM {
		t.Errorf("signals %v, %v", c.signals, err)
	}
	for _, err := range []error{session.ErrNotSupported, syscall.ESRCH} {
		c.err = err
		if err := f.Kill(t.Context(), f.live.ID, KillRequest{Signal: 15}); code(err) != http.StatusConflict {
			t.Errorf("%v", err)
		}
	}
	for _, signal := range []int{-1, 65} {
		if err := f.Kill(t.Context(), f.live.ID, KillRequest{Signal: signal}); code(err) != http.StatusBadRequest {
			t.Errorf("signal %d: %v", signal, err)
		}
	}
	if f.live.Context().Err() != nil {
		t.Fatal("a signal ended the session")
	}
	if err := f.Kill(t.Context(), f.live.ID, KillRequest{}); err != nil {
		t.Fatal(err)
	}
	var end *session.EndError
	if !errors.As(context.Cause(f.live.Context()), &end) || end.Reason != "operator" {
		t.Errorf("the session ends because of %v", context.Cause(f.live.Context()))
	}
}

func TestWatch(t *testing.T) {
	f := newFixture(t)
	if _, err := f.Watch(t.Context(), f.live.ID); code(err) != http.StatusConflict {
		t.Errorf("a session that cannot be watched: %v", err)
	}
	c := &controls{}
	f.live.SetControls(c)
	f.live.Taps.Open()
	f.live.Taps.Resize(workload.Size{Width: 132, Height: 43})
	f.settings.NotifyWatch = true
	body, err := f.Watch(t.Context(), f.live.ID)
	if err != nil {
		t.Fatal(err)
	}
	defer body.Close()
	cast, err := asciicast.NewReader(body)
	if err != nil || cast.Header.Width != 132 || cast.Header.Height != 43 {
		t.Fatalf("header %+v, %v", cast.Header, err)
	}
	f.live.Taps.Output(session.Stdout, []byte("hello"))
	f.live.Taps.Input([]byte("password"))
	if e, err := cast.Next(); err != nil || e.Code != asciicast.Output || e.Data != "hello" {
		t.Errorf("%+v, %v", e, err)
	}
	f.live.End(session.Outcome{})
	if _, err := cast.Next(); err != io.EOF {
		t.Errorf("after the session's end: %v", err)
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if len(c.notices) != 1 {
		t.Errorf("the user was told %q", c.notices)
	}
}

// connection is one over which so much has gone.
type connection struct {
	session.Connection
	sent atomic.Int64
}

func (c *connection) Transferred() (received, sent int64) { return 0, c.sent.Load() }

// A watch says how it has ended, and the next one how much was missed between the two.
func TestEndOfAWatch(t *testing.T) {
	f := newFixture(t)
	f.live.Taps.Open()
	sent := new(connection)
	f.live.Connect(sent)
	watch := func() *Watch {
		t.Helper()
		w, err := f.Watch(t.Context(), f.live.ID)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { w.Close() })
		return w
	}
	wantEnd := func(w *Watch, want WatchEnd) {
		t.Helper()
		if got := w.End(); got != "" {
			t.Errorf("before its end a watch says %q", got)
		}
		if _, err := io.ReadAll(w); err != nil {
			t.Error(err)
		}
		if got := w.End(); got != want {
			t.Errorf("a watch ends with %q, want %q", got, want)
		}
	}
	sent.sent.Store(5)
	first := watch()
	sent.sent.Store(7)
	f.server.Quiesce(t.Context())
	wantEnd(first, WatchHandover)
	f.server.Resume()
	sent.sent.Store(10)
	second := watch()
	if n, known := second.Missed(first); n != 3 || !known {
		t.Errorf("missed: %d, %v", n, known)
	}
	f.live.End(session.Outcome{})
	wantEnd(second, WatchSessionEnded)

	f.live = f.begin(t, session.Info{})
	f.live.Taps.Open()
	third := watch()
	if n, known := third.Missed(second); known {
		t.Errorf("of what was missed behind a session's end %d bytes are known", n)
	}
	if err := f.server.Shutdown(t.Context()); err != nil {
		t.Error(err)
	}
	wantEnd(third, WatchShutdown)
	f.live.End(session.Outcome{})
}

// TestUserIsToldOnce checks that a terminal's user is told of an operator who watches once, however many hand-overs the watch
// goes through, and is told of each other one.
func TestUserIsToldOnce(t *testing.T) {
	f := newFixture(t)
	f.settings.NotifyWatch = true
	c := &controls{}
	f.live.SetControls(c)
	f.live.Taps.Open()
	told := func() int {
		c.mu.Lock()
		defer c.mu.Unlock()
		return len(c.notices)
	}
	watch := func(before string) *Watch {
		t.Helper()
		w, err := f.WatchAgain(t.Context(), f.live.ID, before)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { w.Close() })
		return w
	}
	handOver := func(w *Watch) {
		t.Helper()
		f.server.Quiesce(t.Context())
		f.server.Resume()
		io.Copy(io.Discard, w)
		if w.End() != WatchHandover {
			t.Fatalf("the watch ends with %q", w.End())
		}
	}
	first := watch("")
	for range 3 {
		handOver(first)
		first = watch(first.Name())
	}
	handOver(first)
	if n := told(); n != 1 {
		t.Errorf("of one watch the user was told %d times", n)
	}
	second := watch("")
	handOver(second)
	if n := told(); n != 2 {
		t.Errorf("of two watches the user was told %d times", n)
	}
	// Who leaves and comes back is announced again, and a name that the session does not know proves nothing.
	left := watch("")
	left.Close()
	testutil.Eventually(t, "the watcher has gone", func() bool { return f.live.Taps.Count() == 0 })
	handOver(watch(left.Name()))
	if n := told(); n != 4 {
		t.Errorf("of four watches the user was told %d times", n)
	}
	third := watch("made up")
	handOver(third)
	if n := told(); n != 5 {
		t.Errorf("of five watches the user was told %d times", n)
	}
}

// A watcher that does not read costs its session no time, and its streamshim no more than a buffer.
func TestWatcherThatDoesNotRead(t *testing.T) {
	f := newFixture(t)
	f.live.Taps.Open()
	body, err := f.Watch(t.Context(), f.live.ID)
	if err != nil {
		t.Fatal(err)
	}
	defer body.Close()
	const chunk, chunks = 32 << 10, 8 << 10
	data := bytes.Repeat([]byte("x"), chunk)
	passed := make(chan struct{})
	go func() {
		defer close(passed)
		for range chunks {
			f.live.Taps.Output(session.Stdout, data)
		}
	}()
	select {
	case <-passed:
	case <-time.After(time.Minute):
		t.Fatal("256 MiB do not pass a watcher that does not read")
	}
	f.live.End(session.Outcome{})
	cast, err := asciicast.NewReader(body)
	if err != nil {
		t.Fatal(err)
	}
	seen, gaps := 0, 0
	for {
		e, err := cast.Next()
		if err == io.EOF {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		switch e.Code {
		case asciicast.Output:
			seen += len(e.Data)
		case asciicast.Marker:
			gaps++
		}
	}
	if gaps == 0 || seen == 0 || seen >= chunk*chunks/2 {
		t.Errorf("the watcher saw %d bytes of %d, with %d gaps", seen, chunk*chunks, gaps)
	}
}

func TestNumberOfWatchers(t *testing.T) {
	f := newFixture(t)
	f.live.Taps.Open()
	for range maxTaps {
		body, err := f.Watch(t.Context(), f.live.ID)
		if err != nil {
			t.Fatal(err)
		}
		defer body.Close()
	}
	if _, err := f.Watch(t.Context(), f.live.ID); code(err) != http.StatusTooManyRequests {
		t.Errorf("one watcher more: %v", err)
	}
	f.live.End(session.Outcome{})
}

func TestNobodyThere(t *testing.T) {
	c := NewClient(filepath.Join(t.TempDir(), "none"))
	defer c.Close()
	if _, err := c.List(t.Context()); err == nil || !strings.Contains(err.Error(), "is streamshim running") {
		t.Errorf("%v", err)
	}
}
