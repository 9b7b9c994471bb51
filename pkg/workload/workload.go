// Package workload is the vocabulary of the other packages: containers and pod sandboxes, the commands that run in them,
// and the streams between those and a client. It imports no other package.
//
// Containers, sandboxes and commands are plain data. Sessions share what they point to, so nobody writes to it.
package workload

import (
	"io"
	"time"

	"github.com/opencontainers/runtime-spec/specs-go"
)

// Target is the container or pod of a session. The names come from the CRI labels that the kubelet sets on containers and
// sandboxes (k8s.io/kubelet/pkg/types). They are empty for containers that something else has created, such as crictl.
type Target struct {
	ContainerID   string // full ID; empty for a port-forward
	SandboxID     string // full ID
	ContainerName string
	PodName       string
	PodNamespace  string
	PodUID        string
}

// Container is a running container, with what does not change during its life.
type Container struct {
	Target
	// PodLabels are the labels of the pod's sandbox, nil if unknown.
	PodLabels map[string]string

	// RuntimeType is the upstream's name for the runtime, such as "io.containerd.runc.v2" with containerd, or "oci" or
	// "vm" with CRI-O. It is for logs.
	RuntimeType string
	// Runtime is the OCI runtime's binary, a path or a name in $PATH: runc, crun, youki, or another one that has
	// runc's command line. It is empty if no such binary can start processes. Then sessions are relayed to the
	// upstream.
	Runtime string
	// Root is the runtime's state directory (runc --root), or empty for the runtime's default.
	Root string
	// InitPid is the pid of the container's main process, in the pid namespace of this process.
	InitPid int
	// InitStartTime is when that process began, in clock ticks since boot (field 22 of /proc/PID/stat), or 0 if
	// unknown. It detects a reused pid.
	InitStartTime uint64

	// StdinOnce is stdin_once of the CRI's ContainerConfig: the runtime closes the process's stdin after the first
	// attach session with stdin has sent its end. It comes from the verbose ContainerStatus (containerd:
	// info.config.stdin_once; CRI-O: an annotation of the OCI spec). It is also false if the runtime does not say.
	StdinOnce bool

	// Process is the main process's part of the container's OCI spec. Nil when Runtime is empty.
	Process *specs.Process
	// UIDMappings and GIDMappings are those of the container's user namespace. They are empty without one.
	UIDMappings, GIDMappings []specs.LinuxIDMapping
}

// Sandbox is a ready pod sandbox. ContainerID and ContainerName of its Target are empty.
type Sandbox struct {
	Target
	// PodLabels are the labels of the sandbox, nil if unknown.
	PodLabels map[string]string

	// NetworkNamespace is the path of the pod's network namespace, or empty if the pod uses the host's.
	NetworkNamespace string
	// Pid is the sandbox's own process, or 0 if it has none (CRI-O drops it by default).
	Pid int
}

// Size is the size of a terminal, in characters. If either is zero, the size is unknown.
type Size struct{ Width, Height uint16 }

// Known reports whether the size is known.
func (s Size) Known() bool { return s.Width > 0 && s.Height > 0 }

// Command is a command line and the streams that its caller wants.
type Command struct {
	Args []string
	Env  []string // "NAME=value", added to the container's own; the last value of a name wins (KEP-6035)

	Stdin, Stdout, Stderr, TTY bool

	// Size is the terminal's initial size.
	Size Size
}

// SyncCommand is a command without streams that runs to its end while its output is collected. Most are probes.
type SyncCommand struct {
	Args []string
	Env  []string // as Command.Env
	// Timeout counts from the call and includes the start. Zero is no timeout.
	Timeout time.Duration
}

// Result is the result of a SyncCommand.
type Result struct {
	Stdout, Stderr []byte
	ExitCode       int // 0-255, 128+n after signal n
}

// Stream is one bidirectional stream of a client's connection, whatever the transport.
type Stream interface {
	io.Reader
	io.Writer
	// WriteTo writes what the client sends to w, without copying it. It returns nil at the end of the client's input,
	// and an error if the input was cut. In both cases it first writes what arrived before.
	io.WriterTo
	// InputEnded reports whether the end of the client's input has arrived, read or not.
	InputEnded() bool
	// ReadFrom sends r's bytes to the client until r's end, with one read and one write per chunk. It does not send a
	// FIN.
	io.ReaderFrom
	// CloseWrite sends FIN. Further writes fail.
	CloseWrite() error
	// CloseRead discards what is buffered and whatever the client still sends. WriteTo may continue or return.
	CloseRead()
	// Reset ends both directions at once, so that WriteTo and ReadFrom return, and tells the client.
	Reset() error
	// Err returns why the stream was cut: a reset by either side, or the end of its connection. It is nil before
	// that, and after an orderly end.
	Err() error
	// AfterReset calls f in a new goroutine when either side resets the stream, or when the stream ends with its
	// connection, even while nobody reads. If that has already happened, it calls f at once. A second f replaces the
	// first. Streams that a client cannot reset never call it.
	AfterReset(f func())
	// Received and Sent return the payload bytes that were received from and sent to the client.
	Received() int64
	Sent() int64
}
