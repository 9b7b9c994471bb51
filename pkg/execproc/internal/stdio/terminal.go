package stdio

import (
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"slices"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/streamshim/streamshim/pkg/execproc/internal/tree"
	"github.com/streamshim/streamshim/pkg/handover"
	"github.com/streamshim/streamshim/pkg/rescue"
	"github.com/streamshim/streamshim/pkg/workload"
)

// Terminal is the master side of a pseudo-terminal.
type Terminal struct {
	File   *os.File
	exited <-chan struct{} // closed when the process has ended
	closed chan struct{}
	once   sync.Once
	// newDeadline wakes a Read that waits for someone to open the terminal.
	newDeadline chan struct{}
}

// NewTerminal returns a Terminal on a non-blocking master. exited is closed when the process has ended.
func NewTerminal(file *os.File, exited <-chan struct{}) *Terminal {
	return &Terminal{File: file, exited: exited, closed: make(chan struct{}), newDeadline: make(chan struct{}, 1)}
}

// reopenPoll is how often to check a terminal that nobody holds open. The kernel returns EIO rather than EAGAIN,
// so there is nothing to wait for.
const reopenPoll = 50 * time.Millisecond

// Read returns io.EOF when the process has ended and all its output was read. EIO alone only says that nobody has
// the terminal open right now; a living process can open /dev/tty again.
func (t *Terminal) Read(p []byte) (int, error) {
	for {
		ended := false
		select {
		case <-t.exited:
			ended = true // checked before the read, so that nothing can follow its EIO
		default:
		}
		n, err := t.File.Read(p)
		if n > 0 || !errors.Is(err, unix.EIO) {
			return n, err
		}
		if ended {
			return 0, io.EOF
		}
		timer := time.NewTimer(reopenPoll)
		select {
		case <-t.exited:
		case <-t.closed:
		case <-t.newDeadline:
		case <-timer.C:
		}
		timer.Stop()
	}
}

// Close hangs up: the kernel sends SIGHUP to the session that has it as its controlling terminal.
func (t *Terminal) Close() error {
	t.once.Do(func() { close(t.closed) })
	return t.File.Close()
}

// SetReadDeadline makes reads fail with os.ErrDeadlineExceeded after the deadline, as on an *os.File. It is needed
// because a terminal that a background child holds open never ends by itself (kubernetes#44371).
func (t *Terminal) SetReadDeadline(deadline time.Time) error {
	err := t.File.SetReadDeadline(deadline)
	select {
	case t.newDeadline <- struct{}{}:
	default:
	}
	return err
}

// SyscallConn gives access to the descriptor, which stays in Go's poller.
func (t *Terminal) SyscallConn() (syscall.RawConn, error) { return t.File.SyscallConn() }

func (t *Terminal) control(f func(fd int) error) error {
	raw, err := t.File.SyscallConn() // not Fd(), which makes the descriptor blocking
	if err != nil {
		return err
	}
	var inner error
	if err := raw.Control(func(fd uintptr) { inner = f(int(fd)) }); err != nil {
		return err
	}
	return inner
}

// Resize sets the terminal's size. The kernel tells the process with SIGWINCH.
func (t *Terminal) Resize(size workload.Size) error {
	err := t.control(func(fd int) error {
		return unix.IoctlSetWinsize(fd, unix.TIOCSWINSZ, &unix.Winsize{Row: size.Height, Col: size.Width})
	})
	if err != nil {
		return fmt.Errorf("resize terminal: %w", err)
	}
	return nil
}

// Held reports whether anyone may have the terminal open.
func (t *Terminal) Held() bool {
	hungUp := false
	err := t.control(func(fd int) error {
		poll := []unix.PollFd{{Fd: int32(fd)}} //nolint:gosec // a descriptor
		_, err := unix.Poll(poll, 0)
		hungUp = poll[0].Revents&unix.POLLHUP != 0
		return err
	})
	return err != nil || !hungUp
}

// Slave identifies the process's side. TIOCGPTPEER finds it in any mount namespace.
func (t *Terminal) Slave() (tree.StreamEnds, error) {
	var stat unix.Stat_t
	err := t.control(func(fd int) error {
		// O_NOCTTY: this process may be a session leader and must not take the terminal as its own.
		peer, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), unix.TIOCGPTPEER, unix.O_RDONLY|unix.O_NOCTTY|unix.O_CLOEXEC)
		if errno != 0 {
			return errno
		}
		defer unix.Close(int(peer))
		return unix.Fstat(int(peer), &stat)
	})
	if err != nil {
		return tree.StreamEnds{}, err
	}
	return tree.StreamEnds{Terminal: true, Dev: uint64(stat.Dev), Ino: stat.Ino}, nil
}

// TerminalInput is the terminal as the process's stdin.
type TerminalInput struct {
	*Terminal
	Report rescue.Report // of what types the end of file; required

	mu       sync.Mutex
	midLine  bool
	finished bool
	typing   *endOfFile // once Close has typed the end of file
}

// Write types p. It blocks while the terminal's buffer is full.
func (t *TerminalInput) Write(p []byte) (int, error) {
	n, err := t.File.Write(p)
	if n > 0 {
		t.mu.Lock()
		t.midLine = p[n-1] != '\n' && p[n-1] != '\r'
		t.mu.Unlock()
	}
	return n, err
}

// SetWriteDeadline makes writes fail with os.ErrDeadlineExceeded after the deadline, as on an *os.File.
func (t *TerminalInput) SetWriteDeadline(deadline time.Time) error {
	return t.File.SetWriteDeadline(deadline)
}

// InputState is the state of a terminal's input in a hand-over. Its field names are a contract with other versions
// of this program.
type InputState struct {
	MidLine bool
	Ended   bool
	Typing  *TypingState // nil unless the end of file is still being typed again
}

// TypingState is the state of repeated typing of the end of file.
type TypingState struct {
	Told  []int
	Pause time.Duration
	Next  handover.Instant
}

// Freeze stops typing and returns the state for ResumeInput. Nobody may be writing.
func (t *TerminalInput) Freeze() *InputState {
	s := &InputState{MidLine: t.midLine, Ended: t.finished}
	if e := t.typing; e != nil {
		e.freeze()
		if e.pause <= lastEndOfFileRepeat {
			s.Typing = &TypingState{Told: slices.Sorted(maps.Keys(e.told)), Pause: e.pause, Next: handover.InstantOf(e.next)}
		}
	}
	return s
}

// ResumeInput restores the input of a terminal that was frozen.
func ResumeInput(t *Terminal, s *InputState, report rescue.Report) *TerminalInput {
	input := &TerminalInput{Terminal: t, Report: report, midLine: s.MidLine, finished: s.Ended}
	if s.Typing != nil {
		e := newEndOfFile(t)
		e.pause, e.next = s.Typing.Pause, s.Typing.Next.Time()
		for _, group := range s.Typing.Told {
			e.told[group] = true
		}
		input.typing = e
		rescue.Go(report, e.repeat) // ends with the terminal
	}
	return input
}

func closed(c <-chan struct{}) bool {
	select {
	case <-c:
		return true
	default:
		return false
	}
}

const (
	// endOfFileTimeout bounds the wait for room in the terminal's buffer when its input ends.
	endOfFileTimeout = time.Second
	// The end of file is typed again at intervals between these, doubling, while anyone may read it.
	firstEndOfFileRepeat = 100 * time.Millisecond
	lastEndOfFileRepeat  = 25 * time.Second
)

// Close signals the end of file as a user does, by typing the terminal's EOF character (^D). It leaves the
// terminal open for output: clients that closed their input after sending it lost the answer (cri-tools#269).
// After an unfinished line it types two: the first only hands over the line.
//
// It types repeatedly, because a terminal can forget it: a shell that turns on line editing between the typing and
// its next read finds a NUL instead. As with a pipe, the end of input then holds for whoever reads next. But only
// in canonical mode does the character mean end of input, without reaching the reader. In other modes it is an
// ordinary key. A shell's line editor takes it for end of input too, but a text editor does not, so each
// foreground process group gets it only once.
func (t *TerminalInput) Close() error {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.finished {
		return nil
	}
	t.finished = true
	typing := newEndOfFile(t.Terminal)
	err := typing.typeOnce(t.midLine)
	if errors.Is(err, os.ErrClosed) || errors.Is(err, unix.EIO) {
		return nil // without the terminal no end of file is needed
	}
	if err != nil {
		return fmt.Errorf("send end of file to the terminal: %w", err)
	}
	typing.next = time.Now().Add(typing.pause)
	t.typing = typing
	rescue.Go(t.Report, typing.repeat) // ends with the terminal
	return nil
}

// endOfFile types the end of file, repeatedly.
type endOfFile struct {
	*Terminal
	told  map[int]bool  // process groups that got it as a key, outside canonical mode
	pause time.Duration // until the next time; above lastEndOfFileRepeat there is none
	next  time.Time

	frozen  chan struct{}
	stopped chan struct{} // closed when repeat has returned
	mu      sync.Mutex    // guards the write deadline
}

func newEndOfFile(t *Terminal) *endOfFile {
	return &endOfFile{
		Terminal: t, told: map[int]bool{}, pause: firstEndOfFileRepeat,
		frozen: make(chan struct{}), stopped: make(chan struct{}),
	}
}

// freeze stops repeat, which another endOfFile can continue.
func (e *endOfFile) freeze() {
	e.mu.Lock()
	close(e.frozen)
	_ = e.File.SetWriteDeadline(time.Unix(1, 0)) // fails only if closed, and then nothing is written
	e.mu.Unlock()
	<-e.stopped
}

// repeat types the end of file again while anyone may read it.
func (e *endOfFile) repeat() {
	defer close(e.stopped)
	for e.pause <= lastEndOfFileRepeat {
		timer := time.NewTimer(time.Until(e.next))
		select {
		case <-e.closed:
			timer.Stop()
			return
		case <-e.frozen:
			timer.Stop()
			return
		case <-timer.C:
		}
		if err := e.typeOnce(false); err != nil {
			if !closed(e.frozen) {
				e.pause = lastEndOfFileRepeat + 1 // the process has ended, or has not read what was typed before
			}
			return
		}
		e.pause *= 2
		e.next = time.Now().Add(e.pause)
	}
}

// typeOnce types the end of file, unless the reader would get it a second time as a key.
func (e *endOfFile) typeOnce(midLine bool) error {
	typed := []byte{4}
	skip, key, group := false, false, 0
	err := e.control(func(fd int) error {
		settings, err := unix.IoctlGetTermios(fd, unix.TCGETS)
		if err != nil {
			return err
		}
		typed[0] = settings.Cc[unix.VEOF]
		if settings.Lflag&unix.ICANON == 0 {
			if group, err = unix.IoctlGetInt(fd, unix.TIOCGPGRP); err != nil {
				group = 0 // unknown: count all such groups as one
			}
			key, skip = true, e.told[group]
		} else if midLine {
			typed = append(typed, typed[0])
		}
		return nil
	})
	if err != nil || skip {
		return err
	}
	if err := e.allowWrite(); err != nil {
		return err
	}
	if _, err = e.File.Write(typed); err == nil && key {
		e.told[group] = true
	}
	return err
}

func (e *endOfFile) allowWrite() error {
	e.mu.Lock()
	defer e.mu.Unlock()
	if closed(e.frozen) {
		return handover.ErrFrozen
	}
	return e.File.SetWriteDeadline(time.Now().Add(endOfFileTimeout))
}
