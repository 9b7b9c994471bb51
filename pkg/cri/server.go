package cri

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/keepalive"
	"google.golang.org/grpc/status"

	"github.com/streamshim/streamshim/pkg/cri/internal/quiet"
	"github.com/streamshim/streamshim/pkg/rescue"
)

// keepaliveMinTime is how often a client may ping. gRPC's default of five minutes ends connections that the
// upstream itself might allow.
const keepaliveMinTime = time.Second

// callWorkers is the number of goroutines that wait for calls, with stacks already grown to what a call needs.
// Further calls get goroutines of their own. Together with forwardUnary this saves a ninth of the time for
// forwarding a small call.
const callWorkers = 4

// Config configures a Server. Upstream, Streams and Runner are required.
type Config struct {
	Upstream *Upstream
	Streams  StreamServer
	Runner   Runner

	// StreamErrorCode maps an error of Streams to a code for the client: ResourceExhausted if too many URLs wait
	// to be redeemed, Unavailable if the server is shutting down. If it is nil or returns codes.OK, the error is
	// internal.
	StreamErrorCode func(error) codes.Code

	// MaxMessageSize bounds one message from a client, in bytes. 0 means DefaultMaxMessageSize.
	MaxMessageSize int

	// Logger gets one debug record per call. Nil disables it.
	Logger *slog.Logger
	// BeginSync is called before each ExecSync, whoever serves it. An error refuses the call and is treated like
	// one of Streams. end is called once with the outcome and the number of bytes of output. Nil admits all.
	BeginSync BeginSyncFunc
	// Observe is called at the end of each call with its full method ("/runtime.v1.RuntimeService/Exec"). That
	// includes unknown methods: bound the names before using them as labels. It must not block. Nil disables it.
	Observe func(method string, code codes.Code, duration time.Duration)
	// Trace creates a span for each call that is answered here. Nil disables it; the client's own trace context
	// then passes to the session.
	Trace TraceFunc
}

// Server serves the CRI. Its methods are safe for concurrent use.
type Server struct {
	upstream        *Upstream
	streams         StreamServer
	runner          Runner
	streamErrorCode func(error) codes.Code
	log             *slog.Logger
	observe         func(string, codes.Code, time.Duration)
	askSync         BeginSyncFunc
	trace           TraceFunc

	resolver *resolver
	options  []grpc.ServerOption
	server   *quiet.Server
}

// NewServer returns a server that does not listen yet. The caller must call Shutdown, whether or not the server
// has served, and only then close what is in config, which the server does not own.
func NewServer(config Config) (*Server, error) {
	if config.Upstream == nil || config.Streams == nil || config.Runner == nil {
		return nil, errors.New("cri: a server needs an upstream, a stream server and a runner")
	}
	s := &Server{
		upstream:        config.Upstream,
		streams:         config.Streams,
		runner:          config.Runner,
		streamErrorCode: config.StreamErrorCode,
		log:             config.Logger,
		observe:         config.Observe,
		askSync:         config.BeginSync,
		trace:           config.Trace,
	}
	if s.log == nil {
		s.log = slog.New(slog.DiscardHandler)
	}
	var err error
	if s.resolver, err = newResolver(s.upstream, s.log); err != nil {
		return nil, err
	}
	maxMessageSize := config.MaxMessageSize
	if maxMessageSize == 0 {
		maxMessageSize = DefaultMaxMessageSize
	}
	s.options = []grpc.ServerOption{
		grpc.ForceServerCodecV2(codec),
		grpc.UnknownServiceHandler(s.forward),
		grpc.NumStreamWorkers(callWorkers),
		grpc.MaxRecvMsgSize(maxMessageSize),
		// Whatever the upstream connection let in may go out.
		grpc.MaxSendMsgSize(max(maxMessageSize, DefaultMaxMessageSize)),
		grpc.KeepaliveEnforcementPolicy(keepalive.EnforcementPolicy{MinTime: keepaliveMinTime, PermitWithoutStream: true}),
		grpc.UnaryInterceptor(s.observeUnary),
		grpc.StreamInterceptor(s.observeStream),
	}
	s.server = quiet.NewServer(s.newGRPC)
	return s, nil
}

func (s *Server) newGRPC() *grpc.Server {
	server := grpc.NewServer(s.options...)
	server.RegisterService(&runtimeServiceDesc, s)
	return server
}

// Serve answers calls until Shutdown, then returns nil. It closes the listener.
func (s *Server) Serve(listener net.Listener) error {
	if err := s.server.Serve(listener); err != nil {
		return fmt.Errorf("serve the CRI on %s: %w", listener.Addr(), err)
	}
	return nil
}

// Shutdown stops accepting calls and waits for those in progress until ctx is done, then breaks them off. Watches
// such as GetContainerEvents never end by themselves.
func (s *Server) Shutdown(ctx context.Context) { s.server.Shutdown(ctx) }

func (s *Server) observeUnary(ctx context.Context, request any, info *grpc.UnaryServerInfo, handle grpc.UnaryHandler) (any, error) {
	start := time.Now()
	ctx, end := s.traced(ctx, info.FullMethod)
	var response any
	err := s.server.Counted(func() error {
		return s.rescued(info.FullMethod, func() (err error) {
			response, err = handle(ctx, request)
			return err
		})
	})
	end(err)
	s.observed(ctx, info.FullMethod, err, time.Since(start))
	return response, err
}

func (s *Server) observeStream(server any, stream grpc.ServerStream, info *grpc.StreamServerInfo, handle grpc.StreamHandler) error {
	start := time.Now()
	var err error
	if isWatch(info.FullMethod) {
		err = s.server.Watched(stream, func(stream grpc.ServerStream) error {
			return s.rescued(info.FullMethod, func() error { return handle(server, stream) })
		})
	} else {
		err = s.server.Counted(func() error {
			return s.rescued(info.FullMethod, func() error { return handle(server, stream) })
		})
	}
	s.observed(stream.Context(), info.FullMethod, err, time.Since(start))
	return err
}

// rescued has a panic in a call end that call, not the process.
func (s *Server) rescued(method string, call func() error) (err error) {
	rescue.Call(func(fault *rescue.Panic) {
		s.log.Error("a CRI call has panicked", "method", method, "panic", fault.Value, "stack", string(fault.Stack))
		err = status.Error(codes.Internal, "the call was ended because of a fault in streamshim, which its log tells of")
	}, func() { err = call() })
	return err
}

func (s *Server) observed(ctx context.Context, method string, err error, duration time.Duration) {
	code := status.Code(err)
	if s.observe != nil {
		s.observe(method, code, duration)
	}
	if s.log.Enabled(ctx, slog.LevelDebug) {
		s.log.LogAttrs(ctx, slog.LevelDebug, "CRI call", slog.String("method", method), slog.String("code", code.String()), slog.Duration("duration", duration))
	}
}
