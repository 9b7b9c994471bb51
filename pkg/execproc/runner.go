package execproc

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"os"
	"path/filepath"
	"strconv"
	"sync"
	"time"

	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/streamshim/streamshim/pkg/execproc/internal/ociruntime"
	"github.com/streamshim/streamshim/pkg/execproc/internal/proc"
	"github.com/streamshim/streamshim/pkg/execproc/internal/reaper"
	"github.com/streamshim/streamshim/pkg/execproc/internal/record"
	"github.com/streamshim/streamshim/pkg/execproc/internal/stdio"
	"github.com/streamshim/streamshim/pkg/execproc/internal/tree"
	"github.com/streamshim/streamshim/pkg/rescue"
	"github.com/streamshim/streamshim/pkg/workload"
)

// Policy says what becomes of a process when its client has gone.
type Policy = record.Policy

// The policies for a process whose client has gone.
const (
	PolicyHangup Policy = "hangup" // SIGHUP, then SIGTERM, then SIGKILL, each to the whole tree
	PolicyKill   Policy = "kill"   // SIGKILL to the whole tree at once
	PolicyKeep   Policy = "keep"   // the process lives on
)

// Config configures a Runner. StateDir, OnDisconnect, OutputLimit and all times are required: pkg/config alone
// owns the defaults of user settings.
type Config struct {
	// StateDir holds the files of starts and the recovery records. It is created with mode 0700 and belongs on a
	// tmpfs, such as /run/streamshim/exec.
	StateDir string
	// Runtime and Root, if set, override each container's own.
	Runtime, Root string
	// StartTimeout bounds one start, in addition to the caller's context.
	StartTimeout time.Duration
	// OnDisconnect is what Disconnect, Shutdown and recovery do.
	OnDisconnect Policy
	// TermAfter and KillAfter say when PolicyHangup sends SIGTERM and SIGKILL to the tree, counted from Disconnect
	// and its SIGHUP.
	TermAfter, KillAfter time.Duration
	// DrainIdle is how long the output must be silent, after its command has ended, until RunSync stops waiting
	// for others that hold the pipe. Zero waits for DrainMax.
	DrainIdle time.Duration
	// DrainMax ends that wait even while data flows.
	DrainMax time.Duration
	// OutputLimit is how many bytes of stdout and stderr together RunSync keeps. The rest is read and dropped, and
	// the command goes on (CVE-2022-1708, CVE-2022-31030).
	OutputLimit int
	// OutputRoom bounds the output that all RunSyncs together keep, apart from 64 KiB each. Nil means no bound.
	OutputRoom Room
	// SyncTurn is called before RunSync starts a command, and its end function once the start is done. RunSync
	// returns its error. Nil means no wait.
	SyncTurn func(context.Context, workload.Container) (end func(), err error)
	// Logger gets messages for operators. The default is slog.Default.
	Logger *slog.Logger
	// Successor is set in a program that was executed in a hand-over. Resume must then be called; until it is, no
	// zombie is reaped that may be one of the predecessor's processes.
	Successor bool
	// StandIn reports whether this program can stand in for a command that the container lacks. It returns the
	// helper's name and the arguments to run this program with in the container. Nil disables stand-ins.
	StandIn func(args []string) (name string, standIn []string, ok bool)
	// OnStart is called after each started command. It must not block. May be nil.
	OnStart func()
	// OnKill is called when something of a process's tree outlived its time after Disconnect and must be killed,
	// or at once with PolicyKill. It must not block. May be nil.
	OnKill func()
}

func (c Config) complete() (Config, error) {
	if c.StateDir == "" {
		return c, errors.New("execproc: Config.StateDir is required")
	}
	dir, err := filepath.Abs(c.StateDir) // the runtime's working directory is not ours
	if err != nil {
		return c, fmt.Errorf("execproc: Config.StateDir: %w", err)
	}
	c.StateDir = dir
	if c.StartTimeout <= 0 || c.TermAfter <= 0 || c.KillAfter < c.TermAfter || c.DrainIdle < 0 || c.DrainMax <= 0 || c.OutputLimit <= 0 {
		return c, errors.New("execproc: a time or the limit of output is missing, or KILL comes before TERM")
	}
	switch c.OnDisconnect {
	case PolicyHangup, PolicyKill, PolicyKeep:
	default:
		return c, fmt.Errorf("execproc: on_disconnect is hangup, kill or keep, not %q", c.OnDisconnect)
	}
	if c.Logger == nil {
		c.Logger = slog.Default()
	}
	return c, nil
}

// Room bounds the output that several RunSyncs keep.
type Room = stdio.Room

// Runner starts processes in containers and ends, reaps and recovers them.
type Runner struct {
	config Config
	log    *slog.Logger
	reaper *reaper.Reaper
	owner  proc.Identity // this process; part of its file names
	boot   string        // boot id

	ctx  context.Context // done when the Runner stops waiting: starts and drains end
	stop context.CancelFunc
	done chan struct{} // closed last

	mu      sync.Mutex
	idle    *sync.Cond // signals changes of tasks and calls
	tasks   int        // starts, RunSyncs and goroutines in progress
	closing bool       // no new starts
	closed  bool       // no new tasks at all
	running map[*Process]struct{}
	ending  map[*Process]struct{} // trees being ended; the process itself may have ended already
	keeping map[*Process]int      // number of streams kept; the process itself may have ended already

	handOver
}

// NewRunner makes this process a child subreaper and starts the reaper. In the background it ends what a killed
// predecessor left running, unless the policy was to keep it. Close or Shutdown releases the Runner.
func NewRunner(config Config) (*Runner, error) {
	config, err := config.complete()
	if err != nil {
		return nil, err
	}
	if err := os.MkdirAll(config.StateDir, 0o700); err != nil {
		return nil, fmt.Errorf("execproc: make state directory: %w", err)
	}
	if err := os.Chmod(config.StateDir, 0o700); err != nil {
		return nil, fmt.Errorf("execproc: protect state directory: %w", err)
	}
	self, err := proc.ReadStat(os.Getpid())
	if err != nil {
		return nil, fmt.Errorf("execproc: is /proc mounted? %w", err)
	}
	children, err := reaper.AcquireFor(config.Successor)
	if err != nil {
		return nil, fmt.Errorf("execproc: %w", err)
	}
	r := &Runner{
		config:  config,
		log:     config.Logger,
		reaper:  children,
		owner:   self.Identity,
		boot:    proc.BootID(),
		done:    make(chan struct{}),
		running: map[*Process]struct{}{},
		ending:  map[*Process]struct{}{},
		keeping: map[*Process]int{},
	}
	r.ctx, r.stop = context.WithCancel(context.Background())
	r.idle = sync.NewCond(&r.mu)
	r.recovery, r.endRecovery = context.WithCancel(r.ctx)
	r.handOver.frozen, r.handOver.adopting = config.Successor, config.Successor
	r.handOver.carried, r.handOver.recoveries = map[proc.Identity][]byte{}, new(sync.WaitGroup)
	r.takeNames()
	if !config.Successor {
		r.recover()
	}
	return r, nil
}

// Start runs a command in a container and returns once it runs. The context and Config.StartTimeout bound only the
// start, not the process. If either ends first, the runtime is killed together with whatever it has started.
//
// The error is a *StartError if the command could not be executed although the container is fine. It wraps
// ErrNotRunning if the container is not running, ErrStartTimeout if the runtime took too long, and ErrClosed if
// the Runner is shutting down.
func (r *Runner) Start(ctx context.Context, container workload.Container, command workload.Command) (*Process, error) {
	if err := r.enter(ctx); err != nil {
		return nil, err
	}
	defer r.leaveCall()
	p, err := r.startCommand(ctx, container, command, r.config.OnDisconnect)
	if err != nil && r.config.StandIn != nil {
		return r.startStandIn(ctx, container, command, err)
	}
	return p, err
}

func (r *Runner) startCommand(ctx context.Context, c workload.Container, command workload.Command, policy Policy) (*Process, error) {
	p, err := r.start(ctx, c, command, policy, ociruntime.Exec)
	if err == nil && r.config.OnStart != nil {
		r.config.OnStart()
	}
	return p, err
}

// launcher is ociruntime.Exec or a variant of it.
type launcher func(ctx context.Context, c workload.Container, spec *specs.Process, f ociruntime.Files, streams [3]*os.File, stderr *os.File) (pid int, err error)

func (r *Runner) start(ctx context.Context, c workload.Container, command workload.Command, policy Policy, launch launcher) (_ *Process, err error) {
	ctx, cancelTimeout := context.WithTimeoutCause(ctx, r.config.StartTimeout, ErrStartTimeout)
	defer cancelTimeout()
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	defer context.AfterFunc(r.ctx, func() { cancel(ErrClosed) })()
	if ctx.Err() != nil {
		return nil, fmt.Errorf("start command: %w", context.Cause(ctx))
	}
	c.Runtime = cmp.Or(r.config.Runtime, c.Runtime)
	c.Root = cmp.Or(r.config.Root, c.Root)
	spec, err := ociruntime.ProcessSpec(c.Process, command)
	if err != nil {
		return nil, fmt.Errorf("start command: %w", err)
	}
	files := ociruntime.FilesOf(r.base())
	defer files.RemoveStart()

	p := newProcess(r, c, files.Record, policy)
	if c.InitPid > 0 {
		p.init, err = r.reaper.WatchContainer(c.InitPid)
		if errors.Is(err, unix.ESRCH) {
			return nil, fmt.Errorf("start command: %w: its main process %d has ended", ociruntime.ErrNotRunning, c.InitPid)
		} else if err != nil {
			return nil, fmt.Errorf("watch the container's main process: %w", err)
		}
		spec.Rlimits = ociruntime.CompleteLimits(spec.Rlimits, c.InitPid)
	}
	defer func() {
		if err != nil {
			p.Close()
		}
	}()
	// Check only now: from here on the pidfd keeps the pid from being reused.
	if p.init != nil && c.InitStartTime != 0 && !(proc.Identity{Pid: c.InitPid, Start: c.InitStartTime}).Alive() {
		return nil, fmt.Errorf("start command: %w: its main process %d has ended", ociruntime.ErrNotRunning, c.InitPid)
	}
	if command.TTY {
		err = r.startWithTerminal(ctx, p, spec, command, files, launch)
	} else {
		err = r.startWithPipes(ctx, p, spec, command, files, launch)
	}
	if err != nil {
		if fault := new(rescue.Panic); errors.As(err, &fault) {
			r.panicked(fault)
		}
		if errors.As(err, new(*ociruntime.StartError)) {
			return nil, err // unwrapped: the client sees it
		}
		if p.init != nil && !errors.Is(err, ociruntime.ErrNotRunning) && isClosed(p.init.Exited) {
			// Which explains whatever the runtime reported.
			err = fmt.Errorf("%w: its main process has ended (%w)", ociruntime.ErrNotRunning, err)
		}
		return nil, fmt.Errorf("start command: %w", err)
	}
	// Register only now that p is complete: Shutdown may act on it at once.
	r.mu.Lock()
	defer r.mu.Unlock()
	if !p.hasExited() { // otherwise nobody would remove it
		r.running[p] = struct{}{}
	}
	return p, nil
}

// base returns the path of a start's files without their endings.
func (r *Runner) base() string {
	name := strconv.Itoa(r.owner.Pid) + "-" + strconv.FormatUint(r.owner.Start, 10) + "-" + strconv.FormatUint(r.reaper.Name(), 10)
	return filepath.Join(r.config.StateDir, name)
}

func (r *Runner) startWithPipes(ctx context.Context, p *Process, spec *specs.Process, command workload.Command, f ociruntime.Files, launch launcher) error {
	owner, err := stdio.ProcessOwner(p.container, spec.User)
	if err != nil {
		return err
	}
	pipes, err := stdio.NewPipes(command, owner)
	if err != nil {
		return err
	}
	p.pipes, p.ends = pipes, pipes.Ends
	err = r.launchAndWatch(ctx, p, launch, spec, f, pipes.Process, pipes.Stderr)
	pipes.CloseProcessEnds()
	if err != nil {
		held := tree.WatchPipes(pipes.Stdin, pipes.Stdout, pipes.Stderr)
		defer held.Close()
		if held.Held() {
			r.killHolders(p, pipes.Ends)
		}
		return err
	}
	// Assign only non-nil files: a nil *os.File in an interface is not a nil interface.
	if pipes.Stdin != nil {
		p.stdin = pipes.Stdin
	}
	if pipes.Stdout != nil {
		p.stdout = pipes.Stdout
	}
	if pipes.Stderr != nil {
		p.stderr = pipes.Stderr
	}
	return nil
}

func (r *Runner) startWithTerminal(ctx context.Context, p *Process, spec *specs.Process, command workload.Command, f ociruntime.Files, launch launcher) error {
	// The runtime gets streams of its own. Its stderr explains a failure.
	own, err := stdio.NewPipes(workload.Command{Stderr: true}, stdio.Owner{})
	if err != nil {
		return err
	}
	defer own.CloseOurs()
	defer own.CloseProcessEnds()
	socket, err := ociruntime.NewConsoleSocket(f.Socket)
	if err != nil {
		return err
	}
	defer socket.Close()
	f.Socket = socket.Path
	if err := r.launchAndWatch(ctx, p, launch, spec, f, own.Process, own.Stderr); err != nil {
		if file, queuedErr := socket.Queued(); queuedErr == nil {
			terminal := stdio.NewTerminal(file, nil)
			if ends, endsErr := terminal.Slave(); endsErr == nil && terminal.Held() {
				r.killHolders(p, ends)
			}
			terminal.Close() //nolint:errcheck // nothing to do about an error
		}
		return err
	}
	wait := consoleTimeout
	if deadline, ok := ctx.Deadline(); ok {
		wait = min(wait, time.Until(deadline))
	}
	file, err := socket.Receive(wait)
	if err != nil {
		p.Kill() // nobody could talk to it
		if deadline, ok := ctx.Deadline(); ok && !time.Now().Before(deadline) {
			<-ctx.Done() // due at any moment
			return context.Cause(ctx)
		}
		return err
	}
	p.tty = stdio.NewTerminal(file, p.watch.Exited)
	if ends, err := p.tty.Slave(); err == nil { // fails when everybody has hung up already
		p.ends = ends
	}
	if command.Stdin {
		p.stdin = &stdio.TerminalInput{Terminal: p.tty, Report: p.panicked}
	}
	if command.Stdout {
		p.stdout = p.tty
	} else {
		p.keepStream(stdio.NewKept(p.tty, false, true)) // otherwise the process would block once the terminal's buffer is full
	}
	return nil
}

// killHolders kills what a failed start has left. A runtime may fail or be killed after the command has begun and
// has children. They are found by the streams, which nobody else holds.
func (r *Runner) killHolders(p *Process, ends tree.StreamEnds) {
	nobody := proc.Identity{Pid: -1, Start: r.owner.Start} // no process has this pid
	tree.New(nobody, p.container.InitPid, ends).Kill()
}

// consoleTimeout bounds the wait for a terminal that should already have been sent.
const consoleTimeout = 5 * time.Second

// launchAndWatch starts the process and registers it with the reaper.
func (r *Runner) launchAndWatch(ctx context.Context, p *Process, launch launcher, spec *specs.Process, f ociruntime.Files, streams [3]*os.File, stderr *os.File) error {
	intent, err := p.writeIntent()
	if err != nil {
		return fmt.Errorf("write recovery record: %w", err) // without it, nobody would end the command if streamshim were killed
	}
	started := false
	defer func() {
		intent.Close() //nolint:errcheck // nothing waits for it to reach the disk
		if !started {
			os.Remove(p.record)
		}
	}()
	start := r.reaper.BeginStart()
	defer r.reaper.EndStart(start)
	pid, err := launch(ctx, p.container, spec, f, streams, stderr)
	if err != nil {
		return err
	}
	stat, err := proc.ReadStat(pid)
	if err != nil {
		return fmt.Errorf("%w as process %d, which is not there: %w", ociruntime.ErrProcessUnknown, pid, err)
	}
	if stat.Parent != os.Getpid() {
		return fmt.Errorf("%w as process %d, which is no child of streamshim (its parent is %d); does the runtime support exec --detach?", ociruntime.ErrProcessUnknown, pid, stat.Parent)
	}
	p.leader = stat.Identity
	// The runtime was given a container id and looks up the main process by its pid. If that process is alive now,
	// it was alive all along, so its pid was never another's. If it is not, there is no telling where the command
	// is. With a pid namespace of the container's own this rejects no good start: there the main process cannot
	// end before the command is reaped, and reaping is our job.
	if p.init != nil && r.reaper.HasEnded(p.init) {
		tree.New(p.leader, p.container.InitPid, p.ends).Kill()
		return fmt.Errorf("%w: its main process has ended while the command was being started", ociruntime.ErrNotRunning)
	}
	// Write it before the reaper knows the process, because the reaper removes the record at its end.
	if err := p.writeRecord(intent); err != nil {
		r.log.Warn("cannot write the recovery record of an exec; were streamshim killed now, the process would stay", "error", err)
	}
	p.watch, err = r.reaper.WatchProcess(pid, p.onExit)
	if err != nil {
		tree.New(p.leader, p.container.InitPid, p.ends).Kill()
		return fmt.Errorf("watch process %d: %w", pid, err)
	}
	started = true
	return nil
}

// onExit is called by the reaper, which belongs to all processes, once p.Exited is closed.
func (p *Process) onExit() { rescue.Call(p.panicked, func() { p.runner.exited(p) }) }

func (r *Runner) exited(p *Process) {
	p.mu.Lock()
	if p.ending == nil || p.endOver {
		os.Remove(p.record)
	}
	p.mu.Unlock()
	r.mu.Lock()
	delete(r.running, p)
	r.mu.Unlock()
}

// countKept adds change to the number of streams kept for a process.
func (r *Runner) countKept(p *Process, change int) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.keeping[p] += change; r.keeping[p] == 0 {
		delete(r.keeping, p)
	}
}

// enter counts a start or RunSync. It waits while the Runner is quiescent and fails once the Runner is closing.
func (r *Runner) enter(ctx context.Context) error {
	for {
		r.mu.Lock()
		if r.closing {
			r.mu.Unlock()
			return ErrClosed
		}
		quiet := r.quiet
		if quiet == nil {
			r.tasks++
			r.calls++
			r.mu.Unlock()
			return nil
		}
		r.mu.Unlock()
		select {
		case <-quiet:
		case <-ctx.Done():
			return fmt.Errorf("start command: %w", context.Cause(ctx))
		case <-r.ctx.Done():
			return ErrClosed
		}
	}
}

// leaveCall undoes enter.
func (r *Runner) leaveCall() {
	r.mu.Lock()
	r.calls--
	r.mu.Unlock()
	r.idle.Broadcast() // wakes Quiesce
	r.leave()
}

func (r *Runner) leave() {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.tasks--; r.tasks == 0 {
		r.idle.Broadcast()
	}
}

// background runs f, with report, in a goroutine that Shutdown waits for. It returns false if the Runner is closed.
func (r *Runner) background(report rescue.Report, f func()) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.closed {
		return false
	}
	r.tasks++
	rescue.Go(rescue.Die, func() {
		defer r.leave()
		rescue.Call(report, f)
	})
	return true
}

// panicked is the report of goroutines that have nobody to tell.
func (r *Runner) panicked(fault *rescue.Panic) {
	r.log.Error("a goroutine that deals with a process in a container has panicked", "panic", fault.Value, "stack", string(fault.Stack))
}

// Shutdown refuses new starts, applies the policy to running processes, and waits for them to end. When the
// context is done, it kills those that are left. Processes with PolicyKeep live on, but their output meets a
// closed pipe from now on. No goroutine remains, and no descriptor once every Process is closed.
func (r *Runner) Shutdown(ctx context.Context) error {
	r.mu.Lock()
	if r.closing {
		r.mu.Unlock()
		<-r.done
		return nil
	}
	r.closing = true
	r.mu.Unlock()

	r.each(func(p *Process) {
		if p.policy != PolicyKeep {
			p.Disconnect()
		}
	})
	graceful := r.waitForEnds(ctx)
	r.stop() // starts, RunSyncs and drains end
	for r.killRest() {
	}
	r.mu.Lock()
	r.closed = true
	left := r.running
	r.running = map[*Process]struct{}{}
	r.mu.Unlock()
	for p := range left {
		r.reaper.DropProcess(p.watch)
	}
	close(r.done)
	r.reaper.Release()
	if !graceful {
		return fmt.Errorf("processes were killed at shutdown: %w", context.Cause(ctx))
	}
	return nil
}

// killRest kills everything without PolicyKeep and waits for all tasks, each of which is bounded. It reports
// whether a start in progress has meanwhile brought a new process, so that it must be called again.
func (r *Runner) killRest() bool {
	r.each(func(p *Process) {
		if p.policy != PolicyKeep {
			p.Kill()
		}
	})
	r.mu.Lock()
	for r.tasks > 0 {
		r.idle.Wait()
	}
	r.mu.Unlock()
	more := false
	r.each(func(p *Process) {
		more = more || p.policy != PolicyKeep && !isClosed(p.ended)
	})
	return more
}

// Close is Shutdown without a grace period.
func (r *Runner) Close() error {
	now, cancel := context.WithCancel(context.Background())
	cancel()
	_ = r.Shutdown(now) // the caller asked for an end that is not graceful
	return nil
}

// each calls f for every process that runs or whose tree is being ended.
func (r *Runner) each(f func(*Process)) {
	r.mu.Lock()
	processes := maps.Clone(r.running)
	maps.Copy(processes, r.ending)
	r.mu.Unlock()
	for p := range processes {
		f(p)
	}
}

// waitForEnds waits for the processes that are being ended, and reports whether all of them ended in time.
func (r *Runner) waitForEnds(ctx context.Context) bool {
	graceful := true
	r.each(func(p *Process) {
		if p.policy == PolicyKeep {
			return
		}
		select {
		case <-p.ended:
		case <-ctx.Done():
			graceful = false
		}
	})
	return graceful
}

// SetConcurrentEnds bounds how many endings search /proc at the same time, and so how old a reading of /proc may
// become. 0 means no limit. Of those that wait, endings from RunSync wait less than those of sessions. The bound
// is shared by all Runners of this process, as /proc is.
func SetConcurrentEnds(limit int) { tree.SetConcurrentEnds(limit) }

// Ends returns how many endings are searching now, and how many wait to.
func Ends() (looking, waiting int) { return tree.Ends() }
