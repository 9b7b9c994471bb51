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
	// Acquire waits for a turn of the session. Release ends it; it is nil with an error, which is a
	// *session.RefusedError when too many wait already, or the context's.
	Acquire(ctx context.Context, info session.Info) (release func(), err error)
}

// startFunc starts a command.
type startFunc = func(context.Context, workload.Command) (Process, error)

// startWhenAllowed is for commands that are started here. What the upstream starts, or has started, costs
// nothing here and takes no turn: were the upstream to hang, it would keep local ones waiting.
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

// start is how a request's command comes to run: what the upstream serves is relayed, anything else is started here,
// in its turn.
func (c Config) start(kind session.Kind, request *Request, buffers *buffers.Share, report rescue.Report) startFunc {
	if kind == session.Attach {
		// The end of one client's input is the end of the container's only where the container says so.
		// Elsewhere containerd answers it by ending the whole session, which scripts rely on, and so does crictl's
		// ctrl-P ctrl-Q at a terminal. It is passed on once the answer to the last line had time to come.
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
	// detachGrace is how long a container must have been silent, after the client's input has ended, until the
	// client is detached: the answer to the last line is to reach it (cri-tools#269).
	detachGrace = time.Second
	// relayTimeout is how long it may take to get a URL of the upstream, to connect to it and be upgraded.
	relayTimeout = 30 * time.Second
)

// relayed has the upstream serve a request.
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
			return nil, err // not the nil *relay.Relay, which is no nil interface
		}
		return upstream, nil
	}
}
