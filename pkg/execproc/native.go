package execproc

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"reflect"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/streamshim/streamshim/pkg/execproc/internal/enter"
)

// Engine says what starts the commands.
type Engine string

// The engines.
const (
	// EngineAuto starts commands natively in containers in which that is proven to come to the same as
	// the runtime's exec, from the third on, and by the runtime elsewhere.
	EngineAuto Engine = "auto"
	// EngineRunc leaves every start to the container's OCI runtime.
	EngineRunc Engine = "runc"
	// EngineNative is EngineAuto that proves a container before its first command instead of in the
	// background after its second. Where it cannot, the runtime starts the command all the same.
	EngineNative Engine = "native"
)

const (
	// startsBeforeProof is how many commands a container has seen when EngineAuto begins to prove it: a
	// container with one exec in its life is not worth the proof, which takes as long as two.
	startsBeforeProof = 2
	// proofTimeout bounds a proof.
	proofTimeout = 20 * time.Second
	// maxAnswer is more than the program of a proof can say.
	maxAnswer = 512
	// maxContainers is how many containers the native engine remembers; further ones are left to the
	// runtime until some of these have ended.
	maxContainers = 4096
	// maxFailures is after how many failures in a row a container is left to the runtime.
	maxFailures = 3
	// firstPrune is from how many on it looks for those that have ended.
	firstPrune = 64
)

// A nativeEngine starts commands without the OCI runtime, in containers in which that is proven to be
// the same.
//
// The proof, for each container once: a small program is started in it by the runtime, as any command,
// and everything that the kernel tells of it is written down: ids, groups, capabilities, no_new_privs, seccomp
// filters instruction by instruction, security labels, namespaces, cgroups, limits, scheduling, environment,
// directories, descriptors. Then the same program is started natively, with the filters read off the
// first (so that they need not be compiled again for each exec, which is most of what a runtime's exec
// costs), and compared. Only if nothing differs are commands started natively from then on. On any
// doubt, and for every terminal, the runtime starts the command, as it does when a native start fails:
// then nothing of the command has run.
type nativeEngine struct {
	runner  *Runner
	eager   bool           // EngineNative
	program *enter.Program // nil: never

	mu         sync.Mutex
	containers map[containerKey]*provenContainer
	prune      int // from how many containers on to look for those that have ended
}

// containerKey is a container's life.
type containerKey struct {
	runtime, root, id string
	init              identity
}

func keyOf(c Container) containerKey {
	return containerKey{c.Runtime, c.Root, c.ID, identity{c.InitPid, c.InitStartTime}}
}

// provenContainer is what is known of a container. mu of the engine protects it, but plan does not
// change once proven is closed.
type provenContainer struct {
	starts  int
	begun   bool
	proven  chan struct{}  // closed when the proof is over
	process *specs.Process // of which the proof is
	plan    *plan          // nil: left to the runtime

	failures atomic.Int32 // starts in a row that came to nothing
}

// newNativeEngine never fails: where it cannot work it starts nothing, and says why once.
func newNativeEngine(r *Runner) *nativeEngine {
	n := &nativeEngine{runner: r, eager: r.config.Engine == EngineNative, containers: map[containerKey]*provenContainer{}, prune: firstPrune}
	if r.config.Engine == EngineRunc {
		return n
	}
	program, err := enter.Load()
	if err != nil {
		r.log.Warn("commands are started by the OCI runtime alone, which takes longer", "reason", err)
		return n
	}
	n.program = program
	return n
}

// close must not be called before all starts have ended.
func (n *nativeEngine) close() {
	if n.program != nil {
		n.program.Close()
	}
}

// trusted returns the container if commands in it are to be started natively, nil when its runtime is to
// do it.
func (n *nativeEngine) trusted(ctx context.Context, c Container) *provenContainer {
	if n.program == nil || c.InitPid <= 0 || c.InitStartTime == 0 || c.Process == nil {
		return nil
	}
	container := n.lookup(c)
	if container == nil {
		return nil
	}
	n.mu.Lock()
	container.starts++
	begin := !container.begun && (n.eager || container.starts >= startsBeforeProof)
	container.begun = container.begun || begin
	n.mu.Unlock()
	if begin {
		prove := func() {
			defer close(container.proven)
			n.proveContainer(c, container)
		}
		if !n.runner.background(prove) {
			close(container.proven)
		}
	}
	if n.eager {
		select {
		case <-container.proven:
		case <-ctx.Done():
			return nil
		}
	}
	select {
	case <-container.proven:
	default:
		return nil
	}
	// A container's spec does not change; if its caller gives another one, that is not the proven one.
	if container.process != c.Process && !reflect.DeepEqual(container.process, c.Process) {
		return nil
	}
	if container.plan == nil || container.failures.Load() >= maxFailures {
		return nil
	}
	return container
}

// lookup returns what is known of a container, nil when there is no room for another.
func (n *nativeEngine) lookup(c Container) *provenContainer {
	key := keyOf(c)
	n.mu.Lock()
	defer n.mu.Unlock()
	if known := n.containers[key]; known != nil {
		return known
	}
	if len(n.containers) >= n.prune {
		for old := range n.containers {
			if !old.init.alive() {
				delete(n.containers, old)
			}
		}
		n.prune = max(firstPrune, 2*len(n.containers))
	}
	if len(n.containers) >= maxContainers {
		return nil
	}
	added := &provenContainer{proven: make(chan struct{}), process: c.Process}
	n.containers[key] = added
	return added
}

func (n *nativeEngine) forget(c Container) {
	n.mu.Lock()
	defer n.mu.Unlock()
	delete(n.containers, keyOf(c))
}

// startIn starts a command in a proven container. It reports false when nothing of the command has run
// and the runtime should start it: because of the command, which the runtime explains better, or because
// of something else, which a container's trust does not survive maxFailures times in a row.
func (n *nativeEngine) startIn(ctx context.Context, container *provenContainer, p *Process, spec *specs.Process, streams [3]*os.File) (pid int, started bool, err error) {
	pid, err = n.start(ctx, p, container.plan, spec, streams, nil)
	if !errors.Is(err, errLeftToRuntime) {
		container.failures.Store(0)
		return pid, true, err
	}
	log := n.runner.log.With("container", p.container.ID, "reason", err)
	log.Debug("a command could not be started natively")
	if !errors.Is(err, errUnusual) && !passing(err) && container.failures.Add(1) == maxFailures {
		log.Warn("commands of this container are started by its OCI runtime alone from now on")
	}
	return 0, false, nil
}

// proveContainer does the proof and sets the container's plan if it succeeds.
func (n *nativeEngine) proveContainer(c Container, container *provenContainer) {
	ctx, cancel := context.WithTimeout(n.runner.ctx, proofTimeout)
	defer cancel()
	began := time.Now()
	plan, err := newPlan(c)
	if err == nil {
		err = n.prove(ctx, c, plan, nil)
	}
	log := n.runner.log.With("container", c.ID, "took", time.Since(began).Round(time.Millisecond))
	if err != nil {
		if passing(err) || ctx.Err() != nil { // to be tried again
			n.forget(c)
			log.Debug("the native engine could not prove itself", "reason", err)
			return
		}
		log.Info("commands of this container are started by its OCI runtime alone", "reason", err)
		return
	}
	container.plan = plan
	log.Debug("commands of this container are started natively")
}

// passing reports whether an error says that the machine was short of something, or the container
// paused.
func passing(err error) bool {
	for _, reason := range []error{unix.EMFILE, unix.ENFILE, unix.ENOMEM, unix.EAGAIN, unix.ENOSPC, ErrNotRunning} {
		if errors.Is(err, reason) {
			return true
		}
	}
	return false
}

// prove completes the plan with the seccomp filters and compares what it comes to with what the
// runtime's exec comes to. The error is the difference, or why there is no telling. In between it
// calls spoil, if not nil, by which tests change the plan.
func (n *nativeEngine) prove(ctx context.Context, c Container, plan *plan, spoil func()) error {
	inherited, err := inheritedFilters()
	if err != nil {
		return err
	}
	reference, filters, err := n.observe(ctx, c, plan, n.runner.runtimeLauncher(n.program.File()))
	if err != nil {
		return fmt.Errorf("started by the runtime: %w", err)
	}
	const word = "status Speculation_Store_Bypass"
	plan.request.Filters = filtersToInstall(filters, inherited, !strings.Contains(reference[word], "mitigated"))
	if spoil != nil {
		spoil()
	}
	native := func(ctx context.Context, p *Process, spec *specs.Process, _ files, streams [3]*os.File, _ *os.File) (int, error) {
		return n.start(ctx, p, plan, spec, streams, n.program.File())
	}
	got, gotFilters, err := n.observe(ctx, c, plan, native)
	if err != nil {
		return fmt.Errorf("started natively: %w", err)
	}
	if differences := reference.differences(got); len(differences) > 0 {
		return fmt.Errorf("a command started natively is not the same: %s", strings.Join(differences, "; "))
	}
	if !reflect.DeepEqual(filters, gotFilters) {
		return errors.New("a command started natively has other seccomp filters")
	}
	return nil
}

// observe starts the program as a command and looks at it.
func (n *nativeEngine) observe(ctx context.Context, c Container, plan *plan, launch launcher) (s snapshot, filters []enter.Filter, err error) {
	question := "probe-keyring"
	if plan.seccomp { // which commonly forbids keyctl(2), and may answer it with a kill
		question = "probe"
	}
	command := Command{Args: []string{"/proc/self/fd/3", question}, Stdin: true, Stdout: true, Stderr: true}
	p, err := n.runner.start(ctx, c, command, PolicyKill, launch)
	if err != nil {
		return nil, nil, err
	}
	stop := context.AfterFunc(ctx, p.Kill) // ends the read as well
	defer func() {
		p.stdin.Close() // and with it the program
		select {
		case <-p.Exited():
		case <-p.ended: // killed, and in a container that was paused meanwhile, where it ends later
		}
		stop()
		p.Close()
	}()
	answer, err := bufio.NewReader(io.LimitReader(p.stdout, maxAnswer)).ReadString('\n')
	if err != nil {
		return nil, nil, fmt.Errorf("the program said %q: %w", answer, errors.Join(err, ctx.Err()))
	}
	if s, err = takeSnapshot(p.leader.pid); err != nil {
		return nil, nil, fmt.Errorf("look at the program: %w", err)
	}
	s["answer"] = answer
	if s["status Seccomp"] != "0" {
		if filters, err = seccompFilters(p.leader.pid); err != nil {
			return nil, nil, err
		}
	}
	return s, filters, nil
}

// start starts a command as planned. An error that wraps errLeftToRuntime says that nothing of the command
// has run and the runtime should start it.
func (n *nativeEngine) start(ctx context.Context, p *Process, plan *plan, spec *specs.Process, streams [3]*os.File, execute *os.File) (int, error) {
	if plan.paused() {
		return 0, fmt.Errorf("%w: %w: %w: it is paused", errLeftToRuntime, errUnusual, ErrNotRunning)
	}
	request := plan.request
	var err error
	if request.Env, request.FindHome, err = runcEnvironment(spec.Env); err != nil {
		return 0, fmt.Errorf("%w: %w: %w", errLeftToRuntime, errUnusual, err)
	}
	request.Args = spec.Args
	if request.Limits, err = limits(spec.Rlimits); err != nil {
		return 0, fmt.Errorf("%w: %w", errLeftToRuntime, err)
	}
	options := enter.Options{
		Container: p.init.pidfd, Streams: streams, Execute: execute,
		Cancel: func(pid int) { // ours until Run has waited for it
			if stat, err := readStat(pid); err == nil {
				newTree(stat.identity, 0, streamEnds{}).kill()
			}
		},
	}
	if plan.cgroup != "" {
		cgroup, err := os.OpenFile(plan.cgroup, unix.O_PATH|unix.O_DIRECTORY, 0)
		if err != nil {
			return 0, fmt.Errorf("%w: %w", errLeftToRuntime, err)
		}
		defer cgroup.Close()
		options.Cgroup = cgroup
	}
	pid, err := n.program.Run(ctx, &request, options)
	var step *enter.StepError
	if errors.As(err, &step) && step.OfCommand() {
		return 0, fmt.Errorf("%w: %w: %w", errLeftToRuntime, errUnusual, err)
	}
	if errors.Is(err, enter.ErrNotStarted) {
		return 0, fmt.Errorf("%w: %w", errLeftToRuntime, err)
	}
	if err != nil {
		// A child, and so not another's pid.
		if stat, statErr := readStat(pid); pid != 0 && statErr == nil {
			newTree(stat.identity, p.container.InitPid, p.ends).kill()
		}
		return 0, err
	}
	return pid, nil
}

var (
	// errLeftToRuntime is in the error of a native start of which nothing has run.
	errLeftToRuntime = errors.New("left to the OCI runtime")
	// errUnusual is in it as well when that is no fault of the engine.
	errUnusual = errors.New("unusual command or moment")
)

// CheckNative finds out whether the native engine can start anything on this machine, by starting the
// program of its proofs without a container. It is for a process without a Runner.
func CheckNative(ctx context.Context) error {
	program, err := enter.Load()
	if err != nil {
		return err
	}
	defer program.Close()
	null, err := os.OpenFile(os.DevNull, os.O_RDWR, 0)
	if err != nil {
		return err
	}
	defer null.Close()
	self, err := unix.PidfdOpen(os.Getpid(), 0)
	if err != nil {
		return fmt.Errorf("pidfd_open: %w", err)
	}
	defer unix.Close(self)
	pid, err := program.Run(ctx, &enter.Request{Directory: "/", Args: []string{"enter", "probe"}}, enter.Options{
		Container: self, Streams: [3]*os.File{null, null, null}, Execute: program.File(),
		Cancel: func(pid int) { _ = unix.Kill(pid, unix.SIGKILL) },
	})
	if pid != 0 {
		if err != nil {
			_ = unix.Kill(pid, unix.SIGKILL) // a child that nobody has waited for
		}
		_, _ = unix.Wait4(pid, nil, 0, nil)
	}
	if err != nil {
		return err
	}
	inherited, err := inheritedFilters()
	if err != nil {
		return err
	}
	if inherited > 0 {
		return errors.New("this process has a seccomp filter, and so cannot read those of containers that have one")
	}
	return nil
}
