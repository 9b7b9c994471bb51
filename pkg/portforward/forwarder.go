// Package portforward connects to ports inside a pod and moves bytes between such a connection and a client's
// stream, each direction independently.
package portforward

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/streamshim/streamshim/pkg/handover"
	"github.com/streamshim/streamshim/pkg/rescue"
	"github.com/streamshim/streamshim/pkg/workload"
)

// DefaultHalfClosedIdle replaces a zero Config.HalfClosedIdle.
const DefaultHalfClosedIdle = time.Hour

// leaver is a Stream that continues when its client leaves after the end of its input: WriteTo moves the rest, and
// what is sent to the client is discarded. AfterLeaving calls do when that happens, in a goroutine of its own,
// unless stop was called before.
type leaver interface {
	AfterLeaving(do func()) (stop func() bool)
}

// Config configures a Forwarder, apart from its namespace. The zero value is usable, but then only the next
// Forward notices the end of the sandbox.
type Config struct {
	Dialer Dialer

	// HalfClosedIdle bounds how long a connection with one side ended may go without moving a byte in the other
	// direction. Zero means DefaultHalfClosedIdle. Connections open on both sides have no such limit.
	HalfClosedIdle time.Duration

	// Watcher notices that the network namespace is gone. It has no effect for a host-network sandbox.
	Watcher *Watcher

	// SandboxPID is the sandbox's own process (the pause process), whose end is the end of the sandbox. For a
	// host-network sandbox it is the only sign. Zero if there is none.
	SandboxPID int
}

// Forwarder forwards connections to the ports of one pod sandbox. Its methods are safe for concurrent use.
type Forwarder struct {
	pod            *namespace
	dialer         Dialer
	halfClosedIdle time.Duration
	stopWatching   func()
	process        *os.File      // pidfd of the sandbox's process; nil if there is none
	processWatched chan struct{} // closed when watchProcess has returned

	// life ends with the sandbox or with Close; its cause is ErrSandboxGone or ErrClosed. It has no parent,
	// because forwards come and go with contexts of their own.
	life context.Context
	end  context.CancelCauseFunc

	goneOnce sync.Once
	gone     chan struct{}

	// dialing ends when Freeze gives up the dials in progress.
	dialing  context.Context
	endDials context.CancelCauseFunc

	mu       sync.Mutex
	open     map[*connection]struct{}
	frozen   bool
	dialsEnd *time.Timer // calls endDials
}

// NewForwarder opens the network namespace at netnsPath (empty for a host-network sandbox) and starts to watch the
// sandbox. The error is ErrSandboxGone if it no longer exists. The namespace stays open, which saves opening it
// for each connection, until the sandbox is gone or the caller calls Close. A Forwarder uses at most two
// descriptors and, with a SandboxPID, one goroutine.
func NewForwarder(netnsPath string, config Config) (*Forwarder, error) {
	pod, err := openNamespace(netnsPath)
	if err != nil {
		return nil, err
	}
	var process *os.File
	if config.SandboxPID != 0 {
		if process, err = openProcess(config.SandboxPID); err != nil {
			pod.close()
			return nil, err
		}
	}
	f := makeForwarder(pod, config)
	f.process = process
	f.watch(config.Watcher)
	if err := pod.check(); err != nil { // gone between opening and watching
		f.Close()
		return nil, err
	}
	return f, nil
}

func makeForwarder(pod *namespace, config Config) *Forwarder {
	f := &Forwarder{
		pod:            pod,
		dialer:         config.Dialer,
		halfClosedIdle: orDefault(config.HalfClosedIdle, DefaultHalfClosedIdle),
		stopWatching:   func() {},
		processWatched: make(chan struct{}),
		gone:           make(chan struct{}),
		open:           make(map[*connection]struct{}),
	}
	f.life, f.end = context.WithCancelCause(context.Background())
	f.dialing, f.endDials = context.WithCancelCause(context.Background())
	return f
}

// watch begins to watch the sandbox.
func (f *Forwarder) watch(watcher *Watcher) {
	if f.pod.file != nil && watcher != nil {
		f.stopWatching = watcher.watch(f.pod, f.sandboxGone)
	}
	if f.process != nil {
		rescue.Go(rescue.Die, f.watchProcess) // it only waits
	} else {
		close(f.processWatched)
	}
}

// openProcess returns a pidfd, which becomes readable when the process ends. Unlike a pid it never refers to
// another process.
func openProcess(pid int) (*os.File, error) {
	fd, err := unix.PidfdOpen(pid, unix.PIDFD_NONBLOCK)
	if errors.Is(err, unix.ESRCH) {
		return nil, fmt.Errorf("%w: its process %d has ended", ErrSandboxGone, pid)
	}
	if err != nil {
		return nil, fmt.Errorf("watch the sandbox's process %d: %w", pid, os.NewSyscallError("pidfd_open", err))
	}
	return os.NewFile(uintptr(fd), "pidfd"), nil
}

// watchProcess waits in Go's poller until the sandbox's process ends or Close is called.
func (f *Forwarder) watchProcess() {
	defer close(f.processWatched)
	raw, err := f.process.SyscallConn()
	if err != nil {
		return // closed
	}
	err = raw.Read(func(fd uintptr) (ended bool) {
		ready, err := unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, 0)
		return err == nil && ready > 0
	})
	if err == nil {
		f.sandboxGone()
	}
}

// Gone is closed when the sandbox no longer exists. All forwards end right after that, so one that returns because
// of it finds Gone closed. It stays open if the Forwarder is closed first.
func (f *Forwarder) Gone() <-chan struct{} { return f.gone }

func (f *Forwarder) sandboxGone() {
	f.goneOnce.Do(func() {
		close(f.gone)
		f.end(ErrSandboxGone)
		f.pod.close() // otherwise the namespace and its contents would live on
	})
}

// Close ends all forwards, without waiting for them; they return ErrClosed. It releases the namespace and the
// watch on the sandbox. It may be called more than once.
func (f *Forwarder) Close() error {
	f.end(ErrClosed)
	f.mu.Lock()
	if f.dialsEnd != nil {
		f.dialsEnd.Stop()
	}
	f.mu.Unlock()
	f.endDials(nil)
	f.stopWatching()
	f.pod.close()
	if f.process != nil {
		f.process.Close()
	}
	<-f.processWatched
	return nil
}

// Dial connects to a port of the pod like Dialer.Dial, with its errors, and ErrSandboxGone or ErrClosed once the
// Forwarder has ended. The caller must close the connection; the end of the sandbox does not.
func (f *Forwarder) Dial(ctx context.Context, port uint16) (*net.TCPConn, error) {
	ctx, done := f.bind(ctx)
	defer done()
	return f.dial(ctx, f.dialer, port)
}

func (f *Forwarder) dial(ctx context.Context, dialer Dialer, port uint16) (*net.TCPConn, error) {
	// One stat makes sure, without waiting for the watch, that nothing is dialled in a stopped sandbox.
	if err := f.pod.check(); errors.Is(err, ErrSandboxGone) {
		f.sandboxGone()
	}
	var conn *net.TCPConn
	err := f.life.Err() // check here: the bound context learns of it slightly later
	if err == nil {
		conn, err = dialer.dial(ctx, f.pod, port)
	}
	if err != nil && f.life.Err() != nil {
		return nil, fmt.Errorf("connect to port %d of the pod: %w", port, context.Cause(f.life))
	}
	return conn, err
}

// Forward connects to a port of the pod and moves bytes between the connection and the stream. The client's FIN
// becomes a FIN to the pod and vice versa, and each direction continues without the other as long as it moves
// bytes (see Config.HalfClosedIdle). Forward returns when both directions have ended. It uses one goroutine
// besides the caller's, which has then ended too.
//
// sent counts bytes from the client to the pod, received those from the pod to the client. Both are valid even
// with an error.
//
// Forward owns the stream from the call on. When it returns nil, the stream is closed: the client has the pod's
// FIN, and either its own FIN has been passed on, or the pod has closed for good and the client's bytes are being
// discarded, or the client has reset the stream after the pod's FIN, as client-go always does. When Forward
// returns an error, both the stream and the connection to the pod, if there was one, have been reset. So the
// caller need not reset anything, but may report the error by other means, such as port-forward's error stream.
// The errors are those of Dial, ErrResetByPod, ErrResetByClient, ErrHalfClosedIdle, ErrSandboxGone, ErrClosed, and
// the context's cause.
//
// When the context ends, the connection to the pod is reset at once. A ReadFrom that blocks because the client
// does not read ends when the stream's Reset, or the owner of the client's connection, unblocks it.
//
// When the Forwarder is frozen, the error is a *FrozenError and nothing has ended.
func (f *Forwarder) Forward(ctx context.Context, port uint16, stream workload.Stream) (sent, received int64, err error) {
	return f.forward(ctx, port, stream, 0)
}

// forward is Forward when dialled has already been spent on dialling.
func (f *Forwarder) forward(ctx context.Context, port uint16, stream workload.Stream, dialled time.Duration) (sent, received int64, err error) {
	ctx, done := f.bind(ctx)
	defer done()
	began := time.Now()
	conn, err := f.dialFor(ctx, port, stream, dialled)
	if errors.Is(err, handover.ErrFrozen) {
		return 0, 0, &FrozenError{dialled: dialled + time.Since(began)}
	}
	if err != nil {
		stream.Reset() //nolint:errcheck // the stream ends either way
		return 0, 0, err
	}
	return f.run(ctx, newConnection(conn, stream, f.halfClosedIdle))
}

// run forwards an open connection.
func (f *Forwarder) run(ctx context.Context, c *connection) (sent, received int64, err error) {
	f.add(c)
	defer f.remove(c)
	return c.forward(ctx)
}

// dialFor gives up the dial when the client resets its stream. Otherwise all streams of a client that retries,
// while the pod accepts nothing, would wait for dials that nobody wants any more.
func (f *Forwarder) dialFor(ctx context.Context, port uint16, stream workload.Stream, dialled time.Duration) (*net.TCPConn, error) {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	defer context.AfterFunc(f.dialing, func() { cancel(context.Cause(f.dialing)) })()
	stream.AfterReset(func() { cancel(ErrResetByClient) })
	dialer := f.dialer
	dialer.TotalTimeout = max(orDefault(dialer.TotalTimeout, DefaultTotalTimeout)-dialled, time.Millisecond)
	return f.dial(ctx, dialer, port)
}

// bind returns a context that also ends with the Forwarder's life.
func (f *Forwarder) bind(ctx context.Context) (bound context.Context, done func()) {
	bound, cancel := context.WithCancelCause(ctx)
	stop := context.AfterFunc(f.life, func() { cancel(context.Cause(f.life)) })
	return bound, func() {
		stop()
		cancel(nil)
	}
}
