package execproc

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"

	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/streamshim/streamshim/pkg/workload"
)

// passedProgram is the path, in the process, of the one file that a runtime passes on: the first descriptor
// behind the standard ones. The runtime looks a command up in the container, and has no other word for a file that is not in it.
const passedProgram = "/proc/self/fd/3" //nolint:gosec // no credential

// startStandIn starts this program in the container instead of a command that failed to start because the container
// does not have it, where Config.StandIn says so. The error is otherwise the one of that start.
//
// The process gets what the command would have got: its spec differs in the arguments alone, and the same runtime
// starts it. The program comes from a memfd of its own that is sealed. What the container does to it, or to its mode,
// concerns no other command; and the file on the host is never in the container, where /proc/PID/exe would lead to
// it (CVE-2019-5736). A container whose processes may mount can have something else in passedProgram's place: what
// then runs is a file of the container, as the command would have been.
func (r *Runner) startStandIn(ctx context.Context, c workload.Container, command workload.Command, failed error) (*Process, error) {
	var start *StartError
	if !errors.As(failed, &start) || !start.missing {
		return nil, failed
	}
	name, args, ok := r.config.StandIn(command.Args)
	if !ok {
		return nil, failed
	}
	program, err := sealedSelf()
	if err != nil {
		r.log.Warn("a helper could not be prepared", "helper", name, "error", err)
		return nil, failed
	}
	defer program.Close() //nolint:errcheck // the process has its own by now
	command.Args = slices.Concat([]string{passedProgram}, args)
	p, err := r.start(ctx, c, command, r.config.OnDisconnect,
		func(ctx context.Context, c workload.Container, spec *specs.Process, f files, streams [3]*os.File, stderr *os.File) (int, error) {
			return execPassing(ctx, c, spec, f, streams, stderr, program)
		})
	if err != nil {
		r.log.Warn("a helper did not start", "helper", name, "container", c.ContainerID, "error", err)
		if errors.As(err, new(*StartError)) { // such as a container without /proc
			return nil, failed
		}
		return nil, err
	}
	p.standIn = name
	if r.config.OnStart != nil {
		r.config.OnStart()
	}
	return p, nil
}

// sealedSelf is a copy in memory of the program that runs, that nobody can change.
func sealedSelf() (_ *os.File, err error) {
	self, err := os.Open("/proc/self/exe") // also when the package has been upgraded since
	if err != nil {
		return nil, err
	}
	defer self.Close() //nolint:errcheck // only read
	const name = "streamshim-helper"
	fd, err := unix.MemfdCreate(name, unix.MFD_CLOEXEC|unix.MFD_ALLOW_SEALING|unix.MFD_EXEC)
	if errors.Is(err, unix.EINVAL) { // MFD_EXEC came with Linux 6.3; before, every memfd may be executed
		fd, err = unix.MemfdCreate(name, unix.MFD_CLOEXEC|unix.MFD_ALLOW_SEALING)
	}
	if err != nil {
		return nil, fmt.Errorf("memfd_create: %w", err)
	}
	file := os.NewFile(uintptr(fd), name)
	defer func() {
		if err != nil {
			file.Close() //nolint:errcheck // of no use
		}
	}()
	if _, err := io.Copy(file, self); err != nil {
		return nil, fmt.Errorf("copy the program: %w", err)
	}
	if err := file.Chmod(0o555); err != nil { // for every user of the container
		return nil, err
	}
	const seals = unix.F_SEAL_SEAL | unix.F_SEAL_SHRINK | unix.F_SEAL_GROW | unix.F_SEAL_WRITE
	const sealExec = 0x20 // F_SEAL_EXEC, since Linux 6.3: keeps the execute bits as they are
	if _, err := unix.FcntlInt(file.Fd(), unix.F_ADD_SEALS, seals|sealExec); err != nil {
		if _, err := unix.FcntlInt(file.Fd(), unix.F_ADD_SEALS, seals); err != nil {
			return nil, fmt.Errorf("seal the program: %w", err)
		}
	}
	return file, nil
}
