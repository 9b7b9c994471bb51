package execproc

import (
	"errors"
	"fmt"
	"os"
	"strconv"

	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/streamshim/streamshim/pkg/workload"
)

// pipeSize is what our pipes are enlarged to, from the kernel's 64 KiB, so that one read can move
// much. The kernel may refuse (fs.pipe-max-size, fs.pipe-user-pages-soft); then they stay small.
const pipeSize = 1 << 20

// stdio is the two sides of a process's standard streams without a terminal.
type stdio struct {
	stdin, stdout, stderr *os.File    // ours, non-blocking and in Go's poller; nil when not wanted
	process               [3]*os.File // the process's, blocking as programs expect them
	ends                  streamEnds
}

// owner is the host's uid and gid of a process's user.
type owner struct{ uid, gid int }

func processOwner(c workload.Container, user specs.User) (owner, error) {
	uid, err := hostID(user.UID, c.UIDMappings)
	if err != nil {
		return owner{}, fmt.Errorf("user of the process: %w", err)
	}
	gid, err := hostID(user.GID, c.GIDMappings)
	if err != nil {
		return owner{}, fmt.Errorf("group of the process: %w", err)
	}
	return owner{uid, gid}, nil
}

// newStdio makes a pipe for each stream that is wanted; the others are /dev/null.
func newStdio(command workload.Command, owner owner) (_ *stdio, err error) {
	s := &stdio{ends: streamEnds{pipes: map[string]bool{}}}
	defer func() {
		if err != nil {
			s.closeProcessEnds()
			s.closeOurs()
		}
	}()
	open := func(index int, wanted, input bool, ours **os.File) error {
		if !wanted {
			null, err := os.OpenFile(os.DevNull, os.O_RDWR, 0)
			s.process[index] = null
			return err
		}
		read, write, err := pipe()
		if err != nil {
			return err
		}
		our, their := read, write
		if input {
			our, their = write, read
		}
		s.process[index] = os.NewFile(uintptr(their), "pipe")
		if err := unix.SetNonblock(our, true); err != nil {
			unix.Close(our)
			return fmt.Errorf("make pipe non-blocking: %w", err)
		}
		*ours = os.NewFile(uintptr(our), "pipe")
		return s.prepare(their, owner)
	}
	if err := open(0, command.Stdin, true, &s.stdin); err != nil {
		return nil, fmt.Errorf("stdin: %w", err)
	}
	if err := open(1, command.Stdout, false, &s.stdout); err != nil {
		return nil, fmt.Errorf("stdout: %w", err)
	}
	if err := open(2, command.Stderr, false, &s.stderr); err != nil {
		return nil, fmt.Errorf("stderr: %w", err)
	}
	return s, nil
}

// prepare gives a pipe its size and its owner. Reopening /dev/stdin asks for permission on the pipe's
// inode, which both ends share, so it must belong to the container's user (containerd#10598,
// cri-o#5391); the runtime cannot do that across a user namespace.
func (s *stdio) prepare(fd int, owner owner) error {
	_, _ = unix.FcntlInt(uintptr(fd), unix.F_SETPIPE_SZ, pipeSize)
	if owner.uid != 0 || owner.gid != 0 {
		if err := unix.Fchown(fd, owner.uid, owner.gid); err != nil {
			return fmt.Errorf("give pipe to the container's user: %w", err)
		}
	}
	var stat unix.Stat_t
	if err := unix.Fstat(fd, &stat); err != nil {
		return fmt.Errorf("stat pipe: %w", err)
	}
	s.ends.pipes["pipe:["+strconv.FormatUint(stat.Ino, 10)+"]"] = true
	return nil
}

func pipe() (read, write int, err error) {
	var fds [2]int
	if err := unix.Pipe2(fds[:], unix.O_CLOEXEC); err != nil {
		return -1, -1, fmt.Errorf("pipe: %w", err)
	}
	return fds[0], fds[1], nil
}

// closeProcessEnds must be called once the process has inherited them: our reads end only when
// nobody holds the other side.
func (s *stdio) closeProcessEnds() {
	for _, file := range s.process {
		if file != nil {
			file.Close()
		}
	}
}

func (s *stdio) closeOurs() {
	for _, file := range []*os.File{s.stdin, s.stdout, s.stderr} {
		if file != nil {
			file.Close()
		}
	}
}

// readPending returns what lies in a non-blocking pipe, without waiting and at most limit bytes.
func readPending(file *os.File, limit int) string {
	raw, err := file.SyscallConn()
	if err != nil {
		return ""
	}
	buffer := make([]byte, limit)
	n := 0
	_ = raw.Read(func(fd uintptr) bool {
		n, err = unix.Read(int(fd), buffer)
		return true
	})
	if err != nil && !errors.Is(err, unix.EAGAIN) {
		return ""
	}
	return string(buffer[:max(n, 0)])
}
