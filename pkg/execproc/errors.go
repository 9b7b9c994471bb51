package execproc

import (
	"context"
	"errors"

	"github.com/streamshim/streamshim/pkg/execproc/internal/ociruntime"
)

var (
	// ErrStartTimeout is wrapped by the error of a start that the runtime did not finish in time.
	ErrStartTimeout = errors.New("the OCI runtime did not start the command in time")
	// ErrTimeout is wrapped by the error of a RunSync that timed out or whose context is done. It also matches
	// context.DeadlineExceeded.
	ErrTimeout error = timeoutError{}
	// ErrNoRoom is wrapped by the error of a RunSync whose output did not fit in Config.OutputRoom.
	ErrNoRoom = errors.New("no room for the command's output")
	// ErrClosed is wrapped by the error of a start after Shutdown or Close.
	ErrClosed = errors.New("shutting down: no new processes are started")
)

type timeoutError struct{}

func (timeoutError) Error() string { return "command timed out" }

// Is supports errors.Is.
func (timeoutError) Is(target error) bool { return target == context.DeadlineExceeded }

// ErrNotRunning is wrapped by the error of a start in a container that has ended, is paused, or is unknown to its
// runtime.
var ErrNotRunning = ociruntime.ErrNotRunning

// StartError reports a command that could not be executed although its container is fine.
type StartError = ociruntime.StartError
