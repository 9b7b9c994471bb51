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
	"github.com/streamshim/streamshim/pkg/rescue"
	"github.com/streamshim/streamshim/pkg/workload"
)

// Process is a process started in a container. Its methods are safe for concurrent use. Close it when done with
// it, whether or not it has ended.
type Process struct {
	runner    *Runner
	container workload.Container
	leader    proc.Identity
	record    string // path of the recovery record
	watch     *reaper.Watch
	init      *reaper.Watch // nil if the container's main process is not known

	stdin  io.WriteCloser
	stdout io.ReadCloser
	stderr io.ReadCloser
	pipes  *stdio.Pipes    // nil with a terminal
	tty    *stdio.Terminal // nil with pipes
	ends   tree.StreamEnds

	standIn string // see StandIn
	// stranger marks a process left by a predecessor that was killed. It is not our child.
	stranger bool

	policy   Policy
	probe    atomic.Bool   // started by RunSync
	killNow  chan struct{} // closed by Kill
	freezing chan struct{} // closed by Freeze
	cut      chan struct{} // closed by either
	ended    chan struct{} // closed when the ending is over

	// life is read-locked by whatever changes the process's life, and write-locked by Freeze, which ends it here.
	life   sync.RWMutex
	frozen bool

	mu       sync.Mutex
	closed   bool
	looking  bool // the ending is searching for the tree; Close leaves the streams open until it is done
	isKilled bool
	isKept   bool
	ending   *ending // nil until it begins
	endOver  bool
	kept     []*stdio.Kept
}

// newProcess returns a process that is not watched yet.
func newProcess(r *Runner, container workload.Container, record string, policy Policy) *Process {
	return &Process{
		runner: r, container: container, record: record, policy: policy,
		killNow: make(chan struct{}), freezing: make(chan struct{}), cut: make(chan struct{}), ended: make(chan struct{}),
	}
}

// Stdin returns the process's standard input, or nil if the command did not ask for it. Without a terminal it is
// the *os.File of a pipe, and Close ends the input. With a terminal, Close types the terminal's end-of-file
// character and leaves the terminal open.
func (p *Process) Stdin() io.WriteCloser { return p.stdin }

// Stdout returns the process's standard output, or nil if the command did not ask for it. Without a terminal it is
// the *os.File of a pipe. With a terminal it is the terminal, and closing it hangs up. Reads return io.EOF once
// nobody holds the other end.
func (p *Process) Stdout() io.ReadCloser { return p.stdout }

// Stderr returns the process's standard error, an *os.File. It is nil with a terminal, or if the command did not
// ask for it.
func (p *Process) Stderr() io.ReadCloser { return p.stderr }

// Resize sets the terminal's size. It ignores an unknown size and does nothing without a terminal.
func (p *Process) Resize(size workload.Size) error {
	if p.tty == nil || !size.Known() {
		return nil
	}
	return p.tty.Resize(size)
}

// Exited is closed as soon as the process has ended and been reaped, independently of all I/O.
func (p *Process) Exited() <-chan struct{} { return p.watch.Exited }

// ExitCode returns the exit status: 0-255, or 128+n after signal n. It returns -1 until Exited is closed.
func (p *Process) ExitCode() int {
	if p.hasExited() {
		return p.watch.Status
	}
	return -1
}

// ContainerExited is closed when the container's main process has ended, unless the process was closed first. It
// is nil, and so never ready, if Container.InitPid was 0.
func (p *Process) ContainerExited() <-chan struct{} {
	if p.init == nil {
		return nil
	}
	return p.init.Exited
}

// ContainerEnding reports whether the container's main process has been killed, is exiting or has ended. When it
// exits, the kernel kills all others in its pid namespace and waits for them, so the main process is the last to
// go. Without a pid namespace of its own all get the signal at once, and the main process may be the last to be
// scheduled.
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

// Disconnect begins the end of a process whose client has gone, as Config.OnDisconnect says. With PolicyHangup its
// streams are closed and the whole tree gets SIGHUP, then SIGTERM, then SIGKILL. With PolicyKill the tree gets
// SIGKILL at once. With PolicyKeep the process lives on, its output is read and discarded, and its stdin ends only
// if the caller closed it before. Disconnect returns at once. It may be called more than once, and after Close.
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

// Kill sends SIGKILL to the whole tree now, even during a gentler ending or if the policy is to keep the process.
// It returns at once and may be called more than once.
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

// panicked kills a process one of whose goroutines has panicked: nobody knows what it would do without.
func (p *Process) panicked(fault *rescue.Panic) {
	p.runner.panicked(fault)
	rescue.Go(p.runner.panicked, p.Kill) // who reports must not wait for what a Freeze holds
}

// cutLocked interrupts the ending's waits.
func (p *Process) cutLocked() {
	if !isClosed(p.cut) {
		close(p.cut)
	}
}

// Close releases the streams and all other resources of the process. It neither ends the process nor waits for it;
// a process that still runs continues to be watched and is reaped. But what it writes from then on meets a closed
// pipe, and a terminal hangs up, unless Disconnect with PolicyKeep came first.
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

// hasExited reports whether the process itself has ended, whatever its tree does.
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

// StandIn returns the name of the helper that runs in place of a command that the container lacks, or "" if the
// command itself runs.
func (p *Process) StandIn() string { return p.standIn }

// PID returns the process's pid in our pid namespace. After the process has ended, the pid may be reused.
func (p *Process) PID() int { return p.leader.Pid }

// Signal sends a signal to the process itself, not to its tree. It returns unix.ESRCH if the process has ended.
func (p *Process) Signal(signal syscall.Signal) error { return p.leader.Signal(signal) }
