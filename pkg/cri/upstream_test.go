package cri

import (
	"context"
	"net"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// While the upstream is away a call fails at once and names it; the first call after its return
// works, whatever gRPC's backoff is at.
func TestUpstreamRestart(t *testing.T) {
	upstream := newFakeUpstream(t, func(s *grpc.Server) { runtimeapi.RegisterRuntimeServiceServer(s, &fakeRuntime{}) })
	upstream.kill()
	_, conn := startServer(t, upstream.path, nil)
	client := runtimeapi.NewRuntimeServiceClient(conn)
	ctx := testContext(t)
	call := func() error {
		_, err := client.Version(ctx, &runtimeapi.VersionRequest{})
		return err
	}
	for round := range 4 {
		// Long enough for the backoff to grow to its longest.
		for end := time.Now().Add(time.Duration(round) * 400 * time.Millisecond); ; {
			start := time.Now()
			err := call()
			wantCode(t, err, codes.Unavailable, "unix://"+upstream.path)
			if took := time.Since(start); took > testTimeout/4 {
				t.Errorf("it took %v to say that the upstream is away", took)
			}
			if time.Now().After(end) {
				break
			}
		}
		upstream.start(t)
		if err := call(); err != nil {
			t.Fatalf("round %d: first call after the return: %v", round, err)
		}
		upstream.kill()
	}
}

func TestUpstreamDeathEndsOpenStreams(t *testing.T) {
	started := make(chan struct{}, 1)
	upstream := newFakeUpstream(t, func(*grpc.Server) {}, grpc.UnknownServiceHandler(func(_ any, stream grpc.ServerStream) error {
		started <- struct{}{}
		<-stream.Context().Done()
		return stream.Context().Err()
	}))
	_, conn := startServer(t, upstream.path, nil)
	stream, err := conn.NewStream(testContext(t), allKinds, strangeMethod+"Watch")
	if err != nil {
		t.Fatal(err)
	}
	<-started
	upstream.kill()
	wantCode(t, stream.RecvMsg(text("")), codes.Unavailable, "")
}

// An upstream that accepts and never speaks must not hold calls longer than connecting may take.
func TestUpstreamThatDoesNotAnswer(t *testing.T) {
	path := filepath.Join(socketDir(t), "up.sock")
	listener, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	defer listener.Close()
	upstream, err := NewUpstream(path, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer upstream.Close()
	for range 2 {
		ctx, cancel := context.WithTimeout(context.Background(), testTimeout)
		_, err = upstream.runtime.Version(ctx, &runtimeapi.VersionRequest{})
		cancel()
		wantCode(t, err, codes.Unavailable, path)
		if ctx.Err() == context.DeadlineExceeded {
			t.Error("the call ended with its own deadline only")
		}
	}
	if !strings.HasPrefix(upstream.Endpoint(), "unix:///") {
		t.Error(upstream.Endpoint())
	}
}
