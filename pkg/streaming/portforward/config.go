package portforward

import (
	"time"

	"github.com/streamshim/streamshim/pkg/session"
	"github.com/streamshim/streamshim/pkg/workload"
)

// Protocol is the only version of the port-forward protocol over SPDY.
const Protocol = "portforward.k8s.io"

// Config is how port-forwards are served. Pods is required. Zero is off where a comment says so.
type Config struct {
	Pods Pods
	// Stall is how long one forwarded connection whose pod reads nothing may hold up its neighbours,
	// once it has used up the room that all of them share, before it is reset (kubernetes#78446).
	// Zero is never.
	Stall time.Duration
	// ReportRefused makes port-forward write a refused or failed dial on the error stream, at which
	// kubectl ends the whole port-forward (kubernetes#111825).
	ReportRefused bool
	// MayConnect is asked before each forwarded connection, which its error resets. Nil allows all.
	MayConnect func() error
	// StreamCreation is how long a client may take to open the second stream of a pair. Zero is the ordinary time;
	// no user sets it.
	StreamCreation time.Duration
}

const streamCreation = 30 * time.Second

// Request is what is asked for by a port-forward: a pod sandbox whose ports may be
// dialled. It is plain data, as other requests are.
type Request struct {
	Sandbox workload.Sandbox
	// Ports is what the CRI request named; current clients name none and say the port with each stream.
	Ports []int32
	// Trace is the trace context of the CRI call, see session.Info.
	Trace map[string]string
}

// Info is what is known of the session beforehand.
func (r *Request) Info() session.Info {
	return session.Info{Kind: session.PortForward, Target: r.Sandbox.Target, PodLabels: r.Sandbox.PodLabels, Trace: r.Trace}
}
