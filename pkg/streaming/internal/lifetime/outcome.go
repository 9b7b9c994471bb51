package lifetime

import (
	"context"
	"errors"
	"io"
	"time"

	"github.com/streamshim/streamshim/pkg/session"
)

// ShutdownGrace is how long clients have to read the status at shutdown.
const ShutdownGrace = 2 * time.Second

// ClientGone returns the outcome of a session whose client has gone.
func ClientGone(err error) session.Outcome {
	if errors.Is(err, io.EOF) {
		err = nil
	}
	return session.Outcome{Reason: "client-gone", ExitCode: -1, Err: err}
}

// Stopped returns the outcome of a session whose context has ended.
func Stopped(ctx context.Context) session.Outcome {
	var end *session.EndError
	if errors.As(context.Cause(ctx), &end) {
		return session.Outcome{Reason: end.Reason, ExitCode: -1, Err: end}
	}
	return session.Outcome{Reason: "stopped", ExitCode: -1, Err: context.Cause(ctx)}
}
