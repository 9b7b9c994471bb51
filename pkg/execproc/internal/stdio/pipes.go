// Package stdio provides a process's standard streams: pipes or a terminal, the collection of their output, and
// their hand-over.
package stdio

import (
	"errors"
	"fmt"
	"math"
	"os"
	"strconv"
	"syscall"

	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/streamshim/streamshim/pkg/execproc/internal/tree"
	"github.com/streamshim/streamshim/pkg/workload"
)

// pipeSize replaces the kernel's default of 64 KiB, so that one read can move more. The kernel may refuse it
// (fs.pipe-max-size, fs.pipe-user-pages-soft); the pipes then stay small.
const pipeSize = 1 << 20

// Pipes holds both sides of a process's standard streams without a terminal.
type Pipes struct {
	Stdin, Stdout, Stderr *os.File    // our ends, non-blocking and in Go's poller; nil if not wanted
	Process               [3]*os.File // the process's ends, blocking as programs expect
	Ends                  tree.StreamEnds
}

// Owner is the uid and gid on the host of a process's user.
type Owner struct{ uid, gid int }

// ProcessOwner maps a process's user to the host's ids.
func ProcessOwner(c workload.Container, user specs.User) (Owner, error) {
	uid, err := hostID(user.UID, c.UIDMappings)
	if err != nil {
		return Owner{}, fmt.Errorf("user of the process: %w", err)
	}
	gid, err := hostID(user.GID, c.GIDMappings)
	if err != nil {
		return Owner{}, fmt.Errorf("group of the process: %w", err)
	}
	return Owner{uid, gid}, nil
}

// NewPipes makes a pipe for each wanted stream. The others are /dev/null.
func NewPipes(command workload.Command, owner Owner) (_ *Pipes, err error) {
	s := &Pipes{Ends: tree.StreamEnds{Pipes: map[string]bool{}}}
	defer func() {
		if err != nil {
			s.CloseProcessEnds()
			s.CloseOurs()
		}
	}()
	open := func(index int, wanted, input bool, ours **os.File) error {
		if !wanted {
			null, err := os.OpenFile(os.DevNull, os.O_RDWR, 0)
			s.Process[index] = null
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
		s.Process[index] = os.NewFile(uintptr(their), "pipe")
		if err := unix.SetNonblock(our, true); err != nil {
			unix.Close(our)
			return fmt.Errorf("make pipe non-blocking: %w", err)
		}
		*ours = os.NewFile(uintptr(our), "pipe")
		return s.prepare(their, owner)
	}
	if err := open(0, command.Stdin, true, &s.Stdin); err != nil {
		return nil, fmt.Errorf("stdin: %w", err)
	}
	if err := open(1, command.Stdout, false, &s.Stdout); err != nil {
		return nil, fmt.Errorf("stdout: %w", err)
	}
	if err := open(2, command.Stderr, false, &s.Stderr); err != nil {
		return nil, fmt.Errorf("stderr: %w", err)
	}
	return s, nil
}

// prepare sets a pipe's size and owner. Reopening /dev/stdin checks permissions on the pipe's inode, which both
// ends share, so it must belong to the container's user (containerd#10598, cri-o#5391). The runtime cannot do that
// across a user namespace.
func (s *Pipes) prepare(fd int, owner Owner) error {
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
	s.Ends.Pipes["pipe:["+strconv.FormatUint(stat.Ino, 10)+"]"] = true
	return nil
}

func pipe() (read, write int, err error) {
	var fds [2]int
	if err := unix.Pipe2(fds[:], unix.O_CLOEXEC); err != nil {
		return -1, -1, fmt.Errorf("pipe: %w", err)
	}
	return fds[0], fds[1], nil
}

// CloseProcessEnds must be called once the process has inherited its ends: our reads end only when nobody holds
// the other side.
func (s *Pipes) CloseProcessEnds() {
	for _, file := range s.Process {
		if file != nil {
			file.Close()
		}
	}
}

// CloseOurs closes our ends.
func (s *Pipes) CloseOurs() {
	for _, file := range []*os.File{s.Stdin, s.Stdout, s.Stderr} {
		if file != nil {
			file.Close()
		}
	}
}

// ReadPending returns what a non-blocking pipe holds, at most limit bytes. It does not wait.
func ReadPending(file *os.File, limit int) string {
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

// hostID maps an id inside the container's user namespace to the host's.
func hostID(id uint32, mappings []specs.LinuxIDMapping) (int, error) {
	if len(mappings) == 0 {
		return int(id), nil
	}
	for _, m := range mappings {
		if id >= m.ContainerID && uint64(id) < uint64(m.ContainerID)+uint64(m.Size) {
			host := uint64(m.HostID) + uint64(id-m.ContainerID)
			if host >= math.MaxUint32 {
				break
			}
			return int(host), nil
		}
	}
	return 0, fmt.Errorf("ID %d is not mapped into the container's user namespace", id)
}

// Duplicate returns a file with a duplicate of from's descriptor.
func Duplicate(from syscall.Conn) (*os.File, error) {
	raw, err := from.SyscallConn()
	if err != nil {
		return nil, err
	}
	copied := -1
	ctlErr := raw.Control(func(fd uintptr) {
		copied, err = unix.FcntlInt(fd, unix.F_DUPFD_CLOEXEC, 0)
	})
	if ctlErr != nil {
		return nil, ctlErr
	}
	if err != nil {
		return nil, err
	}
	return os.NewFile(uintptr(copied), "kept "+strconv.Itoa(copied)), nil
}
