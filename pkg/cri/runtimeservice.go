package cri

import (
	"context"
	"errors"
	"math"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/mem"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/streamshim/streamshim/pkg/session"
	"github.com/streamshim/streamshim/pkg/streaming/portforward"
	"github.com/streamshim/streamshim/pkg/streaming/remotecommand"
	"github.com/streamshim/streamshim/pkg/workload"
)

// runtimeServiceDesc lists only the methods that are answered here: a missing method reaches the
// UnknownServiceHandler, while one that is registered but not implemented would be answered with Unimplemented.
var runtimeServiceDesc = grpc.ServiceDesc{
	ServiceName: runtimeapi.RuntimeService_ServiceDesc.ServiceName,
	HandlerType: (*any)(nil),
	Methods: []grpc.MethodDesc{
		unaryMethod(runtimeapi.RuntimeService_Exec_FullMethodName, "Exec", (*Server).exec),
		unaryMethod(runtimeapi.RuntimeService_ExecSync_FullMethodName, "ExecSync", (*Server).execSync),
		unaryMethod(runtimeapi.RuntimeService_Attach_FullMethodName, "Attach", (*Server).attach),
		unaryMethod(runtimeapi.RuntimeService_PortForward_FullMethodName, "PortForward", (*Server).portForward),
	},
}

// unaryMethod describes a method whose handler gets the request as bytes: it may have to pass them on, and reads
// fields from them that are newer than our cri-api.
func unaryMethod(fullName, name string, handle func(*Server, context.Context, []byte) (any, error)) grpc.MethodDesc {
	return grpc.MethodDesc{
		MethodName: name,
		Handler: func(server any, ctx context.Context, decode func(any) error, interceptor grpc.UnaryServerInterceptor) (any, error) {
			var message frame
			if err := decode(&message); err != nil {
				return nil, err
			}
			request := message.data.Materialize()
			message.free()
			info := &grpc.UnaryServerInfo{Server: server, FullMethod: fullName}
			return interceptor(ctx, request, info, func(ctx context.Context, request any) (any, error) {
				return handle(server.(*Server), ctx, request.([]byte))
			})
		},
	}
}

func (s *Server) exec(ctx context.Context, raw []byte) (any, error) {
	var request runtimeapi.ExecRequest
	envs, err := decode(raw, &request, execRequestEnvs)
	if err != nil {
		return nil, err
	}
	if request.GetContainerId() == "" {
		return nil, status.Error(codes.InvalidArgument, "missing required container_id")
	}
	if len(request.GetCmd()) == 0 {
		return nil, status.Error(codes.InvalidArgument, "missing required cmd")
	}
	if err := validateStreams(&request); err != nil {
		return nil, err
	}
	container, err := s.resolver.running(ctx, request.GetContainerId())
	if err != nil {
		return nil, err
	}
	exec := &remotecommand.Request{
		Container: container,
		Command: workload.Command{
			Args:   request.GetCmd(),
			Env:    envs,
			Stdin:  request.GetStdin(),
			Stdout: request.GetStdout(),
			Stderr: request.GetStderr(),
			TTY:    request.GetTty(),
		},
		Trace: traceOf(ctx),
	}
	if container.Runtime == "" {
		exec.Call = raw
	}
	url, err := s.streams.Exec(exec)
	if err != nil {
		return nil, s.streamError(err)
	}
	return &runtimeapi.ExecResponse{Url: url}, nil
}

func (s *Server) attach(ctx context.Context, raw []byte) (any, error) {
	var request runtimeapi.AttachRequest
	if err := proto.Unmarshal(raw, &request); err != nil {
		return nil, status.Errorf(codes.Internal, "AttachRequest: %v", err)
	}
	if request.GetContainerId() == "" {
		return nil, status.Error(codes.InvalidArgument, "missing required container_id")
	}
	if err := validateStreams(&request); err != nil {
		return nil, err
	}
	container, err := s.resolver.running(ctx, request.GetContainerId())
	if err != nil {
		return nil, err
	}
	url, err := s.streams.Attach(&remotecommand.Request{
		Container: container,
		Command: workload.Command{
			Stdin:  request.GetStdin(),
			Stdout: request.GetStdout(),
			Stderr: request.GetStderr(),
			TTY:    request.GetTty(),
		},
		Trace: traceOf(ctx),
		Call:  raw,
	})
	if err != nil {
		return nil, s.streamError(err)
	}
	return &runtimeapi.AttachResponse{Url: url}, nil
}

// streamingMethods are the calls that are answered with a streaming URL.
var streamingMethods = map[session.Kind]string{
	session.Exec:   runtimeapi.RuntimeService_Exec_FullMethodName,
	session.Attach: runtimeapi.RuntimeService_Attach_FullMethodName,
}

// StreamingURL asks the upstream for its own streaming URL of an exec or attach, with the client's unchanged call
// and within its trace.
func (u *Upstream) StreamingURL(ctx context.Context, kind session.Kind, call []byte, trace map[string]string) (string, error) {
	response := &runtimeapi.ExecResponse{} // an AttachResponse has the same field
	err := u.conn.Invoke(withTrace(ctx, trace), streamingMethods[kind], newFrame(call), response, grpc.ForceCodecV2(codec))
	return response.GetUrl(), err
}

func (s *Server) portForward(ctx context.Context, raw []byte) (any, error) {
	var request runtimeapi.PortForwardRequest
	if err := proto.Unmarshal(raw, &request); err != nil {
		return nil, status.Errorf(codes.Internal, "PortForwardRequest: %v", err)
	}
	if request.GetPodSandboxId() == "" {
		return nil, status.Error(codes.InvalidArgument, "missing required pod_sandbox_id")
	}
	sandbox, err := s.resolver.readySandbox(ctx, request.GetPodSandboxId())
	if err != nil {
		return nil, err
	}
	url, err := s.streams.PortForward(&portforward.Request{
		Sandbox: sandbox,
		Ports:   request.GetPort(),
		Trace:   traceOf(ctx),
	})
	if err != nil {
		return nil, s.streamError(err)
	}
	return &runtimeapi.PortForwardResponse{Url: url}, nil
}

func (s *Server) execSync(ctx context.Context, raw []byte) (any, error) {
	var request runtimeapi.ExecSyncRequest
	envs, err := decode(raw, &request, execSyncRequestEnvs)
	if err != nil {
		return nil, err
	}
	if request.GetContainerId() == "" {
		return nil, status.Error(codes.InvalidArgument, "missing required container_id")
	}
	if len(request.GetCmd()) == 0 {
		return nil, status.Error(codes.InvalidArgument, "missing required cmd")
	}
	if request.GetTimeout() < 0 {
		return nil, status.Error(codes.InvalidArgument, "timeout must not be negative")
	}
	// The upstream checks the state itself.
	container, known := s.resolver.containers.peek(request.GetContainerId())
	if !known || container.Runtime != "" {
		if container, err = s.resolver.running(ctx, request.GetContainerId()); err != nil {
			return nil, err
		}
	}
	end, err := s.beginSync(ctx, container, &request, envs)
	if err != nil {
		return nil, s.streamError(err)
	}
	if container.Runtime == "" {
		answer := &frame{}
		err := s.invokeUpstream(ctx, runtimeapi.RuntimeService_ExecSync_FullMethodName, newFrame(raw), answer)
		end(forwardedSync(answer, err))
		return answer, err
	}
	timeout := time.Duration(min(request.GetTimeout(), math.MaxInt64/int64(time.Second))) * time.Second
	result, err := s.runner.RunSync(ctx, container, workload.SyncCommand{
		Args:    request.GetCmd(),
		Env:     envs,
		Timeout: timeout,
	})
	output := int64(len(result.Stdout) + len(result.Stderr))
	if err != nil {
		if refused := (*session.RefusedError)(nil); errors.As(err, &refused) {
			err = s.streamError(refused)
		} else {
			err = execSyncError(ctx, timeout, err)
		}
		end(failedSync(err), output)
		return nil, err
	}
	end(session.Outcome{Reason: "exited", ExitCode: result.ExitCode}, output)
	return &runtimeapi.ExecSyncResponse{Stdout: result.Stdout, Stderr: result.Stderr, ExitCode: int32(result.ExitCode)}, nil
}

// execSyncError says why a command has no exit code.
//
// A command that could not be started is reported as an error, not as exit code 127. The kubelet discards a
// probe's result after an error but counts an exit code as a failed probe (prober.runProbe). So the exit code
// would restart containers that have run for years with a mistyped liveness probe. containerd and CRI-O return
// Unknown, too.
func execSyncError(ctx context.Context, timeout time.Duration, err error) error {
	if ctx.Err() != nil {
		return status.FromContextError(ctx.Err()).Err()
	}
	// The kubelet takes DeadlineExceeded for a probe that failed by timeout (ExecProbeTimeout).
	if errors.Is(err, context.DeadlineExceeded) {
		return status.Errorf(codes.DeadlineExceeded, "failed to exec in container: timeout %v exceeded: %v", timeout, context.DeadlineExceeded)
	}
	var start interface{ ExitCode() int }
	if errors.As(err, &start) {
		return status.Errorf(codes.Unknown, "failed to exec in container: %v", err)
	}
	return status.Errorf(codes.Internal, "failed to exec in container: %v", err)
}

func (s *Server) streamError(err error) error {
	code := codes.OK
	if s.streamErrorCode != nil {
		code = s.streamErrorCode(err)
	}
	if code == codes.OK {
		code = codes.Internal
	}
	return status.Error(code, err.Error())
}

// decode decodes a request together with its environment variables.
func decode(raw []byte, request proto.Message, envsField protowire.Number) ([]string, error) {
	name := request.ProtoReflect().Descriptor().Name()
	if err := proto.Unmarshal(raw, request); err != nil {
		return nil, status.Errorf(codes.Internal, "%s: %v", name, err)
	}
	envs, err := parseEnvs(raw, envsField)
	if err != nil {
		return nil, status.Errorf(codes.InvalidArgument, "%s: %v", name, err)
	}
	return envs, nil
}

// streamsRequest is the common part of Exec and Attach requests.
type streamsRequest interface {
	GetStdin() bool
	GetStdout() bool
	GetStderr() bool
	GetTty() bool
}

// validateStreams checks a request as the CRI's comments on ExecRequest and AttachRequest demand.
func validateStreams(request streamsRequest) error {
	if request.GetTty() && request.GetStderr() {
		return status.Error(codes.InvalidArgument, "tty and stderr cannot both be true")
	}
	if !request.GetStdin() && !request.GetStdout() && !request.GetStderr() {
		return status.Error(codes.InvalidArgument, "one of stdin, stdout, or stderr must be set")
	}
	return nil
}

func newFrame(raw []byte) *frame {
	return &frame{data: mem.BufferSlice{mem.SliceBuffer(raw)}}
}
