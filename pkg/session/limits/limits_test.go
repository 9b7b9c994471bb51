package limits

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/streamshim/streamshim/pkg/session"
)

func refusal(err error) session.Refusal {
	var refused *session.RefusedError
	if errors.As(err, &refused) {
		return refused.Refusal
	}
	return ""
}

func exec(pod, container string) session.Info {
	return session.Info{Kind: session.Exec, Target: session.Target{PodUID: pod, ContainerID: container}}
}

func TestCounts(t *testing.T) {
	l := New(Config{Sessions: 4, SessionsPerPod: 3, SessionsPerContainer: 2})
	registry := session.NewRegistry(slog.New(slog.DiscardHandler), l)
	var live []*session.Session
	begin := func(info session.Info, want string) {
		t.Helper()
		checked := l.Check(info)
		s, err := registry.Begin(t.Context(), info)
		if want == "" {
			if err != nil || checked != nil {
				t.Fatal(err, checked)
			}
			live = append(live, s)
			return
		}
		for _, err := range []error{checked, err} {
			if refusal(err) != session.TooMany || !strings.Contains(err.Error(), want) {
				t.Errorf("%v, want %s", err, want)
			}
		}
	}
	begin(exec("p1", "c1"), "")
	begin(exec("p1", "c1"), "")
	begin(exec("p1", "c1"), "limits.sessions_per_container")
	forward := session.Info{Kind: session.PortForward, Target: session.Target{PodUID: "p1"}}
	begin(forward, "") // has no container
	begin(exec("p1", "c2"), "limits.sessions_per_pod")
	begin(exec("p2", "c3"), "")
	begin(exec("p3", "c4"), "limits.sessions)")
	for _, s := range live {
		s.End(session.Outcome{})
	}
	if l.sessions != 0 || len(l.pods) != 0 || len(l.containers) != 0 {
		t.Errorf("after the end of all: %d, %v, %v", l.sessions, l.pods, l.containers)
	}
	l.Update(Config{})
	for range 10 {
		begin(exec("p1", "c1"), "")
	}
}

// Containers of which nobody knows the pod are not all in one.
func TestUnknownPods(t *testing.T) {
	l := New(Config{SessionsPerPod: 1})
	registry := session.NewRegistry(slog.New(slog.DiscardHandler), l)
	for _, container := range []string{"c1", "c2"} {
		if _, err := registry.Begin(t.Context(), exec("", container)); err != nil {
			t.Error(err)
		}
	}
	if _, err := registry.Begin(t.Context(), exec("", "c1")); refusal(err) != session.TooMany {
		t.Errorf("a second one in c1: %v", err)
	}
}

// As many as allowed get in, however many ask at once.
func TestCountsAtOnce(t *testing.T) {
	l := New(Config{SessionsPerContainer: 5})
	registry := session.NewRegistry(slog.New(slog.DiscardHandler), l)
	var admitted atomic.Int32
	var all sync.WaitGroup
	for range 50 {
		all.Go(func() {
			if _, err := registry.Begin(context.Background(), exec("p", "c")); err == nil {
				admitted.Add(1)
			}
		})
	}
	all.Wait()
	if admitted.Load() != 5 {
		t.Errorf("%d were admitted", admitted.Load())
	}
}

func TestDeny(t *testing.T) {
	yes, no := true, false
	full := session.Info{
		Kind: session.Exec, TTY: true, Target: session.Target{PodNamespace: "bank"},
		PodLabels: map[string]string{"tier": "data"},
	}
	with := func(change func(*session.Info)) session.Info {
		info := full
		change(&info)
		return info
	}
	for _, test := range []struct {
		name   string
		rule   session.Selector
		info   session.Info
		denied bool
	}{
		{"all", session.Selector{}, full, true},
		{"all but ExecSync", session.Selector{}, with(func(i *session.Info) { i.Kind = session.ExecSync }), false},
		{"ExecSync", session.Selector{Kinds: []session.Kind{session.ExecSync}}, with(func(i *session.Info) { i.Kind = session.ExecSync }), true},
		{"kind", session.Selector{Kinds: []session.Kind{session.Attach}}, full, false},
		{"namespace", session.Selector{Namespaces: []string{"bank"}}, full, true},
		{"namespaces", session.Selector{Namespaces: []string{"shop", "b?nk"}}, full, true},
		{"other namespace", session.Selector{Namespaces: []string{"shop"}}, full, false},
		{"tty", session.Selector{TTY: &yes}, full, true},
		{"no tty", session.Selector{TTY: &no}, full, false},
		{"label", session.Selector{PodLabels: map[string]string{"tier": "data"}}, full, true},
		{"other label", session.Selector{PodLabels: map[string]string{"tier": "web"}}, full, false},
		{"missing label", session.Selector{PodLabels: map[string]string{"tier": "*", "x": "*"}}, full, false},
		{"unknown labels", session.Selector{PodLabels: map[string]string{"tier": "web"}}, with(func(i *session.Info) { i.PodLabels = nil }), true},
		{"unknown labels, other namespace", session.Selector{Namespaces: []string{"shop"}, PodLabels: map[string]string{"tier": "web"}}, with(func(i *session.Info) { i.PodLabels = nil }), false},
	} {
		t.Run(test.name, func(t *testing.T) {
			err := New(Config{Deny: []Rule{{Selector: test.rule, Message: "no"}}}).Check(test.info)
			if denied := refusal(err) == session.Denied; denied != test.denied {
				t.Errorf("%v", err)
			}
		})
	}
}

func TestStarts(t *testing.T) {
	l := New(Config{ConcurrentStarts: 2, WaitingStarts: 2})
	var releases []func()
	for i := range 2 {
		release, err := l.Acquire(t.Context(), fmt.Sprint(i))
		if err != nil {
			t.Fatal(err)
		}
		releases = append(releases, release)
	}
	// Two wait, in their order; the third may not.
	order := make(chan int, 2)
	got := make(chan func(), 2)
	for i := range 2 {
		go func() {
			release, err := l.Acquire(context.Background(), fmt.Sprint("waits ", i))
			if err != nil {
				t.Error(err)
				return
			}
			order <- i
			got <- release
		}()
		waitFor(t, func() bool { l.mu.Lock(); defer l.mu.Unlock(); return len(l.waiting) == i+1 })
	}
	if _, err := l.Acquire(t.Context(), "third"); refusal(err) != session.TooMany {
		t.Errorf("a third that waits: %v", err)
	}
	for want, release := range releases {
		release()
		if i := <-order; i != want {
			t.Errorf("it was the turn of %d, not of %d", i, want)
		}
	}
	// Who gives up does not take a turn.
	gone, cancel := context.WithCancel(context.Background())
	cancel()
	if _, err := l.Acquire(gone, "gone"); !errors.Is(err, context.Canceled) {
		t.Errorf("given up: %v", err)
	}
	(<-got)()
	(<-got)()
	if l.starting != 0 || len(l.waiting) != 0 {
		t.Errorf("%d start, %d wait", l.starting, len(l.waiting))
	}
	// A higher limit lets those in who wait.
	l.Update(Config{ConcurrentStarts: 1, WaitingStarts: 1})
	if _, err := l.Acquire(t.Context(), "first"); err != nil {
		t.Fatal(err)
	}
	go func() {
		if _, err := l.Acquire(context.Background(), "second"); err != nil {
			t.Error(err)
		}
		order <- 0
	}()
	waitFor(t, func() bool { l.mu.Lock(); defer l.mu.Unlock(); return len(l.waiting) == 1 })
	l.Update(Config{ConcurrentStarts: 2})
	<-order
}

// A container that holds its starts, and has as many waiting as it may, is in nobody's way.
func TestShareOfContainer(t *testing.T) {
	l := New(Config{ConcurrentStarts: 8, WaitingStarts: 8})
	ctx, cancel := context.WithCancel(t.Context())
	var waiting sync.WaitGroup
	for range 2 {
		if _, err := l.Acquire(ctx, "holds"); err != nil {
			t.Fatal(err)
		}
	}
	for range 2 {
		waiting.Go(func() {
			if _, err := l.Acquire(ctx, "holds"); !errors.Is(err, context.Canceled) {
				t.Errorf("beyond its share: %v", err)
			}
		})
	}
	waitFor(t, func() bool { l.mu.Lock(); defer l.mu.Unlock(); return len(l.waiting) == 2 })
	if _, err := l.Acquire(ctx, "holds"); refusal(err) != session.TooMany {
		t.Errorf("one more that waits: %v", err)
	}
	for range 10 {
		release, err := l.Acquire(t.Context(), "other")
		if err != nil {
			t.Fatal(err)
		}
		release()
	}
	cancel()
	waiting.Wait()
	if l.starting != 2 || len(l.startingIn) != 1 {
		t.Errorf("%d start, in %v", l.starting, l.startingIn)
	}
}

// A turn that comes free goes to the first who may have it.
func TestTurnPassesContainersWithTheirShare(t *testing.T) {
	l := New(Config{ConcurrentStarts: 4})
	var releases []func()
	for _, container := range []string{"a", "b", "c", "d"} {
		release, err := l.Acquire(t.Context(), container)
		if err != nil {
			t.Fatal(err)
		}
		releases = append(releases, release)
	}
	order := make(chan string, 2)
	for i, container := range []string{"a", "e"} {
		go func() {
			if _, err := l.Acquire(context.Background(), container); err != nil {
				t.Error(err)
			}
			order <- container
		}()
		waitFor(t, func() bool { l.mu.Lock(); defer l.mu.Unlock(); return len(l.waiting) == i+1 })
	}
	releases[1]() // b's
	if container := <-order; container != "e" {
		t.Errorf("the turn went to %s, which has its share", container)
	}
	releases[0]()
	if container := <-order; container != "a" {
		t.Errorf("the turn went to %s", container)
	}
}

// As with the other limits, 0 is none.
func TestAnyNumberMayWait(t *testing.T) {
	l := New(Config{ConcurrentStarts: 1})
	release, err := l.Acquire(t.Context(), "c")
	if err != nil {
		t.Fatal(err)
	}
	second := make(chan error, 1)
	go func() {
		releaseSecond, err := l.Acquire(t.Context(), "c")
		if err == nil {
			releaseSecond()
		}
		second <- err
	}()
	waitFor(t, func() bool { l.mu.Lock(); defer l.mu.Unlock(); return len(l.waiting) == 1 || len(second) == 1 })
	release()
	if err := <-second; err != nil {
		t.Error(err)
	}
}

// Turns are not lost when waiters give up at the moment they come.
func TestStartsGivenUp(t *testing.T) {
	l := New(Config{ConcurrentStarts: 1, WaitingStarts: 100})
	release, err := l.Acquire(t.Context(), "c")
	if err != nil {
		t.Fatal(err)
	}
	turn := make(chan struct{})
	l.waiting = append(l.waiting, waiter{"c", turn})
	release()
	<-turn
	l.giveUp("c", turn)
	if l.starting != 0 {
		t.Errorf("%d start after the only one gave up", l.starting)
	}
	var all sync.WaitGroup
	for i := range 100 {
		all.Go(func() {
			ctx, cancel := context.WithTimeout(context.Background(), time.Duration(i)*50*time.Microsecond)
			defer cancel()
			if release, err := l.Acquire(ctx, fmt.Sprint(i%3)); err == nil {
				release()
			}
		})
	}
	all.Wait()
	if l.starting != 0 || len(l.waiting) != 0 {
		t.Errorf("%d start, %d wait", l.starting, len(l.waiting))
	}
}

func waitFor(t *testing.T, condition func() bool) {
	t.Helper()
	for deadline := time.Now().Add(30 * time.Second); !condition(); time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatal("waited in vain")
		}
	}
}
