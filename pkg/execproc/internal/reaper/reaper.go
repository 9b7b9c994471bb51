// Package reaper waits for processes: those that this process has started, and others whose end it must know.
package reaper

import (
	"errors"
	"fmt"
	"os"
	"os/signal"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/streamshim/streamshim/pkg/execproc/internal/proc"
)

// A Reaper waits for processes: for those that were started here, to collect their status the
// moment they end, and for the main processes of containers, to know that they have ended. It also
// collects the zombies that fall to this process because it is a child subreaper.
//
// Being slow is not an option: a process that joined a container's pid namespace and is dead but not
// yet waited for keeps the container's init in the kernel (zap_pid_ns_processes), and with it the
// pod. So a goroutine of its own waits on pidfds, independent of all I/O.
//
// Nobody here calls wait4(-1): it would take the statuses that os/exec, in this same process, is
// waiting for. Whose zombie is it, then?
//
//   - A pid that a Start has registered is reaped when its pidfd says so, and by nobody else.
//   - A child in our own session was started by os/exec in this process and is left to it. Runtimes
//     are started in a session of their own (setsid), and a process can join no session it was not
//     born into, so nothing that descends from a runtime is ever in ours. The other way round, code
//     in this process that starts children with Setsid would lose their status; there is none.
//   - Any other zombie is an orphan: of the runtime, or of a process in a container that shares the
//     host's pid namespace. But it may also be a process that died before the Start that wanted it
//     had read its pid. So it is reaped only when every Start that was under way when the zombie was
//     first seen has ended, by registering a pid or by failing. Until then the zombie keeps its pid.
type Reaper struct {
	Session int // ours
	epoll   *os.File
	signals chan os.Signal
	stop    chan struct{}
	// startEnded asks for a look at what had to wait. While starts are under way SIGCHLD alone does not
	// bring one: most come from the runtime, and a look costs more than the rest of a start's work here.
	startEnded chan struct{}
	loops      sync.WaitGroup

	mu         sync.Mutex
	watches    map[int32]*Watch // by token
	nextToken  int32
	processes  map[int]*Watch      // by pid, those to be reaped
	containers map[int]*Watch      // by pid, shared by all processes in a container
	starts     map[uint64]struct{} // under way
	lastStart  uint64
	orphans    map[int]uint64      // zombies seen, with the last Start begun by then
	held       map[*Watch]struct{} // zombies that cannot be reaped yet: a tracer has them
	unseen     bool                // SIGCHLD came while a Start was under way; nobody has looked yet
	looked     time.Time
	names      uint64
	reserved   map[int]bool // frozen processes, whose zombies wait for whoever resumes them
	adopting   int          // Runners that have yet to learn what their predecessor has frozen: no zombie is an orphan
}

// Watch is one process being waited for.
type Watch struct {
	pid    int
	pidfd  int
	token  int32
	refs   int           // containers only
	Exited chan struct{} // closed once the process has ended, and was reaped if it is ours
	onExit func()        // called by the reaper after exited was closed; must not block
	Status int           // exit code, valid after exited
}

// The children of this process belong to the process, not to a Runner, so that all Runners of a
// process share one reaper. It lives as long as one of them does.
var shared struct {
	mu     sync.Mutex
	Reaper *Reaper
	users  int
}

// Acquire makes this process a child subreaper (prctl(2)) and returns its reaper.
func Acquire() (*Reaper, error) { return AcquireFor(false) }

// AcquireFor is acquireReaper; a successor calls adopted once it knows its processes.
func AcquireFor(successor bool) (*Reaper, error) {
	shared.mu.Lock()
	defer shared.mu.Unlock()
	if shared.Reaper == nil {
		r, err := newReaper(successor)
		if err != nil {
			return nil, err
		}
		shared.Reaper = r
	} else if successor {
		shared.Reaper.mu.Lock()
		shared.Reaper.adopting++
		shared.Reaper.mu.Unlock()
	}
	shared.users++
	return shared.Reaper, nil
}

// Adopted says that all processes of a predecessor are watched or reserved. What has ended in the hand-over is looked
// for: its SIGCHLD may have come to a program that was not yet listening.
func (r *Reaper) Adopted() {
	r.mu.Lock()
	r.adopting--
	r.mu.Unlock()
	r.Look()
}

// Look has orphans looked for soon.
func (r *Reaper) Look() {
	select {
	case r.startEnded <- struct{}{}:
	default: // it is about to look
	}
}

// Release gives up what acquireReaper returned. The process stays a subreaper.
func (r *Reaper) Release() {
	shared.mu.Lock()
	defer shared.mu.Unlock()
	if shared.users--; shared.users > 0 {
		return
	}
	shared.Reaper = nil
	signal.Stop(r.signals)
	close(r.stop)
	r.epoll.Close()
	r.loops.Wait()
}

func newReaper(successor bool) (*Reaper, error) {
	if err := unix.Prctl(unix.PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0); err != nil {
		return nil, fmt.Errorf("become child subreaper: %w", err)
	}
	if err := catchIgnored(); err != nil {
		return nil, fmt.Errorf("read ignored signals from /proc: %w", err)
	}
	probe, err := unix.PidfdOpen(os.Getpid(), 0)
	if err != nil {
		return nil, fmt.Errorf("pidfd_open (it needs Linux 5.4 or later): %w", err)
	}
	unix.Close(probe)
	self, err := proc.ReadStat(os.Getpid())
	if err != nil {
		return nil, fmt.Errorf("read own session from /proc: %w", err)
	}
	epfd, err := unix.EpollCreate1(unix.EPOLL_CLOEXEC)
	if err != nil {
		return nil, fmt.Errorf("epoll_create: %w", err)
	}
	// An epoll descriptor can itself be waited for, by Go's own poller. So no thread is held, and
	// closing the file ends the loop.
	if err := unix.SetNonblock(epfd, true); err != nil {
		unix.Close(epfd)
		return nil, fmt.Errorf("epoll non-blocking: %w", err)
	}
	r := &Reaper{
		Session:    self.Session,
		epoll:      os.NewFile(uintptr(epfd), "epoll"),
		signals:    make(chan os.Signal, 1), // one is enough: it says "look", not who
		stop:       make(chan struct{}),
		startEnded: make(chan struct{}, 1),
		watches:    map[int32]*Watch{},
		processes:  map[int]*Watch{},
		containers: map[int]*Watch{},
		starts:     map[uint64]struct{}{},
		orphans:    map[int]uint64{},
		held:       map[*Watch]struct{}{},
		reserved:   map[int]bool{},
	}
	if successor {
		r.adopting = 1
	}
	raw, err := r.epoll.SyscallConn()
	if err != nil {
		r.epoll.Close()
		return nil, fmt.Errorf("epoll: %w", err)
	}
	signal.Notify(r.signals, unix.SIGCHLD)
	r.loops.Add(2)
	go r.waitForExits(raw)
	go r.waitForOrphans()
	return r, nil
}

var unheard = make(chan os.Signal, 1) // nobody reads it

// catchIgnored makes signals that this process was started to ignore be caught and thrown away. To this
// process that is the same, but what is ignored stays ignored in all that it executes, through the runtime
// and into the container: there no hang-up would end a command, and a shell could not even trap it
// (sh(1) of POSIX, "trap"). Go catches the other signals from the start. These it leaves alone, the first
// two to please nohup and shells that put a process in the background.
//
// It is for good, as being a subreaper is: signal.Stop would make them ignored again. And it looks at what
// the kernel says, as signal.Ignored does not know of all.
func catchIgnored() error {
	status, err := os.ReadFile("/proc/self/status")
	if err != nil {
		return err
	}
	_, rest, _ := strings.Cut(string(status), "\nSigIgn:")
	mask, _, _ := strings.Cut(strings.TrimSpace(rest), "\n")
	ignored, err := strconv.ParseUint(mask, 16, 64)
	if err != nil {
		return err
	}
	for _, s := range []unix.Signal{unix.SIGHUP, unix.SIGINT, unix.SIGTSTP, unix.SIGTTIN, unix.SIGTTOU} {
		if ignored&(1<<(s-1)) != 0 {
			ThrowAway(s)
		}
	}
	return nil
}

// thrownAway are the signals of catchIgnored. After execve they are neither ignored nor caught, so that the next
// program must be told.
var thrownAway struct {
	mu      sync.Mutex
	signals []unix.Signal
}

// UnheardSignals are the signals that are thrown away.
func UnheardSignals() []unix.Signal {
	thrownAway.mu.Lock()
	defer thrownAway.mu.Unlock()
	return slices.Clone(thrownAway.signals)
}

// ThrowAway catches a signal and throws it away, for good.
func ThrowAway(s unix.Signal) {
	thrownAway.mu.Lock()
	defer thrownAway.mu.Unlock()
	if !slices.Contains(thrownAway.signals, s) {
		thrownAway.signals = append(thrownAway.signals, s)
	}
	signal.Notify(unheard, s)
}

func (r *Reaper) waitForExits(raw syscall.RawConn) {
	defer r.loops.Done()
	events := make([]unix.EpollEvent, 64)
	for {
		n := 0
		err := raw.Read(func(fd uintptr) bool {
			var err error
			n, err = unix.EpollWait(int(fd), events, 0)
			return n > 0 || (err != nil && err != unix.EINTR)
		})
		if err != nil {
			return // closed by release
		}
		for _, event := range events[:max(n, 0)] {
			r.exited(event.Fd)
		}
	}
}

func (r *Reaper) waitForOrphans() {
	defer r.loops.Done()
	for {
		select {
		case <-r.signals:
			r.reapHeld()
			r.mu.Lock()
			busy := len(r.starts) > 0
			r.unseen = r.unseen || busy
			r.mu.Unlock()
			if !busy {
				r.ReapOrphans()
			}
		case <-r.startEnded:
			r.ReapOrphans()
		case <-r.stop:
			return
		}
	}
}

// neverExecuted is how runc and youki name the process that is about to become the command. The
// kernel replaces the name when execve succeeds, and a zombie keeps the last one.
const neverExecuted = ":[2:INIT]"

// exited handles a pidfd that has become readable: the process has ended.
func (r *Reaper) exited(token int32) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if w := r.watches[token]; w != nil {
		r.endedLocked(w)
	}
}

// reapHeld tries again to reap what a tracer had.
func (r *Reaper) reapHeld() {
	r.mu.Lock()
	defer r.mu.Unlock()
	for w := range r.held {
		r.endedLocked(w)
	}
}

// endedLocked reaps a process that has ended, if it is ours, and tells those who wait.
func (r *Reaper) endedLocked(w *Watch) {
	if r.processes[w.pid] == w {
		stat, statErr := proc.ReadStat(w.pid)
		var status unix.WaitStatus
		pid, err := unix.Wait4(w.pid, &status, unix.WNOHANG, nil)
		for err == unix.EINTR {
			pid, err = unix.Wait4(w.pid, &status, unix.WNOHANG, nil)
		}
		switch {
		case err != nil:
			w.Status = LostStatus // not our child any more: nobody knows
		case pid == 0:
			r.holdLocked(w)
			return
		case status.Signaled():
			w.Status = 128 + int(status.Signal())
		default:
			w.Status = status.ExitStatus()
			// runc reports what it finds before execve. What execve itself finds (a binary for another
			// machine, a script whose interpreter is missing) comes as exit 255 of a process that never
			// became the command; a shell calls that 126.
			const notExecutable = 126 // as shells say it
			if w.Status == 255 && statErr == nil && strings.HasSuffix(stat.Name, neverExecuted) {
				w.Status = notExecutable
			}
		}
		delete(r.processes, w.pid)
	} else {
		delete(r.containers, w.pid)
	}
	r.forget(w)
	close(w.Exited)
	if w.onExit != nil {
		w.onExit()
	}
}

// holdLocked is for a process that has ended and cannot be reaped: a debugger that traces it is to see its end
// first (ptrace(2)). Its pidfd stays readable all the time, so that it is no longer waited for. When the
// tracer lets go of it, the kernel sends SIGCHLD once more.
func (r *Reaper) holdLocked(w *Watch) {
	if _, known := r.held[w]; known {
		return
	}
	raw, err := r.epoll.SyscallConn()
	if err != nil {
		return // closed by release
	}
	r.held[w] = struct{}{}
	_ = raw.Control(func(epfd uintptr) { _ = unix.EpollCtl(int(epfd), unix.EPOLL_CTL_DEL, w.pidfd, nil) })
	// It may have let go between the wait and now.
	select {
	case r.signals <- unix.SIGCHLD:
	default: // a look is due anyway
	}
}

// forget stops watching. The caller holds the lock.
func (r *Reaper) forget(w *Watch) {
	delete(r.watches, w.token)
	delete(r.held, w)
	unix.Close(w.pidfd) // which also takes it out of the epoll set
}

// add begins to watch. The caller holds the lock.
func (r *Reaper) add(pid int) (*Watch, error) {
	pidfd, err := unix.PidfdOpen(pid, 0)
	if err != nil {
		return nil, fmt.Errorf("pidfd_open: %w", err)
	}
	w := &Watch{pid: pid, pidfd: pidfd, Exited: make(chan struct{})}
	for w.token = r.nextToken; r.watches[w.token] != nil; w.token++ {
	}
	r.nextToken = w.token + 1
	raw, err := r.epoll.SyscallConn()
	if err == nil {
		ctlErr := raw.Control(func(epfd uintptr) {
			event := unix.EpollEvent{Events: unix.EPOLLIN, Fd: w.token}
			err = unix.EpollCtl(int(epfd), unix.EPOLL_CTL_ADD, pidfd, &event)
		})
		err = errors.Join(err, ctlErr)
	}
	if err != nil {
		unix.Close(pidfd)
		return nil, fmt.Errorf("watch pidfd: %w", err)
	}
	r.watches[w.token] = w
	return w, nil
}

// BeginStart notes that a process is about to be started. What it returns must be given to endStart
// once the process is registered, or will not be.
func (r *Reaper) BeginStart() uint64 {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.lastStart++
	r.starts[r.lastStart] = struct{}{}
	return r.lastStart
}

// lookInterval is the least time between looks for orphans while starts go on and on.
const lookInterval = 100 * time.Millisecond

// EndStart ends what BeginStart has begun.
func (r *Reaper) EndStart(start uint64) {
	r.mu.Lock()
	delete(r.starts, start)
	look := (r.unseen || len(r.orphans) > 0) && (len(r.starts) == 0 || time.Since(r.looked) > lookInterval)
	r.mu.Unlock()
	if look {
		r.Look()
	}
}

// WatchProcess registers a process for reaping. It must be a child of this process.
func (r *Reaper) WatchProcess(pid int, onExit func()) (*Watch, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	w, err := r.add(pid)
	if err != nil {
		return nil, err
	}
	w.onExit = onExit
	r.processes[pid] = w
	delete(r.orphans, pid)
	delete(r.reserved, pid)
	return w, nil
}

// Reserve stops waiting for a process, which is left a zombie when it ends until it is watched again or unreserved. It
// reports false when the process has ended before and was reaped.
func (r *Reaper) Reserve(w *Watch) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.processes[w.pid] != w {
		return false
	}
	delete(r.processes, w.pid)
	r.forget(w)
	r.reserved[w.pid] = true
	return true
}

// ReservePid reserves what a predecessor has reserved.
func (r *Reaper) ReservePid(pid int) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.processes[pid] == nil {
		r.reserved[pid] = true
	}
}

// Unreserve takes Reserve back: the process is nobody's.
func (r *Reaper) Unreserve(pid int) {
	r.mu.Lock()
	delete(r.reserved, pid)
	r.mu.Unlock()
	r.Look()
}

// Others returns the children that nobody watches here.
func (r *Reaper) Others() ([]proc.Stat, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	return proc.OwnChildren(r.waitsForLocked)
}

// Unregistered returns which of the children are not to be reaped by somebody who watches them.
func (r *Reaper) Unregistered(children []int) []int {
	r.mu.Lock()
	defer r.mu.Unlock()
	return slices.DeleteFunc(children, r.waitsForLocked)
}

// waitsForLocked reports whether a child is a Process's, or will be again.
func (r *Reaper) waitsForLocked(pid int) bool { return r.processes[pid] != nil || r.reserved[pid] }

// LostStatus is the exit code of a process for which somebody else has waited.
const LostStatus = 255

// EndedWatch is the watch of a process that has ended before.
func EndedWatch(pid, status int) *Watch {
	w := &Watch{pid: pid, pidfd: -1, Exited: make(chan struct{}), Status: status}
	close(w.Exited)
	return w
}

// WatchKnown is watchContainer of a process that was watched before, and may have ended since. A start time of 0 is not
// known.
func (r *Reaper) WatchKnown(id proc.Identity, ended bool) (*Watch, error) {
	if ended || id.Pid <= 0 {
		return EndedWatch(id.Pid, 0), nil
	}
	w, err := r.WatchContainer(id.Pid)
	if errors.Is(err, unix.ESRCH) {
		return EndedWatch(id.Pid, 0), nil
	}
	if err != nil {
		return nil, err
	}
	// Looked at only now: from here on the descriptor keeps the process from being mistaken.
	if id.Start != 0 && !id.Alive() {
		r.DropContainer(w)
		return EndedWatch(id.Pid, 0), nil
	}
	return w, nil
}

// DropProcess stops waiting for a process that is to outlive this one. It is not reaped any more.
func (r *Reaper) DropProcess(w *Watch) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.processes[w.pid] == w {
		delete(r.processes, w.pid)
		r.forget(w)
	}
}

// WatchContainer watches a container's main process, together with everybody else who does. It
// answers unix.ESRCH when there is no such process.
func (r *Reaper) WatchContainer(pid int) (*Watch, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if w := r.containers[pid]; w != nil {
		w.refs++
		return w, nil
	}
	w, err := r.add(pid)
	if err != nil {
		return nil, err
	}
	w.refs = 1
	r.containers[pid] = w
	return w, nil
}

// DropContainer takes one WatchContainer back.
func (r *Reaper) DropContainer(w *Watch) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if w.refs--; w.refs == 0 && r.containers[w.pid] == w {
		delete(r.containers, w.pid)
		r.forget(w)
	}
}

// HasEnded reports what the kernel says of a process now, not what the reaper has got round to: whether it
// has ended. The lock keeps the descriptor from being closed meanwhile, and its number from becoming
// another's.
func (r *Reaper) HasEnded(w *Watch) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.watches[w.token] != w {
		return true
	}
	poll := []unix.PollFd{{Fd: int32(w.pidfd), Events: unix.POLLIN}}
	n, err := unix.Poll(poll, 0)
	for err == unix.EINTR {
		n, err = unix.Poll(poll, 0)
	}
	return n > 0 || err != nil
}

// TakeName says that a name is in use, and so are those before it.
func (r *Reaper) TakeName(name uint64) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.names = max(r.names, name)
}

// Name returns a name for files that no other Runner of this process uses.
func (r *Reaper) Name() uint64 {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.names++
	return r.names
}

// ReapOrphans reaps what nobody waits for; the comment on Reaper says how that is known. It holds
// the lock throughout, so that no pid changes its meaning in between.
func (r *Reaper) ReapOrphans() {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.adopting > 0 {
		return // adopted looks
	}
	r.unseen, r.looked = false, time.Now()
	var info unix.Siginfo
	err := unix.Waitid(unix.P_ALL, 0, &info, unix.WEXITED|unix.WNOHANG|unix.WNOWAIT, nil)
	if err == unix.ECHILD || (err == nil && info.Signo == 0) {
		clear(r.orphans)
		return // no zombie at all: the usual case, as the process was reaped through its pidfd
	}
	children, err := proc.OwnChildren(r.waitsForLocked)
	if err != nil {
		return // no descriptor free; the next SIGCHLD looks again
	}
	seen := make(map[int]uint64)
	for _, child := range children {
		if !child.Zombie() || child.Session == r.Session {
			continue
		}
		last, known := r.orphans[child.Pid]
		if !known {
			last = r.lastStart
		}
		if r.underWay(last) {
			seen[child.Pid] = last
			continue
		}
		// 0 means that other threads of it still run; it signals again when they have ended.
		_, _ = unix.Wait4(child.Pid, nil, unix.WNOHANG, nil)
	}
	r.orphans = seen
}

// underWay reports whether a Start up to and including last has not ended yet.
func (r *Reaper) underWay(last uint64) bool {
	for start := range r.starts {
		if start <= last {
			return true
		}
	}
	return false
}
