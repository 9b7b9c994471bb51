package execproc

import (
	"context"
	"errors"

	"github.com/streamshim/streamshim/pkg/execproc/internal/ociruntime"
)

var (
	// ErrStartTimeout is in the error of a start that the runtime did not finish in time.
	ErrStartTimeout = errors.New("the OCI runtime did not start the command in time")
	// ErrTimeout is in the error of a RunSync whose time is up, or whose context is done.
	// context.DeadlineExceeded is in it too.
	ErrTimeout error = timeoutError{}
	// ErrNoRoom is in the error of a RunSync whose command wrote more than there was room for, see Config.OutputRoom.
	ErrNoRoom = errors.New("no room for the command's output")
	// ErrClosed is in the error of a start after Shutdown or Close.
	ErrClosed = errors.New("shutting down: no new processes are started")
)

type timeoutError struct{}

func (timeoutError) Error() string { return "command timed out" }

// Is implements what errors.Is looks for.
func (timeoutError) Is(target error) bool { return target == context.DeadlineExceeded }

// ErrNotRunning is in the error of a start in a container that has ended, is paused, or is unknown to its runtime.
var ErrNotRunning = ociruntime.ErrNotRunning

// StartError says that the container is fine but the command could not be executed in it.
type StartError = ociruntime.StartError
