package portforward

import (
	"errors"
	"fmt"
	"net/netip"
	"strings"
	"syscall"
)

// Errors that a caller may have to distinguish. For none of them must it reset the stream; see Forwarder.Forward.
var (
	// ErrSandboxGone means that the pod sandbox no longer exists: its process has ended, or its network namespace
	// is no longer at its path. It never comes back.
	ErrSandboxGone = errors.New("the pod sandbox no longer exists")

	// ErrClosed means that the Forwarder was closed.
	ErrClosed = errors.New("the port forwarder was closed")

	// ErrResetByPod means that the program in the pod, or its kernel, ended the connection with a reset. The pod's
	// other connections are not affected (kubernetes#74551).
	ErrResetByPod = errors.New("connection reset by the pod")

	// ErrResetByClient means that the client reset its stream, or that its connection broke.
	ErrResetByClient = errors.New("stream reset by the client")

	// ErrHalfClosedIdle means that one side had ended and the other moved no byte for Config.HalfClosedIdle.
	ErrHalfClosedIdle = errors.New("half-closed connection was idle for too long")
)

// RefusedError says that nobody listens on a port: no address that was tried has a listener. It unwraps to
// syscall.ECONNREFUSED.
type RefusedError struct {
	Port  uint16
	Tried []netip.Addr // in order of the attempts
}

func (e *RefusedError) Error() string {
	tried := make([]string, len(e.Tried))
	for i, address := range e.Tried {
		tried[i] = address.String()
	}
	return fmt.Sprintf("nobody listens on port %d of the pod (tried %s)", e.Port, strings.Join(tried, ", "))
}

func (e *RefusedError) Unwrap() error { return syscall.ECONNREFUSED }

// Refused identifies the error to callers that do not import this package.
func (e *RefusedError) Refused() bool { return true }
