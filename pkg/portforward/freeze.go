package portforward

import (
	"context"
	"errors"
	"fmt"
	"net"
	"time"

	"golang.org/x/sys/unix"

	"github.com/streamshim/streamshim/pkg/handover"
	"github.com/streamshim/streamshim/pkg/workload"
)

// connectionVersion and forwarderVersion are the versions of the states. A reader with another version refuses
// them.
const (
	connectionVersion = 1
	forwarderVersion  = 1
)

// dialGrace is how long a dial continues after Freeze. A dial to a port with an accepting listener takes far less.
// Continue restarts a longer one with the rest of its time: no byte has moved, and a program with a full backlog
// has not seen it.
const dialGrace = 50 * time.Millisecond

// ConnectionState is the state of one frozen connection.
type ConnectionState struct {
	Version int
	Pod     handover.Descriptor // 0 if the pod has not answered the dial
	Dialled time.Duration       // time spent dialling, if there is no Pod

	Sent, Received int64
	// Uploaded says that nothing more is moved to the pod: either the client's FIN was passed on (ClientFinished),
	// or the pod takes no more, because of Fault.
	Uploaded, ClientFinished bool
	Fault                    int  // errno, 0 for none
	PodFinished              bool // the pod's FIN was sent to the client

	Idle, Late, Left TimerState
}

// TimerState is the state of a half-closed connection's limit.
type TimerState struct {
	Started             bool
	Still               time.Duration // time without progress
	Acknowledged, Taken uint64        // the progress
}

// FrozenError is returned by a Forward whose Forwarder was frozen. It matches handover.ErrFrozen. The caller must
// call State or Discard.
type FrozenError struct {
	connection *connection // nil if the pod has not answered the dial
	dialled    time.Duration
}

func (e *FrozenError) Error() string { return "forwarded connection: " + handover.ErrFrozen.Error() }

// Is reports whether target is handover.ErrFrozen.
func (e *FrozenError) Is(target error) bool { return target == handover.ErrFrozen }

// State returns the state for Continue, as CBOR. It duplicates the connection into files and closes it here. On an
// error it resets the connection.
func (e *FrozenError) State(files *handover.Files) ([]byte, error) {
	state := ConnectionState{Version: connectionVersion, Dialled: e.dialled}
	if c := e.connection; c != nil {
		var err error
		if state, err = c.state(files); err != nil {
			e.Discard()
			return nil, err
		}
		c.pod.Close()
	}
	return handover.Encode(state)
}

// Discard resets the connection.
func (e *FrozenError) Discard() {
	if e.connection != nil {
		e.connection.pod.SetLinger(0)
		e.connection.pod.Close()
	}
}

func (c *connection) state(files *handover.Files) (ConnectionState, error) {
	state := ConnectionState{
		Version: connectionVersion, Sent: c.sent, Received: c.received,
		Uploaded: c.uploaded, ClientFinished: c.clientFinished.Load(), PodFinished: c.podFinished.Load(),
		Idle: c.idle.state(), Late: c.late.state(), Left: c.left.state(),
	}
	var fault unix.Errno
	if c.uploaded && errors.As(c.copyErr, &fault) {
		state.Fault = int(fault)
	}
	var err error
	state.Pod, err = files.Keep(c.pod)
	return state, err
}

// resume restores a connection from its state.
func (c *connection) resume(state ConnectionState) {
	c.sent, c.received, c.uploaded = state.Sent, state.Received, state.Uploaded
	c.clientFinished.Store(state.ClientFinished)
	c.podFinished.Store(state.PodFinished)
	if state.Uploaded {
		if !state.ClientFinished {
			c.copyErr = unix.Errno(state.Fault) //nolint:gosec // a small number
		}
		c.endCopy()
	}
	c.idle.resume(state.Idle)
	c.late.resume(state.Late)
	c.left.resume(state.Left)
}

// freeze ends both directions of a connection whose stream is frozen.
func (c *connection) freeze() {
	c.freezing.Store(true)
	c.pod.SetDeadline(time.Unix(1, 0)) //nolint:errcheck // one that is closed has ended
}

// Freeze makes all Forwards return a *FrozenError, except those that have ended. Their streams must have been
// frozen before. Dials in progress get a moment to finish. Freeze does not wait.
func (f *Forwarder) Freeze() {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.frozen {
		return
	}
	f.frozen = true
	for c := range f.open {
		c.freeze()
	}
	f.dialsEnd = time.AfterFunc(dialGrace, func() { f.endDials(handover.ErrFrozen) })
}

// add registers an open connection, and freezes it at once if the Forwarder is frozen.
func (f *Forwarder) add(c *connection) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.open[c] = struct{}{}
	if f.frozen {
		c.freeze()
	}
}

func (f *Forwarder) remove(c *connection) {
	f.mu.Lock()
	defer f.mu.Unlock()
	delete(f.open, c)
}

// ForwarderState is a Forwarder's hold on its sandbox. The handles are carried rather than opened again: the path
// or the pid may refer to another sandbox by then.
type ForwarderState struct {
	Version       int
	Path          string // path of the network namespace, empty for the host's
	Namespace     handover.Descriptor
	Device, Inode uint64
	Process       handover.Descriptor // pidfd of the sandbox's process
	Gone          bool                // the sandbox is gone, and there are no handles
}

// State returns the state for ResumeForwarder, as CBOR, once all Forwards have returned. Close the Forwarder
// afterwards as usual.
func (f *Forwarder) State(files *handover.Files) ([]byte, error) {
	state := ForwarderState{Version: forwarderVersion, Path: f.pod.path, Device: f.pod.dev, Inode: f.pod.ino}
	select {
	case <-f.gone:
		state.Gone = true
		return handover.Encode(state)
	default:
	}
	var err error
	if f.pod.file != nil {
		if state.Namespace, err = files.Keep(f.pod.file); err != nil {
			return nil, fmt.Errorf("network namespace %s: %w", f.pod.path, err)
		}
	}
	if f.process != nil {
		if state.Process, err = files.Keep(f.process); err != nil {
			return nil, fmt.Errorf("process of the sandbox: %w", err)
		}
	}
	return handover.Encode(state)
}

// ResumeForwarder restores a Forwarder from a frozen one's state. It ignores config.SandboxPID. If the sandbox has
// gone meanwhile, Gone is closed.
func ResumeForwarder(encoded []byte, files *handover.Files, config Config) (*Forwarder, error) {
	var state ForwarderState
	if err := handover.Decode(encoded, &state); err != nil {
		return nil, fmt.Errorf("port forwarder: %w", err)
	}
	if state.Version != forwarderVersion {
		return nil, fmt.Errorf("port forwarder: the state has version %d, only %d is known", state.Version, forwarderVersion)
	}
	pod := &namespace{path: state.Path, dev: state.Device, ino: state.Inode}
	f := makeForwarder(pod, config)
	if err := f.take(state, files); err != nil {
		close(f.processWatched)
		f.Close()
		return nil, err
	}
	f.watch(config.Watcher)
	if state.Gone || errors.Is(pod.check(), ErrSandboxGone) {
		f.sandboxGone()
	}
	return f, nil
}

// take takes the handles, unless the sandbox is gone.
func (f *Forwarder) take(state ForwarderState, files *handover.Files) (err error) {
	if state.Gone {
		return nil
	}
	if state.Namespace != 0 {
		if f.pod.file, err = files.Take(state.Namespace, state.Path); err != nil {
			return err
		}
		if err := f.pod.verify(); err != nil {
			return err
		}
	} else if state.Path != "" {
		return fmt.Errorf("port forwarder: nothing was handed over of the network namespace %s", state.Path)
	}
	if state.Process != 0 {
		f.process, err = files.Take(state.Process, "pidfd")
	}
	return err
}

// verify checks that the open file is the expected namespace.
func (n *namespace) verify() error {
	raw, err := n.file.SyscallConn()
	if err != nil {
		return err
	}
	var where unix.Statfs_t
	var what unix.Stat_t
	var statErr error
	if err := raw.Control(func(fd uintptr) {
		statErr = errors.Join(unix.Fstatfs(int(fd), &where), unix.Fstat(int(fd), &what)) //nolint:gosec // a descriptor
	}); err != nil {
		return err
	}
	if statErr != nil {
		return fmt.Errorf("stat network namespace %s: %w", n.path, statErr)
	}
	if where.Type != unix.NSFS_MAGIC || uint64(what.Dev) != n.dev || what.Ino != n.ino { //nolint:unconvert // differs between platforms
		return fmt.Errorf("what was handed over as the network namespace %s is another file", n.path)
	}
	return nil
}

// Continue takes what a FrozenError put into files and returns a function that continues its Forward. An error in
// the state is returned by that function.
func (f *Forwarder) Continue(encoded []byte, files *handover.Files, port uint16, stream workload.Stream) (forward func(context.Context) (sent, received int64, err error)) {
	state, pod, err := takeConnection(encoded, files)
	return func(ctx context.Context) (sent, received int64, _ error) {
		if err != nil {
			stream.Reset() //nolint:errcheck // the stream ends either way
			return 0, 0, err
		}
		if pod == nil {
			return f.forward(ctx, port, stream, max(state.Dialled, 0))
		}
		ctx, done := f.bind(ctx)
		defer done()
		c := newConnection(pod, stream, f.halfClosedIdle)
		c.resume(state)
		return f.run(ctx, c)
	}
}

// takeConnection restores a connection. pod is nil if it was still being dialled.
func takeConnection(encoded []byte, files *handover.Files) (state ConnectionState, pod *net.TCPConn, err error) {
	if err := handover.Decode(encoded, &state); err != nil {
		return state, nil, fmt.Errorf("forwarded connection: %w", err)
	}
	if state.Version != connectionVersion {
		return state, nil, fmt.Errorf("the state of a forwarded connection has version %d, only %d is known", state.Version, connectionVersion)
	}
	if state.Pod != 0 {
		pod, err = takePod(state.Pod, files)
	}
	return state, pod, err
}

func takePod(pod handover.Descriptor, files *handover.Files) (*net.TCPConn, error) {
	conn, err := files.TakeConn(pod)
	if err != nil {
		return nil, err
	}
	tcp, ok := conn.(*net.TCPConn)
	if !ok {
		conn.Close()
		return nil, fmt.Errorf("a connection into a pod was handed over that is a %T", conn)
	}
	return tcp, tcp.SetKeepAliveConfig(keepAlive)
}
