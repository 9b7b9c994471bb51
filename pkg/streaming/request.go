package streaming

import (
	"context"
	"io"

	"github.com/streamshim/streamshim/pkg/session"
)

// ExecRequest is what a token for /exec/ stands for: a command in a container that was found
// running when the token was given out.
type ExecRequest struct {
	Target session.Target
	// PodLabels are those of the pod's sandbox, nil when they are not known. Rules look at them.
	PodLabels map[string]string
	Command   Command
	// Trace is the trace context of the CRI call, see session.Info.
	Trace map[string]string
	// User is whom the command runs as, nil when that is not known. It is for audit records.
	User *session.User
	// Executor starts the command. Nil when the container's runtime is not one whose processes can
	// be started from here; then UpstreamURL is set and the session is relayed.
	Executor Executor
	// UpstreamURL asks the upstream for its own streaming URL. It is called once, at redemption,
	// because the upstream's token lives only a minute.
	UpstreamURL func(context.Context) (string, error)
	// EndReason says in a few words why the container is no longer there, such as "container was
	// OOM-killed". It is called after the container's end, may ask the upstream, and keeps to the
	// context's deadline. Nil when nothing is known.
	EndReason func(context.Context) string
}

func (r *ExecRequest) info() session.Info {
	return session.Info{
		Kind: session.Exec, Target: r.Target, PodLabels: r.PodLabels, Command: r.Command.Args, TTY: r.Command.TTY,
		User: r.User, AuditID: session.AuditID(r.Command.Env), Trace: r.Trace,
	}
}

// AttachRequest is what a token for /attach/ stands for: the streams of a running container's main
// process, reached through the upstream's streaming server.
type AttachRequest struct {
	Target                     session.Target
	PodLabels                  map[string]string // as ExecRequest.PodLabels
	Trace                      map[string]string // as ExecRequest.Trace
	Stdin, Stdout, Stderr, TTY bool
	// StdinOnce is stdin_once of the CRI's ContainerConfig: the runtime closes the process's stdin
	// after the first attach session that had one has sent its end. It comes from the verbose
	// ContainerStatus (containerd: info.config.stdin_once; CRI-O: an annotation of the OCI spec).
	// False also means that the runtime does not say.
	StdinOnce   bool
	User        *session.User // as ExecRequest.User
	UpstreamURL func(context.Context) (string, error)
	EndReason   func(context.Context) string
}

func (r *AttachRequest) info() session.Info {
	return session.Info{Kind: session.Attach, Target: r.Target, PodLabels: r.PodLabels, TTY: r.TTY, User: r.User, Trace: r.Trace}
}

// PortForwardRequest is what a token for /portforward/ stands for: a pod sandbox whose ports may be
// dialled. Ports is what the CRI request named; current clients name none and say the port with
// each stream.
type PortForwardRequest struct {
	Target    session.Target
	PodLabels map[string]string // as ExecRequest.PodLabels
	Trace     map[string]string // as ExecRequest.Trace
	Ports     []int32
	// Open is called at redemption, so that a URL that nobody uses holds nothing of the pod. The
	// session closes the forwarder.
	Open func() (PortForwarder, error)
}

func (r *PortForwardRequest) info() session.Info {
	return session.Info{Kind: session.PortForward, Target: r.Target, PodLabels: r.PodLabels, Trace: r.Trace}
}

// Command is a command line and the streams its caller wants.
type Command struct {
	Args []string
	Env  []string // "NAME=value", added to the container's own, the last of a name wins (KEP-6035)

	Stdin, Stdout, Stderr, TTY bool

	// Width and Height are the terminal's first size, zero when it is not known.
	Width, Height uint16
}

// Executor starts processes in one container.
type Executor interface {
	// Start returns when the process runs. The context bounds the start alone, not the process.
	//
	// An error with a method ExitCode() int means that the command could not be started and the
	// client is to see this exit code (127 not found, 126 not executable), the error's text being
	// one line for the client's stderr. Any other error is an internal one.
	Start(ctx context.Context, command Command) (Process, error)
}

// Process is a started process. Its methods may be called from several goroutines.
type Process interface {
	// Stdin, Stdout and Stderr are the process's streams, nil when the command did not ask for
	// them; with a terminal stdin and stdout are the terminal and stderr is nil. They are *os.File
	// underneath. Reading ends with io.EOF when nobody holds the other end any more.
	Stdin() io.WriteCloser
	Stdout() io.ReadCloser
	Stderr() io.ReadCloser

	// Resize sets the terminal's size in characters; a zero in either is ignored.
	Resize(width, height uint16) error

	// Exited is closed as soon as the process has ended and was reaped, independent of all I/O.
	Exited() <-chan struct{}
	// ExitCode is the exit status, 0-255, 128+n after signal n. Valid once Exited is closed.
	ExitCode() int

	// ContainerExited is closed when the main process of the container has ended.
	ContainerExited() <-chan struct{}

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
	Forward(ctx context.Context, port uint16, stream Stream) (sent, received int64, err error)
	// Gone is closed when the sandbox no longer exists.
	Gone() <-chan struct{}
	// Close releases what Gone watches.
	Close() error
}

// Stream is one bidirectional stream of a client's connection, whatever the transport.
type Stream interface {
	io.Reader
	io.Writer
	// WriteTo moves what the client sends into w, without copies of its own. It returns nil at the end of
	// the client's input, and an error when that was cut; what came before either is moved first.
	io.WriterTo
	// InputEnded says that the end of the client's input has come in, read or not.
	InputEnded() bool
	// ReadFrom sends r's bytes to the client until r's end, at the price of one read and one write
	// a chunk. It does not send a FIN.
	io.ReaderFrom
	// CloseWrite sends FIN: no more bytes from us. Further writes fail.
	CloseWrite() error
	// CloseRead discards what is buffered and whatever else the client sends.
	CloseRead()
	// Reset ends both directions at once, telling the client.
	Reset() error
	// Received and Sent count the payload bytes that have come from and gone to the client.
	Received() int64
	Sent() int64
}
