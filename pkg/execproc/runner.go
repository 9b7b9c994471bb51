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
	"github.com/streamshim/streamshim/pkg/workload"
)

// Policy says what becomes of a process whose client has gone.
type Policy = record.Policy

// The policies.
const (
	PolicyHangup Policy = "hangup" // hang-up, then TERM, then KILL, each for the whole tree
	PolicyKill   Policy = "kill"   // KILL for the whole tree at once
	PolicyKeep   Policy = "keep"   // it lives on
)

// Config is how a Runner works. StateDir, the policy and all times are required: the defaults
// of what users may set stand in pkg/config alone.
type Config struct {
	// StateDir holds the files of starts and the recovery records; made with mode 0700. It belongs
	// on a tmpfs, such as /run/streamshim/exec.
	StateDir string
	// Runtime and Root, where they are set, are taken instead of each container's own.
	Runtime, Root string
	// StartTimeout bounds one start, as far as the caller's context does not.
	StartTimeout time.Duration
	// OnDisconnect is what Disconnect, Shutdown and recovery do.
	OnDisconnect Policy
	// TermAfter and KillAfter say when, counted from Disconnect and its SIGHUP, the tree gets SIGTERM and
	// SIGKILL with PolicyHangup.
	TermAfter, KillAfter time.Duration
	// DrainIdle is for how long the output must be silent until RunSync, its command having ended,
	// no longer waits for whoever else holds the pipe. Zero waits for DrainMax.
	DrainIdle time.Duration
	// DrainMax ends that wait also while data flows.
	DrainMax time.Duration
	// OutputLimit is how many bytes of stdout and stderr together RunSync keeps. The rest is read and
	// dropped, and the command goes on (CVE-2022-1708, CVE-2022-31030).
	OutputLimit int
	// OutputRoom is what all RunSyncs may keep of output together, beside 64 KiB of each. Nil is no bound.
	OutputRoom Room
	// SyncTurn is called before a RunSync's command is started, and end once it has been. Its error is
	// RunSync's. Nil is no wait.
	SyncTurn func(context.Context, workload.Container) (end func(), err error)
	// Logger gets what an operator should know; default slog.Default.
	Logger *slog.Logger
	// Successor is set in a program that its predecessor has executed in a hand-over. Resume must be called; until
	// then no zombie is reaped that may be one of the predecessor's processes.
	Successor bool
	// StandIn tells whether this program, started with the arguments that it returns, can do in a container what
	// the command line says, and the name of what does it. It is asked when the container does not have the
	// command. Nil is never.
	StandIn func(args []string) (name string, standIn []string, ok bool)
	// OnStart is called when a command was started. It must not block. May be nil.
	OnStart func()
	// OnKill is called when something of a process's tree still lived when its time after
	// Disconnect was over and so had to be killed, or at once with PolicyKill. It must not block.
	// May be nil.
	OnKill func()
}

func (c Config) complete() (Config, error) {
	if c.StateDir == "" {
		return c, errors.New("execproc: Config.StateDir is required")
	}
	dir, err := filepath.Abs(c.StateDir) // the runtime does not share our working directory
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

// Room bounds what several RunSyncs keep of their commands' output.
type Room = stdio.Room

// Runner starts processes in containers and keeps an eye on them.
type Runner struct {
	config Config
	log    *slog.Logger
	reaper *reaper.Reaper
	owner  proc.Identity // this process, part of the names of its files
	boot   string        // bootID

	ctx  context.Context // done when the Runner gives up waiting: starts and drains end
	stop context.CancelFunc
	done chan struct{} // closed last

	mu      sync.Mutex
	idle    *sync.Cond // tasks has become 0
	tasks   int        // starts, RunSyncs and goroutines under way
	closing bool       // no new starts
	closed  bool       // no new tasks at all
	running map[*Process]struct{}
	ending  map[*Process]struct{} // their trees; a process may have ended already
	keeping map[*Process]int      // streams kept for them; a process may have ended already

	handOver
}

// NewRunner makes this process a child subreaper, starts the reaper, and ends what a predecessor
// that was killed has left running (unless the policy was to keep it), in the background. Close or
// Shutdown releases it.
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

// Start runs a command in a container and returns when it runs. The context bounds the start alone,
// not the process; so does Config.StartTimeout. When either is over, the runtime is killed with
// whatever it has started.
//
// The error is a *StartError when the command could not be executed in a container that is fine. It
// wraps ErrNotRunning when the container is not running, ErrStartTimeout when the runtime took too
// long, ErrClosed when the Runner is shutting down.
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

// launcher is execInContainer, or in tests something that does more.
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
	// Looked at only now: from here on the pidfd keeps the process from being mistaken.
	if p.init != nil && c.InitStartTime != 0 && !(proc.Identity{Pid: c.InitPid, Start: c.InitStartTime}).Alive() {
		return nil, fmt.Errorf("start command: %w: its main process %d has ended", ociruntime.ErrNotRunning, c.InitPid)
	}
	if command.TTY {
		err = r.startWithTerminal(ctx, p, spec, command, files, launch)
	} else {
		err = r.startWithPipes(ctx, p, spec, command, files, launch)
	}
	if err != nil {
		var startError *ociruntime.StartError
		if errors.As(err, &startError) {
			return nil, err // in its own words, for the client
		}
		if p.init != nil && !errors.Is(err, ociruntime.ErrNotRunning) {
			select {
			case <-p.init.Exited: // whatever the runtime stumbled over
				err = fmt.Errorf("%w: its main process has ended (%w)", ociruntime.ErrNotRunning, err)
			default:
			}
		}
		return nil, fmt.Errorf("start command: %w", err)
	}
	// Complete only now, and so ready for what Shutdown may do to it.
	r.mu.Lock()
	defer r.mu.Unlock()
	if !p.hasExited() { // if it has, nobody would remove it
		r.running[p] = struct{}{}
	}
	return p, nil
}

// base is the path of a start's files without their endings.
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
	// Not the nil pointers themselves, which would make interfaces that are not nil.
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
	// The runtime's own streams: what it says on stderr is wanted if it fails.
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
		const queued = 10 * time.Millisecond // what came lies in the queue
		if file, receiveErr := socket.Receive(queued); receiveErr == nil {
			terminal := stdio.NewTerminal(file, nil)
			if ends, endsErr := terminal.Slave(); endsErr == nil && terminal.Held() {
				r.killHolders(p, ends)
			}
			terminal.Close() //nolint:errcheck // of no use
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
			<-ctx.Done() // at any moment
			return context.Cause(ctx)
		}
		return err
	}
	p.tty = stdio.NewTerminal(file, p.watch.Exited)
	if ends, err := p.tty.Slave(); err == nil { // fails when everybody has hung up already
		p.ends = ends
	}
	if command.Stdin {
		p.stdin = &stdio.TerminalInput{Terminal: p.tty}
	}
	if command.Stdout {
		p.stdout = p.tty
	} else {
		p.keepStream(stdio.NewKept(p.tty, false, true)) // or the process would block once the terminal's buffer is full
	}
	return nil
}

// killHolders ends what a start has left that failed: a runtime may have failed or been killed when the command had
// begun, and had children already. Whatever runs has the streams, which nobody else has.
func (r *Runner) killHolders(p *Process, ends tree.StreamEnds) {
	nobody := proc.Identity{Pid: -1, Start: r.owner.Start} // no process has this pid
	tree.New(nobody, p.container.InitPid, ends).Kill()
}

// consoleTimeout bounds the wait for a terminal that should have been sent already.
const consoleTimeout = 5 * time.Second

// launchAndWatch starts the process and registers it with the reaper.
func (r *Runner) launchAndWatch(ctx context.Context, p *Process, launch launcher, spec *specs.Process, f ociruntime.Files, streams [3]*os.File, stderr *os.File) error {
	intent, err := p.writeIntent()
	if err != nil {
		return fmt.Errorf("write recovery record: %w", err) // without it nobody would end the command, were streamshim killed
	}
	started := false
	defer func() {
		intent.Close() //nolint:errcheck // nobody waits for what is written to reach the disk
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
	// The runtime was given an id and looks for the main process by its pid. If that process lives now, it
	// has lived all the time, and neither was another's. If it does not, there is no telling where the
	// command is. In a pid namespace of the container's own this refuses no good start: there the main
	// process does not end before the command is reaped, which is our task.
	if p.init != nil && r.reaper.HasEnded(p.init) {
		tree.New(p.leader, p.container.InitPid, p.ends).Kill()
		return fmt.Errorf("%w: its main process has ended while the command was being started", ociruntime.ErrNotRunning)
	}
	// Before the reaper knows of it, which removes the record when the process ends.
	if err := p.writeRecord(intent); err != nil {
		r.log.Warn("cannot write the recovery record of an exec; were streamshim killed now, the process would stay", "error", err)
	}
	p.watch, err = r.reaper.WatchProcess(pid, func() { r.exited(p) })
	if err != nil {
		tree.New(p.leader, p.container.InitPid, p.ends).Kill()
		return fmt.Errorf("watch process %d: %w", pid, err)
	}
	started = true
	return nil
}

// exited is called by the reaper once p.Exited is closed.
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

// countKept counts the streams that are kept for a process.
func (r *Runner) countKept(p *Process, change int) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.keeping[p] += change; r.keeping[p] == 0 {
		delete(r.keeping, p)
	}
}

// enter counts a start or RunSync, unless there are to be no more. While the Runner is quiet it waits.
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

// leaveCall is leave for what enter has counted.
func (r *Runner) leaveCall() {
	r.mu.Lock()
	r.calls--
	r.mu.Unlock()
	r.idle.Broadcast() // Quiesce
	r.leave()
}

func (r *Runner) leave() {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.tasks--; r.tasks == 0 {
		r.idle.Broadcast()
	}
}

// background runs a goroutine that Shutdown waits for, unless the Runner is closed.
func (r *Runner) background(f func()) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.closed {
		return false
	}
	r.tasks++
	go func() {
		defer r.leave()
		f()
	}()
	return true
}

// Shutdown refuses new starts, does with the running processes what the policy says, and waits for
// their end; when the context is done it kills those that are left. Processes to be kept live on, but
// their output meets a closed pipe from now on. No goroutine and, once every Process is closed, no
// descriptor stays.
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

// killRest kills what is not to be kept and waits for all tasks, each of which is bounded. It
// reports whether a start that had been under way has brought something new.
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
		select {
		case <-p.ended:
		default:
			more = more || p.policy != PolicyKeep
		}
	})
	return more
}

// Close is Shutdown without patience.
func (r *Runner) Close() error {
	now, cancel := context.WithCancel(context.Background())
	cancel()
	_ = r.Shutdown(now) // that it was not graceful is what the caller asked for
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

// waitForEnds waits for the processes that are being ended, and reports whether they did in time.
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

// SetConcurrentEnds bounds the commands being ended that are looked for at the same time, which also bounds how old
// what one look has read of /proc may become; 0 is no limit. The others wait, those that RunSync has started less than
// those of sessions. It is one bound for all Runners of this process, as /proc is one.
func SetConcurrentEnds(limit int) { tree.SetConcurrentEnds(limit) }

// Ends is how many commands being ended are looked for now, and how many wait for that.
func Ends() (looking, waiting int) { return tree.Ends() }
