// Package telemetry tests metrics, dashboard and traces with the real program in front of real containerd and runc.
package telemetry

import (
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/prometheus/common/expfmt"
	"github.com/prometheus/common/model"
	collector "go.opentelemetry.io/proto/otlp/collector/trace/v1"
	commonpb "go.opentelemetry.io/proto/otlp/common/v1"
	tracepb "go.opentelemetry.io/proto/otlp/trace/v1"
	"google.golang.org/grpc"
	"google.golang.org/grpc/metadata"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/streamshim/streamshim/internal/testutil"
	"github.com/streamshim/streamshim/internal/testutil/leak"
	"github.com/streamshim/streamshim/test/internal/images"
	"github.com/streamshim/streamshim/test/internal/node"
)

// client keeps no connection between requests, because that would count as a leak.
var client = http.Client{Transport: &http.Transport{DisableKeepAlives: true}}

// measured is a node whose streamshim serves metrics and sends traces.
type measured struct {
	*node.Node
	t              *testing.T
	address        string
	pod, container string
}

func freeAddress(t *testing.T) string {
	t.Helper()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer listener.Close()
	return listener.Addr().String()
}

func start(t *testing.T, name, config string) *measured {
	t.Helper()
	m := &measured{t: t, address: freeAddress(t)}
	file := filepath.Join(t.TempDir(), "config.toml")
	if err := os.WriteFile(file, []byte(fmt.Sprintf("metrics_address = %q\n", m.address)+config), 0o600); err != nil {
		t.Fatal(err)
	}
	m.Node = node.StartForTest(t, node.Config{
		Name: name, Streamshim: node.Binary(t), StreamshimArgs: []string{"--config", file, "--log-level", "info"},
	})
	m.pod, m.container = m.run("web", "shop")
	return m
}

func (m *measured) run(name, namespace string) (pod, container string) {
	m.t.Helper()
	pod, err := m.RunPod(m.t.Context(), node.PodSpec{Name: name, Namespace: namespace})
	if err != nil {
		m.t.Fatal(err)
	}
	container, err = m.RunContainer(m.t.Context(), pod, node.ContainerSpec{Image: node.Image(images.Lab), Stdin: true})
	if err != nil {
		m.t.Fatal(err)
	}
	return pod, container
}

// bounded returns a crictl command that is killed if it does not end.
func (m *measured) bounded(args ...string) *exec.Cmd {
	m.t.Helper()
	template := m.Crictl(args...)
	ctx, cancel := context.WithTimeout(m.t.Context(), testutil.Patience)
	m.t.Cleanup(cancel)
	cmd := exec.CommandContext(ctx, template.Path, template.Args[1:]...)
	cmd.WaitDelay = 5 * time.Second
	return cmd
}

// crictl runs crictl to its end, whatever its exit code is.
func (m *measured) crictl(stdin string, args ...string) string {
	m.t.Helper()
	cmd := m.bounded(args...)
	cmd.Stdin = strings.NewReader(stdin)
	out, err := cmd.CombinedOutput()
	m.t.Logf("crictl %v: %v: %.200s", args, err, out)
	return string(out)
}

// disconnect begins a session with crictl, waits for a line of its output, and kills crictl.
func (m *measured) disconnect(args ...string) {
	m.t.Helper()
	cmd := m.bounded(args...)
	out, err := cmd.StdoutPipe()
	if err != nil {
		m.t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		m.t.Fatal(err)
	}
	line, err := bufio.NewReader(out).ReadString('\n')
	if err != nil {
		m.t.Errorf("crictl %v said nothing: %v", args, err)
	}
	m.t.Logf("crictl %v: %s", args, line)
	if err := cmd.Process.Kill(); err != nil {
		m.t.Error(err)
	}
	_ = cmd.Wait() // killed
}

func (m *measured) get(path string) (int, string) {
	m.t.Helper()
	response, err := client.Get("http://" + m.address + path)
	if err != nil {
		m.t.Fatal(err)
	}
	defer response.Body.Close()
	body, err := io.ReadAll(response.Body)
	if err != nil {
		m.t.Fatal(err)
	}
	return response.StatusCode, string(body)
}

// series are the samples of one scrape: for each name, the sets of labels and their values.
type series map[string][]sample

type sample struct {
	labels map[string]string
	value  float64
}

func (m *measured) scrape() series {
	m.t.Helper()
	code, body := m.get("/metrics")
	if code != http.StatusOK {
		m.t.Fatalf("/metrics: %d %s", code, body)
	}
	parser := expfmt.NewTextParser(model.UTF8Validation)
	families, err := parser.TextToMetricFamilies(strings.NewReader(body))
	if err != nil {
		m.t.Fatal(err)
	}
	found := series{}
	for name, family := range families {
		for _, metric := range family.GetMetric() {
			labels := map[string]string{}
			for _, pair := range metric.GetLabel() {
				labels[pair.GetName()] = pair.GetValue()
			}
			if h := metric.GetHistogram(); h != nil {
				count := float64(h.GetSampleCount())
				found[name+"_count"] = append(found[name+"_count"], sample{labels, count})
				found[name+"_bucket"] = append(found[name+"_bucket"], sample{labels, count})
				continue
			}
			value := metric.GetCounter().GetValue() + metric.GetGauge().GetValue() + metric.GetUntyped().GetValue()
			found[name] = append(found[name], sample{labels, value})
		}
	}
	return found
}

// sum adds up the series of a metric with these labels, given as name, value, name, value...
func (s series) sum(name string, labels ...string) (sum float64) {
	for _, sample := range s[name] {
		matches := true
		for i := 0; i < len(labels); i += 2 {
			matches = matches && sample.labels[labels[i]] == labels[i+1]
		}
		if matches {
			sum += sample.value
		}
	}
	return sum
}

func (m *measured) atLeast(least float64, name string, labels ...string) {
	m.t.Helper()
	var last float64
	deadline := time.Now().Add(testutil.Patience)
	for last = m.scrape().sum(name, labels...); last < least; last = m.scrape().sum(name, labels...) {
		if time.Now().After(deadline) {
			m.t.Errorf("%s%v is %v, expected %v at least", name, labels, last, least)
			return
		}
		time.Sleep(100 * time.Millisecond)
	}
}

const measuredConfig = `
[exec]
term_after = "1s"
kill_after = "2s"

[[deny]]
namespaces = ["forbidden"]
`

// TestMetrics sends every kind of traffic through a node and checks the numbers. Then it checks that every query of the
// dashboard finds data.
func TestMetrics(t *testing.T) {
	node.Require(t)
	leak.Check(t)
	m := start(t, "metrics", measuredConfig)
	_, denied := m.run("safe", "forbidden")

	m.crictl("", "exec", m.container, "echo", "hello")
	m.crictl("", "exec", "--transport", "websocket", m.container, "echo", "hello")
	m.crictl("", "exec", m.container, "sh", "-c", "exit 3")
	m.crictl("", "exec", m.container, "no-such-command")
	m.crictl("", "exec", denied, "true")
	m.crictl("", "exec", m.container, "sh", "-c", "sleep 2147483000 & echo child") // the child keeps the output open
	m.crictl("", "exec", "--sync", m.container, "true")
	m.crictl("", "exec", "--sync", m.container, "false")
	m.crictl("", "exec", "--sync", "--timeout", "1", m.container, "sleep", "100")
	m.disconnect("exec", m.container, "sh", "-c", "trap '' HUP TERM; echo stubborn; while :; do sleep 1; done")
	m.attach()
	m.forward()

	m.atLeast(1, "streamshim_sessions_total", "kind", "exec", "result", "ok", "protocol", "WebSocket v5.channel.k8s.io")
	m.atLeast(1, "streamshim_sessions_total", "kind", "exec", "result", "ok", "protocol", "SPDY/3.1 v4.channel.k8s.io")
	m.atLeast(2, "streamshim_sessions_total", "kind", "exec", "result", "failed")
	m.atLeast(1, "streamshim_sessions_total", "kind", "exec", "result", "gone", "reason", "client-gone")
	m.atLeast(1, "streamshim_sessions_total", "kind", "attach", "result", "ok")
	m.atLeast(1, "streamshim_sessions_total", "kind", "portforward", "result", "ok")
	m.atLeast(1, "streamshim_sessions_refused_total", "kind", "exec", "refusal", "denied")
	m.atLeast(4, "streamshim_session_start_seconds_count", "kind", "exec")
	m.atLeast(4, "streamshim_session_duration_seconds_count", "kind", "exec")
	m.atLeast(4, "streamshim_session_linger_seconds_count", "kind", "exec")
	m.atLeast(12, "streamshim_sent_bytes_total", "kind", "exec")
	m.atLeast(1, "streamshim_received_bytes_total", "kind", "portforward")
	m.atLeast(1, "streamshim_sent_bytes_total", "kind", "portforward")
	m.atLeast(1, "streamshim_received_bytes_total", "kind", "attach")
	m.atLeast(7, "streamshim_tokens_total", "event", "issued")
	m.atLeast(7, "streamshim_tokens_total", "event", "redeemed")
	m.atLeast(1, "streamshim_drains_cut_total")
	m.atLeast(1, "streamshim_disconnect_kills_total")
	m.atLeast(1, "streamshim_execsync_seconds_count", "result", "ok")
	m.atLeast(1, "streamshim_execsync_seconds_count", "result", "failed")
	m.atLeast(1, "streamshim_execsync_seconds_count", "result", "timeout")
	m.atLeast(1, "streamshim_cri_calls_total", "method", "RuntimeService/RunPodSandbox", "code", "OK")
	m.atLeast(1, "streamshim_cri_calls_total", "method", "RuntimeService/Exec", "code", "PermissionDenied")
	m.atLeast(1, "streamshim_cri_call_seconds_count", "method", "RuntimeService/Exec")
	testutil.Eventually(t, "no session is left", func() bool { return m.scrape().sum("streamshim_sessions_live") == 0 })

	checkDashboard(t, m.scrape())
	m.health()
}

// attach sends a line to the main process and waits for its answer.
func (m *measured) attach() {
	m.t.Helper()
	cmd := m.bounded("attach", "-i", m.container)
	stdin, err := cmd.StdinPipe()
	if err != nil {
		m.t.Fatal(err)
	}
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		m.t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		m.t.Fatal(err)
	}
	if _, err := io.WriteString(stdin, "hello\n"); err != nil {
		m.t.Error(err)
	}
	line, err := bufio.NewReader(stdout).ReadString('\n')
	m.t.Logf("attach: %q %v", line, err)
	m.atLeast(1, "streamshim_sessions_live", "kind", "attach")
	if err := cmd.Process.Kill(); err != nil {
		m.t.Error(err)
	}
	_ = cmd.Wait() // killed
}

// forward fetches a page of the pod's web server.
func (m *measured) forward() {
	m.t.Helper()
	_, port, err := net.SplitHostPort(freeAddress(m.t))
	if err != nil {
		m.t.Fatal(err)
	}
	cmd := m.bounded("port-forward", m.pod, port+":80")
	if err := cmd.Start(); err != nil {
		m.t.Fatal(err)
	}
	testutil.Eventually(m.t, "the pod's web server answers", func() bool {
		response, err := client.Get("http://127.0.0.1:" + port + "/")
		if err != nil {
			return false
		}
		_, err = io.Copy(io.Discard, response.Body)
		response.Body.Close()
		return err == nil
	})
	if err := cmd.Process.Kill(); err != nil {
		m.t.Error(err)
	}
	_ = cmd.Wait() // killed
}

// health checks that without the runtime the node is not ready, but the process is alive.
func (m *measured) health() {
	m.t.Helper()
	if code, body := m.get("/readyz"); code != http.StatusOK {
		m.t.Errorf("/readyz: %d %s", code, body)
	}
	if err := m.KillContainerd(); err != nil {
		m.t.Fatal(err)
	}
	testutil.Eventually(m.t, "/readyz says that the runtime is away", func() bool {
		code, _ := m.get("/readyz")
		return code == http.StatusServiceUnavailable
	})
	if code, _ := m.get("/healthz"); code != http.StatusOK {
		m.t.Errorf("/healthz without a runtime: %d", code)
	}
	if err := m.StartContainerd(m.t.Context()); err != nil {
		m.t.Fatal(err)
	}
	testutil.Eventually(m.t, "/readyz says that the runtime is back", func() bool {
		code, _ := m.get("/readyz")
		return code == http.StatusOK
	})
}

var (
	metricName = regexp.MustCompile(`\b(?:streamshim|process|go)_[a-z_]+`)
	groupBy    = regexp.MustCompile(`\bby \(([^)]*)\)`)
	matcher    = regexp.MustCompile(`([a-z_]+)\s*(?:=~|!~|!=|=)`)
)

// checkDashboard checks that each query of each panel finds data with the labels that it names.
func checkDashboard(t *testing.T, found series) {
	t.Helper()
	text, err := os.ReadFile(filepath.Join("..", "..", "..", "deploy", "grafana", "streamshim.json"))
	if err != nil {
		t.Fatal(err)
	}
	var dashboard struct {
		Panels []struct {
			Title, Type string
			Targets     []struct{ Expr string }
		}
	}
	if err := json.Unmarshal(text, &dashboard); err != nil {
		t.Fatal(err)
	}
	shown := map[string]bool{}
	for _, panel := range dashboard.Panels {
		if panel.Type != "row" && len(panel.Targets) == 0 {
			t.Errorf("panel %q asks for nothing", panel.Title)
		}
		for _, target := range panel.Targets {
			names := metricName.FindAllString(target.Expr, -1)
			if len(names) == 0 {
				t.Errorf("panel %q: no metric in %q", panel.Title, target.Expr)
			}
			var labels []string
			for _, match := range append(groupBy.FindAllStringSubmatch(target.Expr, -1), matcher.FindAllStringSubmatch(target.Expr, -1)...) {
				labels = append(labels, strings.Split(match[1], ", ")...)
			}
			for _, name := range names {
				shown[strings.TrimSuffix(strings.TrimSuffix(name, "_bucket"), "_count")] = true
				samples := found[name]
				if len(samples) == 0 {
					t.Errorf("panel %q: %s has no data", panel.Title, name)
					continue
				}
				for _, label := range labels {
					if _, ok := samples[0].labels[label]; !ok && label != "instance" && label != "le" {
						t.Errorf("panel %q: %s has no label %q", panel.Title, name, label)
					}
				}
			}
		}
	}
	for name := range found {
		base := strings.TrimSuffix(strings.TrimSuffix(name, "_bucket"), "_count")
		if strings.HasPrefix(name, "streamshim_") && !shown[base] {
			t.Errorf("no panel shows %s", base)
		}
	}
}

// receiver is an OTLP receiver that stores what it receives.
type receiver struct {
	collector.UnimplementedTraceServiceServer
	address string

	mu    sync.Mutex
	spans []*tracepb.Span
}

func (r *receiver) Export(_ context.Context, request *collector.ExportTraceServiceRequest) (*collector.ExportTraceServiceResponse, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, resource := range request.GetResourceSpans() {
		for _, scope := range resource.GetScopeSpans() {
			r.spans = append(r.spans, scope.GetSpans()...)
		}
	}
	return &collector.ExportTraceServiceResponse{}, nil
}

func newReceiver(t *testing.T) *receiver {
	t.Helper()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	r := &receiver{address: listener.Addr().String()}
	server := grpc.NewServer()
	collector.RegisterTraceServiceServer(server, r)
	served := make(chan error, 1)
	go func() { served <- server.Serve(listener) }()
	t.Cleanup(func() {
		server.Stop()
		if err := <-served; err != nil {
			t.Error(err)
		}
	})
	return r
}

// find waits for the span with a name in a trace.
func (r *receiver) find(t *testing.T, traceID, name string) (span *tracepb.Span) {
	t.Helper()
	testutil.Eventually(t, "a span "+name, func() bool {
		r.mu.Lock()
		defer r.mu.Unlock()
		i := slices.IndexFunc(r.spans, func(s *tracepb.Span) bool {
			return s.GetName() == name && fmt.Sprintf("%x", s.GetTraceId()) == traceID
		})
		if i < 0 {
			return false
		}
		span = r.spans[i]
		return true
	})
	return span
}

// TestTraces follows the trace that a kubelet began through the call, the session and its phases.
func TestTraces(t *testing.T) {
	node.Require(t)
	leak.Check(t)
	r := newReceiver(t)
	m := start(t, "traces", fmt.Sprintf("[traces]\nendpoint = %q\ninsecure = true\nsample_ratio = 0.0\n", r.address))

	const traceID, kubelet = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
	ctx := metadata.AppendToOutgoingContext(t.Context(), "traceparent", "00-"+traceID+"-"+kubelet+"-01")
	const secret = "a-secret-argument"
	response, err := m.Runtime().Exec(ctx, &runtimeapi.ExecRequest{
		ContainerId: m.container, Cmd: []string{"sh", "-c", "exit 7", secret}, Stdout: true,
	})
	if err != nil {
		t.Fatal(err)
	}
	redeem(t, response.GetUrl())

	call := r.find(t, traceID, "runtime.v1.RuntimeService/Exec")
	if got := fmt.Sprintf("%x", call.GetParentSpanId()); got != kubelet {
		t.Errorf("the call's parent is %s, not the kubelet's %s", got, kubelet)
	}
	session := r.find(t, traceID, "exec session")
	if string(session.GetParentSpanId()) != string(call.GetSpanId()) {
		t.Errorf("the session is no child of the call: %v", session)
	}
	attributes := map[string]string{}
	for _, a := range session.GetAttributes() {
		attributes[a.GetKey()] = a.GetValue().GetStringValue()
		if code, ok := a.GetValue().GetValue().(*commonpb.AnyValue_IntValue); ok {
			attributes[a.GetKey()] = fmt.Sprint(code.IntValue)
		}
	}
	for key, want := range map[string]string{
		"k8s.pod.name": "web", "k8s.namespace.name": "shop", "process.exit.code": "7", "streamshim.reason": "exited",
	} {
		if attributes[key] != want {
			t.Errorf("%s is %q, want %q", key, attributes[key], want)
		}
	}
	if strings.Contains(session.String(), secret) {
		t.Error("the span holds the command")
	}
	end := session.GetStartTimeUnixNano()
	for _, name := range []string{"start", "run", "linger"} {
		phase := r.find(t, traceID, name)
		if string(phase.GetParentSpanId()) != string(session.GetSpanId()) {
			t.Errorf("%s is no child of the session", name)
		}
		if phase.GetStartTimeUnixNano() < end || phase.GetEndTimeUnixNano() > session.GetEndTimeUnixNano() {
			t.Errorf("%s does not follow what comes before it", name)
		}
		end = phase.GetEndTimeUnixNano()
	}

	// The ratio decides whether a call without a trace context is traced. Here it is zero.
	m.crictl("", "exec", m.container, "true")
	m.atLeast(2, "streamshim_sessions_total", "kind", "exec")
	if err := m.StopStreamshim(testutil.Patience); err != nil { // sends what is still queued
		t.Fatal(err)
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if len(r.spans) != 5 {
		t.Errorf("%d spans have come, expected 5", len(r.spans))
	}
}

// redeem serves the URL's session to its end, as the smallest possible client: it reads WebSocket frames until the server
// closes.
func redeem(t *testing.T, url string) {
	t.Helper()
	address := strings.TrimPrefix(url, "http://")
	host, path, _ := strings.Cut(address, "/")
	conn, err := net.Dial("tcp", host)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	fmt.Fprintf(conn, "GET /%s HTTP/1.1\r\nHost: %s\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n"+
		"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Protocol: v5.channel.k8s.io\r\n\r\n", path, host)
	reader := bufio.NewReader(conn)
	response, err := http.ReadResponse(reader, nil)
	if err != nil {
		t.Fatal(err)
	}
	if response.StatusCode != http.StatusSwitchingProtocols {
		t.Fatalf("the upgrade was answered with %s", response.Status)
	}
	for {
		var head [2]byte
		if _, err := io.ReadFull(reader, head[:]); err != nil {
			t.Fatal(err)
		}
		size := int64(head[1] & 0x7f)
		if size == 126 {
			var length [2]byte
			if _, err := io.ReadFull(reader, length[:]); err != nil {
				t.Fatal(err)
			}
			size = int64(length[0])<<8 | int64(length[1])
		}
		if _, err := io.CopyN(io.Discard, reader, size); err != nil {
			t.Fatal(err)
		}
		if head[0]&0x0f == 8 { // close
			return
		}
	}
}
