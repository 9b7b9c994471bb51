package portforward

import (
	"context"

	"github.com/streamshim/streamshim/pkg/workload"
)

// Pods opens pods for port-forwards.
type Pods interface {
	// Forwarder is called at redemption, so that a URL that nobody uses holds nothing of the pod. The
	// session closes the forwarder.
	Forwarder(workload.Sandbox) (Forwarder, error)
}

// Forwarder opens connections to ports inside one pod.
type Forwarder interface {
	// Forward connects to the port and moves bytes both ways until both directions have ended, the
	// context is done, or either side is reset. It owns the stream from the call on and leaves it
	// closed or reset. The byte counts are valid also with an error. An error with a method
	// Refused() bool that returns true means that nobody listens on the port.
	Forward(ctx context.Context, port uint16, stream workload.Stream) (sent, received int64, err error)
	// Gone is closed when the sandbox no longer exists.
	Gone() <-chan struct{}
	// Close releases what Gone watches.
	Close() error
}
