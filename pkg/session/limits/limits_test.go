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
	"github.com/streamshim/streamshim/pkg/workload"
)

func refusal(err error) session.Refusal {
	var refused *session.RefusedError
	if errors.As(err, &refused) {
		return refused.Refusal
	}
	return ""
}

func exec(pod, container string) session.Info {
	return session.Info{Kind: session.Exec, Target: workload.Target{PodUID: pod, ContainerID: container}}
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
	forward := session.Info{Kind: session.PortForward, Target: workload.Target{PodUID: "p1"}}
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
		Kind: session.Exec, TTY: true, Target: workload.Target{PodNamespace: "bank"},
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
	for range 2 {
		release, err := l.Acquire(t.Context(), another())
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
			release, err := l.Acquire(context.Background(), another())
			if err != nil {
				t.Error(err)
				return
			}
			order <- i
			got <- release
		}()
		waitFor(t, func() bool { l.mu.Lock(); defer l.mu.Unlock(); return len(l.commands.waiting) == i+1 })
	}
	if _, err := l.Acquire(t.Context(), another()); refusal(err) != session.TooMany {
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
	if _, err := l.Acquire(gone, another()); !errors.Is(err, context.Canceled) {
		t.Errorf("given up: %v", err)
	}
	(<-got)()
	(<-got)()
	if l.commands.running != 0 || len(l.commands.inPod) != 0 || len(l.commands.waiting) != 0 {
		t.Errorf("%v start, %d wait", l.commands.inPod, len(l.commands.waiting))
	}
	// A higher limit lets those in who wait.
	l.Update(Config{ConcurrentStarts: 1, WaitingStarts: 1})
	if _, err := l.Acquire(t.Context(), another()); err != nil {
		t.Fatal(err)
	}
	go func() {
		if _, err := l.Acquire(context.Background(), another()); err != nil {
			t.Error(err)
		}
		order <- 0
	}()
	waitFor(t, func() bool { l.mu.Lock(); defer l.mu.Unlock(); return len(l.commands.waiting) == 1 })
	l.Update(Config{ConcurrentStarts: 2})
	<-order
}

// As with the other limits, 0 is none.
func TestAnyNumberMayWait(t *testing.T) {
	l := New(Config{ConcurrentStarts: 1})
	release, err := l.Acquire(t.Context(), another())
	if err != nil {
		t.Fatal(err)
	}
	second := make(chan error, 1)
	go func() {
		releaseSecond, err := l.Acquire(t.Context(), another())
		if err == nil {
			releaseSecond()
		}
		second <- err
	}()
	waitFor(t, func() bool { l.mu.Lock(); defer l.mu.Unlock(); return len(l.commands.waiting) == 1 || len(second) == 1 })
	release()
	if err := <-second; err != nil {
		t.Error(err)
	}
}

// Turns are not lost when waiters give up at the moment they come.
func TestStartsGivenUp(t *testing.T) {
	l := New(Config{ConcurrentStarts: 1, WaitingStarts: 100})
	release, err := l.Acquire(t.Context(), another())
	if err != nil {
		t.Fatal(err)
	}
	mine := turn{"p", make(chan struct{})}
	l.commands.waiting = append(l.commands.waiting, mine)
	release()
	<-mine.comes
	l.giveUp(&l.commands, mine)
	if l.commands.running != 0 || len(l.commands.inPod) != 0 {
		t.Errorf("%v start after the only one gave up", l.commands.inPod)
	}
	var all sync.WaitGroup
	for i := range 100 {
		all.Go(func() {
			ctx, cancel := context.WithTimeout(context.Background(), time.Duration(i)*50*time.Microsecond)
			defer cancel()
			if release, err := l.Acquire(ctx, another()); err == nil {
				release()
			}
		})
	}
	all.Wait()
	if l.commands.running != 0 || len(l.commands.inPod) != 0 || len(l.commands.waiting) != 0 {
		t.Errorf("%v start, %d wait", l.commands.inPod, len(l.commands.waiting))
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

var pods atomic.Int64

// another is an exec in a pod of its own.
func another() session.Info { return exec(fmt.Sprint("pod-", pods.Add(1)), "c") }

// A pod that holds up what enters it, or that is asked for more than it can do, takes a quarter of the turns and
// of the places to wait, and nobody else waits for it.
func TestShareOfPod(t *testing.T) {
	l := New(Config{ConcurrentStarts: 8, WaitingStarts: 12})
	greedy := exec("greedy", "c")
	var releases []func()
	for range 2 {
		release, err := l.Acquire(t.Context(), greedy)
		if err != nil {
			t.Fatal(err)
		}
		releases = append(releases, release)
	}
	got := make(chan func(), 3)
	for range 3 {
		go func() {
			release, err := l.Acquire(context.Background(), greedy)
			if err != nil {
				t.Error(err)
			}
			got <- release
		}()
	}
	waitFor(t, func() bool { l.mu.Lock(); defer l.mu.Unlock(); return len(l.commands.waiting) == 3 })
	if _, err := l.Acquire(t.Context(), greedy); refusal(err) != session.TooMany || !strings.Contains(err.Error(), "pod") {
		t.Errorf("a fourth that waits: %v", err)
	}
	// Others pass those that wait, up to the node's limit.
	for range 6 {
		release, err := l.Acquire(t.Context(), another())
		if err != nil {
			t.Fatal(err)
		}
		releases = append(releases, release)
	}
	gone, cancel := context.WithCancel(context.Background())
	cancel()
	if _, err := l.Acquire(gone, another()); !errors.Is(err, context.Canceled) {
		t.Errorf("a ninth start: %v", err)
	}
	releases[2]() // of another pod: no turn for the greedy one
	l.mu.Lock()
	if len(l.commands.waiting) != 3 {
		t.Errorf("%d wait", len(l.commands.waiting))
	}
	l.mu.Unlock()
	releases[0]()
	(<-got)()
	(<-got)()
	(<-got)()
	for _, release := range append(releases[1:2], releases[3:]...) {
		release()
	}
	if l.commands.running != 0 || len(l.commands.inPod) != 0 || len(l.commands.waiting) != 0 {
		t.Errorf("%v start, %d wait", l.commands.inPod, len(l.commands.waiting))
	}
}

// probe is an ExecSync in a pod of its own.
func probe() session.Info {
	info := another()
	info.Kind = session.ExecSync
	return info
}

// While probes start, sessions have what they leave, and one at least. A probe waits only for probes.
func TestProbesGoFirst(t *testing.T) {
	l := New(Config{ConcurrentStarts: 3, ConcurrentProbes: 4, WaitingStarts: 100})
	begin := func(info session.Info) func() {
		t.Helper()
		release, err := l.Acquire(t.Context(), info)
		if err != nil {
			t.Fatal(err)
		}
		return release
	}
	var sessions, probes []func()
	for range 3 {
		sessions = append(sessions, begin(another()))
	}
	for range 4 {
		probes = append(probes, begin(probe())) // for all that the sessions take
	}
	came := make(chan string, 10)
	later := func(name string, info session.Info) {
		go func() {
			release, err := l.Acquire(context.Background(), info)
			if err != nil {
				t.Error(err)
			}
			came <- name
			release()
		}()
		waitFor(t, func() bool {
			_, waiting := l.Starts(info.Kind)
			return waiting == 1
		})
	}
	later("session", another())
	later("probe", probe())
	sessions[0]()
	sessions[1]() // one runs still, and four probes
	if _, waiting := l.Starts(session.Exec); waiting != 1 {
		t.Errorf("%d sessions wait: it was one's turn while probes took all", waiting)
	}
	probes[0]()
	if name := <-came; name != "probe" {
		t.Errorf("it was the %s's turn", name)
	}
	sessions[2]() // no session starts now, so that one may, whatever the probes take
	if name := <-came; name != "session" {
		t.Errorf("it was the %s's turn", name)
	}
	for _, release := range probes[1:] {
		release()
	}
	for _, kind := range []session.Kind{session.Exec, session.ExecSync} {
		waitFor(t, func() bool { // the last of later gives its turn back behind came
			running, waiting := l.Starts(kind)
			return running == 0 && waiting == 0
		})
	}
}

// A pod's probes take a quarter of the turns at most, and too many that wait are refused.
func TestProbesOfPod(t *testing.T) {
	l := New(Config{ConcurrentProbes: 4, WaitingStarts: 4})
	greedy := probe()
	release, err := l.Acquire(t.Context(), greedy)
	if err != nil {
		t.Fatal(err)
	}
	waiting, end := context.WithCancel(context.Background())
	second := make(chan error, 1)
	go func() {
		_, err := l.Acquire(waiting, greedy)
		second <- err
	}()
	waitFor(t, func() bool { _, n := l.Starts(session.ExecSync); return n == 1 })
	if _, err := l.Acquire(t.Context(), greedy); refusal(err) != session.TooMany {
		t.Errorf("a second that waits: %v", err)
	}
	other, err := l.Acquire(t.Context(), probe())
	if err != nil {
		t.Fatal(err)
	}
	end()
	if err := <-second; !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
	release()
	other()
}
