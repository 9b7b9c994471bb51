package remotecommand

import (
	"github.com/streamshim/streamshim/pkg/session"
	"github.com/streamshim/streamshim/pkg/workload"
)

// Request is a request for an exec or attach: a command in a container, or the streams of its main process. The container
// was running when the token was issued. It is plain data. When the token is redeemed, Runtime serves it.
type Request struct {
	Container workload.Container
	Command   workload.Command // without Args and Env for an attach
	// Trace is the trace context of the CRI call, see session.Info.
	Trace map[string]string
	// Call is the encoded CRI call, for requests that the upstream serves: each attach, and commands in a container
	// without a Runtime.
	Call []byte
}

// Info returns what is known of the session before it begins.
func (r *Request) Info(kind session.Kind) session.Info {
	return session.Info{
		Kind: kind, Target: r.Container.Target, PodLabels: r.Container.PodLabels, Command: r.Command.Args, TTY: r.Command.TTY,
		User: session.UserOf(r.Container), AuditID: session.AuditID(r.Command.Env), Trace: r.Trace,
	}
}
