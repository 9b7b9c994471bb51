package execproc

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/streamshim/streamshim/pkg/execproc/internal/stdio"
	"github.com/streamshim/streamshim/pkg/rescue"
	"github.com/streamshim/streamshim/pkg/workload"
)

// afterTimeout is how long RunSync waits, after the timeout, for the killed command to end.
const afterTimeout = 500 * time.Millisecond

// RunSync runs a command with empty stdin and no terminal, and returns when it has ended.
//
// Once the command itself has ended, RunSync waits for others that hold its output, such as a background child,
// only while output arrives, within Config.DrainIdle and Config.DrainMax. The exit code is the command's own
// (containerd#9568, kubernetes#44371). What such a child writes later meets a closed pipe.
//
// If Config.OutputRoom has no room for its output, the command is ended as at a timeout, and the error wraps
// ErrNoRoom.
//
// When the command times out or the context is done, the whole tree is killed and the error wraps ErrTimeout,
// within a second. The result then holds the output so far. All other errors are those of Start, including
// *StartError.
func (r *Runner) RunSync(ctx context.Context, c workload.Container, command workload.SyncCommand) (workload.Result, error) {
	var timedOut error
	if command.Timeout > 0 {
		timedOut = fmt.Errorf("%w after %v", ErrTimeout, command.Timeout)
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeoutCause(ctx, command.Timeout, timedOut)
		defer cancel()
	}
	if err := r.enter(ctx); errors.Is(err, ErrClosed) {
		return workload.Result{}, err
	} else if err != nil {
		return workload.Result{}, timeoutOf(ctx)
	}
	defer r.leaveCall()
	p, err := r.startInTurn(ctx, c, command)
	if err != nil {
		if ctx.Err() != nil && !errors.Is(err, ErrTimeout) {
			err = fmt.Errorf("%w: %w", ErrTimeout, err)
		}
		return workload.Result{}, err
	}
	defer func() {
		if value := recover(); value != nil { // the caller's to deal with, but the command is not to go on
			p.Kill()
			p.Close()
			panic(rescue.Caught(value))
		}
	}()
	output := stdio.Collect(p.Stdout(), p.Stderr(), r.config.OutputLimit, r.config.OutputRoom)
	defer output.Leave()
	exitCode, err := r.waitSync(ctx, p, output)
	p.Close() // ends the remaining collection of output
	<-output.Done
	if fault := output.Panic(); fault != nil {
		panic(fault)
	}
	return workload.Result{Stdout: output.Stdout, Stderr: output.Stderr, ExitCode: exitCode}, err
}

func (r *Runner) startInTurn(ctx context.Context, c workload.Container, command workload.SyncCommand) (*Process, error) {
	if r.config.SyncTurn != nil {
		end, err := r.config.SyncTurn(ctx, c)
		if err != nil {
			return nil, fmt.Errorf("wait to start command: %w", err)
		}
		defer end()
	}
	p, err := r.startCommand(ctx, c, workload.Command{Args: command.Args, Env: command.Env, Stdout: true, Stderr: true}, PolicyKill)
	if err == nil {
		p.probe.Store(true)
	}
	return p, err
}

// waitSync waits for the command to end and then, within limits, for its output to end.
func (r *Runner) waitSync(ctx context.Context, p *Process, output *stdio.Collector) (int, error) {
	select {
	case <-p.Exited():
	case <-ctx.Done():
		return 0, r.abandon(p, timeoutOf(ctx))
	case <-output.Full:
		return 0, r.abandon(p, ErrNoRoom)
	case <-r.ctx.Done():
		p.Kill()
		return 0, fmt.Errorf("run command: %w", ErrClosed)
	}
	if p.killed() { // by Shutdown; the resulting 137 is not the command's own
		return 0, fmt.Errorf("run command: %w", ErrClosed)
	}
	exited := time.Now()
	for {
		wait := time.Until(exited.Add(r.config.DrainMax))
		if idle := r.config.DrainIdle; idle > 0 {
			wait = min(wait, time.Until(output.LastData(exited).Add(idle)))
		}
		if wait <= 0 {
			return p.ExitCode(), nil
		}
		timer := time.NewTimer(wait)
		select {
		case <-timer.C:
			continue
		case <-output.Done:
		case <-ctx.Done(): // the command is done and its status is known: its children get none of the caller's time
		}
		timer.Stop()
		return p.ExitCode(), nil
	}
}

// abandon kills a command that must not go on, and returns the reason.
func (r *Runner) abandon(p *Process, reason error) error {
	p.Kill()
	timer := time.NewTimer(afterTimeout)
	defer timer.Stop()
	select {
	case <-p.ended:
	case <-timer.C: // the kill continues without us
	}
	return reason
}

// timeoutOf returns the error of a command whose context is done.
func timeoutOf(ctx context.Context) error {
	cause := context.Cause(ctx)
	if errors.Is(cause, ErrTimeout) {
		return cause
	}
	return fmt.Errorf("%w: %w", ErrTimeout, cause)
}
