package enter

import (
	"bytes"
	"context"
	"embed"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// The source stands beside the program, so that there is something to embed also where it was not
// compiled.
//
//go:embed program
var embedded embed.FS

var (
	// ErrNotBuilt says that this binary was built without the program.
	ErrNotBuilt = errors.New("streamshim was built without its program enter (make build compiles it)")
	// ErrNotStarted is in the error of a Run after which nothing of the command has run.
	ErrNotStarted = errors.New("the command was not started")
)

// Name is how the kernel calls a process that is about to become the command (/proc/PID/comm). One
// that has ended under this name never did.
const Name = "enter:[2:INIT]"

// lowestProgram is above all descriptors of the program, CGROUP_FD in program/enter.c.
const lowestProgram = 16

// Program is the program, ready to be run any number of times, from any number of goroutines. Close
// releases it once no Run is under way.
type Program struct{ file *os.File }

// Load puts the program into a sealed memfd: there is no file that somebody could replace, and what is
// executed in a container cannot be written to from there (CVE-2019-5736). The error is ErrNotBuilt,
// or the kernel's.
func Load() (*Program, error) {
	binary, err := embedded.ReadFile("program/enter")
	if err != nil {
		return nil, ErrNotBuilt
	}
	fd, err := unix.MemfdCreate("streamshim-enter", unix.MFD_CLOEXEC|unix.MFD_ALLOW_SEALING|unix.MFD_EXEC)
	if errors.Is(err, unix.EINVAL) { // before Linux 6.3, when all of them were executable
		fd, err = unix.MemfdCreate("streamshim-enter", unix.MFD_CLOEXEC|unix.MFD_ALLOW_SEALING)
	}
	if err != nil {
		return nil, fmt.Errorf("memfd_create: %w", err)
	}
	// Out of the way of the descriptors that Run gives to the program, which are put in their places
	// before this one is executed.
	high, err := unix.FcntlInt(uintptr(fd), unix.F_DUPFD_CLOEXEC, lowestProgram)
	unix.Close(fd)
	if err != nil {
		return nil, fmt.Errorf("duplicate memfd: %w", err)
	}
	file := os.NewFile(uintptr(high), "streamshim-enter")
	if _, err := file.Write(binary); err != nil {
		file.Close()
		return nil, fmt.Errorf("write program into memfd: %w", err)
	}
	seals := unix.F_SEAL_SEAL | unix.F_SEAL_SHRINK | unix.F_SEAL_GROW | unix.F_SEAL_WRITE
	if _, err := unix.FcntlInt(file.Fd(), unix.F_ADD_SEALS, seals); err != nil {
		file.Close()
		return nil, fmt.Errorf("seal program: %w", err)
	}
	return &Program{file}, nil
}

// File is the program itself, for a process that is to execute it as a command. It belongs to p.
func (p *Program) File() *os.File { return p.file }

// Close releases the program.
func (p *Program) Close() error { return p.file.Close() }

// Options is what a Run has besides the request.
type Options struct {
	// Container is a pidfd of a process in the container, whose namespaces are joined.
	Container int
	// Streams are the command's standard streams, none of them nil.
	Streams [3]*os.File
	// Cgroup, if not nil, is the directory of the version 2 cgroup in which the command begins.
	Cgroup *os.File
	// Execute, if not nil, is executed in place of the first argument.
	Execute *os.File
	// Cancel ends what has been started when the context is done; it is given the pid of the program,
	// which is in a session of its own, and returns when nothing of it runs.
	Cancel func(pid int)
}

// Run starts the command and returns its pid. It then is a child of this process, which must reap it;
// until Run returns it may have ended already.
//
// When the context is done Options.Cancel is called and the error is the context's cause. An error that
// wraps ErrNotStarted says that nothing of the command has run or will run, but there may be a zombie
// of its process. With any other error the pid, if it is not 0, is that of a process that must be killed.
func (p *Program) Run(ctx context.Context, request *Request, o Options) (int, error) {
	encoded, err := request.encode(o.Execute != nil, o.Cgroup != nil)
	if err != nil {
		return 0, fmt.Errorf("%w: %w", ErrNotStarted, err)
	}
	message, err := memoryFile("streamshim-request", encoded)
	if err != nil {
		return 0, fmt.Errorf("%w: %w", ErrNotStarted, err)
	}
	defer message.Close()
	result, resultEnd, err := os.Pipe()
	if err != nil {
		return 0, fmt.Errorf("%w: pipe: %w", ErrNotStarted, err)
	}
	defer result.Close()
	container, err := duplicate(o.Container)
	if err != nil {
		resultEnd.Close()
		return 0, fmt.Errorf("%w: pidfd: %w", ErrNotStarted, err)
	}
	defer container.Close()

	command := exec.CommandContext(ctx, "/proc/self/fd/"+strconv.Itoa(int(p.file.Fd())))
	command.Args = []string{"streamshim-enter"}
	command.Env = []string{}
	command.Dir = "/"
	command.Stdin, command.Stdout, command.Stderr = o.Streams[0], o.Streams[1], o.Streams[2]
	command.ExtraFiles = []*os.File{message, resultEnd, container, o.Execute, o.Cgroup}
	command.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	command.Cancel = func() error {
		o.Cancel(command.Process.Pid)
		result.SetReadDeadline(time.Unix(1, 0)) //nolint:errcheck // a pipe of ours has deadlines
		return nil
	}
	err = command.Start()
	resultEnd.Close()
	if err != nil {
		return 0, fmt.Errorf("%w: run enter: %w", ErrNotStarted, err)
	}
	// The end of the pipe is the command's execve, which closes the last descriptor of it.
	records, readErr := io.ReadAll(io.LimitReader(result, maxRecords*recordSize))
	waitErr := command.Wait()
	pid, failed := parseRecords(records)
	switch {
	case ctx.Err() != nil:
		return pid, context.Cause(ctx)
	case failed != nil:
		return 0, fmt.Errorf("%w: %w", ErrNotStarted, failed)
	case readErr != nil:
		return pid, fmt.Errorf("read result of enter: %w", readErr)
	case pid == 0:
		return 0, fmt.Errorf("%w: enter ended without a word (%w)", ErrNotStarted, errors.Join(waitErr, errNoRecord))
	}
	if became, err := becameCommand(pid); !became {
		return pid, err
	}
	return pid, nil
}

// becomeTimeout bounds the wait for a process whose descriptors are closed to have a new name or to be
// gone, which are microseconds.
const becomeTimeout = 5 * time.Second

// becameCommand tells a process that has become the command from one that was killed just before: both
// have closed the result pipe.
func becameCommand(pid int) (bool, error) {
	deadline := time.Now().Add(becomeTimeout)
	for pause := 10 * time.Microsecond; ; pause = min(2*pause, 10*time.Millisecond) {
		stat, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/stat")
		if err != nil {
			return false, fmt.Errorf("look at the command: %w", err)
		}
		open, end := bytes.IndexByte(stat, '('), bytes.LastIndexByte(stat, ')')
		if open < 0 || end < open || len(stat) < end+3 {
			return false, fmt.Errorf("process %d: not what proc_pid_stat(5) says: %q", pid, stat)
		}
		if string(stat[open+1:end]) != Name {
			return true, nil
		}
		if state := stat[end+2]; state == 'Z' || state == 'X' {
			return false, fmt.Errorf("%w: it was killed on its way", ErrNotStarted)
		}
		if time.Now().After(deadline) {
			return false, fmt.Errorf("process %d neither became the command nor ended", pid)
		}
		time.Sleep(pause) // nothing announces an execve
	}
}

var errNoRecord = errors.New("no process id")

// The records of the program's answer: struct record in program/enter.c.
const (
	recordSize    = 32
	maxRecords    = 4 // two at most come
	recordStarted = 1
	recordFailed  = 2
)

// parseRecords returns the command's pid, 0 when it is not told, and why it was not started, nil if
// nothing is said of that.
func parseRecords(b []byte) (pid int, failed error) {
	for ; len(b) >= recordSize; b = b[recordSize:] {
		value := int32(binary.NativeEndian.Uint32(b[4:]))
		switch kind := binary.NativeEndian.Uint32(b); kind {
		case recordStarted:
			pid = int(value)
		case recordFailed:
			step, _, _ := strings.Cut(string(b[8:recordSize]), "\x00")
			failed = &StepError{Step: step, Errno: syscall.Errno(value)}
		default:
			failed = fmt.Errorf("enter says %d, which means nothing", kind)
		}
	}
	return pid, failed
}

// StepError is a step of the program that failed.
type StepError struct {
	Step  string
	Errno syscall.Errno
}

func (e *StepError) Error() string { return e.Step + ": " + e.Errno.Error() }

// OfCommand reports whether the step failed because of the command that was to be executed.
func (e *StepError) OfCommand() bool {
	return e.Step == "search command" || e.Step == "execute command" || e.Step == "change directory"
}

// Unwrap returns the error number.
func (e *StepError) Unwrap() error { return e.Errno }

// memoryFile is a file without a place, read from its beginning.
func memoryFile(name string, content []byte) (*os.File, error) {
	fd, err := unix.MemfdCreate(name, unix.MFD_CLOEXEC|unix.MFD_NOEXEC_SEAL)
	if errors.Is(err, unix.EINVAL) { // before Linux 6.3
		fd, err = unix.MemfdCreate(name, unix.MFD_CLOEXEC)
	}
	if err != nil {
		return nil, fmt.Errorf("memfd_create: %w", err)
	}
	file := os.NewFile(uintptr(fd), name)
	if _, err := file.Write(content); err != nil {
		file.Close()
		return nil, fmt.Errorf("write memfd: %w", err)
	}
	return file, nil
}

func duplicate(fd int) (*os.File, error) {
	copied, err := unix.FcntlInt(uintptr(fd), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	return os.NewFile(uintptr(copied), "pidfd"), nil
}
