package remotecommand

import (
	"context"
	"io"
	"syscall"

	"github.com/streamshim/streamshim/pkg/handover"
	"github.com/streamshim/streamshim/pkg/session"
	"github.com/streamshim/streamshim/pkg/workload"
)

// Runtime starts commands and knows of containers.
type Runtime interface {
	// Start returns when the process runs. It is asked only about containers whose Runtime is set. The
	// context bounds the start alone, not the process.
	//
	// An error with a method ExitCode() int means that the command could not be started and the
	// client is to see this exit code (127 not found, 126 not executable), the error's text being
	// one line for the client's stderr. Any other error is an internal one.
	Start(context.Context, workload.Container, workload.Command) (Process, error)
	// Resume goes on with a process that was frozen, in this program or in the one before. The error is that of a state that
	// cannot be read, or is not true any more.
	Resume(ctx context.Context, state []byte, files *handover.Files) (Process, error)
	// StreamingURL asks the upstream for its own streaming URL of an exec or attach, with the client's call
	// and trace. It is asked at redemption, because the upstream's token lives only a minute.
	StreamingURL(ctx context.Context, kind session.Kind, call []byte, trace map[string]string) (string, error)
	// EndReason says in a few words why a container is no longer there, such as "container was
	// OOM-killed"; empty when nothing is known. It is called after the container's end, may ask the
	// upstream, and keeps to the context's deadline.
	EndReason(context.Context, workload.Target) string
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

	// Freeze ends all that is done for the process here, and returns the state to go on from. Nobody works on its streams;
	// the files get duplicates of them. Afterwards only Discard is called, which closes what is left here, without a
	// sign to the process. After an error the process goes on.
	Freeze(*handover.Files) ([]byte, error)
	Discard()
}
