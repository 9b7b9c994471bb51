package remotecommand

import (
	"context"
	"io"
	"syscall"

	"github.com/streamshim/streamshim/pkg/handover"
	"github.com/streamshim/streamshim/pkg/session"
	"github.com/streamshim/streamshim/pkg/workload"
)

// Runtime starts commands and provides information about containers.
type Runtime interface {
	// Start returns when the process runs. It is called only for containers whose Runtime is set. The context bounds
	// the start, not the process.
	//
	// An error with a method ExitCode() int means that the command could not be started. The client gets this exit
	// code (127 not found, 126 not executable), and the error's text as one line on stderr. Any other error is an
	// internal one.
	Start(context.Context, workload.Container, workload.Command) (Process, error)
	// Resume continues a process that was frozen, in this program or in the one before. It returns an error if the
	// state cannot be read or is outdated.
	Resume(ctx context.Context, state []byte, files *handover.Files) (Process, error)
	// StreamingURL asks the upstream for its own streaming URL of an exec or attach, with the client's call and
	// trace. It is called when our URL is redeemed, because the upstream's token lives only a minute.
	StreamingURL(ctx context.Context, kind session.Kind, call []byte, trace map[string]string) (string, error)
	// EndReason returns in a few words why a container is gone, such as "container was OOM-killed", or "" if that is
	// unknown. It is called after the container's end, may ask the upstream, and respects the context's deadline.
	EndReason(context.Context, workload.Target) string
}

// Process is a started process, of this node or the upstream's. Its methods may be called from several goroutines.
type Process interface {
	// Stdin, Stdout and Stderr return the process's streams, or nil if the command did not ask for them. With a
	// terminal, stdin and stdout are the terminal and stderr is nil. They are *os.File underneath. Reading ends with
	// io.EOF when nobody holds the other end any more.
	Stdin() io.WriteCloser
	Stdout() io.ReadCloser
	Stderr() io.ReadCloser

	// Resize sets the terminal's size. An unknown size is ignored.
	Resize(workload.Size) error

	// Exited is closed as soon as the process has ended and was reaped, independent of all I/O.
	Exited() <-chan struct{}
	// ExitCode returns the exit status, 0-255, 128+n after signal n. It is valid once Exited is closed.
	ExitCode() int

	// ContainerExited is closed when the main process of the container has ended.
	ContainerExited() <-chan struct{}
	// ContainerEnding reports whether the main process of the container has begun to end, which may be a
	// while before ContainerExited.
	ContainerEnding() bool

	// PID returns the pid in our pid namespace, or 0 for a process of the upstream.
	PID() int
	// StandIn returns the name of our helper that runs instead of a command that the container does not have, or "".
	StandIn() string
	// Signal sends a signal to the process itself, not to its tree. The error is session.ErrNotSupported for
	// a process of the upstream.
	Signal(syscall.Signal) error

	// Disconnect begins the end of a process whose client has gone, as the configured policy says: by default hang-up,
	// TERM and KILL for the whole tree, with a grace in between. It returns at once, and may be called more than once.
	Disconnect()
	// Kill sends SIGKILL to the whole tree now. It returns at once, and may be called more than once.
	Kill()

	// Close releases the streams and everything kept for the process. It neither ends the process nor waits for it. A
	// process that still runs is still watched and reaped.
	Close() error

	// Freeze stops all work for the process in this program, and returns the state for Resume. Nobody may use its
	// streams; Freeze adds duplicates of them to the files. Afterwards only Discard is called, which closes what is
	// left here and does not affect the process. After an error the process continues.
	Freeze(*handover.Files) ([]byte, error)
	Discard()
}
