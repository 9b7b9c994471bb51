package portforward

import (
	"errors"
	"fmt"
	"net/netip"
	"strings"
	"syscall"
)

// What a caller may have to tell apart. None of them is the caller's business to reset for: see
// Forwarder.Forward.
var (
	// ErrSandboxGone means that the pod sandbox no longer exists: its process has ended, or its
	// network namespace is no longer at the path it was found at. It never comes back.
	ErrSandboxGone = errors.New("the pod sandbox no longer exists")

	// ErrClosed means that the Forwarder was closed.
	ErrClosed = errors.New("the port forwarder was closed")

	// ErrResetByPod means that the program in the pod, or its kernel, ended the connection with a
	// reset. The other connections of the pod are not touched (kubernetes#74551).
	ErrResetByPod = errors.New("connection reset by the pod")

	// ErrResetByClient means that the client reset its stream, or that its connection broke.
	ErrResetByClient = errors.New("stream reset by the client")

	// ErrHalfClosedIdle means that one side had ended and the other moved no byte for
	// Config.HalfClosedIdle.
	ErrHalfClosedIdle = errors.New("half-closed connection was idle for too long")
)

// RefusedError says that nobody listens on a port: every address that was tried answered that there
// is no listener. It unwraps to syscall.ECONNREFUSED.
type RefusedError struct {
	Port  uint16
	Tried []netip.Addr // in the order of the tries
}

func (e *RefusedError) Error() string {
	tried := make([]string, len(e.Tried))
	for i, address := range e.Tried {
		tried[i] = address.String()
	}
	return fmt.Sprintf("nobody listens on port %d of the pod (tried %s)", e.Port, strings.Join(tried, ", "))
}

func (e *RefusedError) Unwrap() error { return syscall.ECONNREFUSED }

// Refused lets callers that do not know this package tell the error from others.
func (e *RefusedError) Refused() bool { return true }
