package main

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

func newTestRun(t *testing.T) *soakRun {
	t.Helper()
	log, err := os.Create(filepath.Join(t.TempDir(), "events.log"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { log.Close() })
	return &soakRun{
		options: options{seed: 7, duration: time.Minute, output: t.TempDir()}, log: log, begin: time.Now(),
		violations: map[violationKind]int{}, counts: map[string]int{},
	}
}

func TestSequence(t *testing.T) {
	if got := string(sequence(11)); got != "1\n2\n3\n4\n5\n6\n7\n8\n9\n10\n11\n" {
		t.Errorf("%q", got)
	}
	if got := string(sequence(2)); got != "1\n2\n" || sequence(0) != nil {
		t.Errorf("%q", got)
	}
}

// Output that is cut, changed or too long is wrong when the session succeeds, and only then.
func TestJudge(t *testing.T) {
	success := metav1.Status{Status: metav1.StatusSuccess}
	exit := func(code int) metav1.Status {
		return metav1.Status{
			Status: metav1.StatusFailure, Reason: "NonZeroExitCode",
			Details: &metav1.StatusDetails{Causes: []metav1.StatusCause{{Type: "ExitCode", Message: fmt.Sprint(code)}}},
		}
	}
	for _, test := range []struct {
		name   string
		writes []string
		drop   int
		status metav1.Status
		code   int
		wrong  bool
		fails  bool
	}{
		{"right", []string{"1\n", "2\n3\n"}, 0, success, 0, false, false},
		{"right, with an exit code", []string{"1\n2\n3\n"}, 0, exit(3), 3, false, false},
		{"cut", []string{"1\n", "2\n"}, 0, success, 0, true, false},
		{"nothing", nil, 0, success, 0, true, false},
		{"dropped", []string{"1\n", "2\n3\n"}, 1, success, 0, true, false},
		{"changed", []string{"1\n2\nx\n"}, 0, success, 0, true, false},
		{"too long", []string{"1\n2\n3\n4"}, 0, success, 0, true, false},
		{"another exit code", []string{"1\n2\n3\n"}, 0, exit(3), 0, true, false},
		{"killed with its container", []string{"1\n"}, 0, exit(killedCode), 0, false, true},
		{"failed", []string{"1\n"}, 0, metav1.Status{Status: metav1.StatusFailure, Message: "shutdown"}, 0, false, true},
	} {
		t.Run(test.name, func(t *testing.T) {
			k := &checker{want: sequence(3), drop: test.drop}
			for _, text := range test.writes {
				k.Write([]byte(text))
			}
			err := judge(test.status, k, nil, test.code)
			var wrong wrongError
			if errors.As(err, &wrong) != test.wrong || (err != nil) != (test.wrong || test.fails) {
				t.Errorf("%v", err)
			}
		})
	}
}

// A failure is explained by what goes on at its time, and by what has that consequence.
func TestCauses(t *testing.T) {
	s := newTestRun(t)
	now := time.Now()
	at := func(seconds float64) time.Time { return now.Add(time.Duration(seconds * float64(time.Second))) }
	s.windows = []*window{
		{name: "state-full", begin: at(10), end: at(12), excuses: excuse{failures: true, starts: []string{"no space left"}}},
		{name: "killed", begin: at(30), end: at(31), excuses: everything},
		{name: "hangs", begin: at(50), excuses: upstream},
	}
	s.begin = now
	s.floor = []sample{{at: 80 * time.Second, took: 6 * time.Second}}
	living := &pod{kind: stable}
	for _, test := range []struct {
		name       string
		c          *client
		begin, end float64
		err        error
		want       string
	}{
		{"nothing going on", &client{pod: living}, 1, 5, errors.New("x"), ""},
		{"before the disk was full", &client{pod: living}, 1, 9, errors.New("start: no space left on device"), ""},
		{"while it was", &client{pod: living}, 11, 11.5, errors.New("start: no space left on device"), "state-full"},
		{"while it was, for another reason", &client{pod: living}, 11, 11.5, errors.New("x"), ""},
		{"soon after", &client{pod: living}, 14, 15, errors.New("start: no space left on device"), "state-full"},
		{"long after", &client{pod: living}, 16, 17, errors.New("start: no space left on device"), ""},
		{"lived when streamshim was killed", &client{pod: living}, 1, 30.5, errors.New("x"), "killed"},
		{"hangs, whatever was going on", &client{pod: living}, 1, 30.5, os.ErrDeadlineExceeded, ""},
		{"hangs as everything does", &client{pod: living}, 70, 130, os.ErrDeadlineExceeded, "hopelessly busy"},
		{"fails while everything hangs", &client{pod: living}, 70, 130, errors.New("x"), ""},
		{"needs no upstream", &client{pod: living}, 51, 52, errors.New("x"), ""},
		{"needs the upstream", &client{pod: living, upstream: true}, 51, 52, errors.New("x"), "hangs"},
		{"dead pod", &client{pod: &pod{kind: victim, gone: now}}, 1, 2, errors.New("x"), "pod killed"},
	} {
		if got := s.causeOf(test.c, at(test.begin), at(test.end), test.err); got != test.want {
			t.Errorf("%s: %q, want %q", test.name, got, test.want)
		}
	}
}

func TestAccountAbove(t *testing.T) {
	before := account{descriptors: 20, goroutines: 30, members: 6}
	if found := (account{descriptors: 20 + moreDescriptors, goroutines: 30 + moreGoroutines, members: 6}).above(before, 0); found != nil {
		t.Errorf("within: %v", found)
	}
	for _, more := range []account{
		{sessions: 1}, {descriptors: 21 + moreDescriptors}, {goroutines: 31 + moreGoroutines}, {children: 1}, {members: 7},
		{records: 1}, {buffered: 1}, {mounts: 1}, {namespaces: 1}, {heap: moreHeap + 1}, {rss: moreRSS + 1},
	} {
		if found := more.above(before, 0); len(found) != 1 {
			t.Errorf("%+v: %v", more, found)
		}
	}
}

// A pod that was being made when containerd was killed may leave something.
func TestAccountOfInterruptedPods(t *testing.T) {
	before := account{}
	if found := (account{mounts: 4, namespaces: 2}).above(before, 2); found != nil {
		t.Errorf("within: %v", found)
	}
	for _, more := range []account{{mounts: 5}, {namespaces: 3}, {records: 1}} {
		if found := more.above(before, 2); len(found) != 1 {
			t.Errorf("%+v: %v", more, found)
		}
	}
}

// A probe may take a second, or as much as three of what is started at the same time without streamshim.
func TestProbeBar(t *testing.T) {
	probes := func(late int, took time.Duration) []sample {
		all := []sample{{at: time.Minute, took: time.Minute, excused: true}}
		for i := range 200 {
			one := sample{at: time.Duration(i) * 100 * time.Millisecond, took: 10 * time.Millisecond}
			if i < late {
				one.took = took
			}
			all = append(all, one)
		}
		return all
	}
	for _, test := range []struct {
		name   string
		probes []sample
		floor  []sample
		want   int
	}{
		{"within a second", probes(200, 900*time.Millisecond), nil, 0},
		{"two of 200", probes(2, 2*time.Second), nil, 0},
		{"three of 200", probes(3, 2*time.Second), nil, 1},
		{"a busy machine", probes(3, 2*time.Second), []sample{{at: time.Second, took: 700 * time.Millisecond}}, 0},
		{"and slow beside it", probes(3, 2200*time.Millisecond), []sample{{at: time.Second, took: 700 * time.Millisecond}}, 1},
		{"a busy machine at another time", probes(3, 2*time.Second), []sample{{at: 10 * time.Second, took: time.Minute}}, 1},
		{"a busy machine just before", probes(3, 2*time.Second), []sample{{at: -10 * time.Second, took: 900 * time.Millisecond}}, 0},
		{"a quiet one since", probes(3, 2*time.Second), []sample{{at: -10 * time.Second, took: 5 * time.Second}, {at: -2 * time.Second, took: 50 * time.Millisecond}}, 1},
	} {
		s := newTestRun(t)
		s.probes, s.floor = test.probes, test.floor
		s.judgeProbes()
		if s.violations[slowProbes] != test.want {
			t.Errorf("%s: %v", test.name, s.violations)
		}
	}
}

// Streamshim itself may use twice the CPU time of what it starts.
func TestCPUBar(t *testing.T) {
	for used, want := range map[time.Duration]int{500 * time.Millisecond: 0, 700 * time.Millisecond: 1} {
		s := newTestRun(t)
		s.probes, s.counts = make([]sample, 6), map[string]int{"download: ok": 4}
		s.floor, s.floorCPU, s.cpu = make([]sample, 3), 90*time.Millisecond, used
		s.judgeCPU()
		if s.violations[burntCPU] != want {
			t.Errorf("%v: %v", used, s.violations)
		}
	}
}

// The same seed makes the same decisions, and each part its own.
func TestRandom(t *testing.T) {
	a, b := newTestRun(t), newTestRun(t)
	if a.random("session", 3).Uint64() != b.random("session", 3).Uint64() {
		t.Error("the same seed decides otherwise")
	}
	b.seed++
	for _, other := range []uint64{a.random("session", 4).Uint64(), a.random("faults", 3).Uint64(), b.random("session", 3).Uint64()} {
		if other == a.random("session", 3).Uint64() {
			t.Error("another part decides the same")
		}
	}
}

func TestReport(t *testing.T) {
	s := newTestRun(t)
	s.violations[leftBehind] = 1
	s.probes = []sample{{at: time.Second, took: time.Millisecond}, {at: 59 * time.Second, took: 2 * time.Second}}
	s.samples = []usage{{at: time.Second, rss: 1 << 20, sessions: 3}, {at: 90 * time.Second, rss: 2 << 20}}
	s.windows = []*window{{name: "a <fault>", begin: s.begin, end: s.begin.Add(time.Second)}}
	s.report()
	for name, want := range map[string]string{"report.txt": "left behind", "soak.svg": "a &lt;fault&gt;"} {
		text, err := os.ReadFile(filepath.Join(s.output, name))
		if err != nil || !strings.Contains(string(text), want) || strings.Contains(string(text), "NaN") {
			t.Errorf("%s: %v\n%s", name, err, text)
		}
	}
}
