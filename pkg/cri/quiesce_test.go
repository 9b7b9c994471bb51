package cri

import (
	"context"
	"errors"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/streamshim/streamshim/internal/testutil/leak"
	"github.com/streamshim/streamshim/pkg/endpoint"
	"github.com/streamshim/streamshim/pkg/handover"
	"github.com/streamshim/streamshim/pkg/workload"
)

// watchable is a runtime with a watch that never ends.
type watchable struct {
	fakeRuntime
	watches atomic.Int64
}

func (w *watchable) GetContainerEvents(_ *runtimeapi.GetEventsRequest, stream runtimeapi.RuntimeService_GetContainerEventsServer) error {
	if err := stream.Send(&runtimeapi.ContainerEventResponse{ContainerId: "first"}); err != nil {
		return err
	}
	w.watches.Add(1)
	defer w.watches.Add(-1)
	<-stream.Context().Done()
	return stream.Context().Err()
}

// quietServer is a server whose listener can be paused.
type quietServer struct {
	*Server
	path     string
	listener *handover.Listener
	upstream *watchable
}

func startQuiet(t *testing.T, runSync func(context.Context, workload.SyncCommand) (workload.Result, error)) *quietServer {
	t.Helper()
	q := &quietServer{path: filepath.Join(socketDir(t), "s.sock"), upstream: &watchable{}}
	q.upstream.execSync = func(ctx context.Context, r *runtimeapi.ExecSyncRequest) (*runtimeapi.ExecSyncResponse, error) {
		result, err := runSync(ctx, workload.SyncCommand{Args: r.Cmd})
		return &runtimeapi.ExecSyncResponse{Stdout: result.Stdout}, err
	}
	upstreamServer := newFakeUpstream(t, func(s *grpc.Server) {
		runtimeapi.RegisterRuntimeServiceServer(s, q.upstream)
		runtimeapi.RegisterImageServiceServer(s, q.upstream)
	})
	upstream, err := NewUpstream("unix://"+upstreamServer.path, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { upstream.Close() })
	if q.Server, err = NewServer(Config{Upstream: upstream, Streams: &fakeStreams{}, Runner: &fakeRunner{runSync: runSync}}); err != nil {
		t.Fatal(err)
	}
	socket, err := endpoint.Listen(q.path)
	if err != nil {
		t.Fatal(err)
	}
	if q.listener, err = handover.NewListener(socket); err != nil {
		t.Fatal(err)
	}
	done := make(chan error, 1)
	go func() { done <- q.Serve(q.listener) }()
	t.Cleanup(func() {
		now, cancel := context.WithCancel(context.Background())
		cancel()
		q.Shutdown(now)
		if err := <-done; err != nil {
			t.Error(err)
		}
		socket.Close()
	})
	if _, err := runtimeapi.NewRuntimeServiceClient(dialSocket(t, q.path)).Version(testContext(t), &runtimeapi.VersionRequest{}); err != nil {
		t.Fatal(err)
	}
	return q
}

// A server that is quiet time and again fails no call, of clients that keep a connection and of those that connect anew.
func TestQuiesceFailsNoCall(t *testing.T) {
	leak.Check(t)
	ctx := testContext(t)
	q := startQuiet(t, nil)
	stop := make(chan struct{})
	var callers sync.WaitGroup
	var made atomic.Int64
	for i := range 6 {
		callers.Go(func() {
			conn := dialSocket(t, q.path)
			defer func() { conn.Close() }()
			for {
				select {
				case <-stop:
					return
				default:
				}
				if _, err := runtimeapi.NewRuntimeServiceClient(conn).Version(ctx, &runtimeapi.VersionRequest{}); err != nil {
					t.Error(err)
					return
				}
				made.Add(1)
				if i%2 == 1 {
					conn.Close()
					conn = dialSocket(t, q.path)
				}
			}
		})
	}
	for range 40 {
		limited, cancel := context.WithTimeout(ctx, testTimeout)
		if err := q.Quiesce(limited); err != nil {
			t.Error(err)
		}
		cancel()
		if n := q.server.Calls(); n != 0 {
			t.Errorf("%d calls are under way", n)
		}
		before := made.Load()
		q.Resume()
		for made.Load() < before+20 && !t.Failed() && ctx.Err() == nil {
			time.Sleep(time.Millisecond)
		}
	}
	close(stop)
	callers.Wait()
}

// A watch ends as Unavailable, and its client, which asks again at once, gets a new one when the server serves again.
func TestQuiesceEndsWatches(t *testing.T) {
	ctx := testContext(t)
	q := startQuiet(t, nil)
	client := runtimeapi.NewRuntimeServiceClient(dialSocket(t, q.path))
	begun, ended := make(chan error, 10), make(chan error, 10)
	go func() {
		for ctx.Err() == nil {
			watch, err := client.GetContainerEvents(ctx, &runtimeapi.GetEventsRequest{})
			if err == nil {
				_, err = watch.Recv()
			}
			if status.Code(err) == codes.Unavailable && strings.Contains(err.Error(), "replaced") {
				continue // called before the client had read the GOAWAY
			}
			begun <- err
			if err != nil {
				return
			}
			_, err = watch.Recv()
			ended <- err
		}
	}()
	for range 3 {
		if err := <-begun; err != nil {
			t.Fatal(err)
		}
		if err := q.Quiesce(ctx); err != nil {
			t.Fatal(err)
		}
		wantCode(t, <-ended, codes.Unavailable, "replaced")
		select {
		case err := <-begun:
			t.Fatalf("a watch has begun while the server is quiet: %v", err)
		case <-time.After(100 * time.Millisecond):
		}
		q.Resume()
	}
	if err := <-begun; err != nil {
		t.Fatal(err)
	}
}

// A call that takes long is waited for, and others are served meanwhile; one that outlasts the limit ends as Unavailable.
func TestQuiesceWaitsForLongCalls(t *testing.T) {
	ctx := testContext(t)
	called := make(chan chan struct{})
	q := startQuiet(t, func(ctx context.Context, _ workload.SyncCommand) (workload.Result, error) {
		release := make(chan struct{})
		called <- release
		select {
		case <-release:
			return workload.Result{Stdout: []byte("released")}, nil
		case <-ctx.Done():
			return workload.Result{}, ctx.Err()
		}
	})
	q.upstream.containerStatus = func(*runtimeapi.ContainerStatusRequest) (*runtimeapi.ContainerStatusResponse, error) {
		return &runtimeapi.ContainerStatusResponse{Status: &runtimeapi.ContainerStatus{Id: "c", State: runtimeapi.ContainerState_CONTAINER_RUNNING}}, nil
	}
	client := runtimeapi.NewRuntimeServiceClient(dialSocket(t, q.path))
	exec := func() <-chan error {
		answered := make(chan error, 1)
		go func() {
			response, err := client.ExecSync(ctx, &runtimeapi.ExecSyncRequest{ContainerId: "c", Cmd: []string{"x"}})
			if err == nil && string(response.Stdout) != "released" {
				err = errors.New("wrong output")
			}
			answered <- err
		}()
		return answered
	}
	answered := exec()
	release := <-called
	quiesced := make(chan error, 1)
	go func() { quiesced <- q.Quiesce(ctx) }()
	deadline := time.Now().Add(3 * time.Second)
	for time.Now().Before(deadline) {
		if _, err := client.Version(ctx, &runtimeapi.VersionRequest{}); err != nil {
			t.Fatalf("a short call beside a long one: %v", err)
		}
	}
	select {
	case <-quiesced:
		t.Fatal("the long call was not waited for")
	default:
	}
	close(release)
	if err := <-quiesced; err != nil {
		t.Fatal(err)
	}
	if err := <-answered; err != nil {
		t.Errorf("the long call: %v", err)
	}
	q.Resume()

	answered = exec()
	<-called
	limited, cancel := context.WithTimeout(ctx, 50*time.Millisecond)
	defer cancel()
	if err := q.Quiesce(limited); err != nil {
		t.Fatal(err)
	}
	if err := <-answered; status.Code(err) != codes.Unavailable {
		t.Errorf("a call beyond the limit: %v", err)
	}
	q.Resume()
	if _, err := client.Version(ctx, &runtimeapi.VersionRequest{}); err != nil {
		t.Error(err)
	}
}

// What is known of containers goes over as it is.
func TestStateOfContainers(t *testing.T) {
	q := startQuiet(t, nil)
	known := workload.Container{Target: workload.Target{ContainerID: "c"}, InitPid: 7, InitStartTime: 9}
	q.resolver.containers.put(known)
	encoded, err := handover.Encode(q.State())
	if err != nil {
		t.Fatal(err)
	}
	var state State
	if err := handover.Decode(encoded, &state); err != nil {
		t.Fatal(err)
	}
	next := startQuiet(t, nil)
	next.Adopt(state)
	got, ok := next.resolver.containers.peek("c")
	if !ok || got.InitPid != 7 || got.InitStartTime != 9 {
		t.Errorf("%+v", got)
	}
}
