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

	"github.com/streamshim/streamshim/pkg/workload"
)

// Policy says what becomes of a process whose client has gone.
type Policy string

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

// Runner starts processes in containers and keeps an eye on them.
type Runner struct {
	config Config
	log    *slog.Logger
	reaper *reaper
	owner  identity // this process, part of the names of its files
	boot   string   // bootID

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
	self, err := readStat(os.Getpid())
	if err != nil {
		return nil, fmt.Errorf("execproc: is /proc mounted? %w", err)
	}
	reaper, err := acquireReaper()
	if err != nil {
		return nil, fmt.Errorf("execproc: %w", err)
	}
	r := &Runner{
		config:  config,
		log:     config.Logger,
		reaper:  reaper,
		owner:   self.identity,
		boot:    bootID(),
		done:    make(chan struct{}),
		running: map[*Process]struct{}{},
		ending:  map[*Process]struct{}{},
	}
	r.ctx, r.stop = context.WithCancel(context.Background())
	r.idle = sync.NewCond(&r.mu)
	r.recover()
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
	if !r.enter() {
		return nil, ErrClosed
	}
	defer r.leave()
	p, err := r.startCommand(ctx, container, command, r.config.OnDisconnect)
	if err != nil && r.config.StandIn != nil {
		return r.startStandIn(ctx, container, command, err)
	}
	return p, err
}

func (r *Runner) startCommand(ctx context.Context, c workload.Container, command workload.Command, policy Policy) (*Process, error) {
	p, err := r.start(ctx, c, command, policy, execInContainer)
	if err == nil && r.config.OnStart != nil {
		r.config.OnStart()
	}
	return p, err
}

// launcher is execInContainer, or in tests something that does more.
type launcher func(ctx context.Context, c workload.Container, spec *specs.Process, f files, streams [3]*os.File, stderr *os.File) (pid int, err error)

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
	spec, err := processSpec(c.Process, command)
	if err != nil {
		return nil, fmt.Errorf("start command: %w", err)
	}
	files := filesOf(r.base())
	defer files.removeStart()

	p := &Process{
		runner:    r,
		container: c,
		record:    files.record,
		policy:    policy,
		killNow:   make(chan struct{}),
		ended:     make(chan struct{}),
	}
	if c.InitPid > 0 {
		p.init, err = r.reaper.watchContainer(c.InitPid)
		if errors.Is(err, unix.ESRCH) {
			return nil, fmt.Errorf("start command: %w: its main process %d has ended", ErrNotRunning, c.InitPid)
		} else if err != nil {
			return nil, fmt.Errorf("watch the container's main process: %w", err)
		}
		spec.Rlimits = completeLimits(spec.Rlimits, c.InitPid)
	}
	defer func() {
		if err != nil {
			p.Close()
		}
	}()
	// Looked at only now: from here on the pidfd keeps the process from being mistaken.
	if p.init != nil && c.InitStartTime != 0 && !(identity{c.InitPid, c.InitStartTime}).alive() {
		return nil, fmt.Errorf("start command: %w: its main process %d has ended", ErrNotRunning, c.InitPid)
	}
	if command.TTY {
		err = r.startWithTerminal(ctx, p, spec, command, files, launch)
	} else {
		err = r.startWithPipes(ctx, p, spec, command, files, launch)
	}
	if err != nil {
		var startError *StartError
		if errors.As(err, &startError) {
			return nil, err // in its own words, for the client
		}
		if p.init != nil && !errors.Is(err, ErrNotRunning) {
			select {
			case <-p.init.exited: // whatever the runtime stumbled over
				err = fmt.Errorf("%w: its main process has ended (%w)", ErrNotRunning, err)
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
	name := strconv.Itoa(r.owner.pid) + "-" + strconv.FormatUint(r.owner.start, 10) + "-" + strconv.FormatUint(r.reaper.name(), 10)
	return filepath.Join(r.config.StateDir, name)
}

func (r *Runner) startWithPipes(ctx context.Context, p *Process, spec *specs.Process, command workload.Command, f files, launch launcher) error {
	owner, err := processOwner(p.container, spec.User)
	if err != nil {
		return err
	}
	pipes, err := newStdio(command, owner)
	if err != nil {
		return err
	}
	p.pipes, p.ends = pipes, pipes.ends
	err = r.launchAndWatch(ctx, p, launch, spec, f, pipes.process, pipes.stderr)
	pipes.closeProcessEnds()
	if errors.Is(err, errProcessUnknown) {
		// Whatever runs has our pipes, which nobody else has. No process has this leader's pid.
		newTree(identity{pid: -1, start: r.owner.start}, p.container.InitPid, pipes.ends).kill()
	}
	if err != nil {
		return err
	}
	// Not the nil pointers themselves, which would make interfaces that are not nil.
	if pipes.stdin != nil {
		p.stdin = pipes.stdin
	}
	if pipes.stdout != nil {
		p.stdout = pipes.stdout
	}
	if pipes.stderr != nil {
		p.stderr = pipes.stderr
	}
	return nil
}

func (r *Runner) startWithTerminal(ctx context.Context, p *Process, spec *specs.Process, command workload.Command, f files, launch launcher) error {
	// The runtime's own streams: what it says on stderr is wanted if it fails.
	own, err := newStdio(workload.Command{Stderr: true}, owner{})
	if err != nil {
		return err
	}
	defer own.closeOurs()
	defer own.closeProcessEnds()
	socket, err := newConsoleSocket(f.socket)
	if err != nil {
		return err
	}
	defer socket.close()
	f.socket = socket.path
	if err := r.launchAndWatch(ctx, p, launch, spec, f, own.process, own.stderr); err != nil {
		return err
	}
	wait := consoleTimeout
	if deadline, ok := ctx.Deadline(); ok {
		wait = min(wait, time.Until(deadline))
	}
	file, err := socket.receive(wait)
	if err != nil {
		p.Kill() // nobody could talk to it
		if deadline, ok := ctx.Deadline(); ok && !time.Now().Before(deadline) {
			<-ctx.Done() // at any moment
			return context.Cause(ctx)
		}
		return err
	}
	p.tty = newTerminal(file, p.watch.exited)
	if ends, err := p.tty.slave(); err == nil { // fails when everybody has hung up already
		p.ends = ends
	}
	if command.Stdin {
		p.stdin = &terminalInput{terminal: p.tty}
	}
	if command.Stdout {
		p.stdout = p.tty
	} else {
		p.discard(p.tty) // or the process would block once the terminal's buffer is full
	}
	return nil
}

// consoleTimeout bounds the wait for a terminal that should have been sent already.
const consoleTimeout = 5 * time.Second

// launchAndWatch starts the process and registers it with the reaper.
func (r *Runner) launchAndWatch(ctx context.Context, p *Process, launch launcher, spec *specs.Process, f files, streams [3]*os.File, stderr *os.File) error {
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
	start := r.reaper.beginStart()
	defer r.reaper.endStart(start)
	pid, err := launch(ctx, p.container, spec, f, streams, stderr)
	if err != nil {
		return err
	}
	stat, err := readStat(pid)
	if err != nil {
		return fmt.Errorf("%w as process %d, which is not there: %w", errProcessUnknown, pid, err)
	}
	if stat.ppid != os.Getpid() {
		return fmt.Errorf("%w as process %d, which is no child of streamshim (its parent is %d); does the runtime support exec --detach?", errProcessUnknown, pid, stat.ppid)
	}
	p.leader = stat.identity
	// The runtime was given an id and looks for the main process by its pid. If that process lives now, it
	// has lived all the time, and neither was another's. If it does not, there is no telling where the
	// command is. In a pid namespace of the container's own this refuses no good start: there the main
	// process does not end before the command is reaped, which is our task.
	if p.init != nil && r.reaper.hasEnded(p.init) {
		newTree(p.leader, p.container.InitPid, p.ends).kill()
		return fmt.Errorf("%w: its main process has ended while the command was being started", ErrNotRunning)
	}
	// Before the reaper knows of it, which removes the record when the process ends.
	if err := p.writeRecord(intent); err != nil {
		r.log.Warn("cannot write the recovery record of an exec; were streamshim killed now, the process would stay", "error", err)
	}
	p.watch, err = r.reaper.watchProcess(pid, func() { r.exited(p) })
	if err != nil {
		newTree(p.leader, p.container.InitPid, p.ends).kill()
		return fmt.Errorf("watch process %d: %w", pid, err)
	}
	started = true
	return nil
}

// exited is called by the reaper once p.Exited is closed.
func (r *Runner) exited(p *Process) {
	os.Remove(p.record)
	r.mu.Lock()
	delete(r.running, p)
	r.mu.Unlock()
}

// enter counts a start, unless there are to be no more.
func (r *Runner) enter() bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.closing {
		return false
	}
	r.tasks++
	return true
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
		r.reaper.dropProcess(p.watch)
	}
	close(r.done)
	r.reaper.release()
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
