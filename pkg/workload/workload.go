// Package workload holds what the other packages speak of: containers and pod sandboxes, the commands
// that are run in them, and the streams between those and a client. It knows no other package.
//
// Containers, sandboxes and commands are plain data. What they point to is shared between sessions:
// nobody writes to it.
package workload

import (
	"io"
	"time"

	"github.com/opencontainers/runtime-spec/specs-go"
)

// Target says what a session belongs to. The names come from the CRI labels that the kubelet puts
// on containers and sandboxes (k8s.io/kubelet/pkg/types); they are empty for containers that were
// made by something else, such as crictl.
type Target struct {
	ContainerID   string // full ID; empty for a port-forward
	SandboxID     string // full ID
	ContainerName string
	PodName       string
	PodNamespace  string
	PodUID        string
}

// Container is a running container, and what does not change about it in its life.
type Container struct {
	Target
	// PodLabels are the labels of the pod's sandbox, nil when they are not known.
	PodLabels map[string]string

	// RuntimeType is the upstream's word for the runtime, such as "io.containerd.runc.v2" with
	// containerd, or "oci" or "vm" with CRI-O. For logs.
	RuntimeType string
	// Runtime is the OCI runtime's binary, a path or a name to be found in $PATH: runc, crun, youki, or
	// whatever else understands runc's command line. It is empty when processes cannot be started with
	// one: then sessions are relayed to the upstream.
	Runtime string
	// Root is the runtime's state directory (runc --root); empty for the runtime's own default.
	Root string
	// InitPid is the container's main process in the pid namespace of this process.
	InitPid int
	// InitStartTime is when that process began, in clock ticks since boot (field 22 of
	// /proc/PID/stat); 0 when it is not known. With it a reused pid is told from the real one.
	InitStartTime uint64

	// StdinOnce is stdin_once of the CRI's ContainerConfig: the runtime closes the process's stdin
	// after the first attach session that had one has sent its end. It comes from the verbose
	// ContainerStatus (containerd: info.config.stdin_once; CRI-O: an annotation of the OCI spec).
	// False also means that the runtime does not say.
	StdinOnce bool

	// Process is the main process's part of the container's OCI spec. Nil when Runtime is empty.
	Process *specs.Process
	// UIDMappings and GIDMappings are the container's user namespace; empty without one.
	UIDMappings, GIDMappings []specs.LinuxIDMapping
}

// Sandbox is a ready pod sandbox. ContainerID and ContainerName of its Target are empty.
type Sandbox struct {
	Target
	// PodLabels are the labels of the sandbox, nil when they are not known.
	PodLabels map[string]string

	// NetworkNamespace is the path of the pod's network namespace, empty when the pod uses the
	// host's.
	NetworkNamespace string
	// Pid is the sandbox's own process, 0 when it has none (CRI-O drops it by default).
	Pid int
}

// Size is a terminal's, in characters. A zero in either means that it is not known.
type Size struct{ Width, Height uint16 }

// Known tells whether it is a size at all.
func (s Size) Known() bool { return s.Width > 0 && s.Height > 0 }

// Command is a command line and the streams its caller wants.
type Command struct {
	Args []string
	Env  []string // "NAME=value", added to the container's own, the last of a name wins (KEP-6035)

	Stdin, Stdout, Stderr, TTY bool

	// Size is the terminal's first.
	Size Size
}

// SyncCommand is a command without streams that is run to its end, its output collected: a probe, mostly.
type SyncCommand struct {
	Args []string
	Env  []string // as Command.Env
	// Timeout counts from the call, start included. Zero means none.
	Timeout time.Duration
}

// Result is what a SyncCommand left.
type Result struct {
	Stdout, Stderr []byte
	ExitCode       int // 0-255, 128+n after signal n
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
	// CloseRead discards what is buffered and whatever else the client sends; WriteTo may go on or return.
	CloseRead()
	// Reset ends both directions at once, so that WriteTo and ReadFrom return, and tells the client.
	Reset() error
	// Err says why the stream was cut: a reset of either side or the end of its connection. It is nil before, and
	// after an end in order.
	Err() error
	// AfterReset has f called, in a goroutine of its own, when the stream is reset by either side or ends with
	// its connection, at once if that has happened, also while nobody reads. There is one f; a second replaces
	// it. Streams that a client cannot reset never call it.
	AfterReset(f func())
	// Received and Sent count the payload bytes that have come from and gone to the client.
	Received() int64
	Sent() int64
}
