package cri

import (
	"context"
	"fmt"
	"net"
	"strings"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/connectivity"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/mem"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/streamshim/streamshim/pkg/endpoint"
)

const (
	// DefaultMaxMessageSize bounds one gRPC message in either direction, in bytes. The kubelet accepts at most 16
	// MiB; the rest is for other clients.
	DefaultMaxMessageSize = 64 << 20

	// A restarted runtime must be found again within about a second.
	reconnectBaseDelay = 100 * time.Millisecond
	reconnectMaxDelay  = time.Second
	// connectTimeout bounds one connection attempt, including the HTTP/2 preface.
	connectTimeout = 3 * time.Second
	// readyTimeout is how long a call waits for a connection to an upstream that accepts again.
	readyTimeout = time.Second
)

// Upstream is the connection to the container runtime's own CRI socket. It connects at the first call and survives
// restarts of the runtime: while the runtime is away, calls fail at once with codes.Unavailable, and the first
// call after its return works. Its methods are safe for concurrent use.
type Upstream struct {
	endpoint string
	path     string
	conn     *grpc.ClientConn
	runtime  runtimeapi.RuntimeServiceClient
}

// NewUpstream prepares the connection to a runtime endpoint, "unix:///run/containerd/containerd.sock" or a plain
// absolute path. It does not connect. maxMessageSize is in bytes; 0 means DefaultMaxMessageSize. The caller must
// close the Upstream.
func NewUpstream(address string, maxMessageSize int) (*Upstream, error) {
	path, err := endpoint.Path(address)
	if err != nil {
		return nil, fmt.Errorf("upstream endpoint: %w", err)
	}
	if maxMessageSize == 0 {
		maxMessageSize = DefaultMaxMessageSize
	}
	u := &Upstream{endpoint: "unix://" + path, path: path}
	u.conn, err = grpc.NewClient(u.endpoint,
		grpc.WithTransportCredentials(insecure.NewCredentials()),
		// This is what the kubelet sends. Servers that check it refuse the default, the escaped path of the
		// socket.
		grpc.WithAuthority("localhost"),
		grpc.WithConnectParams(grpc.ConnectParams{
			Backoff: backoff.Config{
				BaseDelay:  reconnectBaseDelay,
				Multiplier: 1.6,
				Jitter:     0.2,
				MaxDelay:   reconnectMaxDelay,
			},
			MinConnectTimeout: connectTimeout,
		}),
		grpc.WithIdleTimeout(0),
		// A call may change the node's state, so only the caller may decide to repeat it. gRPC still resends calls
		// that the upstream certainly has not seen.
		grpc.WithDisableRetry(),
		grpc.WithDisableServiceConfig(),
		grpc.WithDefaultCallOptions(
			grpc.MaxCallRecvMsgSize(maxMessageSize),
			grpc.MaxCallSendMsgSize(maxMessageSize),
		),
		grpc.WithUnaryInterceptor(func(ctx context.Context, method string, req, reply any, conn *grpc.ClientConn, invoke grpc.UnaryInvoker, opts ...grpc.CallOption) error {
			if err := u.ready(ctx); err != nil {
				return err
			}
			return u.nameEndpoint(invoke(ctx, method, req, reply, conn, opts...))
		}),
		grpc.WithStreamInterceptor(func(ctx context.Context, desc *grpc.StreamDesc, conn *grpc.ClientConn, method string, open grpc.Streamer, opts ...grpc.CallOption) (grpc.ClientStream, error) {
			if err := u.ready(ctx); err != nil {
				return nil, err
			}
			stream, err := open(ctx, desc, conn, method, opts...)
			return stream, u.nameEndpoint(err)
		}),
	)
	if err != nil {
		return nil, fmt.Errorf("upstream endpoint %q: %w", u.endpoint, err)
	}
	u.runtime = runtimeapi.NewRuntimeServiceClient(u.conn)
	return u, nil
}

// Endpoint returns the upstream's address, always in the form unix:///path.
func (u *Upstream) Endpoint() string { return u.endpoint }

// Version returns the upstream's version. It takes the path of forwarded calls, so it fails if those do.
func (u *Upstream) Version(ctx context.Context) (*runtimeapi.VersionResponse, error) {
	response := &runtimeapi.VersionResponse{}
	return response, u.callForwarded(ctx, runtimeapi.RuntimeService_Version_FullMethodName, &runtimeapi.VersionRequest{}, response)
}

// Status returns the upstream's conditions, by the same path.
func (u *Upstream) Status(ctx context.Context) (*runtimeapi.StatusResponse, error) {
	response := &runtimeapi.StatusResponse{}
	return response, u.callForwarded(ctx, runtimeapi.RuntimeService_Status_FullMethodName, &runtimeapi.StatusRequest{}, response)
}

// callForwarded makes a call of our own as if it were a client's that is forwarded.
func (u *Upstream) callForwarded(ctx context.Context, method string, request, response proto.Message) error {
	encoded, err := proto.Marshal(request)
	if err != nil {
		return fmt.Errorf("encode %T: %w", request, err)
	}
	asked := frame{mem.BufferSlice{mem.SliceBuffer(encoded)}}
	var answered frame
	defer answered.free()
	if err := u.conn.Invoke(ctx, method, &asked, &answered, forwardOptions(ctx)...); err != nil {
		return err
	}
	if err := proto.Unmarshal(answered.data.Materialize(), response); err != nil {
		return fmt.Errorf("decode the answer to %s: %w", method, err)
	}
	return nil
}

// Close closes the connection and ends every call on it.
func (u *Upstream) Close() error { return u.conn.Close() }

// ready waits for a working connection before a call is made. Otherwise gRPC could fail the call with an earlier
// attempt's error, even while the connection's state does not yet show that the attempt has failed.
func (u *Upstream) ready(ctx context.Context) error {
	for {
		state := u.conn.GetState()
		switch state {
		case connectivity.Ready, connectivity.Shutdown: // the call's own error will tell
			return nil
		case connectivity.TransientFailure:
			return u.reconnect(ctx)
		case connectivity.Idle:
			u.conn.Connect()
		}
		if !u.conn.WaitForStateChange(ctx, state) {
			return status.FromContextError(ctx.Err()).Err()
		}
	}
}

// reconnect keeps calls from suffering the pause between connection attempts, which lasts up to a second after the
// runtime is back. A refused connection to a Unix socket costs only microseconds, so the calls themselves probe
// for it.
func (u *Upstream) reconnect(ctx context.Context) error {
	dialer := net.Dialer{Timeout: readyTimeout}
	probe, err := dialer.DialContext(ctx, "unix", u.path)
	if err != nil {
		return u.unavailable(err.Error())
	}
	probe.Close()

	ctx, cancel := context.WithTimeout(ctx, readyTimeout)
	defer cancel()
	u.conn.ResetConnectBackoff()
	for {
		state := u.conn.GetState()
		switch state {
		case connectivity.Ready, connectivity.Shutdown:
			return nil
		case connectivity.Idle:
			u.conn.Connect()
		}
		if !u.conn.WaitForStateChange(ctx, state) {
			return u.unavailable("it accepts connections and does not answer")
		}
	}
}

// nameEndpoint adds the upstream's name to a failure to reach it. It leaves responses of a reachable upstream
// unchanged.
func (u *Upstream) nameEndpoint(err error) error {
	s, ok := status.FromError(err)
	if !ok || s.Code() != codes.Unavailable || strings.Contains(s.Message(), u.endpoint) {
		return err
	}
	// The connection's state follows its end only after a moment.
	if u.conn.GetState() != connectivity.Ready || !u.accepts() {
		return u.unavailable(s.Message())
	}
	return err
}

func (u *Upstream) accepts() bool {
	probe, err := net.DialTimeout("unix", u.path, readyTimeout)
	if err != nil {
		return false
	}
	probe.Close()
	return true
}

func (u *Upstream) unavailable(reason string) error {
	return status.Errorf(codes.Unavailable, "container runtime at %s cannot be reached: %s", u.endpoint, reason)
}
