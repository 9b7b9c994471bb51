package check

import (
	"context"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"google.golang.org/grpc"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/streamshim/streamshim/internal/testutil/criosocket"
	"github.com/streamshim/streamshim/pkg/config"
)

func find(t *testing.T, results []Result, name string) Result {
	t.Helper()
	for _, r := range results {
		if r.Name == name {
			return r
		}
	}
	t.Fatalf("no check named %q", name)
	return Result{}
}

func write(t *testing.T, path, text string) {
	t.Helper()
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
}

// Every problem must be found, and come with a fix.
func TestProblemsAreFound(t *testing.T) {
	dir := t.TempDir()
	c := config.Default()
	c.Listen = "unix://" + filepath.Join(dir, "a-file")
	c.Upstream = "unix://" + filepath.Join(dir, "nobody.sock")
	c.StateDir = filepath.Join(dir, "state")
	c.Runtime.Binary = filepath.Join(dir, "no-runc")
	write(t, filepath.Join(dir, "a-file"), "")
	kubelet := filepath.Join(dir, "kubelet.yaml")
	write(t, kubelet, "containerRuntimeEndpoint: unix:///run/containerd/containerd.sock\n")

	results := Run(t.Context(), c, kubelet)
	for name, want := range map[string]Level{
		"upstream": Failed, "OCI runtime": Warning, "listen socket": Failed, "kubelet": Warning,
	} {
		if r := find(t, results, name); r.Level != want || r.Fix == "" || r.Detail == "" {
			t.Errorf("%s: %+v, want %s with a fix", name, r, want)
		}
	}
	if r := find(t, results, "kubelet"); !strings.Contains(r.Fix, "containerRuntimeEndpoint: "+c.Listen) {
		t.Errorf("the kubelet's fix is %q", r.Fix)
	}
}

func TestGoodNode(t *testing.T) {
	dir := t.TempDir()
	c := config.Default()
	c.Listen = "unix://" + filepath.Join(dir, "made", "s.sock")
	c.Runtime.Binary = "/bin/true" // answers --version
	kubelet := filepath.Join(dir, "kubelet.yaml")
	write(t, kubelet, "kind: KubeletConfiguration\ncontainerRuntimeEndpoint: "+c.Listen+"\n")
	results := Run(t.Context(), c, kubelet)
	for _, name := range []string{"privileges", "pidfd", "network namespaces", "child subreaper", "OCI runtime", "listen socket", "kubelet"} {
		if r := find(t, results, name); r.Level != OK {
			t.Errorf("%s: %+v", name, r)
		}
	}
	if _, err := os.Stat(filepath.Join(dir, "made")); err == nil {
		t.Error("the check made the socket's directory")
	}
}

// Also without any runtime all the rest is looked at.
func TestNoRuntime(t *testing.T) {
	results := Run(t.Context(), config.Default(), filepath.Join(t.TempDir(), "none"))
	if r := find(t, results, "upstream"); r.Level != Failed || !strings.Contains(r.Fix, "start the runtime") {
		t.Errorf("%+v", r)
	}
	find(t, results, "kubelet")
}

// upstream is a runtime that has only conditions.
type upstream struct {
	runtimeapi.UnimplementedRuntimeServiceServer
	conditions []*runtimeapi.RuntimeCondition
}

func (u *upstream) Version(context.Context, *runtimeapi.VersionRequest) (*runtimeapi.VersionResponse, error) {
	return &runtimeapi.VersionResponse{RuntimeName: "containerd", RuntimeVersion: "v2", RuntimeApiVersion: "v1"}, nil
}

func (u *upstream) Status(context.Context, *runtimeapi.StatusRequest) (*runtimeapi.StatusResponse, error) {
	return &runtimeapi.StatusResponse{Status: &runtimeapi.RuntimeStatus{Conditions: u.conditions}}, nil
}

// What matters of a runtime's conditions is whether pods can run, not what containerd deprecates.
func TestUpstreamConditions(t *testing.T) {
	path := filepath.Join(t.TempDir(), "s.sock")
	listener, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	u := &upstream{}
	server := grpc.NewServer()
	runtimeapi.RegisterRuntimeServiceServer(server, u)
	served := make(chan error, 1)
	go func() { served <- server.Serve(listener) }()
	defer func() {
		server.Stop()
		if err := <-served; err != nil {
			t.Error(err)
		}
	}()
	c := config.Default()
	c.Upstream = "unix://" + path
	for _, test := range []struct {
		condition string
		good      bool
		want      Level
	}{
		{runtimeapi.NetworkReady, false, Warning},
		{runtimeapi.RuntimeReady, true, OK},
		{"ContainerdHasNoDeprecationWarnings", false, OK},
	} {
		u.conditions = []*runtimeapi.RuntimeCondition{{Type: test.condition, Status: test.good}}
		results := Run(t.Context(), c, filepath.Join(t.TempDir(), "none"))
		if r := find(t, results, "upstream"); r.Level != OK {
			t.Errorf("%+v", r)
		}
		if r := find(t, results, "upstream conditions"); r.Level != test.want || (!test.good && !strings.Contains(r.Detail, test.condition)) {
			t.Errorf("%s: %+v", test.condition, r)
		}
	}
}

func TestServedSocketIsSeen(t *testing.T) {
	c := config.Default()
	path := filepath.Join(t.TempDir(), "s.sock")
	c.Listen = "unix://" + path
	l, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	if r := socket("listen socket", "--listen", c.Listen); r.Level != OK || !strings.Contains(r.Detail, "being served") {
		t.Errorf("%+v", r)
	}
}

func TestRuncVersion(t *testing.T) {
	dir := t.TempDir()
	for _, tt := range []struct {
		line string
		want Level
	}{
		{"runc version 1.0.3", Failed},
		{"runc version 1.0.0-rc93", Failed},
		{"runc version 1.1.11", Warning},
		{"runc version 1.1.12", OK},
		{"runc version 1.1.5+ds1\ncommit: 1.1.5+ds1-1+deb12u1", OK}, // patched by Debian
		{"runc version 1.1.5+ds1\ncommit: 1.1.5+ds1-1", Warning},    // and not yet
		{"runc version v1.5.2", OK},
		{"runc version 2.0.0", OK},
		{"crun version 0.9", OK}, // other runtimes count differently
		{"", OK},
	} {
		c := config.Default()
		c.Runtime.Binary = filepath.Join(dir, "runc")
		if err := os.WriteFile(c.Runtime.Binary, []byte("#!/bin/sh\necho '"+tt.line+"'\necho spec: 1.2.0\n"), 0o755); err != nil {
			t.Fatal(err)
		}
		if r := ociRuntime(t.Context(), c); r.Level != tt.want || (r.Level != OK && r.Fix == "") {
			t.Errorf("%q: %+v, want %s", tt.line, r, tt.want)
		}
	}
}

// kubeadm's flags win over the kubelet's configuration.
func TestKubeadmFlags(t *testing.T) {
	dir := t.TempDir()
	c := config.Default()
	file := filepath.Join(dir, "config.yaml")
	write(t, file, "containerRuntimeEndpoint: "+c.Listen+"\n")
	for flags, want := range map[string]Level{
		`KUBELET_KUBEADM_ARGS="--node-ip=1.2.3.4"`:                                                         OK,
		`KUBELET_KUBEADM_ARGS="--container-runtime-endpoint=unix:///run/containerd/containerd.sock --v=2"`: Warning,
		`KUBELET_KUBEADM_ARGS="--v=2 --container-runtime-endpoint=` + c.Listen + `"`:                       OK,
	} {
		write(t, filepath.Join(dir, kubeadmFlags), flags)
		if r := kubelet(c, file, dir); r.Level != want {
			t.Errorf("%s: %+v", flags, r)
		}
	}
}

// A flag from elsewhere is seen in the kubelet that runs.
func TestRunningKubelet(t *testing.T) {
	dir := t.TempDir()
	c := config.Default()
	file := filepath.Join(dir, "config.yaml")
	for _, test := range []struct {
		arguments, file string
		want            Level
	}{
		{"--config=/x\x00--container-runtime-endpoint=unix:///run/crio/crio.sock\x00", c.Listen, Warning},
		{"--container-runtime-endpoint\x00" + c.Listen + "\x00--v=2\x00", "unix:///run/crio/crio.sock", OK},
		{"--config=/x\x00", "/run/streamshim/streamshim.sock", OK}, // the same, written otherwise
		{"--config=/x\x00", "unix:///run/crio/crio.sock", Warning},
	} {
		proc := filepath.Join(dir, "42")
		if err := os.MkdirAll(proc, 0o755); err != nil {
			t.Fatal(err)
		}
		write(t, filepath.Join(proc, "comm"), "kubelet\n")
		write(t, filepath.Join(proc, "cmdline"), "/usr/bin/kubelet\x00"+test.arguments)
		write(t, file, "containerRuntimeEndpoint: "+test.file+"\n")
		if r := kubelet(c, file, dir); r.Level != test.want || (r.Level != OK && r.Fix == "") {
			t.Errorf("%q, %s: %+v", test.arguments, test.file, r)
		}
	}
}

func TestPlacesAreChecked(t *testing.T) {
	dir := t.TempDir()
	write(t, filepath.Join(dir, "file"), "")
	c := config.Default()
	c.Admin = "unix://" + filepath.Join(dir, "file")
	c.MetricsAddress, c.StreamAddress = "192.0.2.1:1", "192.0.2.1:0" // nobody's: RFC 5737
	c.Audit.Destination, c.Audit.File = "file", filepath.Join(dir, "file", "audit.log")
	results := Run(t.Context(), c, filepath.Join(dir, "none"))
	for _, name := range []string{"admin socket", "metrics address", "stream address", "audit log"} {
		if r := find(t, results, name); r.Level != Failed || r.Fix == "" {
			t.Errorf("%s: %+v", name, r)
		}
	}
	for _, name := range []string{"recordings", "inotify"} {
		if r := find(t, results, name); r.Level != OK {
			t.Errorf("%s: %+v", name, r)
		}
	}
}

// What answers an ordinary client and not the calls as serve makes them is no upstream that works, and what is
// wrong with a socket is said in words.
func TestUpstreamThatIsNone(t *testing.T) {
	dir := t.TempDir()
	path := func(name string) string { return filepath.Join(dir, name) }
	listen := func(network, name string) {
		t.Helper()
		listener, err := net.ListenUnix(network, &net.UnixAddr{Name: path(name), Net: network})
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { listener.Close() })
		go func() {
			for {
				conn, err := listener.AcceptUnix()
				if err != nil {
					return
				}
				conn.Close()
			}
		}()
	}
	write(t, path("file"), "")
	listen("unixpacket", "packets")
	listen("unix", "closes")
	shared, err := criosocket.Listen(path("crio"))
	if err != nil {
		t.Fatal(err)
	}
	crio := grpc.NewServer()
	runtimeapi.RegisterRuntimeServiceServer(crio, &upstream{})
	strange := grpc.NewServer() // gRPC without CRI
	plain, err := net.Listen("unix", path("strange"))
	if err != nil {
		t.Fatal(err)
	}
	served := make(chan error, 2)
	go func() { served <- crio.Serve(shared.GRPC()) }()
	go func() { served <- strange.Serve(plain) }()
	t.Cleanup(func() {
		crio.Stop()
		strange.Stop()
		<-served
		<-served
		shared.Close()
	})
	for name, want := range map[string]struct {
		level Level
		says  string
	}{
		"crio":    {OK, "containerd v2"},
		"missing": {Failed, "there is no socket"},
		"file":    {Failed, "is no socket"},
		"packets": {Failed, "socket of another type"},
		"closes":  {Failed, "does not answer a CRI call"},
		"strange": {Failed, "not CRI v1"},
	} {
		c := config.Default()
		c.Upstream = "unix://" + path(name)
		r := find(t, Run(t.Context(), c, path("none")), "upstream")
		if r.Level != want.level || !strings.Contains(r.Detail, want.says) || (r.Level == Failed) != (r.Fix != "") {
			t.Errorf("%s: %+v, want %s with %q", name, r, want.level, want.says)
		}
		if strings.Contains(r.Detail, "rpc error") {
			t.Errorf("%s: gRPC's own words: %s", name, r.Detail)
		}
	}
}

// Whether somebody takes the spans, and with TLS if they are to be sent so.
func TestTraces(t *testing.T) {
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer listener.Close()
	go func() {
		for {
			conn, err := listener.Accept()
			if err != nil {
				return
			}
			conn.Write([]byte("HTTP/1.0 400 no TLS here\r\n\r\n")) //nolint:errcheck // as a server without TLS does
			conn.Close()
		}
	}()
	free, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	free.Close()
	for name, test := range map[string]struct {
		traces config.Traces
		level  Level
		says   string
	}{
		"off":      {config.Traces{}, OK, "switched off"},
		"there":    {config.Traces{Endpoint: listener.Addr().String(), Insecure: true}, OK, "accepts connections"},
		"no TLS":   {config.Traces{Endpoint: listener.Addr().String()}, Warning, "does not speak TLS"},
		"nobody":   {config.Traces{Endpoint: free.Addr().String(), Insecure: true}, Warning, "refused"},
		"no TLS 2": {config.Traces{Endpoint: free.Addr().String()}, Warning, "refused"},
	} {
		c := config.Default()
		c.Traces = test.traces
		if r := traces(t.Context(), c); r.Level != test.level || !strings.Contains(r.Detail, test.says) || (r.Level != OK) != (r.Fix != "") {
			t.Errorf("%s: %+v", name, r)
		}
	}
}
