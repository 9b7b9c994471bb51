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
)

// keepaliveMinTime is how often a client may ping. gRPC's own default, five minutes, ends
// connections that the upstream itself might allow.
const keepaliveMinTime = time.Second

// callWorkers is how many goroutines wait for calls, with stacks that have grown to what a call takes;
// calls beyond them get one of their own. Together with forwardUnary it saves a ninth of the time that
// forwarding a small call takes.
const callWorkers = 4

// Config is what a Server needs. Upstream, Streams and Runner are required.
type Config struct {
	Upstream *Upstream
	Streams  StreamServer
	Runner   Runner

	// StreamErrorCode says which code an error of Streams is for a client: ResourceExhausted when
	// too many URLs wait to be redeemed, Unavailable when the server is shutting down. Nil, and
	// codes.OK, mean that the error is an internal one.
	StreamErrorCode func(error) codes.Code

	// MaxMessageSize bounds one message from a client, in bytes; 0 means DefaultMaxMessageSize.
	MaxMessageSize int

	// Logger gets one debug record for each call. Nil means none.
	Logger *slog.Logger
	// BeginSync is asked before each ExecSync, whoever serves it. An error refuses it and is treated
	// like one of Streams; end is called once with how it went and how many bytes of output it gave.
	// Nil means that nobody asks.
	BeginSync BeginSyncFunc
	// Observe is called at the end of each call with its full method ("/runtime.v1.RuntimeService/Exec"),
	// also of methods that nobody knows: bound the names before they become labels. It must not
	// block. Nil means none.
	Observe func(method string, code codes.Code, duration time.Duration)
	// Trace is asked for a span for each call that is answered here. Nil means none; the client's
	// own trace context then goes on to the session.
	Trace TraceFunc
}

// Server serves the CRI. Its methods may be called from several goroutines.
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

// NewServer makes a server that does not listen yet. The caller ends it with Shutdown, whether it has
// served or not, and closes what is in the config, which the server does not own, after that.
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
		// What the upstream connection let in may go out.
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

// Shutdown stops accepting calls and waits for those that run until ctx is done, then breaks them
// off. Watches such as GetContainerEvents never end by themselves.
func (s *Server) Shutdown(ctx context.Context) { s.server.Shutdown(ctx) }

func (s *Server) observeUnary(ctx context.Context, request any, info *grpc.UnaryServerInfo, handle grpc.UnaryHandler) (any, error) {
	start := time.Now()
	ctx, end := s.traced(ctx, info.FullMethod)
	var response any
	err := s.server.Counted(func() (err error) {
		response, err = handle(ctx, request)
		return err
	})
	end(err)
	s.observed(ctx, info.FullMethod, err, time.Since(start))
	return response, err
}

func (s *Server) observeStream(server any, stream grpc.ServerStream, info *grpc.StreamServerInfo, handle grpc.StreamHandler) error {
	start := time.Now()
	var err error
	if isWatch(info.FullMethod) {
		err = s.server.Watched(stream, func(stream grpc.ServerStream) error { return handle(server, stream) })
	} else {
		err = s.server.Counted(func() error { return handle(server, stream) })
	}
	s.observed(stream.Context(), info.FullMethod, err, time.Since(start))
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
