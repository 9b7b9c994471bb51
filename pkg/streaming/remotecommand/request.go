package remotecommand

import (
	"github.com/streamshim/streamshim/pkg/session"
	"github.com/streamshim/streamshim/pkg/workload"
)

// Request is what is asked for by an exec or attach: a command in a container, or the streams
// of its main process. The container was found running when the token was given out. It is plain data; what
// it takes to serve it is asked of Runtime when the token is redeemed.
type Request struct {
	Container workload.Container
	Command   workload.Command // without Args and Env for an attach
	// Trace is the trace context of the CRI call, see session.Info.
	Trace map[string]string
	// Call is the CRI call as it came, for what the upstream serves: each attach, and commands in a
	// container without a Runtime.
	Call []byte
}

// Info is what is known of the session beforehand.
func (r *Request) Info(kind session.Kind) session.Info {
	return session.Info{
		Kind: kind, Target: r.Container.Target, PodLabels: r.Container.PodLabels, Command: r.Command.Args, TTY: r.Command.TTY,
		User: session.UserOf(r.Container), AuditID: session.AuditID(r.Command.Env), Trace: r.Trace,
	}
}
