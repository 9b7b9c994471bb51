package execproc

import (
	"io"
	"sync"
	"sync/atomic"
	"syscall"

	"github.com/streamshim/streamshim/pkg/execproc/internal/proc"
	"github.com/streamshim/streamshim/pkg/execproc/internal/reaper"
	"github.com/streamshim/streamshim/pkg/execproc/internal/stdio"
	"github.com/streamshim/streamshim/pkg/execproc/internal/tree"
	"github.com/streamshim/streamshim/pkg/workload"
)

// Process is a process that was started in a container. Its methods may be called from several
// goroutines. Close it when done with it, whether it has ended or not.
type Process struct {
	runner    *Runner
	container workload.Container
	leader    proc.Identity
	record    string // path of its recovery record
	watch     *reaper.Watch
	init      *reaper.Watch // nil when the container's main process is not known

	stdin  io.WriteCloser
	stdout io.ReadCloser
	stderr io.ReadCloser
	pipes  *stdio.Pipes    // nil with a terminal
	tty    *stdio.Terminal // nil without
	ends   tree.StreamEnds

	standIn string // see StandIn
	// stranger is set for what a predecessor has left that was killed: it is no child of this process.
	stranger bool

	policy   Policy
	probe    atomic.Bool   // started by RunSync
	killNow  chan struct{} // closed by Kill
	freezing chan struct{} // closed by Freeze
	cut      chan struct{} // closed by either
	ended    chan struct{} // closed when the ending is over

	// life is held for reading by what changes the life of a process, and for writing by Freeze, which ends it here.
	life   sync.RWMutex
	frozen bool

	mu       sync.Mutex
	closed   bool
	looking  bool // the ending looks for the tree; Close leaves the streams open until it has
	isKilled bool
	isKept   bool
	ending   *ending // nil before it has begun
	endOver  bool
	kept     []*stdio.Kept
}

// newProcess returns a process that nobody watches yet.
func newProcess(r *Runner, container workload.Container, record string, policy Policy) *Process {
	return &Process{
		runner: r, container: container, record: record, policy: policy,
		killNow: make(chan struct{}), freezing: make(chan struct{}), cut: make(chan struct{}), ended: make(chan struct{}),
	}
}

// Stdin is the process's standard input, nil when the command did not ask for it. Without a terminal
// it is the *os.File of a pipe, and Close is the end of input. With a terminal Close types the
// terminal's end-of-file character and leaves the terminal open.
func (p *Process) Stdin() io.WriteCloser { return p.stdin }

// Stdout is the process's standard output, nil when the command did not ask for it. Without a
// terminal it is the *os.File of a pipe. With a terminal it is the terminal, and closing it hangs up.
// Reading ends with io.EOF when nobody holds the other end any more.
func (p *Process) Stdout() io.ReadCloser { return p.stdout }

// Stderr is the process's standard error, an *os.File; nil when the command did not ask for it and
// always with a terminal.
func (p *Process) Stderr() io.ReadCloser { return p.stderr }

// Resize sets the terminal's size. One that is not known is ignored, and so is everything for a process
// without a terminal.
func (p *Process) Resize(size workload.Size) error {
	if p.tty == nil || !size.Known() {
		return nil
	}
	return p.tty.Resize(size)
}

// Exited is closed as soon as the process has ended and was reaped, independent of all I/O.
func (p *Process) Exited() <-chan struct{} { return p.watch.Exited }

// ExitCode is the exit status, 0-255, 128+n after signal n. It is valid once Exited is closed, and
// -1 before.
func (p *Process) ExitCode() int {
	select {
	case <-p.watch.Exited:
		return p.watch.Status
	default:
		return -1
	}
}

// ContainerExited is closed when the main process of the container has ended, unless the process
// was closed before. It is nil, and so never ready, when Container.InitPid was 0.
func (p *Process) ContainerExited() <-chan struct{} {
	if p.init == nil {
		return nil
	}
	return p.init.Exited
}

// ContainerEnding reports whether the main process of the container has been killed, has begun to end or has
// ended. In between the kernel kills all others in its pid namespace and waits for them, so that it is the last
// to be gone. Without a namespace of its own all get the signal at once, and it may be the last to be given a
// CPU.
func (p *Process) ContainerEnding() bool {
	if p.init == nil {
		return false
	}
	init, err := proc.ReadStat(p.container.InitPid)
	if err != nil {
		return proc.Gone(err)
	}
	return init.Killed || init.Exiting || init.Zombie() || (p.container.InitStartTime != 0 && init.Start != p.container.InitStartTime)
}

// Disconnect begins the end of a process whose client has gone, as Config.OnDisconnect says: with
// PolicyHangup its streams are closed and the whole tree gets SIGHUP, then SIGTERM, then SIGKILL;
// with PolicyKill it gets SIGKILL at once; with PolicyKeep it lives on, its output read and thrown
// away, its stdin at its end only if the caller has closed it before. It returns at once; may be called more than
// once, and after Close.
func (p *Process) Disconnect() {
	p.life.RLock()
	defer p.life.RUnlock()
	if p.frozen {
		return
	}
	switch p.policy {
	case PolicyKeep:
		p.keepOn()
	case PolicyKill:
		if onKill := p.runner.config.OnKill; onKill != nil && !p.hasExited() {
			onKill()
		}
		p.killTree()
	default:
		p.beginEnd()
	}
}

// Kill sends SIGKILL to the whole tree now, also when a gentler end is under way or the policy is to
// keep the process. It returns at once; may be called more than once.
func (p *Process) Kill() {
	p.life.RLock()
	defer p.life.RUnlock()
	if !p.frozen {
		p.killTree()
	}
}

func (p *Process) killTree() {
	p.mu.Lock()
	if !p.isKilled {
		p.isKilled = true
		close(p.killNow)
		p.cutLocked()
	}
	p.mu.Unlock()
	p.beginEnd()
}

// cutLocked ends the waits of the ending.
func (p *Process) cutLocked() {
	if !isClosed(p.cut) {
		close(p.cut)
	}
}

// Close releases the streams and everything kept for the process. It does not end the process and
// does not wait for it; a process that still runs goes on being watched and reaped. But what it
// writes from then on meets a closed pipe, and a terminal hangs up, unless Disconnect with
// PolicyKeep came first.
func (p *Process) Close() error {
	p.life.RLock()
	defer p.life.RUnlock()
	if p.frozen {
		p.closeStreams()
		return nil
	}
	p.mu.Lock()
	was := p.closed
	p.closed = true
	if !was && !p.looking {
		p.closeStreams()
	}
	p.mu.Unlock()
	if !was && p.init != nil {
		p.runner.reaper.DropContainer(p.init)
	}
	return nil
}

func (p *Process) closeStreams() {
	if p.tty != nil {
		p.tty.Close()
	}
	if p.pipes != nil {
		p.pipes.CloseOurs()
	}
}

// hasExited reports whether the process itself has ended.
func (p *Process) hasExited() bool { return isClosed(p.watch.Exited) }

// killed reports whether Kill was called.
func (p *Process) killed() bool { return isClosed(p.killNow) }

func isClosed(c <-chan struct{}) bool {
	select {
	case <-c:
		return true
	default:
		return false
	}
}

// StandIn is the name of the helper that runs instead of the command, which the container does not have; otherwise empty.
func (p *Process) StandIn() string { return p.standIn }

// PID is the process in our pid namespace. After the process has ended it may be another's.
func (p *Process) PID() int { return p.leader.Pid }

// Signal sends a signal to the process itself, not to its tree. The error is unix.ESRCH when it has
// ended.
func (p *Process) Signal(signal syscall.Signal) error { return p.leader.Signal(signal) }
