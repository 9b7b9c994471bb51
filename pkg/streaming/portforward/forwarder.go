package portforward

import (
	"context"

	"github.com/streamshim/streamshim/pkg/handover"
	"github.com/streamshim/streamshim/pkg/workload"
)

// Pods opens pods for port-forwards.
type Pods interface {
	// Forwarder opens a pod. It is called when a URL is redeemed, so that an unused URL holds no resources of the
	// pod. The session closes the forwarder.
	Forwarder(workload.Sandbox) (Forwarder, error)
	// ResumeForwarder continues a frozen forwarder from its State. It takes what it needs from the files.
	ResumeForwarder(state []byte, files *handover.Files) (Forwarder, error)
}

// Forwarder opens connections to ports inside one pod.
type Forwarder interface {
	// Forward connects to the port and moves bytes both ways until both directions have ended, the
	// context is done, or either side is reset. It owns the stream from the call on and leaves it
	// closed or reset. The byte counts are valid also with an error. An error with a method
	// Refused() bool that returns true means that nobody listens on the port.
	Forward(ctx context.Context, port uint16, stream workload.Stream) (sent, received int64, err error)
	// Freeze makes all calls of Forward return whose streams were frozen before, with a FrozenConnection as the error.
	// It does not wait for them. They return as soon as they know what they have moved.
	Freeze()
	// State returns what ResumeForwarder needs, once all calls of Forward have returned.
	State(*handover.Files) ([]byte, error)
	// Continue takes what FrozenConnection.State has put into the files, and returns a function that continues the
	// Forward. If the state cannot be used, that function returns the error.
	Continue(state []byte, files *handover.Files, port uint16, stream workload.Stream) (forward func(context.Context) (sent, received int64, err error))
	// Gone is closed when the sandbox no longer exists.
	Gone() <-chan struct{}
	// Close releases what Gone watches.
	Close() error
}

// FrozenConnection is the error of a Forward that was frozen. It wraps handover.ErrFrozen. The connection is still open:
// the caller calls State or Discard.
type FrozenConnection interface {
	error
	// State returns what Continue needs, and adds the connection's descriptor to the files. If it returns an error, it
	// has reset the connection.
	State(*handover.Files) ([]byte, error)
	// Discard resets the connection.
	Discard()
}
