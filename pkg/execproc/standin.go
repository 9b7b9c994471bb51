package execproc

import (
	"context"
	"errors"
	"os"
	"slices"

	"github.com/opencontainers/runtime-spec/specs-go"

	"github.com/streamshim/streamshim/pkg/execproc/internal/ociruntime"
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
	var start *ociruntime.StartError
	if !errors.As(failed, &start) || !start.Missing {
		return nil, failed
	}
	name, args, ok := r.config.StandIn(command.Args)
	if !ok {
		return nil, failed
	}
	program, err := ociruntime.SealedSelf()
	if err != nil {
		r.log.Warn("a helper could not be prepared", "helper", name, "error", err)
		return nil, failed
	}
	defer program.Close() //nolint:errcheck // the process has its own by now
	command.Args = slices.Concat([]string{passedProgram}, args)
	p, err := r.start(ctx, c, command, r.config.OnDisconnect,
		func(ctx context.Context, c workload.Container, spec *specs.Process, f ociruntime.Files, streams [3]*os.File, stderr *os.File) (int, error) {
			return ociruntime.ExecPassing(ctx, c, spec, f, streams, stderr, program)
		})
	if err != nil {
		r.log.Warn("a helper did not start", "helper", name, "container", c.ContainerID, "error", err)
		if errors.As(err, new(*ociruntime.StartError)) { // such as a container without /proc
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
