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

// BeginSyncFunc is called when an ExecSync begins; see Config.BeginSync.
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

// errNotStarted replaces the error of a command that could not be started. That error's text names the command,
// whatever audit.command says.
var errNotStarted = errors.New("the command could not be started")

// failedSync returns the outcome of an ExecSync that ended with an error.
func failedSync(err error) session.Outcome {
	reason := "failed"
	switch status.Code(err) {
	case codes.DeadlineExceeded:
		reason = "timeout"
	case codes.Canceled:
		reason = "client-gone"
	case codes.Unknown: // from execSyncError, and from the runtimes
		err = errNotStarted
	}
	return session.Outcome{Reason: reason, ExitCode: -1, Err: errors.New(status.Convert(err).Message())}
}

// forwardedSync returns the outcome of an ExecSync that the upstream answered.
func forwardedSync(answer *frame, err error) (o session.Outcome, output int64) {
	if err != nil {
		return failedSync(err), 0
	}
	var response runtimeapi.ExecSyncResponse
	if proto.Unmarshal(answer.data.Materialize(), &response) != nil {
		return session.Outcome{Reason: "exited", ExitCode: -1}, 0 // unreadable here, but the client may understand it
	}
	return session.Outcome{Reason: "exited", ExitCode: int(response.GetExitCode())},
		int64(len(response.GetStdout()) + len(response.GetStderr()))
}
