package portforward

import (
	"time"

	"github.com/streamshim/streamshim/pkg/session"
	"github.com/streamshim/streamshim/pkg/workload"
)

// Protocol is the only version of the port-forward protocol over SPDY.
const Protocol = "portforward.k8s.io"

// Config configures port-forward sessions. Pods is required. Zero means off where a comment says so.
type Config struct {
	Pods Pods
	// Stall is how long one forwarded connection whose pod does not read may block the others of its session, once it
	// has filled the room that they share. Then it is reset (kubernetes#78446). Zero is never.
	Stall time.Duration
	// ReportRefused writes a refused dial to the error stream, at which kubectl ends the whole port-forward
	// (kubernetes#111825).
	ReportRefused bool
	// MayConnect is called before each forwarded connection. If it returns an error, the connection is reset. Nil
	// allows all.
	MayConnect func() error
	// StreamCreation is how long a client may take to open the second stream of a pair. Zero is 30 s. No user sets
	// it.
	StreamCreation time.Duration
}

const streamCreation = 30 * time.Second

// Request is a request for a port-forward into a pod sandbox. It is plain data.
type Request struct {
	Sandbox workload.Sandbox
	// Ports are the ports of the CRI request. Current clients name none there, and name the port with each stream.
	Ports []int32
	// Trace is the trace context of the CRI call, see session.Info.
	Trace map[string]string
}

// Info returns what is known of the session before it begins.
func (r *Request) Info() session.Info {
	return session.Info{Kind: session.PortForward, Target: r.Sandbox.Target, PodLabels: r.Sandbox.PodLabels, Trace: r.Trace}
}
