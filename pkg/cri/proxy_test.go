package cri

import (
	"bytes"
	"context"
	"errors"
	"io"
	"slices"
	"strings"
	"testing"
	"time"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/encoding/gzip"
	"google.golang.org/grpc/health"
	healthapi "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/wrapperspb"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// text is the message of the calls below.
func text(s string) *wrapperspb.StringValue { return wrapperspb.String(s) }

// A service that nobody outside this test has heard of, with a handler for every method.
const strangeMethod = "/strange.v9.Service/"

// eachUnary runs a test with a unary method of that service and with one that is known to be unary.
func eachUnary(t *testing.T, test func(t *testing.T, method string)) {
	t.Run("unknown", func(t *testing.T) { test(t, strangeMethod+"Unary") })
	t.Run("known", func(t *testing.T) { test(t, runtimeapi.RuntimeService_Version_FullMethodName) })
}

var allKinds = &grpc.StreamDesc{ClientStreams: true, ServerStreams: true}

// startStrange serves handle for every unknown method upstream, and a proxy in front of it.
func startStrange(t testing.TB, handle func(method string, stream grpc.ServerStream) error) *grpc.ClientConn {
	t.Helper()
	upstream := newFakeUpstream(t, func(s *grpc.Server) {}, grpc.UnknownServiceHandler(func(_ any, stream grpc.ServerStream) error {
		full, _ := grpc.MethodFromServerStream(stream)
		return handle(full[strings.LastIndexByte(full, '/')+1:], stream)
	}))
	_, conn := startServer(t, upstream.path, nil)
	return conn
}

func receive(t testing.TB, stream grpc.ClientStream) string {
	t.Helper()
	var message wrapperspb.StringValue
	if err := stream.RecvMsg(&message); err != nil {
		t.Fatalf("RecvMsg: %v", err)
	}
	return message.GetValue()
}

func TestForwardKnownServices(t *testing.T) {
	fake := &fakeRuntime{listContainers: func(request *runtimeapi.ListContainersRequest) (*runtimeapi.ListContainersResponse, error) {
		return &runtimeapi.ListContainersResponse{Containers: []*runtimeapi.Container{{Id: "of " + request.GetFilter().GetPodSandboxId()}}}, nil
	}}
	upstream := newFakeUpstream(t, func(s *grpc.Server) {
		runtimeapi.RegisterRuntimeServiceServer(s, fake)
		runtimeapi.RegisterImageServiceServer(s, fake)
		healthapi.RegisterHealthServer(s, health.NewServer())
	})
	var observed []string
	_, conn := startServer(t, upstream.path, func(config *Config) {
		config.Observe = func(method string, code codes.Code, duration time.Duration) {
			observed = append(observed, method+" "+code.String())
		}
	})
	ctx := testContext(t)
	client := runtimeapi.NewRuntimeServiceClient(conn)

	version, err := client.Version(ctx, &runtimeapi.VersionRequest{})
	if err != nil || version.GetRuntimeName() != "containerd" {
		t.Errorf("Version: %v, %v", version, err)
	}
	list, err := client.ListContainers(ctx, &runtimeapi.ListContainersRequest{Filter: &runtimeapi.ContainerFilter{PodSandboxId: "p"}})
	if err != nil || list.GetContainers()[0].GetId() != "of p" {
		t.Errorf("ListContainers: %v, %v", list, err)
	}
	_, err = client.UpdateRuntimeConfig(ctx, &runtimeapi.UpdateRuntimeConfigRequest{})
	wantCode(t, err, codes.Unimplemented, "UpdateRuntimeConfig not implemented")
	_, err = runtimeapi.NewImageServiceClient(conn).ListImages(ctx, &runtimeapi.ListImagesRequest{})
	wantCode(t, err, codes.Unimplemented, "ListImages not implemented")
	serving, err := healthapi.NewHealthClient(conn).Check(ctx, &healthapi.HealthCheckRequest{})
	if err != nil || serving.GetStatus() != healthapi.HealthCheckResponse_SERVING {
		t.Errorf("health: %v, %v", serving, err)
	}
	// Nothing is answered here that the upstream does not know.
	err = conn.Invoke(ctx, "/runtime.v1.RuntimeService/NotYetInvented", text("x"), text(""))
	wantCode(t, err, codes.Unimplemented, "unknown method NotYetInvented")

	want := []string{"/runtime.v1.RuntimeService/Version OK", "/runtime.v1.RuntimeService/ListContainers OK",
		"/runtime.v1.RuntimeService/UpdateRuntimeConfig Unimplemented", "/runtime.v1.ImageService/ListImages Unimplemented",
		"/grpc.health.v1.Health/Check OK", "/runtime.v1.RuntimeService/NotYetInvented Unimplemented"}
	if !slices.Equal(observed, want) {
		t.Errorf("observed %q, want %q", observed, want)
	}
}

func TestForwardMetadata(t *testing.T) { eachUnary(t, testForwardMetadata) }

func testForwardMetadata(t *testing.T, method string) {
	received := make(chan metadata.MD, 1)
	conn := startStrange(t, func(_ string, stream grpc.ServerStream) error {
		md, _ := metadata.FromIncomingContext(stream.Context())
		received <- md
		stream.SetHeader(metadata.Pairs("answer", "1", "answer", "2", "blob-bin", "\x00\xff"))
		stream.SetTrailer(metadata.Pairs("end", "3", "end-bin", "\x01"))
		if err := stream.RecvMsg(text("")); err != nil {
			return err
		}
		return stream.SendMsg(text("done"))
	})
	ctx := metadata.AppendToOutgoingContext(testContext(t), "traceparent", "00-1-2-01", "many", "a", "many", "b", "raw-bin", "\x00\x01")
	var header, trailer metadata.MD
	if err := conn.Invoke(ctx, method, text("x"), text(""), grpc.Header(&header), grpc.Trailer(&trailer)); err != nil {
		t.Fatal(err)
	}
	got := <-received
	for key, want := range map[string][]string{"traceparent": {"00-1-2-01"}, "many": {"a", "b"}, "raw-bin": {"\x00\x01"}, ":authority": {"localhost"}} {
		if !slices.Equal(got.Get(key), want) {
			t.Errorf("request: %s = %q, want %q", key, got.Get(key), want)
		}
	}
	for key, want := range map[string][]string{"answer": {"1", "2"}, "blob-bin": {"\x00\xff"}, "content-type": {"application/grpc"}} {
		if !slices.Equal(header.Get(key), want) {
			t.Errorf("header: %s = %q, want %q", key, header.Get(key), want)
		}
	}
	for key, want := range map[string][]string{"end": {"3"}, "end-bin": {"\x01"}} {
		if !slices.Equal(trailer.Get(key), want) {
			t.Errorf("trailer: %s = %q, want %q", key, trailer.Get(key), want)
		}
	}
}

func TestForwardStatusWithDetails(t *testing.T) { eachUnary(t, testForwardStatusWithDetails) }

func testForwardStatusWithDetails(t *testing.T, method string) {
	conn := startStrange(t, func(_ string, stream grpc.ServerStream) error {
		stream.SetTrailer(metadata.Pairs("end", "with error"))
		s, err := status.New(codes.ResourceExhausted, "no room: 50% ✓").WithDetails(&errdetails.RetryInfo{}, text("why"))
		if err != nil {
			return err
		}
		return s.Err()
	})
	var trailer metadata.MD
	err := conn.Invoke(testContext(t), method, text("x"), text(""), grpc.Trailer(&trailer))
	wantCode(t, err, codes.ResourceExhausted, "no room: 50% ✓")
	details := status.Convert(err).Details()
	if len(details) != 2 || !proto.Equal(details[1].(proto.Message), text("why")) {
		t.Errorf("details %v", details)
	}
	if got := trailer.Get("end"); !slices.Equal(got, []string{"with error"}) {
		t.Errorf("trailer %q", got)
	}
}

func TestForwardKindsOfStreams(t *testing.T) {
	conn := startStrange(t, func(method string, stream grpc.ServerStream) error {
		switch method {
		case "Server": // one request, many answers
			request := text("")
			if err := stream.RecvMsg(request); err != nil {
				return err
			}
			for range 3 {
				if err := stream.SendMsg(request); err != nil {
					return err
				}
			}
			return nil
		case "Client": // many requests, one answer after the half-close
			var all []string
			for {
				var message wrapperspb.StringValue
				if err := stream.RecvMsg(&message); errors.Is(err, io.EOF) {
					return stream.SendMsg(text(strings.Join(all, "+")))
				} else if err != nil {
					return err
				}
				all = append(all, message.GetValue())
			}
		case "ServerFirst": // the answer comes before the first request
			if err := stream.SendMsg(text("hello")); err != nil {
				return err
			}
			request := text("")
			if err := stream.RecvMsg(request); err != nil {
				return err
			}
			return stream.SendMsg(text("you said " + request.GetValue()))
		case "HeaderFirst": // a watch with nothing to say for the moment
			if err := stream.SendHeader(metadata.Pairs("watching", "yes")); err != nil {
				return err
			}
			return stream.RecvMsg(text(""))
		case "EndsEarly": // an answer without having read the request
			return status.Error(codes.FailedPrecondition, "not listening")
		}
		return status.Error(codes.Unimplemented, method)
	})
	ctx := testContext(t)
	open := func(method string) grpc.ClientStream {
		stream, err := conn.NewStream(ctx, allKinds, strangeMethod+method)
		if err != nil {
			t.Fatal(err)
		}
		return stream
	}
	send := func(stream grpc.ClientStream, s string) {
		if err := stream.SendMsg(text(s)); err != nil {
			t.Fatal(err)
		}
	}
	wantEOF := func(stream grpc.ClientStream) {
		if err := stream.RecvMsg(text("")); !errors.Is(err, io.EOF) {
			t.Errorf("at the end: %v", err)
		}
	}

	stream := open("Server")
	send(stream, "x")
	for range 3 {
		if got := receive(t, stream); got != "x" {
			t.Errorf("got %q", got)
		}
	}
	wantEOF(stream)

	stream = open("Client")
	send(stream, "a")
	send(stream, "b")
	if err := stream.CloseSend(); err != nil {
		t.Fatal(err)
	}
	if got := receive(t, stream); got != "a+b" {
		t.Errorf("got %q", got)
	}
	wantEOF(stream)

	stream = open("ServerFirst")
	if got := receive(t, stream); got != "hello" {
		t.Errorf("got %q", got)
	}
	send(stream, "hi")
	if got := receive(t, stream); got != "you said hi" {
		t.Errorf("got %q", got)
	}
	wantEOF(stream)

	stream = open("HeaderFirst")
	header, err := stream.Header()
	if err != nil || !slices.Equal(header.Get("watching"), []string{"yes"}) {
		t.Errorf("header before the first message: %v, %v", header, err)
	}
	send(stream, "enough")
	wantEOF(stream)

	stream = open("EndsEarly")
	wantCode(t, stream.RecvMsg(text("")), codes.FailedPrecondition, "not listening")
}

func TestForwardDeadline(t *testing.T) { eachUnary(t, testForwardDeadline) }

func testForwardDeadline(t *testing.T, method string) {
	deadlines := make(chan time.Time, 1)
	conn := startStrange(t, func(_ string, stream grpc.ServerStream) error {
		deadline, ok := stream.Context().Deadline()
		if ok {
			deadlines <- deadline
		} else {
			deadlines <- time.Time{}
		}
		request := text("")
		if err := stream.RecvMsg(request); err != nil {
			return err
		}
		if request.GetValue() == "hang" {
			<-stream.Context().Done()
			return stream.Context().Err()
		}
		return stream.SendMsg(text("done"))
	})
	ctx, cancel := context.WithTimeout(context.Background(), time.Hour)
	defer cancel()
	if err := conn.Invoke(ctx, method, text("x"), text("")); err != nil {
		t.Fatal(err)
	}
	want, _ := ctx.Deadline()
	if got := <-deadlines; got.Sub(want).Abs() > testTimeout {
		t.Errorf("upstream's deadline is %v from the client's", got.Sub(want))
	}
	if err := conn.Invoke(context.Background(), method, text("x"), text("")); err != nil {
		t.Fatal(err)
	}
	if got := <-deadlines; !got.IsZero() {
		t.Errorf("a call without a deadline got one: %v", got)
	}
	ctx, cancel = context.WithTimeout(context.Background(), 100*time.Millisecond)
	defer cancel()
	err := conn.Invoke(ctx, method, text("hang"), text(""))
	wantCode(t, err, codes.DeadlineExceeded, "")
}

func TestForwardCancellation(t *testing.T) {
	t.Run("sending", func(t *testing.T) { testForwardCancellation(t, false) })
	t.Run("half-closed", func(t *testing.T) { testForwardCancellation(t, true) })
	eachUnary(t, testForwardUnaryCancellation)
}

// wantCanceledUpstream waits for how the context of the upstream's call has ended.
func wantCanceledUpstream(t *testing.T, ended <-chan error) {
	t.Helper()
	select {
	case err := <-ended:
		if !errors.Is(err, context.Canceled) {
			t.Errorf("upstream's context: %v", err)
		}
	case <-testContext(t).Done():
		t.Error("the upstream never learnt that the client has gone")
	}
}

func testForwardUnaryCancellation(t *testing.T, method string) {
	started, ended := make(chan struct{}), make(chan error, 1)
	conn := startStrange(t, func(_ string, stream grpc.ServerStream) error {
		close(started)
		<-stream.Context().Done()
		ended <- stream.Context().Err()
		return stream.Context().Err()
	})
	ctx, cancel := context.WithCancel(testContext(t))
	defer cancel()
	answered := make(chan error, 1)
	go func() { answered <- conn.Invoke(ctx, method, text("x"), text("")) }()
	<-started
	cancel()
	wantCode(t, <-answered, codes.Canceled, "")
	wantCanceledUpstream(t, ended)
}

// A client that ends a unary call without a request gets an answer, and the upstream hears nothing.
func TestForwardUnaryWithoutRequest(t *testing.T) {
	conn := startStrange(t, func(method string, _ grpc.ServerStream) error {
		t.Errorf("%s was called", method)
		return nil
	})
	stream, err := conn.NewStream(testContext(t), allKinds, runtimeapi.RuntimeService_Version_FullMethodName)
	if err != nil {
		t.Fatal(err)
	}
	if err := stream.CloseSend(); err != nil {
		t.Fatal(err)
	}
	wantCode(t, stream.RecvMsg(text("")), codes.Internal, "without a request")
}

func testForwardCancellation(t *testing.T, halfClosed bool) {
	ended := make(chan error, 1)
	started, eof := make(chan struct{}), make(chan struct{})
	conn := startStrange(t, func(_ string, stream grpc.ServerStream) error {
		close(started)
		if err := stream.RecvMsg(text("")); errors.Is(err, io.EOF) {
			close(eof)
		}
		<-stream.Context().Done()
		ended <- stream.Context().Err()
		return stream.Context().Err()
	})
	ctx, cancel := context.WithCancel(testContext(t))
	stream, err := conn.NewStream(ctx, allKinds, strangeMethod+"Watch")
	if err != nil {
		t.Fatal(err)
	}
	<-started
	// Nothing is read from the client any more, so that only the context can tell.
	if halfClosed {
		if err := stream.CloseSend(); err != nil {
			t.Fatal(err)
		}
		<-eof
	}
	cancel()
	wantCode(t, stream.RecvMsg(text("")), codes.Canceled, "")
	wantCanceledUpstream(t, ended)
}

func TestForwardLargeMessages(t *testing.T) { eachUnary(t, testForwardLargeMessages) }

func testForwardLargeMessages(t *testing.T, method string) {
	conn := startStrange(t, func(_ string, stream grpc.ServerStream) error {
		var message wrapperspb.BytesValue
		if err := stream.RecvMsg(&message); err != nil {
			return err
		}
		return stream.SendMsg(&message)
	})
	const size = 17 << 20 // more than the 16 MiB that the kubelet takes
	payload := make([]byte, 0, size)
	for i := range 7 * 256 {
		payload = append(payload, byte(i*7/3))
	}
	payload = bytes.Repeat(payload, size/len(payload)+1)[:size]
	echo := func(payload []byte, options ...grpc.CallOption) {
		t.Helper()
		start := time.Now()
		var reply wrapperspb.BytesValue
		if err := conn.Invoke(testContext(t), method, wrapperspb.Bytes(payload), &reply, options...); err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(reply.GetValue(), payload) {
			t.Errorf("%d bytes came back changed", len(payload))
		}
		t.Logf("%d bytes there and back in %v", len(payload), time.Since(start))
	}
	echo(payload)
	echo(payload[:256<<10], grpc.UseCompressor(gzip.Name))
}

func TestForwardMessageAboveTheLimit(t *testing.T) { eachUnary(t, testForwardMessageAboveTheLimit) }

func testForwardMessageAboveTheLimit(t *testing.T, method string) {
	upstream := newFakeUpstream(t, func(*grpc.Server) {}, grpc.UnknownServiceHandler(func(_ any, stream grpc.ServerStream) error {
		return stream.RecvMsg(text(""))
	}))
	narrow, err := NewUpstream(upstream.path, 1<<20)
	if err != nil {
		t.Fatal(err)
	}
	defer narrow.Close()
	_, fromClient := startServer(t, upstream.path, func(config *Config) { config.MaxMessageSize = 1 << 20 })
	_, toUpstream := startServer(t, upstream.path, func(config *Config) { config.Upstream = narrow })
	for _, conn := range []*grpc.ClientConn{fromClient, toUpstream} {
		err := conn.Invoke(testContext(t), method, wrapperspb.Bytes(make([]byte, 2<<20)), text(""))
		wantCode(t, err, codes.ResourceExhausted, "larger than max")
	}
}

// Fields and bytes that no cri-api knows must arrive.
func TestForwardUnknownFields(t *testing.T) {
	fake := &fakeRuntime{listContainers: func(request *runtimeapi.ListContainersRequest) (*runtimeapi.ListContainersResponse, error) {
		response := &runtimeapi.ListContainersResponse{}
		response.ProtoReflect().SetUnknown(request.ProtoReflect().GetUnknown())
		return response, nil
	}}
	upstream := newFakeUpstream(t, func(s *grpc.Server) { runtimeapi.RegisterRuntimeServiceServer(s, fake) })
	_, conn := startServer(t, upstream.path, nil)
	request := &runtimeapi.ListContainersRequest{}
	request.ProtoReflect().SetUnknown(appendEnv(nil, 999, "a", "b"))
	response, err := runtimeapi.NewRuntimeServiceClient(conn).ListContainers(testContext(t), request)
	if err != nil || !bytes.Equal(response.ProtoReflect().GetUnknown(), request.ProtoReflect().GetUnknown()) {
		t.Errorf("got %v, %v", response, err)
	}
}

func BenchmarkVersion(b *testing.B) {
	fake := &fakeRuntime{}
	upstream := newFakeUpstream(b, func(s *grpc.Server) { runtimeapi.RegisterRuntimeServiceServer(s, fake) })
	_, proxied := startServer(b, upstream.path, nil)
	for _, bench := range []struct {
		name string
		conn *grpc.ClientConn
	}{{"direct", dialSocket(b, upstream.path)}, {"proxied", proxied}} {
		b.Run(bench.name, func(b *testing.B) {
			client := runtimeapi.NewRuntimeServiceClient(bench.conn)
			durations := make([]time.Duration, 0, 1<<16)
			for b.Loop() {
				start := time.Now()
				if _, err := client.Version(b.Context(), &runtimeapi.VersionRequest{}); err != nil {
					b.Fatal(err)
				}
				durations = append(durations, time.Since(start))
			}
			slices.Sort(durations)
			b.ReportMetric(float64(durations[len(durations)/2].Microseconds()), "p50-µs")
			b.ReportMetric(float64(durations[len(durations)*99/100].Microseconds()), "p99-µs")
		})
	}
}
