package metrics

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/streamshim/streamshim/pkg/session"
	"github.com/streamshim/streamshim/pkg/workload"
)

type moved struct{ received, sent int64 }

func (m moved) LastActivity() time.Time             { return time.Now() }
func (m moved) Transferred() (received, sent int64) { return m.received, m.sent }

func newForTest() *Metrics {
	return New(Config{
		Version: "test", Methods: []string{"/runtime.v1.RuntimeService/Exec"}, WaitingTokens: func() int { return 3 },
		Buffered: func() int64 { return 11 }, BuffersRefused: func() int64 { return 13 },
		SyncOutput: func() int64 { return 17 }, SyncOutputRefused: func() int64 { return 19 },
		RecordingBuffered: func() int64 { return 23 }, RecordingBuffersRefused: func() int64 { return 29 },
		Commands:  func() Commands { return Commands{1, 2, 3, 4, 5, 6} },
		Handovers: func() Handovers { return Handovers{Done: 31, Failed: 37, Carried: 41, Ended: 43, Pause: 0.5} },
		LostAudit: func() int64 { return 5 }, IncompleteRecordings: func() int64 { return 7 },
	})
}

// value is the sum of a metric over all series that have the labels; a histogram's is its count.
func value(t *testing.T, m *Metrics, name string, labels map[string]string) float64 {
	t.Helper()
	families, err := m.registry.Gather()
	if err != nil {
		t.Fatal(err)
	}
	sum := 0.0
	for _, family := range families {
		if family.GetName() != name {
			continue
		}
	series:
		for _, s := range family.GetMetric() {
			for key, want := range labels {
				found := false
				for _, pair := range s.GetLabel() {
					found = found || pair.GetName() == key && pair.GetValue() == want
				}
				if !found {
					continue series
				}
			}
			sum += s.GetCounter().GetValue() + s.GetGauge().GetValue() + float64(s.GetHistogram().GetSampleCount())
		}
	}
	return sum
}

func expect(t *testing.T, m *Metrics, name string, labels map[string]string, want float64) {
	t.Helper()
	if got := value(t, m, name, labels); got != want {
		t.Errorf("%s%v = %v, want %v", name, labels, got, want)
	}
}

// A session's bytes count while it lives and once when it has ended.
func TestSession(t *testing.T) {
	m := newForTest()
	registry := session.NewRegistry(slog.New(slog.DiscardHandler))
	registry.Observe(m)
	s, err := registry.Begin(context.Background(), session.Info{Kind: session.Exec, Protocol: "SPDY/3.1 v4.channel.k8s.io"})
	if err != nil {
		t.Fatal(err)
	}
	exec := map[string]string{"kind": "exec"}
	expect(t, m, "streamshim_sessions_live", exec, 1)
	expect(t, m, "streamshim_sent_bytes_total", exec, 0) // no connection yet
	s.Connect(moved{10, 20})
	s.SetPhase(session.Running)
	s.SetPhase(session.Running)
	for range 2 {
		expect(t, m, "streamshim_received_bytes_total", exec, 10)
		expect(t, m, "streamshim_sent_bytes_total", exec, 20)
	}
	s.SetPhase(session.Lingering)
	s.End(session.Outcome{Reason: "exited", ExitCode: 3})
	expect(t, m, "streamshim_sessions_live", nil, 0)
	expect(t, m, "streamshim_received_bytes_total", exec, 10)
	expect(t, m, "streamshim_sent_bytes_total", exec, 20)
	expect(t, m, "streamshim_session_start_seconds", exec, 1)
	expect(t, m, "streamshim_session_linger_seconds", exec, 1)
	expect(t, m, "streamshim_session_duration_seconds", exec, 1)
	expect(t, m, "streamshim_sessions_total", map[string]string{
		"kind": "exec", "protocol": "SPDY/3.1 v4.channel.k8s.io", "result": "failed", "reason": "exited",
	}, 1)
}

// Whatever comes from outside, the number of series stays what it was.
func TestCardinalityIsBounded(t *testing.T) {
	m := newForTest()
	registry := session.NewRegistry(slog.New(slog.DiscardHandler))
	registry.Observe(m)
	hostile := func(i int) {
		name := fmt.Sprintf("hostile-%d", i)
		s, err := registry.Begin(context.Background(), session.Info{
			Kind: session.Kind(name), Protocol: name, Peer: name, Command: []string{name},
			Target: workload.Target{PodName: name, PodNamespace: name, ContainerName: name, ContainerID: name},
		})
		if err != nil {
			t.Fatal(err)
		}
		s.SetPhase(session.Running)
		s.SetPhase(session.Lingering)
		s.End(session.Outcome{Reason: name, ExitCode: i, Err: errors.New(name)})
		m.Refused(session.Info{Kind: session.Kind(name)}, &session.RefusedError{Refusal: session.Refusal(name)})
		m.Refused(session.Info{Kind: session.Exec}, errors.New(name))
		m.Call("/runtime.v9.RuntimeService/"+name, name, time.Second)
		m.Call("/runtime.v1.RuntimeService/Exec", fmt.Sprintf("Code(%d)", i), time.Second)
		m.Event(name)
		m.ExecSync(session.Outcome{Reason: name, ExitCode: i}, 1, time.Second)
	}
	hostile(1)
	before := series(t, m)
	for i := range 500 {
		hostile(i + 2)
	}
	if after := series(t, m); after != before {
		t.Errorf("%d series have become %d", before, after)
	}
	expect(t, m, "streamshim_cri_calls_total", map[string]string{"method": "other"}, 501)
	// All combinations of the label sets, which no node will ever have.
	most := (len(kinds) + 1) * (len(protocols) + 1) * len(results) * (len(reasons) + 1)
	if most > 10000 {
		t.Errorf("the labels of sessions_total allow %d series", most)
	}
}

func series(t *testing.T, m *Metrics) (n int) {
	t.Helper()
	families, err := m.registry.Gather()
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range families {
		if strings.HasPrefix(f.GetName(), "streamshim_") {
			n += len(f.GetMetric())
		}
	}
	return n
}

func TestResults(t *testing.T) {
	for _, tt := range []struct {
		kind    session.Kind
		outcome session.Outcome
		want    string
	}{
		{session.Exec, session.Outcome{Reason: "exited"}, "ok"},
		{session.Exec, session.Outcome{Reason: "exited", ExitCode: 1}, "failed"},
		{session.PortForward, session.Outcome{Reason: "exited", ExitCode: -1}, "ok"},
		{session.Exec, session.Outcome{Reason: "client-gone", ExitCode: -1}, "gone"},
		{session.PortForward, session.Outcome{Reason: "client-gone", ExitCode: -1}, "ok"},
		{session.Exec, session.Outcome{Reason: "start-failed", ExitCode: 127}, "failed"},
		{session.Exec, session.Outcome{Reason: "start-failed", ExitCode: -1}, "error"},
		{session.Exec, session.Outcome{Reason: "idle-timeout", ExitCode: -1}, "ended"},
		{session.Exec, session.Outcome{Reason: "no-streams", ExitCode: -1}, "error"},
	} {
		if got := resultLabel(tt.kind, tt.outcome); got != tt.want {
			t.Errorf("%s %+v is %q, want %q", tt.kind, tt.outcome, got, tt.want)
		}
	}
}

func TestBudgets(t *testing.T) {
	m := newForTest()
	for name, want := range map[string]float64{
		"streamshim_buffered_bytes": 11, "streamshim_buffers_refused_total": 13,
		"streamshim_execsync_buffered_bytes": 17, "streamshim_execsync_output_refused_total": 19,
		"streamshim_recording_buffered_bytes": 23, "streamshim_recording_buffers_refused_total": 29,
	} {
		if got := value(t, m, name, nil); got != want {
			t.Errorf("%s is %v, want %v", name, got, want)
		}
	}
	for i, what := range []string{"exec-start", "execsync-start", "end"} {
		for j, state := range []string{"running", "waiting"} {
			want := float64(2*i + j + 1)
			if got := value(t, m, "streamshim_commands", map[string]string{"what": what, "state": state}); got != want {
				t.Errorf("%s %s: %v, want %v", what, state, got, want)
			}
		}
	}
}

func TestServer(t *testing.T) {
	m := newForTest()
	asked, problem := 0, error(nil)
	config := ServerConfig{Metrics: m, Log: slog.New(slog.DiscardHandler), Ready: func(context.Context) error {
		asked++
		return problem
	}}
	get := func(s *Server, path string) (int, string) {
		recorder, request := httptest.NewRecorder(), httptest.NewRequest(http.MethodGet, path, nil)
		request.Host = "localhost"
		s.http.Handler.ServeHTTP(recorder, request)
		body, err := io.ReadAll(recorder.Body)
		if err != nil {
			t.Fatal(err)
		}
		return recorder.Code, string(body)
	}
	s := NewServer(config)
	if code, body := get(s, "/metrics"); code != 200 || !strings.Contains(body, "streamshim_tokens_waiting 3\n") {
		t.Errorf("/metrics: %d %.300s", code, body)
	}
	if code, _ := get(s, "/healthz"); code != 200 {
		t.Errorf("/healthz: %d", code)
	}
	for range 10 {
		if code, _ := get(s, "/readyz"); code != 200 {
			t.Errorf("/readyz: %d", code)
		}
	}
	if asked > 5 {
		t.Errorf("the runtime was asked %d times for 10 quick requests", asked)
	}
	problem = errors.New("the runtime is away")
	if code, body := get(NewServer(config), "/readyz"); code != 503 || !strings.Contains(body, "away") {
		t.Errorf("/readyz without a runtime: %d %s", code, body)
	}
	if code, _ := get(s, "/debug/pprof/"); code != 404 {
		t.Errorf("profiling is off: %d", code)
	}
	config.Profiling = true // see TestProfilesCheckHost, too
	if code, _ := get(NewServer(config), "/debug/pprof/"); code != 200 {
		t.Errorf("profiling is on: %d", code)
	}
}

// docs/metrics.md explains each metric and no others.
func TestDocumentation(t *testing.T) {
	text, err := os.ReadFile(filepath.Join("..", "..", "docs", "metrics.md"))
	if err != nil {
		t.Fatal(err)
	}
	documented := map[string]bool{}
	for _, match := range regexp.MustCompile("(?m)^(?:\\| )?`(streamshim_[a-z_]+)`").FindAllStringSubmatch(string(text), -1) {
		documented[match[1]] = true
	}
	m := newForTest()
	m.Call("x", "OK", time.Second)
	m.Refused(session.Info{Kind: session.Exec}, errors.New("x"))
	m.ended.WithLabelValues("exec", "x", "ok", "exited")
	families, err := m.registry.Gather()
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range families {
		if name := f.GetName(); strings.HasPrefix(name, "streamshim_") && !documented[name] {
			t.Errorf("docs/metrics.md does not explain %s", name)
		}
		delete(documented, f.GetName())
	}
	for name := range documented {
		t.Errorf("docs/metrics.md explains %s, which is not there", name)
	}
}

// Every metric has a help text, and names keep to Prometheus' conventions.
func TestNames(t *testing.T) {
	m := newForTest()
	m.Call("x", "OK", time.Second)
	families, err := m.registry.Gather()
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range families {
		if f.GetHelp() == "" {
			t.Errorf("%s has no help text", f.GetName())
		}
		if strings.HasPrefix(f.GetName(), "streamshim_") && (f.GetType().String() == "COUNTER") != strings.HasSuffix(f.GetName(), "_total") {
			t.Errorf("%s is a %s", f.GetName(), f.GetType())
		}
	}
}

// What a session costs without and with metrics, besides its work.
func BenchmarkSession(b *testing.B) {
	for name, observers := range map[string][]session.Observer{"off": nil, "on": {newForTest()}} {
		b.Run(name, func(b *testing.B) {
			r := session.NewRegistry(slog.New(slog.DiscardHandler))
			for _, o := range observers {
				r.Observe(o)
			}
			for b.Loop() {
				s, err := r.Begin(context.Background(), session.Info{Kind: session.Exec})
				if err != nil {
					b.Fatal(err)
				}
				s.SetPhase(session.Running)
				s.SetPhase(session.Lingering)
				s.End(session.Outcome{Reason: "exited"})
			}
		})
	}
}

// Profiles are not for pages that lead a browser on the node to a loopback address by a name of their own.
func TestProfilesCheckHost(t *testing.T) {
	server := NewServer(ServerConfig{Metrics: New(Config{}), Ready: func(context.Context) error { return nil }, Profiling: true, Log: slog.New(slog.DiscardHandler)})
	for _, test := range []struct {
		host, origin string
		want         int
	}{
		{"127.0.0.1:9000", "", 200}, {"localhost", "", 200}, {"[::1]:9000", "", 200}, {"127.1.2.3", "", 200},
		{"evil.example:9000", "", 403}, {"10.0.0.1:9000", "", 403}, {"localhost.evil.example", "", 403}, {"", "", 403},
		{"127.0.0.1:9000", "http://evil.example", 403},
	} {
		for _, path := range []string{"/debug/pprof/", "/debug/pprof/goroutine", "/debug/pprof/symbol"} {
			request := httptest.NewRequest(http.MethodGet, path, http.NoBody)
			request.Host = test.host
			if test.origin != "" {
				request.Header.Set("Origin", test.origin)
			}
			answer := httptest.NewRecorder()
			server.http.Handler.ServeHTTP(answer, request)
			if answer.Code != test.want {
				t.Errorf("%s of %q from %q: %d, want %d", path, test.host, test.origin, answer.Code, test.want)
			}
		}
	}
}
