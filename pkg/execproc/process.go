package execproc

import (
	"context"
	"io"
	"os"
	"strconv"
	"sync"
	"sync/atomic"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/streamshim/streamshim/pkg/workload"
)

// Process is a process that was started in a container. Its methods may be called from several
// goroutines. Close it when done with it, whether it has ended or not.
type Process struct {
	runner    *Runner
	container workload.Container
	leader    identity
	record    string // path of its recovery record
	watch     *watch
	init      *watch // nil when the container's main process is not known

	stdin  io.WriteCloser
	stdout io.ReadCloser
	stderr io.ReadCloser
	pipes  *stdio    // nil with a terminal
	tty    *terminal // nil without
	ends   streamEnds

	standIn string // see StandIn

	policy  Policy
	probe   atomic.Bool // started by RunSync
	keep    sync.Once
	end     sync.Once
	kill    sync.Once
	killNow chan struct{} // closed by Kill
	ended   chan struct{} // closed when the ending is over

	mu      sync.Mutex
	closed  bool
	looking bool // the ending looks for the tree; Close leaves the streams open until it has
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
	return p.tty.resize(size)
}

// Exited is closed as soon as the process has ended and was reaped, independent of all I/O.
func (p *Process) Exited() <-chan struct{} { return p.watch.exited }

// ExitCode is the exit status, 0-255, 128+n after signal n. It is valid once Exited is closed, and
// -1 before.
func (p *Process) ExitCode() int {
	select {
	case <-p.watch.exited:
		return p.watch.status
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
	return p.init.exited
}

// ContainerEnding reports whether the main process of the container has been killed, has begun to end or has
// ended. In between the kernel kills all others in its pid namespace and waits for them, so that it is the last
// to be gone. Without a namespace of its own all get the signal at once, and it may be the last to be given a
// CPU.
func (p *Process) ContainerEnding() bool {
	if p.init == nil {
		return false
	}
	init, err := readStat(p.container.InitPid)
	if err != nil {
		return gone(err)
	}
	return init.killed || init.exiting || init.zombie() || (p.container.InitStartTime != 0 && init.start != p.container.InitStartTime)
}

// Disconnect begins the end of a process whose client has gone, as Config.OnDisconnect says: with
// PolicyHangup its streams are closed and the whole tree gets SIGHUP, then SIGTERM, then SIGKILL;
// with PolicyKill it gets SIGKILL at once; with PolicyKeep it lives on, its output read and thrown
// away, its stdin at its end only if the caller has closed it before. It returns at once; may be called more than
// once, and after Close.
func (p *Process) Disconnect() {
	switch p.policy {
	case PolicyKeep:
		p.keep.Do(p.discardOutput)
	case PolicyKill:
		if onKill := p.runner.config.OnKill; onKill != nil && !p.hasExited() {
			onKill()
		}
		p.Kill()
	default:
		p.end.Do(p.beginEnd)
	}
}

// Kill sends SIGKILL to the whole tree now, also when a gentler end is under way or the policy is to
// keep the process. It returns at once; may be called more than once.
func (p *Process) Kill() {
	p.kill.Do(func() { close(p.killNow) })
	p.end.Do(p.beginEnd)
}

// Close releases the streams and everything kept for the process. It does not end the process and
// does not wait for it; a process that still runs goes on being watched and reaped. But what it
// writes from then on meets a closed pipe, and a terminal hangs up, unless Disconnect with
// PolicyKeep came first.
func (p *Process) Close() error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.closed {
		return nil
	}
	p.closed = true
	if !p.looking {
		p.closeStreams()
	}
	if p.init != nil {
		p.runner.reaper.dropContainer(p.init)
	}
	return nil
}

func (p *Process) closeStreams() {
	if p.tty != nil {
		p.tty.Close()
	}
	if p.pipes != nil {
		p.pipes.closeOurs()
	}
}

// hasExited reports whether the process itself has ended.
func (p *Process) hasExited() bool {
	select {
	case <-p.watch.exited:
		return true
	default:
		return false
	}
}

func (p *Process) beginEnd() {
	r := p.runner
	p.mu.Lock()
	p.looking = true
	p.mu.Unlock()
	r.mu.Lock()
	r.ending[p] = struct{}{}
	r.mu.Unlock()
	over := func() {
		r.mu.Lock()
		delete(r.ending, p)
		r.mu.Unlock()
		close(p.ended)
	}
	if !r.background(func() { defer over(); p.endTree() }) {
		p.endLook()
		over()
	}
}

// endTree is the end of a process and of everything that descends from it.
func (p *Process) endTree() {
	t := newTree(p.leader, p.container.InitPid, p.ends)
	t.urgent = p.probe.Load()
	t.stranger = p.pipes == nil && p.tty == nil // a predecessor's
	if p.pipes != nil {
		t.pipes = p.pipes.watchEnds()
		defer t.pipes.close()
	}
	// Before anything is closed or signalled: later the leader may be gone, and with it the trace to
	// its children.
	living := p.firstLook(t)
	config := p.runner.config
	if !p.killed() {
		p.closeStreams()
		living = t.ask(living, unix.SIGHUP, config.TermAfter, p.killNow)
		if !p.killed() {
			living = t.ask(living, unix.SIGTERM, config.KillAfter-config.TermAfter, p.killNow)
		}
		if len(living) > 0 && !p.killed() && config.OnKill != nil {
			config.OnKill()
		}
	}
	if len(living) > 0 && !t.kill() {
		p.runner.log.Warn("processes of an exec survived SIGKILL; is the container paused, or I/O stuck?",
			"container", p.container.ContainerID, "pid", p.leader.pid)
		return
	}
	<-p.watch.exited // it is a zombie now, and the reaper knows
}

// firstLook finds the tree while the terminal is certain to be still the process's own. Once its
// master is closed the kernel may give the same number to the next terminal, whose users are
// strangers, so that later looks do without it.
//
// A Close that follows Disconnect or Kill at once takes effect after this look: closing a terminal
// ends its leader, and with it the trace to children in sessions of their own.
func (p *Process) firstLook(t *tree) []procStat {
	defer p.endLook()
	defer func() { t.ends.terminal = false }()
	if t.ends.terminal {
		master, err := duplicate(p.tty)
		if err != nil { // closed already
			t.ends.terminal = false
		} else {
			defer master.Close()
		}
	}
	t.killing = p.killed()
	return t.living()
}

func (p *Process) endLook() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.looking = false
	if p.closed {
		p.closeStreams()
	}
}

// killed reports whether Kill was called.
func (p *Process) killed() bool {
	select {
	case <-p.killNow:
		return true
	default:
		return false
	}
}

// discardOutput keeps reading what the process writes, so that it neither blocks nor meets a closed
// pipe, until it ends or the Runner does. It works on descriptors of its own, as the caller is going
// to Close the others.
func (p *Process) discardOutput() {
	if p.tty != nil {
		if file, err := duplicate(p.tty); err == nil {
			p.discard(newTerminal(file, p.watch.exited))
		} else {
			p.runner.log.Warn("cannot keep a terminal open for a process whose client has gone", "pid", p.leader.pid, "error", err)
		}
		return
	}
	// Input that was cut must not look whole: only who has given it all closes stdin.
	if p.pipes.stdin != nil {
		if file, err := duplicate(p.pipes.stdin); err == nil {
			p.hold(file)
		}
	}
	for _, output := range []*os.File{p.pipes.stdout, p.pipes.stderr} {
		if output == nil {
			continue
		}
		file, err := duplicate(output)
		if err != nil {
			p.runner.log.Warn("cannot keep the output open of a process whose client has gone", "pid", p.leader.pid, "error", err)
			continue
		}
		p.discard(file)
	}
}

// hold keeps a file open until the process ends or the Runner does.
func (p *Process) hold(file io.Closer) {
	started := p.runner.background(func() {
		defer file.Close()
		select {
		case <-p.watch.exited:
		case <-p.runner.ctx.Done():
		}
	})
	if !started {
		file.Close()
	}
}

// discard reads the output to its end in the background and closes it.
func (p *Process) discard(output io.ReadCloser) {
	started := p.runner.background(func() {
		stop := context.AfterFunc(p.runner.ctx, func() { output.Close() })
		_, _ = io.Copy(io.Discard, output)
		if stop() {
			output.Close()
		}
	})
	if !started {
		output.Close()
	}
}

func duplicate(from syscall.Conn) (*os.File, error) {
	raw, err := from.SyscallConn()
	if err != nil {
		return nil, err
	}
	copied := -1
	ctlErr := raw.Control(func(fd uintptr) {
		copied, err = unix.FcntlInt(fd, unix.F_DUPFD_CLOEXEC, 0)
	})
	if ctlErr != nil {
		return nil, ctlErr
	}
	if err != nil {
		return nil, err
	}
	return os.NewFile(uintptr(copied), "kept "+strconv.Itoa(copied)), nil
}

// StandIn is the name of the helper that runs instead of the command, which the container does not have; otherwise empty.
func (p *Process) StandIn() string { return p.standIn }

// PID is the process in our pid namespace. After the process has ended it may be another's.
func (p *Process) PID() int { return p.leader.pid }

// Signal sends a signal to the process itself, not to its tree. The error is unix.ESRCH when it has
// ended.
func (p *Process) Signal(signal syscall.Signal) error { return p.leader.sendSignal(signal) }
