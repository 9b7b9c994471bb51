// Package reaper waits for processes to end: children of this process, and others whose end must be known.
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
	"github.com/streamshim/streamshim/pkg/rescue"
)

// Reaper waits for processes: for those started here, to collect their status the moment they end, and for
// containers' main processes, to know when they have ended. It also collects the zombies that this process gets as
// a child subreaper.
//
// It must not be slow. A process that joined a container's pid namespace and is dead but not yet waited for keeps
// the container's init in the kernel (zap_pid_ns_processes), and with it the pod. So a goroutine of its own waits
// on pidfds, independently of all I/O.
//
// Nothing here calls wait4(-1): that would take the statuses that os/exec, in this same process, is waiting for.
// Whose zombie is it, then?
//
//   - A pid that a Start has registered is reaped when its pidfd says so, and by nobody else.
//   - A child in our own session was started by os/exec in this process and is left to it. Runtimes are started in
//     a session of their own (setsid), and a process can only be born into a session, so no descendant of a
//     runtime is ever in ours. Conversely, code in this process that starts children with Setsid would lose their
//     status; there is none.
//   - Any other zombie is an orphan: of the runtime, or of a process in a container that shares the host's pid
//     namespace. But it may also have died before the Start that wants it has read its pid. So it is reaped only
//     when every Start that was in progress when the zombie was first seen has ended, by registering a pid or by
//     failing. Until then the zombie keeps its pid.
type Reaper struct {
	Session int // our own session
	epoll   *os.File
	signals chan os.Signal
	stop    chan struct{}
	// startEnded asks for a deferred look for orphans. During starts SIGCHLD alone does not trigger one: most come
	// from the runtime, and a look costs more than the rest of a start's work here.
	startEnded chan struct{}
	loops      sync.WaitGroup

	mu         sync.Mutex
	watches    map[int32]*Watch // by token
	nextToken  int32
	processes  map[int]*Watch      // by pid; to be reaped
	containers map[int]*Watch      // by pid; shared by all processes in a container
	starts     map[uint64]struct{} // in progress
	lastStart  uint64
	orphans    map[int]uint64      // zombies seen, with the last Start begun before that
	held       map[*Watch]struct{} // zombies that a tracer keeps us from reaping
	unseen     bool                // SIGCHLD came during a Start and nobody has looked since
	looked     time.Time
	names      uint64
	reserved   map[int]bool                                        // frozen processes; they stay zombies until they are resumed
	children   func(known func(pid int) bool) ([]proc.Stat, error) // of this process, see proc.OwnChildren
	adopting   int                                                 // Runners that have yet to learn what their predecessor froze; until then no zombie is an orphan
}

// Watch is a process being waited for.
type Watch struct {
	pid    int
	pidfd  int
	token  int32
	refs   int           // only used for containers
	Exited chan struct{} // closed once the process has ended, and has been reaped if it is ours
	onExit func()        // called by the reaper after Exited is closed; must not block or panic
	Status int           // exit code, valid once Exited is closed
}

// Children belong to this process, not to a Runner, so all Runners share one reaper. It lives while any of them
// does.
var shared struct {
	mu     sync.Mutex
	Reaper *Reaper
	users  int
}

// Acquire makes this process a child subreaper (prctl(2)) and returns its reaper.
func Acquire() (*Reaper, error) { return AcquireFor(false) }

// AcquireFor is Acquire. A successor must call Adopted once it knows its processes.
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

// Adopted says that all processes of the predecessor are now watched or reserved. It triggers a look for those
// that ended in the hand-over: their SIGCHLD may have come before this program listened.
func (r *Reaper) Adopted() {
	r.mu.Lock()
	r.adopting--
	r.mu.Unlock()
	r.Look()
}

// Look triggers a look for orphans.
func (r *Reaper) Look() {
	select {
	case r.startEnded <- struct{}{}:
	default: // one is already due
	}
}

// Release gives back what Acquire returned. This process stays a subreaper.
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
	// Go's own poller can wait for an epoll descriptor. That blocks no thread, and closing the file ends the loop.
	if err := unix.SetNonblock(epfd, true); err != nil {
		unix.Close(epfd)
		return nil, fmt.Errorf("epoll non-blocking: %w", err)
	}
	r := &Reaper{
		Session:    self.Session,
		epoll:      os.NewFile(uintptr(epfd), "epoll"),
		signals:    make(chan os.Signal, 1), // a signal says only that there is something to see
		stop:       make(chan struct{}),
		startEnded: make(chan struct{}, 1),
		watches:    map[int32]*Watch{},
		processes:  map[int]*Watch{},
		containers: map[int]*Watch{},
		starts:     map[uint64]struct{}{},
		orphans:    map[int]uint64{},
		held:       map[*Watch]struct{}{},
		reserved:   map[int]bool{},
		children:   proc.OwnChildren,
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
	// They belong to all processes: nothing would be reaped any more without them.
	rescue.Go(rescue.Die, func() { r.waitForExits(raw) })
	rescue.Go(rescue.Die, r.waitForOrphans)
	return r, nil
}

var discardChannel = make(chan os.Signal, 1) // nobody reads it

// catchIgnored catches and discards the signals that this process was started to ignore. Ignored signals stay
// ignored across execve, through the runtime and into the container: there a hang-up would end no command, and a
// shell could not even trap it (sh(1) of POSIX, "trap"). Go catches the other signals from the start. It leaves
// these alone, the first two for nohup and for shells that run jobs in the background.
//
// Like being a subreaper this is permanent: signal.Stop would make them ignored again. It reads the kernel's mask
// because signal.Ignored does not know all of them.
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
			Discard(s)
		}
	}
	return nil
}

// discarded holds the signals of catchIgnored. After execve they are neither ignored nor caught, so the next
// program must be told.
var discarded struct {
	mu      sync.Mutex
	signals []unix.Signal
}

// DiscardedSignals returns the signals that are caught and discarded.
func DiscardedSignals() []unix.Signal {
	discarded.mu.Lock()
	defer discarded.mu.Unlock()
	return slices.Clone(discarded.signals)
}

// Discard catches and discards a signal from now on.
func Discard(s unix.Signal) {
	discarded.mu.Lock()
	defer discarded.mu.Unlock()
	if !slices.Contains(discarded.signals, s) {
		discarded.signals = append(discarded.signals, s)
	}
	signal.Notify(discardChannel, s)
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
			return // closed by Release
		}
		for _, event := range events[:max(n, 0)] {
			r.exited(event.Fd)
		}
	}
}

func (r *Reaper) waitForOrphans() {
	defer r.loops.Done()
	again, pause := time.NewTimer(time.Hour), firstLookPause
	defer again.Stop()
	look := func() {
		if !r.ReapOrphans() {
			pause = firstLookPause
			return
		}
		again.Reset(pause)
		pause = min(2*pause, maxLookPause)
	}
	for {
		select {
		case <-r.signals:
			r.reapHeld()
			r.mu.Lock()
			busy := len(r.starts) > 0
			r.unseen = r.unseen || busy
			r.mu.Unlock()
			if !busy {
				look()
			}
		case <-r.startEnded:
			look()
		case <-again.C:
			look()
		case <-r.stop:
			return
		}
	}
}

// neverExecuted ends the name that runc and youki give to the process that is about to become the command. The
// kernel replaces the name when execve succeeds, and a zombie keeps the last one.
const neverExecuted = ":[2:INIT]"

// exited handles a readable pidfd: its process has ended.
func (r *Reaper) exited(token int32) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if w := r.watches[token]; w != nil {
		r.endedLocked(w)
	}
}

// reapHeld retries the zombies that tracers held.
func (r *Reaper) reapHeld() {
	r.mu.Lock()
	defer r.mu.Unlock()
	for w := range r.held {
		r.endedLocked(w)
	}
}

// endedLocked reaps a process that has ended, if it is ours, and notifies those who wait.
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
			w.Status = LostStatus // no longer our child: its status is unknown
		case pid == 0:
			r.holdLocked(w)
			return
		case status.Signaled():
			w.Status = 128 + int(status.Signal())
		default:
			w.Status = status.ExitStatus()
			// runc reports errors that it finds before execve. An error of execve itself (a binary for another
			// machine, a script whose interpreter is missing) shows only as exit code 255 of a process that never
			// became the command. Shells call that 126.
			const notExecutable = 126 // as in shells
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

// holdLocked sets aside a process that has ended but cannot be reaped, because a debugger that traces it must see
// its end first (ptrace(2)). Its pidfd stays readable, so it is taken out of the epoll set. When the tracer lets
// go, the kernel sends another SIGCHLD.
func (r *Reaper) holdLocked(w *Watch) {
	if _, known := r.held[w]; known {
		return
	}
	raw, err := r.epoll.SyscallConn()
	if err != nil {
		return // closed by Release
	}
	r.held[w] = struct{}{}
	_ = raw.Control(func(epfd uintptr) { _ = unix.EpollCtl(int(epfd), unix.EPOLL_CTL_DEL, w.pidfd, nil) })
	// The tracer may have let go between the wait and now.
	select {
	case r.signals <- unix.SIGCHLD:
	default: // a look is due already
	}
}

// forget stops watching. The caller holds mu.
func (r *Reaper) forget(w *Watch) {
	delete(r.watches, w.token)
	delete(r.held, w)
	unix.Close(w.pidfd) // also removes it from the epoll set
}

// add starts watching a process. The caller holds mu.
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

// BeginStart records that a process is about to be started. Pass the result to EndStart once the process is
// registered, or the start has failed.
func (r *Reaper) BeginStart() uint64 {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.lastStart++
	r.starts[r.lastStart] = struct{}{}
	return r.lastStart
}

// lookInterval is the minimum time between looks for orphans while starts never cease.
const lookInterval = 100 * time.Millisecond

// A look that leaves zombies is repeated after a pause, which doubles from the first to the longest. The kernel's list
// of children omits some while others are being reaped (proc_pid_children(5)), and no SIGCHLD would come for them again.
const (
	firstLookPause = time.Second
	maxLookPause   = 8 * time.Second
)

// EndStart ends a start that BeginStart began.
func (r *Reaper) EndStart(start uint64) {
	r.mu.Lock()
	delete(r.starts, start)
	look := (r.unseen || len(r.orphans) > 0) && (len(r.starts) == 0 || time.Since(r.looked) > lookInterval)
	r.mu.Unlock()
	if look {
		r.Look()
	}
}

// WatchProcess registers a child of this process for reaping.
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

// Reserve stops waiting for a process. When it ends it stays a zombie, until it is watched again or unreserved.
// Reserve returns false if the process has already ended and been reaped.
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

// ReservePid reserves a process that a predecessor reserved.
func (r *Reaper) ReservePid(pid int) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.processes[pid] == nil {
		r.reserved[pid] = true
	}
}

// Unreserve undoes Reserve: the process belongs to nobody.
func (r *Reaper) Unreserve(pid int) {
	r.mu.Lock()
	delete(r.reserved, pid)
	r.mu.Unlock()
	r.Look()
}

// Others returns the children that nobody here watches.
func (r *Reaper) Others() ([]proc.Stat, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	return proc.OwnChildren(r.waitsForLocked)
}

// Unregistered returns the children that are neither watched nor reserved for reaping. It modifies its argument.
func (r *Reaper) Unregistered(children []int) []int {
	r.mu.Lock()
	defer r.mu.Unlock()
	return slices.DeleteFunc(children, r.waitsForLocked)
}

// waitsForLocked reports whether a child belongs to a Process, or will again.
func (r *Reaper) waitsForLocked(pid int) bool { return r.processes[pid] != nil || r.reserved[pid] }

// LostStatus is the exit code of a process that somebody else has waited for.
const LostStatus = 255

// EndedWatch returns the watch of a process that has already ended.
func EndedWatch(pid, status int) *Watch {
	w := &Watch{pid: pid, pidfd: -1, Exited: make(chan struct{}), Status: status}
	close(w.Exited)
	return w
}

// WatchKnown is WatchContainer for a process that was watched before and may have ended since. A start time of 0
// means unknown.
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
	// Check only now: from here on the pidfd keeps the pid from being reused.
	if id.Start != 0 && !id.Alive() {
		r.DropContainer(w)
		return EndedWatch(id.Pid, 0), nil
	}
	return w, nil
}

// DropProcess stops waiting for a process that is to outlive this one. It is no longer reaped.
func (r *Reaper) DropProcess(w *Watch) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.processes[w.pid] == w {
		delete(r.processes, w.pid)
		r.forget(w)
	}
}

// WatchContainer watches a container's main process. All callers for the same pid share one Watch. It returns
// unix.ESRCH if there is no such process.
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

// DropContainer undoes one WatchContainer.
func (r *Reaper) DropContainer(w *Watch) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if w.refs--; w.refs == 0 && r.containers[w.pid] == w {
		delete(r.containers, w.pid)
		r.forget(w)
	}
}

// HasEnded asks the kernel whether a process has ended, whether or not the reaper has noticed. The lock keeps the
// pidfd from being closed and its number from being reused meanwhile.
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

// TakeName marks a name, and all before it, as used.
func (r *Reaper) TakeName(name uint64) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.names = max(r.names, name)
}

// Name returns a name for files that is unique in this process.
func (r *Reaper) Name() uint64 {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.names++
	return r.names
}

// ReapOrphans reaps the zombies that nobody waits for; the comment on Reaper says how they are known. It holds the
// lock throughout, so no pid can change its meaning in between. left reports whether there are zombies afterwards,
// whoever waits for them.
func (r *Reaper) ReapOrphans() (left bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.adopting > 0 {
		return false // Adopted will look
	}
	r.unseen, r.looked = false, time.Now()
	if !haveZombie() {
		clear(r.orphans)
		return false // as usual: processes are reaped through their pidfds
	}
	children, err := r.children(r.waitsForLocked)
	if err != nil {
		return true // no free descriptor
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
		// 0 means that other threads still run. The kernel signals again when they have ended.
		_, _ = unix.Wait4(child.Pid, nil, unix.WNOHANG, nil)
	}
	r.orphans = seen
	return haveZombie()
}

// haveZombie reports whether any child is a zombie.
func haveZombie() bool {
	var info unix.Siginfo
	err := unix.Waitid(unix.P_ALL, 0, &info, unix.WEXITED|unix.WNOHANG|unix.WNOWAIT, nil)
	return err != unix.ECHILD && (err != nil || info.Signo != 0)
}

// underWay reports whether a Start up to and including last is still in progress.
func (r *Reaper) underWay(last uint64) bool {
	for start := range r.starts {
		if start <= last {
			return true
		}
	}
	return false
}
