package daemon

import (
	"context"
	"errors"
	"fmt"

	"github.com/streamshim/streamshim/pkg/cri"
	"github.com/streamshim/streamshim/pkg/execproc"
	"github.com/streamshim/streamshim/pkg/handover"
	"github.com/streamshim/streamshim/pkg/portforward"
	"github.com/streamshim/streamshim/pkg/session"
	forwarding "github.com/streamshim/streamshim/pkg/streaming/portforward"
	"github.com/streamshim/streamshim/pkg/streaming/remotecommand"
	"github.com/streamshim/streamshim/pkg/workload"
)

// engine starts commands and dials into pods for sessions. The upstream tells why a container has ended, and gives out
// URLs for sessions that are relayed to it.
type engine struct {
	*cri.Upstream
	runner  *execproc.Runner
	watcher *portforward.Watcher
}

// Start implements remotecommand.Runtime.
func (e engine) Start(ctx context.Context, container workload.Container, command workload.Command) (remotecommand.Process, error) {
	process, err := e.runner.Start(ctx, container, command)
	if err != nil {
		return nil, err // not the nil *Process, which is no nil interface
	}
	return process, nil
}

// Resume implements remotecommand.Runtime.
func (e engine) Resume(ctx context.Context, state []byte, files *handover.Files) (remotecommand.Process, error) {
	process, err := e.runner.ResumeProcess(ctx, state, files)
	if err != nil {
		return nil, err // not the nil *Process, which is no nil interface
	}
	return process, nil
}

// RunSync implements cri.Runner.
func (e engine) RunSync(ctx context.Context, container workload.Container, command workload.SyncCommand) (workload.Result, error) {
	result, err := e.runner.RunSync(ctx, container, command)
	if errors.Is(err, execproc.ErrNoRoom) {
		err = &session.RefusedError{Refusal: session.TooMany, Message: "the command was ended because ExecSync calls on this node " +
			"have as much output as they may keep together (limits.sync_output): try again later, or use exec"}
	}
	return result, err
}

// Forwarder implements forwarding.Pods.
func (e engine) Forwarder(s workload.Sandbox) (forwarding.Forwarder, error) {
	f, err := portforward.NewForwarder(s.NetworkNamespace, portforward.Config{Watcher: e.watcher, SandboxPID: s.Pid})
	if err != nil {
		return nil, fmt.Errorf("pod sandbox %s: %w", s.SandboxID, err)
	}
	return f, nil
}

// ResumeForwarder implements forwarding.Pods.
func (e engine) ResumeForwarder(state []byte, files *handover.Files) (forwarding.Forwarder, error) {
	f, err := portforward.ResumeForwarder(state, files, portforward.Config{Watcher: e.watcher})
	if err != nil {
		return nil, err // not the nil *Forwarder, which is no nil interface
	}
	return f, nil
}
