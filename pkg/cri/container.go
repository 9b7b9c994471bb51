package cri

import (
	"context"

	"github.com/streamshim/streamshim/pkg/streaming/portforward"
	"github.com/streamshim/streamshim/pkg/streaming/remotecommand"
	"github.com/streamshim/streamshim/pkg/workload"
)

// StreamServer creates one-time URLs. Config.StreamErrorCode tells errors meant for the client, such as too many
// unredeemed URLs, from internal ones.
type StreamServer interface {
	Exec(*remotecommand.Request) (url string, err error)
	Attach(*remotecommand.Request) (url string, err error)
	PortForward(*portforward.Request) (url string, err error)
}

// Runner runs commands without streams. It is only used for containers whose Runtime is set.
type Runner interface {
	// RunSync runs a command to its end and returns its output. At the command's timeout it ends the whole process
	// tree and returns an error that matches context.DeadlineExceeded; it does the same when ctx is done, with
	// ctx's error. An error with a method ExitCode() int means that the command could not be started; its text is
	// one line for users. A *session.RefusedError means that there was no room for it.
	RunSync(context.Context, workload.Container, workload.SyncCommand) (workload.Result, error)
}
