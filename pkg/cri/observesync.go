package cri

import (
	"context"
	"errors"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/streamshim/streamshim/pkg/session"
	"github.com/streamshim/streamshim/pkg/workload"
)

// BeginSyncFunc is told that an ExecSync begins; see Config.BeginSync.
type BeginSyncFunc func(ctx context.Context, info session.Info) (end func(o session.Outcome, output int64), err error)

func (s *Server) beginSync(ctx context.Context, c workload.Container, request *runtimeapi.ExecSyncRequest, envs []string) (func(session.Outcome, int64), error) {
	if s.askSync == nil {
		return func(session.Outcome, int64) {}, nil
	}
	return s.askSync(ctx, session.Info{
		Kind: session.ExecSync, Target: c.Target, PodLabels: c.PodLabels, Protocol: "CRI", Command: request.GetCmd(),
		User: session.UserOf(c), AuditID: session.AuditID(envs),
	})
}

// errNotStarted stands for the error of a command that could not be started. Its own text names the
// command, whatever audit.command says.
var errNotStarted = errors.New("the command could not be started")

// failedSync is the outcome of an ExecSync that ended with an error.
func failedSync(err error) session.Outcome {
	reason := "failed"
	switch status.Code(err) {
	case codes.DeadlineExceeded:
		reason = "timeout"
	case codes.Canceled:
		reason = "client-gone"
	case codes.Unknown: // execSyncError, and the runtimes' own
		err = errNotStarted
	}
	return session.Outcome{Reason: reason, ExitCode: -1, Err: errors.New(status.Convert(err).Message())}
}

// forwardedSync is the outcome of an ExecSync that the upstream has answered.
func forwardedSync(answer *frame, err error) (o session.Outcome, output int64) {
	if err != nil {
		return failedSync(err), 0
	}
	var response runtimeapi.ExecSyncResponse
	if proto.Unmarshal(answer.data.Materialize(), &response) != nil {
		return session.Outcome{Reason: "exited", ExitCode: -1}, 0 // not for us to judge
	}
	return session.Outcome{Reason: "exited", ExitCode: int(response.GetExitCode())},
		int64(len(response.GetStdout()) + len(response.GetStderr()))
}
