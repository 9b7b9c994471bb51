package lifetime

import (
	"context"
	"errors"
	"io"
	"time"

	"github.com/streamshim/streamshim/pkg/session"
)

// ShutdownGrace is for clients to read the status at shutdown.
const ShutdownGrace = 2 * time.Second

// ClientGone is the outcome of a session whose client has gone.
func ClientGone(err error) session.Outcome {
	if errors.Is(err, io.EOF) {
		err = nil
	}
	return session.Outcome{Reason: "client-gone", ExitCode: -1, Err: err}
}

// Stopped is the outcome of a session whose context has ended.
func Stopped(ctx context.Context) session.Outcome {
	var end *session.EndError
	if errors.As(context.Cause(ctx), &end) {
		return session.Outcome{Reason: end.Reason, ExitCode: -1, Err: end}
	}
	return session.Outcome{Reason: "stopped", ExitCode: -1, Err: context.Cause(ctx)}
}

// WithGrace is a context that outlasts ctx by ShutdownGrace: a session that is told to end, before
// or while its client takes the rest, still gets it to a client who reads.
func WithGrace(ctx context.Context) (context.Context, context.CancelFunc) {
	patience, cancel := context.WithCancel(context.WithoutCancel(ctx))
	stop := context.AfterFunc(ctx, func() { time.AfterFunc(ShutdownGrace, cancel) })
	return patience, func() {
		stop()
		cancel()
	}
}
