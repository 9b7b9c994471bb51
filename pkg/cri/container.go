package cri

import (
	"context"

	"github.com/streamshim/streamshim/pkg/streaming/portforward"
	"github.com/streamshim/streamshim/pkg/streaming/remotecommand"
	"github.com/streamshim/streamshim/pkg/workload"
)

// StreamServer gives out one-time URLs. An error that is meant for the client, such as too many
// URLs waiting, is told from an internal one by Config.StreamErrorCode.
type StreamServer interface {
	Exec(*remotecommand.Request) (url string, err error)
	Attach(*remotecommand.Request) (url string, err error)
	PortForward(*portforward.Request) (url string, err error)
}

// Runner runs commands without streams. It is asked only about containers whose Runtime is set.
type Runner interface {
	// RunSync runs a command to its end and returns what it wrote. After the command's timeout it
	// ends the whole process tree and returns an error for which errors.Is(err,
	// context.DeadlineExceeded) holds; the same when ctx is done, with ctx's error. An error with a
	// method ExitCode() int means that the command could not be started, its text being one line for
	// people, and a *session.RefusedError that there was no room for it.
	RunSync(context.Context, workload.Container, workload.SyncCommand) (workload.Result, error)
}
