package streaming

import (
	"context"
	"io"
	"syscall"

	"github.com/streamshim/streamshim/pkg/session"
	"github.com/streamshim/streamshim/pkg/workload"
)

// CommandRequest is what a token for /exec/ or /attach/ stands for: a command in a container, or the streams
// of its main process. The container was found running when the token was given out. It is plain data; what
// it takes to serve it is asked of Runtime when the token is redeemed.
type CommandRequest struct {
	Container workload.Container
	Command   workload.Command // without Args and Env for an attach
	// Trace is the trace context of the CRI call, see session.Info.
	Trace map[string]string
	// Call is the CRI call as it came, for what the upstream serves: each attach, and commands in a
	// container without a Runtime.
	Call []byte
}

func (r *CommandRequest) info(kind session.Kind) session.Info {
	return session.Info{
		Kind: kind, Target: r.Container.Target, PodLabels: r.Container.PodLabels, Command: r.Command.Args, TTY: r.Command.TTY,
		User: session.UserOf(r.Container), AuditID: session.AuditID(r.Command.Env), Trace: r.Trace,
	}
}

// PortForwardRequest is what a token for /portforward/ stands for: a pod sandbox whose ports may be
// dialled. It is plain data, as a CommandRequest is.
type PortForwardRequest struct {
	Sandbox workload.Sandbox
	// Ports is what the CRI request named; current clients name none and say the port with each stream.
	Ports []int32
	// Trace is the trace context of the CRI call, see session.Info.
	Trace map[string]string
}

func (r *PortForwardRequest) info() session.Info {
	return session.Info{Kind: session.PortForward, Target: r.Sandbox.Target, PodLabels: r.Sandbox.PodLabels, Trace: r.Trace}
}

// Runtime starts commands and knows of containers.
type Runtime interface {
	// Start returns when the process runs. It is asked only about containers whose Runtime is set. The
	// context bounds the start alone, not the process.
	//
	// An error with a method ExitCode() int means that the command could not be started and the
	// client is to see this exit code (127 not found, 126 not executable), the error's text being
	// one line for the client's stderr. Any other error is an internal one.
	Start(context.Context, workload.Container, workload.Command) (Process, error)
	// StreamingURL asks the upstream for its own streaming URL of an exec or attach, with the client's call
	// and trace. It is asked at redemption, because the upstream's token lives only a minute.
	StreamingURL(ctx context.Context, kind session.Kind, call []byte, trace map[string]string) (string, error)
	// EndReason says in a few words why a container is no longer there, such as "container was
	// OOM-killed"; empty when nothing is known. It is called after the container's end, may ask the
	// upstream, and keeps to the context's deadline.
	EndReason(context.Context, workload.Target) string
}

// Pods opens pods for port-forwards.
type Pods interface {
	// Forwarder is called at redemption, so that a URL that nobody uses holds nothing of the pod. The
	// session closes the forwarder.
	Forwarder(workload.Sandbox) (PortForwarder, error)
}

// Process is a started process, of this node or the upstream's. Its methods may be called from several
// goroutines.
type Process interface {
	// Stdin, Stdout and Stderr are the process's streams, nil when the command did not ask for
	// them; with a terminal stdin and stdout are the terminal and stderr is nil. They are *os.File
	// underneath. Reading ends with io.EOF when nobody holds the other end any more.
	Stdin() io.WriteCloser
	Stdout() io.ReadCloser
	Stderr() io.ReadCloser

	// Resize sets the terminal's size; one that is not known is ignored.
	Resize(workload.Size) error

	// Exited is closed as soon as the process has ended and was reaped, independent of all I/O.
	Exited() <-chan struct{}
	// ExitCode is the exit status, 0-255, 128+n after signal n. Valid once Exited is closed.
	ExitCode() int

	// ContainerExited is closed when the main process of the container has ended.
	ContainerExited() <-chan struct{}
	// ContainerEnding reports whether the main process of the container has begun to end, which may be a
	// while before ContainerExited.
	ContainerEnding() bool

	// PID is the process in our pid namespace, 0 for one of the upstream's.
	PID() int
	// StandIn is the name of the helper of ours that runs instead of the command, which the container does not
	// have; otherwise empty.
	StandIn() string
	// Signal sends a signal to the process itself, not to its tree. The error is session.ErrNotSupported for
	// a process of the upstream's.
	Signal(syscall.Signal) error

	// Disconnect begins the end of a process whose client has gone: hang-up, TERM, KILL for the
	// whole tree with a grace in between, or whatever the configured policy says. It returns at
	// once; may be called more than once.
	Disconnect()
	// Kill sends SIGKILL to the whole tree now. It returns at once; may be called more than once.
	Kill()

	// Close releases the streams and everything kept for the process. It does not end the process
	// and does not wait for it; a process that still runs goes on being watched and reaped.
	Close() error
}

// PortForwarder opens connections to ports inside one pod.
type PortForwarder interface {
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
