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

// passedProgram is the path, inside the container, of the one file that a runtime passes on: the first descriptor
// after the standard ones. The runtime looks commands up in the container, so this is the only way to name a file
// that is not in it.
const passedProgram = "/proc/self/fd/3" //nolint:gosec // no credential

// startStandIn starts this program in the container in place of a command that failed because the container lacks
// it, if Config.StandIn agrees. Otherwise it returns the error of that start.
//
// The same runtime starts it, with the command's spec except for the arguments. The program runs from a sealed
// memfd of its own: what the container does to it, or to its mode, affects no other command. The host's file never
// enters the container, where /proc/PID/exe would lead to it (CVE-2019-5736). A container whose processes may
// mount can put something else in passedProgram's place; what then runs is a file of the container, as the command
// would have been.
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
	defer program.Close() //nolint:errcheck // the process has its own descriptor by now
	command.Args = slices.Concat([]string{passedProgram}, args)
	p, err := r.start(ctx, c, command, r.config.OnDisconnect,
		func(ctx context.Context, c workload.Container, spec *specs.Process, f ociruntime.Files, streams [3]*os.File, stderr *os.File) (int, error) {
			return ociruntime.ExecPassing(ctx, c, spec, f, streams, stderr, program)
		})
	if err != nil {
		r.log.Warn("a helper did not start", "helper", name, "container", c.ContainerID, "error", err)
		if errors.As(err, new(*ociruntime.StartError)) { // such as in a container without /proc
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
