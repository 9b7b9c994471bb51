package remotecommand

import (
	"context"
	"fmt"
	"time"

	"github.com/streamshim/streamshim/pkg/rescue"
	"github.com/streamshim/streamshim/pkg/session"
	"github.com/streamshim/streamshim/pkg/streaming/buffers"
	"github.com/streamshim/streamshim/pkg/streaming/remotecommand/internal/relay"
	"github.com/streamshim/streamshim/pkg/workload"
)

// StartGate bounds how many commands start at the same time.
type StartGate interface {
	// Acquire waits for the session's turn. Release ends the turn; it is nil with an error. The error is a
	// *session.RefusedError if too many wait already, or the context's.
	Acquire(ctx context.Context, info session.Info) (release func(), err error)
}

// startFunc starts a command.
type startFunc = func(context.Context, workload.Command) (Process, error)

// startWhenAllowed makes a start wait for its turn. It is for commands that are started here. What the upstream starts costs
// nothing here and takes no turn, so that an upstream that hangs does not block local starts.
func startWhenAllowed(gate StartGate, info session.Info, start startFunc) startFunc {
	if gate == nil {
		return start
	}
	return func(ctx context.Context, c workload.Command) (Process, error) {
		release, err := gate.Acquire(ctx, info)
		if err != nil {
			return nil, err
		}
		defer release()
		return start(ctx, c)
	}
}

// start returns how a request's command is started: either relayed to the upstream, or started here in its turn.
func (c Config) start(kind session.Kind, request *Request, buffers *buffers.Share, report rescue.Report) startFunc {
	if kind == session.Attach {
		// The end of one client's input ends the container's input only if stdin_once says so. Otherwise containerd
		// ends the whole session at the end of input. Scripts rely on that, and so does crictl's ctrl-P ctrl-Q at a
		// terminal. So the end is passed on, but only after the answer to the last line had time to arrive.
		stdinGrace := detachGrace
		switch {
		case request.Command.TTY:
		case request.Container.StdinOnce:
			stdinGrace = 0
		case c.AttachStays:
			stdinGrace = -1
		}
		return c.relayed(kind, request, relay.Options{Buffer: c.AttachBuffer, StdinGrace: stdinGrace, Buffers: buffers, Report: report})
	}
	if request.Container.Runtime == "" {
		return c.relayed(kind, request, relay.Options{Buffers: buffers, Report: report})
	}
	return startWhenAllowed(c.Starts, request.Info(kind), func(ctx context.Context, command workload.Command) (Process, error) {
		return c.Runtime.Start(ctx, request.Container, command)
	})
}

const (
	// detachGrace is how long a container must have been silent, after the client's input has ended, before the client
	// is detached, so that the answer to the last line reaches it (cri-tools#269).
	detachGrace = time.Second
	// relayTimeout bounds getting a URL from the upstream, connecting to it, and the upgrade.
	relayTimeout = 30 * time.Second
)

// relayed returns a start that relays a request to the upstream.
func (c Config) relayed(kind session.Kind, request *Request, options relay.Options) startFunc {
	return func(ctx context.Context, command workload.Command) (Process, error) {
		ctx, cancel := context.WithTimeout(ctx, relayTimeout)
		defer cancel()
		target, err := c.Runtime.StreamingURL(ctx, kind, request.Call, request.Trace)
		if err != nil {
			return nil, fmt.Errorf("ask the upstream for its streaming URL: %w", err)
		}
		upstream, err := relay.Start(ctx, target, command, options)
		if err != nil {
			return nil, err // a nil *relay.Relay would not be a nil interface
		}
		return upstream, nil
	}
}
