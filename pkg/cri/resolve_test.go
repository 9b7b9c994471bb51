package cri

import (
	"context"
	"errors"
	"log/slog"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
	"testing"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/streamshim/streamshim/pkg/workload"
)

const (
	containerdID        = "bf9fb06ecc1d909eb6f4db4c912329f3130931026deb622ae35ce2ef78c97138"
	containerdSandboxID = "9440b5bd25642d43cf8adef8d5c08c13fd20d1152d8b8fb97f2e2cba20896c33"
	crioID              = "7d1d6f2f0c9b4f0e8d7c6b5a49382716050403020100ffeeddccbbaa99887766"
	crioSandboxID       = "3c1f7b0c2f6f4f6c9a4d1f0e8f5a2f7b9d8c7e6a5b4c3d2e1f0a9b8c7d6e5f40"
)

var podLabels = map[string]string{
	"io.kubernetes.container.name": "app",
	"io.kubernetes.pod.name":       "web",
	"io.kubernetes.pod.namespace":  "shop",
	"io.kubernetes.pod.uid":        "u-1",
}

// executable makes an empty program and returns its path.
func executable(t testing.TB, dir, name string) string {
	t.Helper()
	path := filepath.Join(dir, name)
	if err := os.WriteFile(path, nil, 0o755); err != nil {
		t.Fatal(err)
	}
	return path
}

// startResolver serves the fake runtime and returns a resolver that asks it.
func startResolver(t testing.TB, fake *fakeRuntime) *resolver {
	t.Helper()
	upstream := newFakeUpstream(t, func(s *grpc.Server) { runtimeapi.RegisterRuntimeServiceServer(s, fake) })
	server, _ := startServer(t, upstream.path, nil)
	return server.resolver
}

// runningContainer answers ContainerStatus for one container, also by a shortened ID.
func runningContainer(id, info string) func(*runtimeapi.ContainerStatusRequest) (*runtimeapi.ContainerStatusResponse, error) {
	return func(request *runtimeapi.ContainerStatusRequest) (*runtimeapi.ContainerStatusResponse, error) {
		if !strings.HasPrefix(id, request.GetContainerId()) {
			return nil, errors.New("wrong container")
		}
		response := &runtimeapi.ContainerStatusResponse{Status: &runtimeapi.ContainerStatus{
			Id:     id,
			State:  runtimeapi.ContainerState_CONTAINER_RUNNING,
			Labels: podLabels,
		}}
		if request.GetVerbose() {
			response.Info = map[string]string{"info": info}
		}
		return response, nil
	}
}

// readyPod answers PodSandboxStatus for any pod.
func readyPod(*runtimeapi.PodSandboxStatusRequest) (*runtimeapi.PodSandboxStatusResponse, error) {
	return &runtimeapi.PodSandboxStatusResponse{Status: &runtimeapi.PodSandboxStatus{Labels: podLabels}}, nil
}

func TestResolveContainerdContainer(t *testing.T) {
	runc := executable(t, t.TempDir(), "runc")
	fake := &fakeRuntime{containerStatus: runningContainer(containerdID,
		testdata(t, "containerd-container.json", "@BINARY@", runc, "@ROOT@", "/run/other/runc"))}
	got, err := startResolver(t, fake).running(testContext(t), containerdID[:8])
	if err != nil {
		t.Fatal(err)
	}
	target := workload.Target{ContainerID: containerdID, SandboxID: containerdSandboxID, ContainerName: "app", PodName: "web", PodNamespace: "shop", PodUID: "u-1"}
	if got.Target != target {
		t.Errorf("target %+v", got.Target)
	}
	if got.RuntimeType != "io.containerd.runc.v2" || got.Runtime != runc || got.Root != "/run/other/runc/k8s.io" || got.InitPid == 0 {
		t.Errorf("runtime %+v", got)
	}
	if got.Process == nil || got.Process.Cwd != "/" || len(got.Process.Capabilities.Bounding) == 0 || !slices.Contains(got.Process.Env, "COLOUR=blue") {
		t.Errorf("process %+v", got.Process)
	}
}

func TestContainerdRuntime(t *testing.T) {
	found := func(binary string) (string, error) { return "/found/" + filepath.Base(binary), nil }
	missing := func(binary string) (string, error) { return "", exec.ErrNotFound }
	for _, test := range []struct {
		name          string
		kind, options string
		lookPath      func(string) (string, error)
		want          ociRuntime
		err           bool
	}{
		{"defaults", "io.containerd.runc.v2", `{}`, found, ociRuntime{"io.containerd.runc.v2", "/found/runc", "/run/containerd/runc/k8s.io"}, false},
		{"no options", "io.containerd.runc.v2", ``, found, ociRuntime{"io.containerd.runc.v2", "/found/runc", "/run/containerd/runc/k8s.io"}, false},
		{"null options", "io.containerd.runc.v1", `null`, found, ociRuntime{"io.containerd.runc.v1", "/found/runc", "/run/containerd/runc/k8s.io"}, false},
		{"crun", "io.containerd.runc.v2", `{"binary_name":"/usr/bin/crun","root":"/run/crun","systemd_cgroup":true}`, found, ociRuntime{"io.containerd.runc.v2", "/found/crun", "/run/crun/k8s.io"}, false},
		{"gVisor behind runc's shim", "io.containerd.runc.v2", `{"binary_name":"/usr/bin/runsc"}`, found, ociRuntime{kind: "io.containerd.runc.v2"}, false},
		{"gVisor", "io.containerd.runsc.v1", `{"TypeUrl":"io.containerd.runsc.v1.options"}`, found, ociRuntime{kind: "io.containerd.runsc.v1"}, false},
		{"Kata", "io.containerd.kata.v2", `{"ConfigPath":"/x"}`, found, ociRuntime{kind: "io.containerd.kata.v2"}, false},
		{"missing binary", "io.containerd.runc.v2", `{}`, missing, ociRuntime{kind: "io.containerd.runc.v2"}, true},
		{"strange options", "io.containerd.runc.v2", `"x"`, found, ociRuntime{kind: "io.containerd.runc.v2"}, true},
	} {
		t.Run(test.name, func(t *testing.T) {
			r := &resolver{lookPath: test.lookPath}
			got, err := r.containerdRuntime(containerInfo{RuntimeType: test.kind, RuntimeOptions: []byte(test.options)})
			if got != test.want || (err != nil) != test.err {
				t.Errorf("got %+v, %v, want %+v", got, err, test.want)
			}
		})
	}
}

func TestResolveCrioContainer(t *testing.T) {
	bin, run := t.TempDir(), t.TempDir()
	crun, runc, special := executable(t, bin, "crun"), executable(t, bin, "runc"), executable(t, bin, "special")
	state := func(root string) {
		if err := os.MkdirAll(filepath.Join(run, root, crioID), 0o700); err != nil {
			t.Fatal(err)
		}
	}
	config := testdata(t, "crio-status-config.json", "@BIN@", bin, "@RUN@", run)
	sandbox := func(handler string) string { return testdata(t, "crio-sandbox.json", "@HANDLER@", handler) }
	noHandler := `{"runtimeSpec":{"ociVersion":"1.2.1"}}`
	annotated := testdata(t, "crio-container.json", `"io.container.manager": "cri-o",`, `"platform-runtime-path.crio.io": "`+special+`",`)
	for _, test := range []struct {
		name                       string
		state                      string // the root that has state for the container
		sandbox, config, container string
		kind, runtime, root        string
	}{
		{name: "default handler", state: "crun", sandbox: sandbox(""), config: config, kind: "oci", runtime: crun, root: "crun"},
		{name: "named handler", state: "runc", sandbox: sandbox("runc"), config: config, kind: "oci", runtime: runc, root: "runc"},
		{name: "conmon-rs", state: "crun-pods", sandbox: sandbox("conmonrs"), config: config, kind: "pod", runtime: crun, root: "crun-pods"},
		{name: "binary for the platform", state: "crun", sandbox: sandbox(""), config: config, container: annotated, kind: "oci", runtime: special, root: "crun"},
		{name: "Kata", state: "crun", sandbox: sandbox("kata"), config: config, kind: "vm"},
		{name: "gVisor", state: "crun", sandbox: sandbox("gvisor"), config: config, kind: "oci"},
		{name: "handler that has no state for the container", state: "runc", sandbox: sandbox("crun"), config: config, kind: "oci"},
		{name: "handler not told, found by its state", state: "runc", sandbox: noHandler, config: config, kind: "oci", runtime: runc, root: "runc"},
		{name: "handler not told, no state", state: "elsewhere", sandbox: noHandler, config: config},
		{name: "handler not in the configuration", state: "crun", sandbox: sandbox("other"), config: config},
		// No HTTP on the fake socket: the configuration cannot be had.
		{name: "older CRI-O without HTTP", state: "crun", sandbox: sandbox(""), config: `{"sandboxImage":"registry.k8s.io/pause:3.10"}`},
	} {
		t.Run(test.name, func(t *testing.T) {
			entries, _ := filepath.Glob(filepath.Join(run, "*"))
			for _, entry := range entries {
				os.RemoveAll(entry)
			}
			state(test.state)
			if test.container == "" {
				test.container = testdata(t, "crio-container.json")
			}
			fake := &fakeRuntime{
				name:            "cri-o",
				statusConfig:    test.config,
				containerStatus: runningContainer(crioID, test.container),
				podSandboxStatus: func(request *runtimeapi.PodSandboxStatusRequest) (*runtimeapi.PodSandboxStatusResponse, error) {
					if request.GetPodSandboxId() != crioSandboxID || !request.GetVerbose() {
						return nil, errors.New("wrong request")
					}
					return &runtimeapi.PodSandboxStatusResponse{Status: &runtimeapi.PodSandboxStatus{}, Info: map[string]string{"info": test.sandbox}}, nil
				},
			}
			got, err := startResolver(t, fake).running(testContext(t), crioID)
			if err != nil {
				t.Fatal(err)
			}
			want := ""
			if test.root != "" {
				want = filepath.Join(run, test.root)
			}
			if got.RuntimeType != test.kind || got.Runtime != test.runtime || got.Root != want {
				t.Errorf("got type %q, runtime %q, root %q, want %q, %q, %q", got.RuntimeType, got.Runtime, got.Root, test.kind, test.runtime, want)
			}
			if got.ContainerID != crioID || got.SandboxID != crioSandboxID || got.PodName != "web" {
				t.Errorf("target %+v", got.Target)
			}
			if got.Runtime == "" {
				return
			}
			mapping := []specs.LinuxIDMapping{{ContainerID: 0, HostID: 100000, Size: 65536}}
			if got.Process.User.UID != 1000 || got.Process.Cwd != "/srv" || !reflect.DeepEqual(got.UIDMappings, mapping) || !reflect.DeepEqual(got.GIDMappings, mapping) {
				t.Errorf("process %+v, mappings %v %v", got.Process, got.UIDMappings, got.GIDMappings)
			}
		})
	}
}

// Before cri-o#9122 the configuration comes over HTTP, on the same socket as gRPC.
func TestCrioConfigOverHTTP(t *testing.T) {
	bin, run := t.TempDir(), t.TempDir()
	runc := executable(t, bin, "runc")
	if err := os.MkdirAll(filepath.Join(run, "runc", crioID), 0o700); err != nil {
		t.Fatal(err)
	}
	upstream := newFakeUpstream(t, func(*grpc.Server) {})
	upstream.kill()
	upstream.web = http.HandlerFunc(func(w http.ResponseWriter, request *http.Request) {
		if request.URL.Path != "/config" {
			http.NotFound(w, request)
			return
		}
		w.Header().Set("Content-Type", "application/toml")
		w.Write([]byte(testdata(t, "crio.conf", "@BIN@", bin, "@RUN@", run)))
	})
	upstream.start(t)

	r := &resolver{upstream: &Upstream{path: upstream.path}, lookPath: lookPath}
	text, err := r.crioHTTPConfig(testContext(t))
	if err != nil {
		t.Fatal(err)
	}
	runtimes, err := parseCrioTOMLConfig(text)
	if err != nil {
		t.Fatal(err)
	}
	if runtimes.defaultHandler != "runc" || runtimes.handlers["kata"].RuntimeType != "vm" {
		t.Errorf("got %+v", runtimes)
	}
	got, err := r.crioOCIRuntime(crioID, containerInfo{}, "runc", runtimes.handlers["runc"])
	if want := (ociRuntime{"oci", runc, filepath.Join(run, "runc")}); err != nil || got != want {
		t.Errorf("got %+v, %v, want %+v", got, err, want)
	}
}

func TestResolveContainerThatDoesNotRun(t *testing.T) {
	for state, name := range runtimeapi.ContainerState_name {
		if state == int32(runtimeapi.ContainerState_CONTAINER_RUNNING) {
			continue
		}
		fake := &fakeRuntime{containerStatus: func(*runtimeapi.ContainerStatusRequest) (*runtimeapi.ContainerStatusResponse, error) {
			return &runtimeapi.ContainerStatusResponse{Status: &runtimeapi.ContainerStatus{Id: "c", State: runtimeapi.ContainerState(state)}}, nil
		}}
		_, err := startResolver(t, fake).running(testContext(t), "c")
		wantCode(t, err, codes.FailedPrecondition, name)
	}
	_, err := startResolver(t, &fakeRuntime{}).running(testContext(t), "nosuch")
	wantCode(t, err, codes.NotFound, `find container "nosuch": not found`)
	ambiguous := &fakeRuntime{containerStatus: func(*runtimeapi.ContainerStatusRequest) (*runtimeapi.ContainerStatusResponse, error) {
		return nil, status.Error(codes.Unknown, "more than one container begins with this")
	}}
	_, err = startResolver(t, ambiguous).running(testContext(t), "0")
	wantCode(t, err, codes.Unknown, "more than one container begins with this")
}

// counter counts the records of a level.
type counter struct {
	slog.Handler
	level slog.Level
	n     *atomic.Int64
}

func (c counter) Enabled(context.Context, slog.Level) bool { return true }
func (c counter) Handle(_ context.Context, record slog.Record) error {
	if record.Level == c.level {
		c.n.Add(1)
	}
	return nil
}

// What is missing is written once and not once a probe, and is looked for again at every call.
func TestResolveMissingBinary(t *testing.T) {
	dir := t.TempDir()
	fake := &fakeRuntime{containerStatus: runningContainer(containerdID,
		testdata(t, "containerd-container.json", "@BINARY@", filepath.Join(dir, "runc"), "@ROOT@", "/run/runc"))}
	r := startResolver(t, fake)
	var warnings atomic.Int64
	r.log = slog.New(counter{level: slog.LevelWarn, n: &warnings})
	for range 3 {
		got, err := r.running(testContext(t), containerdID)
		if err != nil || got.Runtime != "" {
			t.Fatalf("got %+v, %v", got, err)
		}
	}
	if warnings.Load() != 1 {
		t.Errorf("%d warnings", warnings.Load())
	}
	executable(t, dir, "runc")
	got, err := r.running(testContext(t), containerdID)
	if err != nil || got.Runtime == "" {
		t.Errorf("after the binary's return: %+v, %v", got, err)
	}
}

// startInit starts a process to stand for a container's init.
func startInit(t testing.TB) *exec.Cmd {
	t.Helper()
	command := exec.Command("sleep", "3600")
	if err := command.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		command.Process.Kill()
		command.Wait()
	})
	return command
}

// A running init is a running container: neither a probe nor an exec asks the upstream about it
// again, and its end is seen at once, before anybody has reaped it.
func TestFactsAreKeptForTheContainersLife(t *testing.T) {
	command := startInit(t)
	// This test's processes are in no container's cgroup; ":/" is in every line of /proc/pid/cgroup.
	const id = ":/"
	info := `{"sandboxID":"p","pid":` + strconv.Itoa(command.Process.Pid) + `,"runtimeType":"io.containerd.runc.v2",
		"runtimeOptions":{"binary_name":"` + executable(t, t.TempDir(), "runc") + `"},"runtimeSpec":{"process":{"cwd":"/"}}}`
	fake := &fakeRuntime{containerStatus: runningContainer(id, info), podSandboxStatus: readyPod}
	upstream := newFakeUpstream(t, func(s *grpc.Server) { runtimeapi.RegisterRuntimeServiceServer(s, fake) })
	server, conn := startServer(t, upstream.path, nil)
	client := runtimeapi.NewRuntimeServiceClient(conn)
	ctx := testContext(t)
	probe := func() error {
		_, err := client.ExecSync(ctx, &runtimeapi.ExecSyncRequest{ContainerId: id, Cmd: []string{"true"}})
		return err
	}
	for range 3 {
		if err := probe(); err != nil {
			t.Fatal(err)
		}
		if _, err := client.Exec(ctx, &runtimeapi.ExecRequest{ContainerId: id, Cmd: []string{"sh"}, Stdout: true}); err != nil {
			t.Fatal(err)
		}
	}
	if n := fake.called("ContainerStatus"); n != 1 {
		t.Errorf("asked %d times for the status", n)
	}

	upstream.kill()
	if err := probe(); err != nil {
		t.Errorf("while the upstream is away: %v", err)
	}
	if err := command.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	waitZombie(t, command.Process.Pid)
	wantCode(t, probe(), codes.Unavailable, upstream.path)
	upstream.start(t)
	fake.containerStatus = nil
	wantCode(t, probe(), codes.NotFound, "not found")
	if n := len(server.resolver.containers.byID); n != 0 {
		t.Errorf("%d containers are still kept", n)
	}
}

// waitZombie waits for a process to have ended, not yet reaped.
func waitZombie(t testing.TB, pid int) {
	t.Helper()
	ctx := testContext(t)
	for ctx.Err() == nil {
		if _, err := processStartTime(pid); err != nil {
			return
		}
	}
	t.Fatal("the process does not end")
}

func TestInitStartTime(t *testing.T) {
	if got, err := initStartTime(os.Getpid(), ":/"); err != nil || got == 0 {
		t.Errorf("got %d, %v", got, err)
	}
	if _, err := initStartTime(os.Getpid(), containerdID); err == nil {
		t.Error("took a process that is in no cgroup of the container")
	}
	for _, pid := range []int{0, -1, 1 << 30} {
		if _, err := initStartTime(pid, ":/"); err == nil {
			t.Errorf("took pid %d", pid)
		}
	}
}

func TestParseProcessStartTime(t *testing.T) {
	rest := " 1 1 1 0 -1 4194560 1 0 0 0 0 0 0 0 20 0 1 0 424242 1 1 18446744073709551615"
	for stat, want := range map[string]uint64{
		"7 (sleep) S" + rest:             424242,
		"7 (a) Z 1 (b c)) R" + rest:      424242,
		"7 (sleep) Z" + rest:             0,
		"7 (sleep) S 1 1":                0,
		"":                               0,
		"7 (sleep) S" + rest[:40] + " x": 0,
	} {
		got, err := parseProcessStartTime(stat)
		if got != want || (err == nil) != (want != 0) {
			t.Errorf("%q: %d, %v, want %d", stat, got, err, want)
		}
	}
}

func TestCacheIsBounded(t *testing.T) {
	command := startInit(t)
	started, err := processStartTime(command.Process.Pid)
	if err != nil {
		t.Fatal(err)
	}
	container := func(i int, pid int) workload.Container {
		return workload.Container{Target: workload.Target{ContainerID: strconv.Itoa(i)}, InitPid: pid, InitStartTime: started}
	}
	c := newContainerCache()
	for i := range 10 * cacheSweepSize {
		c.put(container(i, 1<<30)) // has ended
	}
	if n := len(c.byID); n > cacheSweepSize+1 {
		t.Errorf("%d ended containers are kept", n)
	}
	for i := range 2*maxCachedContainers + 10 {
		c.put(container(i, command.Process.Pid))
		if n := len(c.byID); n > maxCachedContainers {
			t.Fatalf("%d containers are kept", n)
		}
	}
}

func TestResolveSandbox(t *testing.T) {
	const netns = "/run/netns/one"
	containerd := testdata(t, "containerd-sandbox.json")
	for _, test := range []struct {
		name      string
		info      map[string]string
		network   runtimeapi.NamespaceMode
		state     runtimeapi.PodSandboxState
		container string
		want      string
		code      codes.Code
	}{
		{name: "containerd", info: map[string]string{"info": containerd}, want: "/run/containerd/io.containerd.grpc.v1.cri/netns/cni-00047877-4b09-5e25-a6e9-5856690a0a1f"},
		{name: "CRI-O", info: map[string]string{"info": testdata(t, "crio-sandbox.json")}, want: "/var/run/netns/6d2b9d2e-5b7a-4d9e-8c54-3f0c7f1b6a55"},
		{name: "host network", info: map[string]string{"info": `{"pid":7}`}, network: runtimeapi.NamespaceMode_NODE},
		{name: "host network whatever else is said", info: map[string]string{"info": containerd}, network: runtimeapi.NamespaceMode_NODE},
		{name: "by a container", container: `{"runtimeSpec":{"linux":{"namespaces":[{"type":"mount"},{"type":"network","path":"` + netns + `"}]}}}`, want: netns},
		{name: "not to be found", info: map[string]string{"info": `{}`}, code: codes.FailedPrecondition},
		{name: "malformed", info: map[string]string{"info": `[`}, code: codes.FailedPrecondition},
		{name: "not ready", info: map[string]string{"info": containerd}, state: runtimeapi.PodSandboxState_SANDBOX_NOTREADY, code: codes.FailedPrecondition},
	} {
		t.Run(test.name, func(t *testing.T) {
			fake := &fakeRuntime{
				podSandboxStatus: func(*runtimeapi.PodSandboxStatusRequest) (*runtimeapi.PodSandboxStatusResponse, error) {
					return &runtimeapi.PodSandboxStatusResponse{Info: test.info, Status: &runtimeapi.PodSandboxStatus{
						Id: containerdSandboxID, State: test.state, Labels: podLabels,
						Linux: &runtimeapi.LinuxPodSandboxStatus{Namespaces: &runtimeapi.Namespace{Options: &runtimeapi.NamespaceOption{Network: test.network}}},
					}}, nil
				},
				containerStatus: runningContainer("member", test.container),
			}
			if test.container != "" {
				fake.listContainers = func(*runtimeapi.ListContainersRequest) (*runtimeapi.ListContainersResponse, error) {
					return &runtimeapi.ListContainersResponse{Containers: []*runtimeapi.Container{{Id: "member"}}}, nil
				}
			}
			got, err := startResolver(t, fake).readySandbox(testContext(t), containerdSandboxID[:6])
			if test.code != codes.OK {
				wantCode(t, err, test.code, "pod sandbox")
				return
			}
			target := workload.Target{SandboxID: containerdSandboxID, PodName: "web", PodNamespace: "shop", PodUID: "u-1"}
			if err != nil || got.NetworkNamespace != test.want || got.Target != target {
				t.Errorf("got %+v, %v, want %q", got, err, test.want)
			}
		})
	}
	_, err := startResolver(t, &fakeRuntime{}).readySandbox(testContext(t), "nosuch")
	wantCode(t, err, codes.NotFound, "find sandbox")
}

func TestEndReason(t *testing.T) {
	exited := func(code int32, reason string) *runtimeapi.ContainerStatus {
		return &runtimeapi.ContainerStatus{State: runtimeapi.ContainerState_CONTAINER_EXITED, ExitCode: code, Reason: reason}
	}
	running := &runtimeapi.ContainerStatus{State: runtimeapi.ContainerState_CONTAINER_RUNNING}
	ready := &runtimeapi.PodSandboxStatus{State: runtimeapi.PodSandboxState_SANDBOX_READY}
	stopped := &runtimeapi.PodSandboxStatus{State: runtimeapi.PodSandboxState_SANDBOX_NOTREADY}
	for _, test := range []struct {
		name    string
		answers []*runtimeapi.ContainerStatus // one after the other, then NotFound
		sandbox *runtimeapi.PodSandboxStatus  // nil for NotFound
		want    string
	}{
		{"exit code", []*runtimeapi.ContainerStatus{exited(3, "Error")}, ready, "container exited with code 3"},
		{"success", []*runtimeapi.ContainerStatus{exited(0, "Completed")}, stopped, "container exited with code 0"},
		{"out of memory", []*runtimeapi.ContainerStatus{exited(137, "OOMKilled")}, ready, "container was OOM-killed"},
		{"killed", []*runtimeapi.ContainerStatus{exited(137, "Error")}, ready, "container exited with code 137"},
		{"pod stopped", []*runtimeapi.ContainerStatus{exited(143, "Error")}, stopped, "pod sandbox was stopped"},
		{"pod removed", []*runtimeapi.ContainerStatus{exited(137, "Error")}, nil, "pod sandbox was stopped"},
		{"removed", nil, ready, "container was removed"},
		{"the upstream learns later", []*runtimeapi.ContainerStatus{running, running, exited(1, "Error")}, ready, "container exited with code 1"},
	} {
		t.Run(test.name, func(t *testing.T) {
			var answers []*runtimeapi.ContainerStatus
			fake := &fakeRuntime{containerStatus: func(*runtimeapi.ContainerStatusRequest) (*runtimeapi.ContainerStatusResponse, error) {
				if len(answers) == 0 {
					return nil, statusNotFound
				}
				answer := answers[0]
				answers = answers[1:]
				return &runtimeapi.ContainerStatusResponse{Status: answer}, nil
			}}
			if test.sandbox != nil {
				fake.podSandboxStatus = func(*runtimeapi.PodSandboxStatusRequest) (*runtimeapi.PodSandboxStatusResponse, error) {
					return &runtimeapi.PodSandboxStatusResponse{Status: test.sandbox}, nil
				}
			}
			upstream, got := startResolver(t, fake).upstream, containerGone
			for attempts := 0; got == containerGone && attempts < 10; attempts++ { // a busy machine may answer some of them too late
				answers = test.answers
				got = upstream.EndReason(testContext(t), workload.Target{ContainerID: "c", SandboxID: "p"})
			}
			if got != test.want {
				t.Errorf("got %q, want %q", got, test.want)
			}
		})
	}
	t.Run("upstream away", func(t *testing.T) {
		upstream := newFakeUpstream(t, func(*grpc.Server) {})
		server, _ := startServer(t, upstream.path, nil)
		upstream.kill()
		ctx, cancel := context.WithTimeout(context.Background(), 3*endReasonRetry)
		defer cancel()
		if got := server.upstream.EndReason(ctx, workload.Target{ContainerID: "c"}); got != "container is no longer running" {
			t.Errorf("got %q", got)
		}
	})
}

// Labels that could not be had once are asked for again, whatever the error was: a rule that denies by label
// would otherwise deny everything in the container for its whole life.
func TestPodLabelsAreAskedForAgain(t *testing.T) {
	runc := executable(t, t.TempDir(), "runc")
	for _, test := range []struct {
		code  codes.Code
		fails bool // the call itself, which the caller repeats
		asked bool // again, at the next call
	}{
		{codes.Unknown, false, true},
		{codes.Internal, false, true},
		{codes.ResourceExhausted, false, true},
		{codes.NotFound, false, true},
		{codes.Unavailable, true, true},
		{codes.Unimplemented, false, false},
	} {
		t.Run(test.code.String(), func(t *testing.T) {
			fake := &fakeRuntime{
				containerStatus: runningContainer(containerdID,
					testdata(t, "containerd-container.json", "@BINARY@", runc, "@ROOT@", "/run/other/runc")),
				podSandboxStatus: func(*runtimeapi.PodSandboxStatusRequest) (*runtimeapi.PodSandboxStatusResponse, error) {
					return nil, status.Error(test.code, "not now")
				},
			}
			r := startResolver(t, fake)
			if got, err := r.running(testContext(t), containerdID); (err != nil) != test.fails || got.PodLabels != nil {
				t.Errorf("labels %v, %v", got.PodLabels, err)
			}
			// What is kept is taken from then on, for as long as the container's main process lives.
			if _, kept := r.containers.peek(containerdID); kept == test.asked {
				t.Errorf("kept for the container's life: %v", kept)
			}
		})
	}
}
