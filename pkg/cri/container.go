package cri

import (
	"context"
	"time"

	specs "github.com/opencontainers/runtime-spec/specs-go"

	"github.com/streamshim/streamshim/pkg/session"
	"github.com/streamshim/streamshim/pkg/streaming"
)

// Container is what was found out about a running container. The facts do not change in a
// container's life and are shared between its sessions: nobody writes to what they point to.
type Container struct {
	session.Target
	// PodLabels are the labels of the pod's sandbox, nil when they are not known.
	PodLabels map[string]string

	// RuntimeType is the upstream's word for the runtime, such as "io.containerd.runc.v2" with
	// containerd, or "oci" or "vm" with CRI-O. For logs.
	RuntimeType string
	// Runtime is the absolute path of the OCI runtime's binary (runc, crun, youki). It is empty when
	// processes cannot be started with one: then sessions are relayed to the upstream.
	Runtime string
	// Root is the directory in which the OCI runtime keeps its state, its --root.
	Root string
	// InitPid is the container's main process in our pid namespace.
	InitPid int
	// InitStartTime is the time that process started, in clock ticks since boot (field 22 of
	// /proc/pid/stat), 0 when it could not be read. With it a reused pid is told from the real one.
	InitStartTime uint64

	// StdinOnce is stdin_once of its ContainerConfig, false also when the upstream does not say.
	StdinOnce bool

	// Process is the process of the container's OCI spec. Nil when Runtime is empty.
	Process *specs.Process
	// UIDMappings and GIDMappings are the container's user namespace, empty when it has none.
	UIDMappings, GIDMappings []specs.LinuxIDMapping
}

// user is whom a process runs as in the container, nil when that is not known.
func (c Container) user() *session.User {
	if c.Process == nil {
		return nil
	}
	return &session.User{UID: c.Process.User.UID, GID: c.Process.User.GID}
}

// Sandbox is what was found out about a ready pod sandbox. ContainerID and ContainerName of its
// Target are empty.
type Sandbox struct {
	session.Target
	// PodLabels are the labels of the pod's sandbox, nil when they are not known.
	PodLabels map[string]string

	// NetworkNamespace is the path of the pod's network namespace, empty when the pod uses the
	// host's.
	NetworkNamespace string
	// Pid is the sandbox's own process, 0 when it has none (CRI-O drops it by default).
	Pid int
}

// StreamServer gives out one-time URLs. An error that is meant for the client, such as too many
// URLs waiting, is told from an internal one by Config.StreamErrorCode.
type StreamServer interface {
	Exec(*streaming.ExecRequest) (url string, err error)
	Attach(*streaming.AttachRequest) (url string, err error)
	PortForward(*streaming.PortForwardRequest) (url string, err error)
}

// Engine starts processes and dials ports. It is asked only about containers whose Runtime is set.
type Engine interface {
	// Executor makes what an exec session will start its process with. It does not block.
	Executor(Container) streaming.Executor

	// ExecSync runs a command to its end and returns what it wrote. After the request's timeout it
	// ends the whole process tree and returns an error for which errors.Is(err,
	// context.DeadlineExceeded) holds; the same when ctx is done, with ctx's error. An error with a
	// method ExitCode() int means that the command could not be started, its text being one line for
	// people, and a *session.RefusedError that there was no room for it.
	ExecSync(ctx context.Context, container Container, request SyncRequest) (SyncResult, error)

	// Forwarder makes what a port-forward session will dial with. The session closes it.
	Forwarder(Sandbox) (streaming.PortForwarder, error)
}

// SyncRequest is a command without streams.
type SyncRequest struct {
	Args []string
	Env  []string // "NAME=value", added to the container's own, the last of a name wins
	// Timeout is how long the command may take, 0 for as long as it likes.
	Timeout time.Duration
}

// SyncResult is how a command without streams ended.
type SyncResult struct {
	Stdout, Stderr []byte
	ExitCode       int // 0-255, 128+n after signal n
}
