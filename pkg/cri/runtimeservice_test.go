package cri

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/streamshim/streamshim/pkg/session"
	"github.com/streamshim/streamshim/pkg/workload"
)

var statusNotFound = status.Error(codes.NotFound, "not found")

// node is a server in front of a fake runtime with one container that runs with runc, and what it
// hands its requests to.
type node struct {
	fake    *fakeRuntime
	server  *Server
	streams *fakeStreams
	runner  *fakeRunner
	conn    *grpc.ClientConn
	client  runtimeapi.RuntimeServiceClient
}

func startNode(t testing.TB, info string) *node {
	t.Helper()
	n := &node{
		fake: &fakeRuntime{containerStatus: func(request *runtimeapi.ContainerStatusRequest) (*runtimeapi.ContainerStatusResponse, error) {
			if request.GetContainerId() != containerdID {
				return nil, statusNotFound
			}
			return runningContainer(containerdID, info)(request)
		}},
		streams: &fakeStreams{},
		runner:  &fakeRunner{},
	}
	upstream := newFakeUpstream(t, func(s *grpc.Server) { runtimeapi.RegisterRuntimeServiceServer(s, n.fake) })
	n.server, n.conn = startServer(t, upstream.path, func(config *Config) {
		config.Streams, config.Runner = n.streams, n.runner
		config.StreamErrorCode = func(err error) codes.Code {
			if refused := (*session.RefusedError)(nil); errors.Is(err, errTooMany) || errors.As(err, &refused) {
				return codes.ResourceExhausted
			}
			return codes.OK
		}
	})
	n.client = runtimeapi.NewRuntimeServiceClient(n.conn)
	return n
}

var errTooMany = errors.New("too many")

func runcInfo(t testing.TB) string {
	return testdata(t, "containerd-container.json", "@BINARY@", executable(t, t.TempDir(), "runc"), "@ROOT@", "/run/runc")
}

func kataInfo(t testing.TB) string {
	return testdata(t, "containerd-container.json", "io.containerd.runc.v2", "io.containerd.kata.v2")
}

func TestExecGivesOutAURL(t *testing.T) {
	n := startNode(t, runcInfo(t))
	request := &runtimeapi.ExecRequest{ContainerId: containerdID, Cmd: []string{"sh", "-c", "x"}, Stdin: true, Stdout: true, Tty: true}
	request.ProtoReflect().SetUnknown(appendEnv(appendEnv(nil, 7, "A", "1"), 7, "KUBERNETES_EXEC_AUDIT_ID", "u"))
	response, err := n.client.Exec(testContext(t), request)
	if err != nil || response.GetUrl() != fakeURL {
		t.Fatalf("got %v, %v", response, err)
	}
	got := n.streams.exec
	if got.Container.ContainerID != containerdID || got.Container.Root != "/run/runc/k8s.io" || got.Call != nil {
		t.Errorf("request %+v", got)
	}
	command := got.Command
	if !slices.Equal(command.Args, request.Cmd) || !slices.Equal(command.Env, []string{"A=1", "KUBERNETES_EXEC_AUDIT_ID=u"}) ||
		!command.Stdin || !command.Stdout || command.Stderr || !command.TTY {
		t.Errorf("command %+v", command)
	}
}

// The upstream gets at redemption what the client sent, to the last unknown field.
func TestExecOfAnotherRuntimeIsRelayed(t *testing.T) {
	n := startNode(t, kataInfo(t))
	var received *runtimeapi.ExecRequest
	n.fake.exec = func(request *runtimeapi.ExecRequest) (*runtimeapi.ExecResponse, error) {
		received = request
		return &runtimeapi.ExecResponse{Url: "http://upstream/exec/1"}, nil
	}
	request := &runtimeapi.ExecRequest{ContainerId: containerdID, Cmd: []string{"sh"}, Stdout: true}
	request.ProtoReflect().SetUnknown(appendEnv(nil, 7, "A", "1"))
	if _, err := n.client.Exec(testContext(t), request); err != nil {
		t.Fatal(err)
	}
	got := n.streams.exec
	if got.Container.Runtime != "" || n.fake.called("Exec") != 0 {
		t.Fatalf("request %+v", got)
	}
	url, err := n.server.upstream.StreamingURL(testContext(t), session.Exec, got.Call, got.Trace)
	if err != nil || url != "http://upstream/exec/1" {
		t.Fatalf("%q, %v", url, err)
	}
	if received.GetContainerId() != containerdID || !slices.Equal(received.ProtoReflect().GetUnknown(), request.ProtoReflect().GetUnknown()) {
		t.Errorf("the upstream got %v", received)
	}
}

func TestAttachIsRelayed(t *testing.T) {
	n := startNode(t, runcInfo(t))
	n.fake.attach = func(request *runtimeapi.AttachRequest) (*runtimeapi.AttachResponse, error) {
		return &runtimeapi.AttachResponse{Url: "http://upstream/attach/" + request.GetContainerId()[:4]}, nil
	}
	response, err := n.client.Attach(testContext(t), &runtimeapi.AttachRequest{ContainerId: containerdID, Stdin: true, Stdout: true, Tty: true})
	if err != nil || response.GetUrl() != fakeURL {
		t.Fatalf("got %v, %v", response, err)
	}
	got := n.streams.attach
	if c := got.Command; got.Container.ContainerID != containerdID || !c.Stdin || !c.Stdout || c.Stderr || !c.TTY {
		t.Errorf("request %+v", got)
	}
	url, err := n.server.upstream.StreamingURL(testContext(t), session.Attach, got.Call, got.Trace)
	if err != nil || url != "http://upstream/attach/"+containerdID[:4] {
		t.Errorf("%q, %v", url, err)
	}
}

func TestAttachKnowsStdinOnce(t *testing.T) {
	const config, annotation = `"log_path": "app.log",`, `"io.kubernetes.cri-o.TTY": "false"`
	for _, test := range []struct {
		name, info string
		want       bool
	}{
		{"containerd", testdata(t, "containerd-container.json", config, config+` "stdin": true, "stdin_once": true,`), true},
		{"containerd, stdin stays open", testdata(t, "containerd-container.json", config, config+` "stdin": true,`), false},
		{"CRI-O", testdata(t, "crio-container.json", annotation, annotation+`, "io.kubernetes.cri-o.StdinOnce": "true"`), true},
		{"CRI-O, stdin stays open", testdata(t, "crio-container.json", annotation, annotation+`, "io.kubernetes.cri-o.StdinOnce": "false"`), false},
		{"neither of them", `{"pid": 1}`, false},
		{"no object", `[]`, false},
	} {
		t.Run(test.name, func(t *testing.T) {
			n := startNode(t, test.info)
			if _, err := n.client.Attach(testContext(t), &runtimeapi.AttachRequest{ContainerId: containerdID, Stdin: true}); err != nil {
				t.Fatal(err)
			}
			if n.streams.attach.Container.StdinOnce != test.want {
				t.Errorf("StdinOnce is %v", n.streams.attach.Container.StdinOnce)
			}
		})
	}
}

func TestPortForwardGivesOutAURL(t *testing.T) {
	n := startNode(t, runcInfo(t))
	n.fake.podSandboxStatus = func(*runtimeapi.PodSandboxStatusRequest) (*runtimeapi.PodSandboxStatusResponse, error) {
		return &runtimeapi.PodSandboxStatusResponse{
			Status: &runtimeapi.PodSandboxStatus{Id: containerdSandboxID},
			Info:   map[string]string{"info": testdata(t, "containerd-sandbox.json")},
		}, nil
	}
	request := &runtimeapi.PortForwardRequest{PodSandboxId: containerdSandboxID, Port: []int32{80, 443}}
	response, err := n.client.PortForward(testContext(t), request)
	if err != nil || response.GetUrl() != fakeURL {
		t.Fatalf("got %v, %v", response, err)
	}
	got := n.streams.portForward
	if s := got.Sandbox; s.SandboxID != containerdSandboxID || s.NetworkNamespace == "" || s.Pid == 0 || !slices.Equal(got.Ports, request.Port) {
		t.Errorf("request %+v", got)
	}
	n.streams.err = errTooMany
	_, err = n.client.PortForward(testContext(t), request)
	wantCode(t, err, codes.ResourceExhausted, "too many")
}

func TestStreamErrors(t *testing.T) {
	n := startNode(t, runcInfo(t))
	for err, code := range map[error]codes.Code{
		fmt.Errorf("exec: %w", errTooMany): codes.ResourceExhausted,
		errors.New("broken"):               codes.Internal,
	} {
		n.streams.err = err
		_, got := n.client.Exec(testContext(t), &runtimeapi.ExecRequest{ContainerId: containerdID, Cmd: []string{"sh"}, Stdout: true})
		wantCode(t, got, code, err.Error())
		_, got = n.client.Attach(testContext(t), &runtimeapi.AttachRequest{ContainerId: containerdID, Stdout: true})
		wantCode(t, got, code, err.Error())
	}
}

func TestRequestsAreCheckedAtOnce(t *testing.T) {
	n := startNode(t, runcInfo(t))
	ctx := testContext(t)
	sh := []string{"sh"}
	badEnv := &runtimeapi.ExecRequest{ContainerId: containerdID, Cmd: sh, Stdout: true}
	badEnv.ProtoReflect().SetUnknown(appendEnv(nil, 7, "", "1"))
	exec := func(request *runtimeapi.ExecRequest) error { _, err := n.client.Exec(ctx, request); return err }
	attach := func(request *runtimeapi.AttachRequest) error { _, err := n.client.Attach(ctx, request); return err }
	sync := func(request *runtimeapi.ExecSyncRequest) error { _, err := n.client.ExecSync(ctx, request); return err }
	for _, test := range []struct {
		name string
		err  error
		code codes.Code
		text string
	}{
		{"exec without container", exec(&runtimeapi.ExecRequest{Cmd: sh, Stdout: true}), codes.InvalidArgument, "missing required container_id"},
		{"exec without command", exec(&runtimeapi.ExecRequest{ContainerId: containerdID, Stdout: true}), codes.InvalidArgument, "missing required cmd"},
		{"exec with tty and stderr", exec(&runtimeapi.ExecRequest{ContainerId: containerdID, Cmd: sh, Stdout: true, Stderr: true, Tty: true}), codes.InvalidArgument, "tty and stderr cannot both be true"},
		{"exec without streams", exec(&runtimeapi.ExecRequest{ContainerId: containerdID, Cmd: sh}), codes.InvalidArgument, "one of stdin, stdout, or stderr must be set"},
		{"exec with a strange environment", exec(badEnv), codes.InvalidArgument, "envs[0]: the name is empty"},
		{"exec of an unknown container", exec(&runtimeapi.ExecRequest{ContainerId: "nosuch", Cmd: sh, Stdout: true}), codes.NotFound, "not found"},
		{"attach without container", attach(&runtimeapi.AttachRequest{Stdout: true}), codes.InvalidArgument, "missing required container_id"},
		{"attach with tty and stderr", attach(&runtimeapi.AttachRequest{ContainerId: containerdID, Stderr: true, Tty: true}), codes.InvalidArgument, "tty and stderr"},
		{"attach without streams", attach(&runtimeapi.AttachRequest{ContainerId: containerdID}), codes.InvalidArgument, "one of stdin, stdout"},
		{"attach to an unknown container", attach(&runtimeapi.AttachRequest{ContainerId: "nosuch", Stdout: true}), codes.NotFound, "not found"},
		{"execsync without container", sync(&runtimeapi.ExecSyncRequest{Cmd: sh}), codes.InvalidArgument, "missing required container_id"},
		{"execsync without command", sync(&runtimeapi.ExecSyncRequest{ContainerId: containerdID}), codes.InvalidArgument, "missing required cmd"},
		{"execsync with a negative timeout", sync(&runtimeapi.ExecSyncRequest{ContainerId: containerdID, Cmd: sh, Timeout: -1}), codes.InvalidArgument, "timeout"},
		{"execsync in an unknown container", sync(&runtimeapi.ExecSyncRequest{ContainerId: "nosuch", Cmd: sh}), codes.NotFound, "not found"},
		{"port-forward without sandbox", func() error { _, err := n.client.PortForward(ctx, &runtimeapi.PortForwardRequest{}); return err }(), codes.InvalidArgument, "missing required pod_sandbox_id"},
		{"port-forward into an unknown sandbox", func() error {
			_, err := n.client.PortForward(ctx, &runtimeapi.PortForwardRequest{PodSandboxId: "nosuch"})
			return err
		}(), codes.NotFound, "not found"},
	} {
		t.Run(test.name, func(t *testing.T) { wantCode(t, test.err, test.code, test.text) })
	}
	if n.streams.exec != nil || n.streams.attach != nil || n.streams.portForward != nil {
		t.Error("a URL was asked for")
	}
}

// startError is what an engine gives for a command that cannot be started.
type startError struct{ code int }

func (e startError) Error() string { return `exec: "nosuch": executable file not found in $PATH` }
func (e startError) ExitCode() int { return e.code }

func TestExecSync(t *testing.T) {
	n := startNode(t, runcInfo(t))
	ctx := testContext(t)
	request := &runtimeapi.ExecSyncRequest{ContainerId: containerdID, Cmd: []string{"check", "it"}, Timeout: 7}
	request.ProtoReflect().SetUnknown(appendEnv(nil, 4, "A", "1"))
	n.runner.runSync = func(context.Context, workload.SyncCommand) (workload.Result, error) {
		return workload.Result{Stdout: []byte("out"), Stderr: []byte("err"), ExitCode: 3}, nil
	}
	response, err := n.client.ExecSync(ctx, request)
	if err != nil || string(response.GetStdout()) != "out" || string(response.GetStderr()) != "err" || response.GetExitCode() != 3 {
		t.Errorf("got %v, %v", response, err)
	}
	got := n.runner.requests[0]
	if !slices.Equal(got.Args, request.Cmd) || !slices.Equal(got.Env, []string{"A=1"}) || got.Timeout != 7*time.Second {
		t.Errorf("the engine got %+v", got)
	}

	n.runner.runSync = func(context.Context, workload.SyncCommand) (workload.Result, error) {
		return workload.Result{}, fmt.Errorf("killed: %w", context.DeadlineExceeded)
	}
	_, err = n.client.ExecSync(ctx, request)
	wantCode(t, err, codes.DeadlineExceeded, "timeout 7s exceeded: context deadline exceeded")

	n.runner.runSync = func(context.Context, workload.SyncCommand) (workload.Result, error) {
		return workload.Result{}, fmt.Errorf("wait: %w", &session.RefusedError{Refusal: session.TooMany, Message: "too many"})
	}
	_, err = n.client.ExecSync(ctx, request)
	wantCode(t, err, codes.ResourceExhausted, "too many")

	n.runner.runSync = func(context.Context, workload.SyncCommand) (workload.Result, error) {
		return workload.Result{}, fmt.Errorf("start: %w", startError{127})
	}
	_, err = n.client.ExecSync(ctx, request)
	wantCode(t, err, codes.Unknown, "executable file not found in $PATH")

	n.runner.runSync = func(context.Context, workload.SyncCommand) (workload.Result, error) {
		return workload.Result{}, errors.New("broken")
	}
	_, err = n.client.ExecSync(ctx, request)
	wantCode(t, err, codes.Internal, "broken")

	// No timeout is none, and the client's own deadline holds all the same.
	n.runner.runSync = func(ctx context.Context, request workload.SyncCommand) (workload.Result, error) {
		if request.Timeout != 0 {
			return workload.Result{}, fmt.Errorf("timeout %v", request.Timeout)
		}
		if _, limited := ctx.Deadline(); !limited {
			return workload.Result{}, errors.New("no deadline")
		}
		return workload.Result{}, nil
	}
	request.Timeout = 0
	if _, err = n.client.ExecSync(ctx, request); err != nil {
		t.Error(err)
	}

	// The longest timeout a client can write is not a negative one.
	n.runner.runSync = nil
	request.Timeout = 1<<63 - 1
	if _, err = n.client.ExecSync(ctx, request); err != nil || n.runner.requests[len(n.runner.requests)-1].Timeout <= 0 {
		t.Errorf("%v, %+v", err, n.runner.requests)
	}

	// An answer with as much output as pkg/config allows must fit through the kubelet's 16 MiB.
	n.runner.runSync = func(context.Context, workload.SyncCommand) (workload.Result, error) {
		half := make([]byte, 15<<20/2)
		return workload.Result{Stdout: half, Stderr: half}, nil
	}
	if _, err = n.client.ExecSync(ctx, request, grpc.MaxCallRecvMsgSize(16<<20)); err != nil {
		t.Error(err)
	}
}

// A panic in a call ends that call.
func TestPanicInACall(t *testing.T) {
	n := startNode(t, runcInfo(t))
	ctx := testContext(t)
	request := &runtimeapi.ExecSyncRequest{ContainerId: containerdID, Cmd: []string{"check"}}
	n.runner.runSync = func(context.Context, workload.SyncCommand) (workload.Result, error) { panic("a fault of the test") }
	_, err := n.client.ExecSync(ctx, request)
	wantCode(t, err, codes.Internal, "a fault in streamshim")
	n.runner.runSync = nil
	if response, err := n.client.ExecSync(ctx, request); err != nil || string(response.GetStdout()) != "ok\n" {
		t.Errorf("the next call: %v, %v", response, err)
	}
}

func TestExecSyncOfAClientThatHasGone(t *testing.T) {
	n := startNode(t, runcInfo(t))
	started, ended := make(chan struct{}), make(chan struct{})
	n.runner.runSync = func(ctx context.Context, _ workload.SyncCommand) (workload.Result, error) {
		close(started)
		<-ctx.Done()
		close(ended)
		return workload.Result{}, ctx.Err()
	}
	ctx, cancel := context.WithCancel(testContext(t))
	go func() {
		<-started
		cancel()
	}()
	_, err := n.client.ExecSync(ctx, &runtimeapi.ExecSyncRequest{ContainerId: containerdID, Cmd: []string{"sleep"}})
	wantCode(t, err, codes.Canceled, "")
	select {
	case <-ended:
	case <-testContext(t).Done():
		t.Error("the command was not told")
	}
}

func TestExecSyncOfAnotherRuntimeIsForwarded(t *testing.T) {
	n := startNode(t, kataInfo(t))
	n.fake.podSandboxStatus = readyPod
	n.fake.execSync = func(ctx context.Context, request *runtimeapi.ExecSyncRequest) (*runtimeapi.ExecSyncResponse, error) {
		md, _ := metadata.FromIncomingContext(ctx)
		grpc.SetHeader(ctx, metadata.Pairs("header", "h"))
		grpc.SetTrailer(ctx, metadata.Pairs("trailer", "t"))
		if request.GetTimeout() == 9 {
			return nil, status.Error(codes.DeadlineExceeded, "upstream's own words")
		}
		return &runtimeapi.ExecSyncResponse{Stdout: []byte(md.Get("caller")[0]), ExitCode: 4}, nil
	}
	ctx := metadata.AppendToOutgoingContext(testContext(t), "caller", "me")
	var header, trailer metadata.MD
	for range 3 {
		response, err := n.client.ExecSync(ctx, &runtimeapi.ExecSyncRequest{ContainerId: containerdID, Cmd: []string{"true"}}, grpc.Header(&header), grpc.Trailer(&trailer))
		if err != nil || string(response.GetStdout()) != "me" || response.GetExitCode() != 4 {
			t.Fatalf("got %v, %v", response, err)
		}
		if !slices.Equal(header.Get("header"), []string{"h"}) || !slices.Equal(trailer.Get("trailer"), []string{"t"}) {
			t.Errorf("header %v, trailer %v", header, trailer)
		}
	}
	if n.fake.called("ContainerStatus") != 1 || len(n.runner.requests) != 0 {
		t.Errorf("%d status calls, %d commands run here", n.fake.called("ContainerStatus"), len(n.runner.requests))
	}
	_, err := n.client.ExecSync(ctx, &runtimeapi.ExecSyncRequest{ContainerId: containerdID, Cmd: []string{"true"}, Timeout: 9})
	wantCode(t, err, codes.DeadlineExceeded, "upstream's own words")
}

func TestUpstreamAwayIsUnavailable(t *testing.T) {
	path := filepath.Join(socketDir(t), "nobody.sock")
	_, conn := startServer(t, path, nil)
	client := runtimeapi.NewRuntimeServiceClient(conn)
	ctx := testContext(t)
	_, err := client.Exec(ctx, &runtimeapi.ExecRequest{ContainerId: "c", Cmd: []string{"sh"}, Stdout: true})
	wantCode(t, err, codes.Unavailable, path)
	_, err = client.Attach(ctx, &runtimeapi.AttachRequest{ContainerId: "c", Stdout: true})
	wantCode(t, err, codes.Unavailable, path)
	_, err = client.PortForward(ctx, &runtimeapi.PortForwardRequest{PodSandboxId: "p"})
	wantCode(t, err, codes.Unavailable, path)
	_, err = client.ExecSync(ctx, &runtimeapi.ExecSyncRequest{ContainerId: "c", Cmd: []string{"sh"}})
	wantCode(t, err, codes.Unavailable, path)
}
