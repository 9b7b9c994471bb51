package cri

import (
	"context"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/streamshim/streamshim/internal/testutil/criosocket"
	"github.com/streamshim/streamshim/pkg/endpoint"
	"github.com/streamshim/streamshim/pkg/streaming/portforward"
	"github.com/streamshim/streamshim/pkg/streaming/remotecommand"
	"github.com/streamshim/streamshim/pkg/workload"
)

// testTimeout bounds every wait of a test; it is long because the machine may be busy.
const testTimeout = 2 * time.Minute

func testContext(t testing.TB) context.Context {
	ctx, cancel := context.WithTimeout(context.Background(), testTimeout)
	t.Cleanup(cancel)
	return ctx
}

// fakeRuntime is an upstream made of functions. A method without one is Unimplemented.
type fakeRuntime struct {
	runtimeapi.UnimplementedRuntimeServiceServer
	runtimeapi.UnimplementedImageServiceServer

	mu               sync.Mutex
	calls            map[string]int
	name             string
	containerStatus  func(*runtimeapi.ContainerStatusRequest) (*runtimeapi.ContainerStatusResponse, error)
	podSandboxStatus func(*runtimeapi.PodSandboxStatusRequest) (*runtimeapi.PodSandboxStatusResponse, error)
	listContainers   func(*runtimeapi.ListContainersRequest) (*runtimeapi.ListContainersResponse, error)
	statusConfig     string
	execSync         func(context.Context, *runtimeapi.ExecSyncRequest) (*runtimeapi.ExecSyncResponse, error)
	exec             func(*runtimeapi.ExecRequest) (*runtimeapi.ExecResponse, error)
	attach           func(*runtimeapi.AttachRequest) (*runtimeapi.AttachResponse, error)
}

func (f *fakeRuntime) count(method string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.calls == nil {
		f.calls = make(map[string]int)
	}
	f.calls[method]++
}

func (f *fakeRuntime) called(method string) int {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.calls[method]
}

func (f *fakeRuntime) Version(context.Context, *runtimeapi.VersionRequest) (*runtimeapi.VersionResponse, error) {
	f.count("Version")
	if f.name == crioRuntimeName {
		return &runtimeapi.VersionResponse{Version: "0.1.0", RuntimeName: f.name, RuntimeVersion: "1.37.0", RuntimeApiVersion: "v1"}, nil
	}
	return &runtimeapi.VersionResponse{Version: "0.1.0", RuntimeName: "containerd", RuntimeVersion: "v2.4.2", RuntimeApiVersion: "v1"}, nil
}

func (f *fakeRuntime) Status(context.Context, *runtimeapi.StatusRequest) (*runtimeapi.StatusResponse, error) {
	f.count("Status")
	return &runtimeapi.StatusResponse{Info: map[string]string{"config": f.statusConfig}}, nil
}

func (f *fakeRuntime) ContainerStatus(_ context.Context, request *runtimeapi.ContainerStatusRequest) (*runtimeapi.ContainerStatusResponse, error) {
	f.count("ContainerStatus")
	if f.containerStatus == nil {
		return nil, status.Errorf(codes.NotFound, "an error occurred when try to find container %q: not found", request.GetContainerId())
	}
	return f.containerStatus(request)
}

func (f *fakeRuntime) PodSandboxStatus(_ context.Context, request *runtimeapi.PodSandboxStatusRequest) (*runtimeapi.PodSandboxStatusResponse, error) {
	f.count("PodSandboxStatus")
	if f.podSandboxStatus == nil {
		return nil, status.Errorf(codes.NotFound, "an error occurred when try to find sandbox: not found")
	}
	return f.podSandboxStatus(request)
}

func (f *fakeRuntime) ListContainers(_ context.Context, request *runtimeapi.ListContainersRequest) (*runtimeapi.ListContainersResponse, error) {
	f.count("ListContainers")
	if f.listContainers == nil {
		return &runtimeapi.ListContainersResponse{}, nil
	}
	return f.listContainers(request)
}

func (f *fakeRuntime) ExecSync(ctx context.Context, request *runtimeapi.ExecSyncRequest) (*runtimeapi.ExecSyncResponse, error) {
	f.count("ExecSync")
	return f.execSync(ctx, request)
}

func (f *fakeRuntime) Exec(_ context.Context, request *runtimeapi.ExecRequest) (*runtimeapi.ExecResponse, error) {
	f.count("Exec")
	return f.exec(request)
}

func (f *fakeRuntime) Attach(_ context.Context, request *runtimeapi.AttachRequest) (*runtimeapi.AttachResponse, error) {
	f.count("Attach")
	return f.attach(request)
}

// fakeUpstream is a gRPC server on a Unix socket that can be killed and started again. It is as strict as CRI-O
// about what it takes for gRPC, see criosocket.
type fakeUpstream struct {
	path     string
	register func(*grpc.Server)
	options  []grpc.ServerOption
	web      http.Handler                    // what it answers to HTTP, nothing when nil
	listen   func(net.Listener) net.Listener // what the gRPC server accepts from, may be nil

	socket *criosocket.Socket
	server *grpc.Server
	http   *http.Server
	done   chan error
}

func newFakeUpstream(t testing.TB, register func(*grpc.Server), options ...grpc.ServerOption) *fakeUpstream {
	t.Helper()
	f := &fakeUpstream{
		path:     filepath.Join(socketDir(t), "up.sock"),
		register: register,
		options:  append([]grpc.ServerOption{grpc.MaxRecvMsgSize(DefaultMaxMessageSize), grpc.MaxSendMsgSize(DefaultMaxMessageSize)}, options...),
	}
	f.start(t)
	t.Cleanup(f.kill)
	return f
}

func (f *fakeUpstream) start(t testing.TB) {
	t.Helper()
	socket, err := criosocket.Listen(f.path)
	if err != nil {
		t.Fatal(err)
	}
	server := grpc.NewServer(f.options...)
	f.register(server)
	web := &http.Server{Handler: f.web, ReadHeaderTimeout: testTimeout}
	if f.web == nil {
		web.Handler = http.NotFoundHandler()
	}
	listener := socket.GRPC()
	if f.listen != nil {
		listener = f.listen(listener)
	}
	done := make(chan error, 2)
	go func() { done <- server.Serve(listener) }()
	go func() { done <- web.Serve(socket.HTTP()) }()
	f.socket, f.server, f.http, f.done = socket, server, web, done
}

// kill ends the server and all its connections, and removes the socket.
func (f *fakeUpstream) kill() {
	if f.server == nil {
		return
	}
	f.server.Stop()
	f.http.Close()
	<-f.done
	<-f.done
	f.socket.Close()
	f.server = nil
}

// socketDir is a directory with a path short enough for a socket in it.
func socketDir(t testing.TB) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "cri")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	return dir
}

// startServer serves the CRI in front of an upstream socket and returns the server and a connection
// to it.
func startServer(t testing.TB, upstreamPath string, change func(*Config)) (*Server, *grpc.ClientConn) {
	t.Helper()
	path := filepath.Join(socketDir(t), "streamshim.sock")
	return serveAt(t, path, upstreamPath, change), dialSocket(t, path)
}

// serveAt serves the CRI on the socket at path.
func serveAt(t testing.TB, path, upstreamPath string, change func(*Config)) *Server {
	t.Helper()
	upstream, err := NewUpstream("unix://"+upstreamPath, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { upstream.Close() })
	config := Config{Upstream: upstream, Streams: &fakeStreams{}, Runner: &fakeRunner{}}
	if change != nil {
		change(&config)
	}
	server, err := NewServer(config)
	if err != nil {
		t.Fatal(err)
	}
	listener, err := endpoint.Listen(path)
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan error, 1)
	go func() { done <- server.Serve(listener) }()
	t.Cleanup(func() {
		ctx, cancel := context.WithCancel(context.Background())
		cancel()
		server.Shutdown(ctx)
		if err := <-done; err != nil {
			t.Errorf("Serve: %v", err)
		}
	})
	return server
}

func dialSocket(t testing.TB, path string) *grpc.ClientConn {
	t.Helper()
	conn, err := grpc.NewClient("unix://"+path,
		grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithAuthority("localhost"),
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(DefaultMaxMessageSize), grpc.MaxCallSendMsgSize(DefaultMaxMessageSize)))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	return conn
}

// fakeStreams keeps the last request and answers with a fixed URL or error.
type fakeStreams struct {
	mu          sync.Mutex
	exec        *remotecommand.Request
	attach      *remotecommand.Request
	portForward *portforward.Request
	err         error
}

const fakeURL = "http://127.0.0.1:1/exec/token"

func (f *fakeStreams) Exec(request *remotecommand.Request) (string, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.exec = request
	return fakeURL, f.err
}

func (f *fakeStreams) Attach(request *remotecommand.Request) (string, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.attach = request
	return fakeURL, f.err
}

func (f *fakeStreams) PortForward(request *portforward.Request) (string, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.portForward = request
	return fakeURL, f.err
}

// fakeRunner notes what it was asked about.
type fakeRunner struct {
	mu         sync.Mutex
	containers []workload.Container
	requests   []workload.SyncCommand
	runSync    func(context.Context, workload.SyncCommand) (workload.Result, error)
}

func (f *fakeRunner) RunSync(ctx context.Context, container workload.Container, command workload.SyncCommand) (workload.Result, error) {
	f.mu.Lock()
	f.containers = append(f.containers, container)
	f.requests = append(f.requests, command)
	f.mu.Unlock()
	if f.runSync == nil {
		return workload.Result{Stdout: []byte("ok\n")}, nil
	}
	return f.runSync(ctx, command)
}

// testdata reads a recorded answer and puts values in the place of @NAME@.
func testdata(t testing.TB, name string, values ...string) string {
	t.Helper()
	text, err := os.ReadFile(filepath.Join("testdata", name))
	if err != nil {
		t.Fatal(err)
	}
	return strings.NewReplacer(values...).Replace(string(text))
}

func wantCode(t testing.TB, err error, code codes.Code, text string) {
	t.Helper()
	if status.Code(err) != code || !strings.Contains(err.Error(), text) {
		t.Errorf("got %v, want %v with %q", err, code, text)
	}
}
