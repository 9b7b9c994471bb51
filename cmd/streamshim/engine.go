package main

import (
	"context"
	"errors"
	"fmt"

	"github.com/streamshim/streamshim/pkg/config"
	"github.com/streamshim/streamshim/pkg/cri"
	"github.com/streamshim/streamshim/pkg/execproc"
	"github.com/streamshim/streamshim/pkg/portforward"
	"github.com/streamshim/streamshim/pkg/session"
	"github.com/streamshim/streamshim/pkg/streaming"
)

// engine joins what pkg/cri finds out about containers and sandboxes with what starts processes and
// dials ports. It only translates between their types.
type engine struct {
	runner  *execproc.Runner
	watcher *portforward.Watcher
	runtime config.Runtime
	starts  streaming.StartGate
}

func (e *engine) container(c cri.Container) execproc.Container {
	container := execproc.Container{
		ID: c.ContainerID, Runtime: c.Runtime, Root: c.Root, InitPid: c.InitPid, InitStartTime: c.InitStartTime,
		Process: c.Process, UIDMappings: c.UIDMappings, GIDMappings: c.GIDMappings,
	}
	if e.runtime.Binary != "" {
		container.Runtime = e.runtime.Binary
	}
	if e.runtime.Root != "" {
		container.Root = e.runtime.Root
	}
	return container
}

// Executor implements cri.Engine.
func (e *engine) Executor(c cri.Container) streaming.Executor {
	return &executor{runner: e.runner, container: e.container(c)}
}

// ExecSync implements cri.Engine.
func (e *engine) ExecSync(ctx context.Context, c cri.Container, r cri.SyncRequest) (cri.SyncResult, error) {
	result, err := e.runner.RunSync(ctx, e.container(c), execproc.SyncCommand{
		Args: r.Args, Env: r.Env, Timeout: r.Timeout,
		Turn: func(ctx context.Context) (func(), error) {
			return e.starts.Acquire(ctx, session.Info{Kind: session.ExecSync, Target: c.Target})
		},
	})
	switch {
	case errors.Is(err, execproc.ErrTimeout) && ctx.Err() == nil:
		err = fmt.Errorf("%w: %w", context.DeadlineExceeded, err)
	case errors.Is(err, execproc.ErrNoRoom):
		err = &session.RefusedError{Refusal: session.TooMany, Message: "the command was ended because ExecSync calls on this node " +
			"have as much output as they may keep together (limits.sync_output): try again later, or use exec"}
	}
	return cri.SyncResult{Stdout: result.Stdout, Stderr: result.Stderr, ExitCode: result.ExitCode}, err
}

// Forwarder implements cri.Engine.
func (e *engine) Forwarder(s cri.Sandbox) (streaming.PortForwarder, error) {
	f, err := portforward.NewForwarder(s.NetworkNamespace, portforward.Config{Watcher: e.watcher, SandboxPID: s.Pid})
	if err != nil {
		return nil, fmt.Errorf("pod sandbox %s: %w", s.SandboxID, err)
	}
	return forwarder{f}, nil
}

type executor struct {
	runner    *execproc.Runner
	container execproc.Container
}

// Start implements streaming.Executor.
func (e *executor) Start(ctx context.Context, c streaming.Command) (streaming.Process, error) {
	process, err := e.runner.Start(ctx, e.container, execproc.Command(c))
	if err != nil {
		return nil, err // not the nil *Process, which is no nil interface
	}
	return process, nil
}

type forwarder struct{ *portforward.Forwarder }

// Forward implements streaming.PortForwarder.
func (f forwarder) Forward(ctx context.Context, port uint16, stream streaming.Stream) (sent, received int64, err error) {
	return f.Forwarder.Forward(ctx, port, stream)
}
