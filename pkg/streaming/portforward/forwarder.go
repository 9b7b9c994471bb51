package portforward

import (
	"context"

	"github.com/streamshim/streamshim/pkg/handover"
	"github.com/streamshim/streamshim/pkg/workload"
)

// Pods opens pods for port-forwards.
type Pods interface {
	// Forwarder is called at redemption, so that a URL that nobody uses holds nothing of the pod. The
	// session closes the forwarder.
	Forwarder(workload.Sandbox) (Forwarder, error)
	// ResumeForwarder goes on with one that was frozen, from its State. It takes what it needs of the files.
	ResumeForwarder(state []byte, files *handover.Files) (Forwarder, error)
}

// Forwarder opens connections to ports inside one pod.
type Forwarder interface {
	// Forward connects to the port and moves bytes both ways until both directions have ended, the
	// context is done, or either side is reset. It owns the stream from the call on and leaves it
	// closed or reset. The byte counts are valid also with an error. An error with a method
	// Refused() bool that returns true means that nobody listens on the port.
	Forward(ctx context.Context, port uint16, stream workload.Stream) (sent, received int64, err error)
	// Freeze has all calls of Forward return whose streams were frozen before, with a FrozenConnection for an error. It does not
	// wait for them, and they take no longer than it takes to say what was moved.
	Freeze()
	// State is what ResumeForwarder needs, once all calls of Forward have returned.
	State(*handover.Files) ([]byte, error)
	// Continue takes what FrozenConnection.State has put into the files and returns the Forward that goes on with it. An error,
	// also in the state, is that Forward's.
	Continue(state []byte, files *handover.Files, port uint16, stream workload.Stream) (forward func(context.Context) (sent, received int64, err error))
	// Gone is closed when the sandbox no longer exists.
	Gone() <-chan struct{}
	// Close releases what Gone watches.
	Close() error
}

// FrozenConnection is the error of a Forward that was frozen; it is handover.ErrFrozen too. Nothing has ended. Who gets it
// calls State or Discard.
type FrozenConnection interface {
	error
	// State is what Continue needs. The connection's descriptor is in the files. After an error the connection was reset.
	State(*handover.Files) ([]byte, error)
	// Discard resets the connection.
	Discard()
}
