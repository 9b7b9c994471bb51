package cri

import (
	"context"
	"encoding/json"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
	"time"

	containersapi "github.com/containerd/containerd/api/services/containers/v1"
	tasksapi "github.com/containerd/containerd/api/services/tasks/v1"
	runcapi "github.com/containerd/containerd/api/types/runc/options"
	taskapi "github.com/containerd/containerd/api/types/task"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/typeurl/v2"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/anypb"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// fakeContainerd is containerd's own API with one container.
type fakeContainerd struct {
	record *containersapi.Container
	pid    uint32
	err    error // of every call
}

func (f *fakeContainerd) check(ctx context.Context, id string) error {
	if namespace, _ := namespaces.Namespace(ctx); namespace != "k8s.io" || id != f.record.GetID() {
		return status.Errorf(codes.NotFound, "container %q in namespace %q", id, namespace)
	}
	return f.err
}

type fakeContainers struct {
	containersapi.UnimplementedContainersServer
	*fakeContainerd
}

func (f fakeContainers) Get(ctx context.Context, request *containersapi.GetContainerRequest) (*containersapi.GetContainerResponse, error) {
	if err := f.check(ctx, request.GetID()); err != nil {
		return nil, err
	}
	return &containersapi.GetContainerResponse{Container: f.record}, nil
}

type fakeTasks struct {
	tasksapi.UnimplementedTasksServer
	*fakeContainerd
}

func (f fakeTasks) Get(ctx context.Context, request *tasksapi.GetRequest) (*tasksapi.GetResponse, error) {
	if err := f.check(ctx, request.GetContainerID()); err != nil {
		return nil, err
	}
	return &tasksapi.GetResponse{Process: &taskapi.Process{ID: request.GetContainerID(), Pid: f.pid}}, nil
}

func anyOf(t testing.TB, value any) *anypb.Any {
	t.Helper()
	encoded, err := typeurl.MarshalAnyToProto(value)
	if err != nil {
		t.Fatal(err)
	}
	return encoded
}

func TestContainerdAPIBeforeVerboseStatus(t *testing.T) {
	bin := t.TempDir()
	runc, crun := executable(t, bin, "runc"), executable(t, bin, "crun")
	verbose := testdata(t, "containerd-container.json", "@BINARY@", runc, "@ROOT@", "/run/verbose")
	spec := anyOf(t, &specs.Spec{
		Process: &specs.Process{Cwd: "/api"},
		Linux:   &specs.Linux{UIDMappings: []specs.LinuxIDMapping{{HostID: 7, Size: 1}}},
	})
	record := func(kind string, options *anypb.Any) *containersapi.Container {
		return &containersapi.Container{ID: containerdID, Spec: spec, Sandbox: containerdSandboxID,
			Runtime: &containersapi.Container_Runtime{Name: kind, Options: options}}
	}
	crunOptions := anyOf(t, &runcapi.Options{BinaryName: crun, Root: "/run/api"})
	const runcShim = "io.containerd.runc.v2"
	type facts struct {
		kind, binary, root, cwd string
		pid                     int
	}
	fromVerbose := facts{runcShim, runc, "/run/verbose/k8s.io", "/", 6571}
	for _, test := range []struct {
		name, verbose string
		api           *fakeContainerd // nil when it is not served
		want          facts
	}{
		{"API", verbose, &fakeContainerd{record: record(runcShim, crunOptions), pid: 77},
			facts{runcShim, crun, "/run/api/k8s.io", "/api", 77}},
		{"API alone", `[]`, &fakeContainerd{record: record(runcShim, crunOptions), pid: 77},
			facts{runcShim, crun, "/run/api/k8s.io", "/api", 77}},
		{"no runc", verbose, &fakeContainerd{record: record("io.containerd.kata.v2", &anypb.Any{TypeUrl: "kata", Value: []byte("x")}), pid: 77},
			facts{kind: "io.containerd.kata.v2", pid: 77}},
		{"not served", verbose, nil, fromVerbose},
		{"closed to us", verbose, &fakeContainerd{record: record(runcShim, crunOptions), err: status.Error(codes.PermissionDenied, "no")}, fromVerbose},
		{"shim does not answer", verbose, &fakeContainerd{record: record(runcShim, crunOptions), err: status.Error(codes.Unavailable, "no")}, fromVerbose},
		{"another namespace", verbose, &fakeContainerd{record: &containersapi.Container{ID: "other"}}, fromVerbose},
		{"options of an unknown kind", verbose, &fakeContainerd{record: record(runcShim, &anypb.Any{TypeUrl: "strange"})}, fromVerbose},
		{"no spec", verbose, &fakeContainerd{record: &containersapi.Container{ID: containerdID, Runtime: &containersapi.Container_Runtime{Name: runcShim}}}, fromVerbose},
	} {
		t.Run(test.name, func(t *testing.T) {
			upstream := newFakeUpstream(t, func(s *grpc.Server) {
				runtimeapi.RegisterRuntimeServiceServer(s, &fakeRuntime{containerStatus: runningContainer(containerdID, test.verbose)})
				if test.api != nil {
					containersapi.RegisterContainersServer(s, fakeContainers{fakeContainerd: test.api})
					tasksapi.RegisterTasksServer(s, fakeTasks{fakeContainerd: test.api})
				}
			})
			server, _ := startServer(t, upstream.path, nil)
			got, err := server.resolver.running(testContext(t), containerdID[:12])
			if err != nil {
				t.Fatal(err)
			}
			found := facts{kind: got.RuntimeType, binary: got.Runtime, root: got.Root, pid: got.InitPid}
			if got.Process != nil {
				found.cwd = got.Process.Cwd
			}
			if found != test.want || got.SandboxID != containerdSandboxID {
				t.Errorf("got %+v in sandbox %q, want %+v", found, got.SandboxID, test.want)
			}
			if found.binary == crun && len(got.UIDMappings) != 1 {
				t.Errorf("UID mappings %v", got.UIDMappings)
			}
		})
	}
}

// With a real containerd both sources must agree, or one of them is read wrongly. The test of the same
// name in test/integration/cri brings the node up, because this package cannot import one.
func TestContainerdAPIAndVerboseStatusAgree(t *testing.T) {
	socket := os.Getenv("STREAMSHIM_CONTAINERD")
	if socket == "" {
		t.Skip("run by the test of this name in test/integration/cri, with a containerd of its own")
	}
	runcRoot, containers := os.Getenv("STREAMSHIM_RUNC_ROOT"), strings.Fields(os.Getenv("STREAMSHIM_CONTAINERS"))
	if len(containers) < 2 {
		t.Fatalf("STREAMSHIM_CONTAINERS is %q, want two at least", containers)
	}
	upstream, err := NewUpstream(socket, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { upstream.Close() })
	server, err := NewServer(Config{Upstream: upstream, Streams: &fakeStreams{}, Runner: &fakeRunner{}})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { server.Shutdown(context.Background()) })
	r := server.resolver
	// The runtime's binary need not be in this test's PATH.
	r.lookPath = func(binary string) (string, error) { return filepath.Join("/found", filepath.Base(binary)), nil }
	ctx := testContext(t)
	for _, pair := range containers {
		pod, id, _ := strings.Cut(pair, "/")
		t.Run(id, func(t *testing.T) {
			response, err := upstream.runtime.ContainerStatus(ctx, &runtimeapi.ContainerStatusRequest{ContainerId: id, Verbose: true})
			if err != nil {
				t.Fatal(err)
			}
			verbose, err := parseContainerInfo(response.GetInfo())
			if err != nil {
				t.Fatal(err)
			}
			if !verbose.stdinOnce() {
				t.Error("stdin_once is not seen in the verbose status")
			}
			var api containerInfo
			start := time.Now()
			if err := addContainerdFacts(ctx, r.containerd, id, &api); err != nil {
				t.Fatal(err)
			}
			t.Logf("containerd's API took %v", time.Since(start))
			// containerd 1.7 does not name the sandbox there.
			if api.Pid != verbose.Pid || api.Pid == 0 || api.RuntimeType != verbose.RuntimeType || api.SandboxID != pod && api.SandboxID != "" {
				t.Errorf("the API says pid %d, type %q, sandbox %q; the verbose status %d, %q, %q",
					api.Pid, api.RuntimeType, api.SandboxID, verbose.Pid, verbose.RuntimeType, verbose.SandboxID)
			}
			if a, b := encoded(t, api.RuntimeSpec), encoded(t, verbose.RuntimeSpec); a != b {
				t.Errorf("the API says %s\nthe verbose status %s", a, b)
			}
			fromAPI, err := r.containerdRuntime(api)
			if err != nil {
				t.Fatal(err)
			}
			fromVerbose, err := r.containerdRuntime(verbose)
			if err != nil {
				t.Fatal(err)
			}
			if want := filepath.Clean(runcRoot); fromAPI.root != want || !reflect.DeepEqual(fromAPI, fromVerbose) {
				t.Errorf("the API leads to %+v, the verbose status to %+v, want root %q", fromAPI, fromVerbose, want)
			}
			start = time.Now()
			container, err := r.running(ctx, id)
			if err != nil {
				t.Fatal(err)
			}
			t.Logf("resolving took %v", time.Since(start))
			if container.InitStartTime == 0 || container.Runtime == "" || !container.StdinOnce || container.SandboxID != pod {
				t.Errorf("resolved to %+v", container)
			}
		})
	}
}

func encoded(t testing.TB, value any) string {
	t.Helper()
	text, err := json.Marshal(value)
	if err != nil {
		t.Fatal(err)
	}
	return string(text)
}
