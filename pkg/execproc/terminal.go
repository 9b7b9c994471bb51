package execproc

import (
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/streamshim/streamshim/pkg/workload"
)

// maxSocketPath is the size of sun_path less the final NUL, unix(7).
const maxSocketPath = 107

// consoleSocket is where the runtime hands over the master of the terminal it made in the
// container's /dev/pts (runc, docs/terminals.md: "detached, new terminal").
type consoleSocket struct {
	listener *net.UnixListener
	path     string
	tempDir  string // to be removed, when the state directory's path was too long
}

func newConsoleSocket(path string) (*consoleSocket, error) {
	s := &consoleSocket{path: path}
	if len(path) > maxSocketPath {
		dir, err := os.MkdirTemp("", "streamshim-")
		if err != nil {
			return nil, fmt.Errorf("console socket: %w", err)
		}
		s.tempDir, s.path = dir, filepath.Join(dir, "s")
	}
	listener, err := net.ListenUnix("unix", &net.UnixAddr{Name: s.path, Net: "unix"})
	if err != nil {
		if s.tempDir != "" {
			os.Remove(s.tempDir)
		}
		return nil, fmt.Errorf("console socket: %w", err)
	}
	s.listener = listener
	return s, nil
}

// receive takes the terminal. The runtime has returned by now, so what it sent lies in the socket's
// queue; the timeout is for a runtime that sent nothing.
func (s *consoleSocket) receive(timeout time.Duration) (*os.File, error) {
	deadline := time.Now().Add(timeout)
	if err := s.listener.SetDeadline(deadline); err != nil {
		return nil, err
	}
	conn, err := s.listener.AcceptUnix()
	if err != nil {
		return nil, fmt.Errorf("the runtime did not connect to the console socket: %w", err)
	}
	defer conn.Close()
	if err := conn.SetDeadline(deadline); err != nil {
		return nil, err
	}
	const maxDescriptors = 8 // one is expected; room to receive, and close, a few too many
	name, control := make([]byte, 4096), make([]byte, unix.CmsgSpace(4*maxDescriptors))
	_, n, _, _, err := conn.ReadMsgUnix(name, control) // sets MSG_CMSG_CLOEXEC
	if err != nil {
		return nil, fmt.Errorf("read console socket: %w", err)
	}
	fds, err := parseDescriptors(control[:n])
	if err == nil && len(fds) != 1 {
		err = fmt.Errorf("the runtime sent %d descriptors over the console socket, not one", len(fds))
	}
	if err != nil {
		for _, fd := range fds {
			unix.Close(fd)
		}
		return nil, err
	}
	// Before os.NewFile, which puts only non-blocking descriptors into Go's poller: a blocking one
	// pins a thread and cannot be interrupted by Close.
	if err := unix.SetNonblock(fds[0], true); err != nil {
		unix.Close(fds[0])
		return nil, fmt.Errorf("make terminal non-blocking: %w", err)
	}
	return os.NewFile(uintptr(fds[0]), "terminal"), nil
}

func parseDescriptors(control []byte) ([]int, error) {
	messages, err := unix.ParseSocketControlMessage(control)
	if err != nil {
		return nil, fmt.Errorf("console socket: %w", err)
	}
	var all []int
	for i := range messages {
		if fds, err := unix.ParseUnixRights(&messages[i]); err == nil {
			all = append(all, fds...)
		}
	}
	return all, nil
}

func (s *consoleSocket) close() {
	s.listener.Close() // which unlinks the path
	if s.tempDir != "" {
		os.Remove(s.tempDir)
	}
}

// terminal is the master side of a pseudo-terminal.
type terminal struct {
	file   *os.File
	exited <-chan struct{} // the process has ended
	closed chan struct{}
	once   sync.Once
}

func newTerminal(file *os.File, exited <-chan struct{}) *terminal {
	return &terminal{file: file, exited: exited, closed: make(chan struct{})}
}

// reopenPoll is how often a terminal that nobody holds open is looked at again. The kernel answers
// EIO, not "wait", so there is nothing to wait for.
const reopenPoll = 50 * time.Millisecond

// Read returns io.EOF when the process has ended and all its output was read. EIO alone says only
// that nobody has the terminal open at this moment; a living process can open /dev/tty again.
func (t *terminal) Read(p []byte) (int, error) {
	for {
		ended := false
		select {
		case <-t.exited:
			ended = true // seen before the read, so that nothing can come after its EIO
		default:
		}
		n, err := t.file.Read(p)
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
		case <-timer.C:
		}
		timer.Stop()
	}
}

// Close hangs up: the kernel sends SIGHUP to whoever has this as controlling terminal.
func (t *terminal) Close() error {
	t.once.Do(func() { close(t.closed) })
	return t.file.Close()
}

// SetReadDeadline makes reads fail with os.ErrDeadlineExceeded from then on, as of an *os.File: a
// terminal that a background child holds open never ends by itself (kubernetes#44371).
func (t *terminal) SetReadDeadline(deadline time.Time) error { return t.file.SetReadDeadline(deadline) }

// SyscallConn gives access to the descriptor, which stays in Go's poller.
func (t *terminal) SyscallConn() (syscall.RawConn, error) { return t.file.SyscallConn() }

func (t *terminal) control(f func(fd int) error) error {
	raw, err := t.file.SyscallConn() // not Fd(), which makes the descriptor blocking
	if err != nil {
		return err
	}
	var inner error
	if err := raw.Control(func(fd uintptr) { inner = f(int(fd)) }); err != nil {
		return err
	}
	return inner
}

func (t *terminal) resize(size workload.Size) error {
	err := t.control(func(fd int) error {
		return unix.IoctlSetWinsize(fd, unix.TIOCSWINSZ, &unix.Winsize{Row: size.Height, Col: size.Width})
	})
	if err != nil {
		return fmt.Errorf("resize terminal: %w", err)
	}
	return nil
}

// slave identifies the process's side, as TIOCGPTPEER finds it whatever the mount namespace.
func (t *terminal) slave() (streamEnds, error) {
	var stat unix.Stat_t
	err := t.control(func(fd int) error {
		// O_NOCTTY: this process may be a session leader and must not take the terminal for its own.
		peer, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), unix.TIOCGPTPEER, unix.O_RDONLY|unix.O_NOCTTY|unix.O_CLOEXEC)
		if errno != 0 {
			return errno
		}
		defer unix.Close(int(peer))
		return unix.Fstat(int(peer), &stat)
	})
	if err != nil {
		return streamEnds{}, err
	}
	return streamEnds{terminal: true, dev: uint64(stat.Dev), ino: stat.Ino}, nil
}

// terminalInput is the terminal as the process's stdin.
type terminalInput struct {
	*terminal
	mu       sync.Mutex
	midLine  bool
	finished bool
}

// Write passes what was typed. It blocks while the terminal's buffer is full.
func (t *terminalInput) Write(p []byte) (int, error) {
	n, err := t.file.Write(p)
	if n > 0 {
		t.mu.Lock()
		t.midLine = p[n-1] != '\n' && p[n-1] != '\r'
		t.mu.Unlock()
	}
	return n, err
}

// SetWriteDeadline makes writes fail with os.ErrDeadlineExceeded from then on, as of an *os.File.
func (t *terminalInput) SetWriteDeadline(deadline time.Time) error {
	return t.file.SetWriteDeadline(deadline)
}

const (
	// endOfFileTimeout bounds the wait for room in the terminal's buffer when its input ends.
	endOfFileTimeout = time.Second
	// The end of file is typed again after these times, for as long as there is somebody to read it.
	firstEndOfFileRepeat = 100 * time.Millisecond
	lastEndOfFileRepeat  = 25 * time.Second
)

// Close says "end of file" the way a user does, by typing the terminal's EOF character (^D), and
// leaves the terminal open for output (cri-tools#269: clients that send their input and close it
// lost the answer). After an unfinished line it takes two: the first only hands over the line.
//
// It is typed more than once, because a terminal forgets it: a shell that takes over line editing
// between the typing and its next read finds a NUL in its place. As with a pipe, the end then stays the end
// for whoever reads next. But only in canonical mode does the character mean the end of input, and does not reach
// who reads. Otherwise it is a key like any other, which to a shell's line editor means the same and to an editor
// of texts does not, so that each foreground process group gets it only once.
func (t *terminalInput) Close() error {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.finished {
		return nil
	}
	t.finished = true
	typing := endOfFile{terminal: t.terminal, told: map[int]bool{}}
	err := typing.typeOnce(t.midLine)
	if errors.Is(err, os.ErrClosed) || errors.Is(err, unix.EIO) {
		return nil // a process without a terminal needs no end of file
	}
	if err != nil {
		return fmt.Errorf("send end of file to the terminal: %w", err)
	}
	go typing.repeat() // ends with the terminal
	return nil
}

// endOfFile types the end of file.
type endOfFile struct {
	*terminal
	told map[int]bool // process groups that were in the foreground outside canonical mode
}

// repeat types the end of file for as long as there may be somebody to read it.
func (e *endOfFile) repeat() {
	for pause := firstEndOfFileRepeat; pause <= lastEndOfFileRepeat; pause *= 2 {
		timer := time.NewTimer(pause)
		select {
		case <-e.closed:
			timer.Stop()
			return
		case <-timer.C:
		}
		if e.typeOnce(false) != nil {
			return // the process has ended, or has not read what was typed before
		}
	}
}

// typeOnce types the end of file, unless it would be a key that the one who reads has had already.
func (e *endOfFile) typeOnce(midLine bool) error {
	typed := []byte{4}
	skip := false
	err := e.control(func(fd int) error {
		settings, err := unix.IoctlGetTermios(fd, unix.TCGETS)
		if err != nil {
			return err
		}
		typed[0] = settings.Cc[unix.VEOF]
		if settings.Lflag&unix.ICANON == 0 {
			group, err := unix.IoctlGetInt(fd, unix.TIOCGPGRP)
			if err != nil {
				group = 0 // nobody's: all are taken for one
			}
			skip = e.told[group]
			e.told[group] = true
		} else if midLine {
			typed = append(typed, typed[0])
		}
		return nil
	})
	if err != nil || skip {
		return err
	}
	if err := e.file.SetWriteDeadline(time.Now().Add(endOfFileTimeout)); err != nil {
		return err
	}
	_, err = e.file.Write(typed)
	return err
}
