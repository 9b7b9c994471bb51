package execproc

import (
	"context"
	"errors"
	"fmt"
	"io"
	"sync"
	"time"

	"github.com/streamshim/streamshim/pkg/workload"
)

// afterTimeout is how long RunSync goes on after the timeout to see the killed command's end.
const afterTimeout = 500 * time.Millisecond

// RunSync runs a command with empty stdin and no terminal, and returns when it has ended.
//
// Once the command itself has ended, whoever else holds its output (a background child) is waited
// for only as long as output comes, Config.DrainIdle and Config.DrainMax; the exit code is the
// command's own (containerd#9568, kubernetes#44371). What such a child writes later meets a closed
// pipe.
//
// When the timeout is over or the context is done the whole tree is killed and the error wraps
// ErrTimeout, within a second; the result then holds the output so far. Otherwise errors are as for
// Start, among them *StartError.
func (r *Runner) RunSync(ctx context.Context, c workload.Container, command workload.SyncCommand) (workload.Result, error) {
	if !r.enter() {
		return workload.Result{}, ErrClosed
	}
	defer r.leave()
	var timedOut error
	if command.Timeout > 0 {
		timedOut = fmt.Errorf("%w after %v", ErrTimeout, command.Timeout)
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeoutCause(ctx, command.Timeout, timedOut)
		defer cancel()
	}
	p, err := r.startCommand(ctx, c, workload.Command{Args: command.Args, Env: command.Env, Stdout: true, Stderr: true}, PolicyKill)
	if err != nil {
		if ctx.Err() != nil && !errors.Is(err, ErrTimeout) {
			err = fmt.Errorf("%w: %w", ErrTimeout, err)
		}
		return workload.Result{}, err
	}
	output := collect(p, r.config.OutputLimit)
	exitCode, err := r.waitSync(ctx, p, output)
	p.Close() // ends what is left of the collecting
	<-output.done
	result := workload.Result{Stdout: output.stdout, Stderr: output.stderr, ExitCode: exitCode}
	if err != nil {
		result.ExitCode = 0
	}
	return result, err
}

// waitSync waits for the command's end and then, within limits, for the end of its output.
func (r *Runner) waitSync(ctx context.Context, p *Process, output *collector) (int, error) {
	select {
	case <-p.Exited():
	case <-ctx.Done():
		return 0, r.abandon(ctx, p)
	case <-r.ctx.Done():
		p.Kill()
		return 0, fmt.Errorf("run command: %w", ErrClosed)
	}
	select {
	case <-p.killNow: // by Shutdown; its 137 is not the command's doing
		return 0, fmt.Errorf("run command: %w", ErrClosed)
	default:
	}
	exited := time.Now()
	for {
		wait := time.Until(exited.Add(r.config.DrainMax))
		if idle := r.config.DrainIdle; idle > 0 {
			wait = min(wait, time.Until(output.lastData(exited).Add(idle)))
		}
		if wait <= 0 {
			return p.ExitCode(), nil
		}
		timer := time.NewTimer(wait)
		select {
		case <-output.done:
			timer.Stop()
			return p.ExitCode(), nil
		case <-ctx.Done():
			timer.Stop()
			// The command is done and its status known. The children are its own affair, the caller's
			// time is not.
			return p.ExitCode(), nil
		case <-timer.C:
		}
	}
}

// abandon kills a command whose time is up.
func (r *Runner) abandon(ctx context.Context, p *Process) error {
	p.Kill()
	timer := time.NewTimer(afterTimeout)
	defer timer.Stop()
	select {
	case <-p.ended:
	case <-timer.C: // the killing goes on without us
	}
	cause := context.Cause(ctx)
	if errors.Is(cause, ErrTimeout) {
		return cause
	}
	return fmt.Errorf("%w: %w", ErrTimeout, cause)
}

// collector gathers a process's output up to a limit and drops the rest.
type collector struct {
	done chan struct{} // closed when both streams have ended

	mu             sync.Mutex
	room           int
	stdout, stderr []byte // to be read once done is closed
	last           time.Time
}

func collect(p *Process, limit int) *collector {
	c := &collector{done: make(chan struct{}), room: limit}
	var streams sync.WaitGroup
	read := func(from io.Reader, to *[]byte) {
		buffer := make([]byte, 32<<10)
		for {
			n, err := from.Read(buffer)
			c.add(to, buffer[:n])
			if err != nil {
				return
			}
		}
	}
	streams.Go(func() { read(p.Stderr(), &c.stderr) })
	go func() {
		defer close(c.done)
		read(p.Stdout(), &c.stdout)
		streams.Wait()
	}()
	return c
}

func (c *collector) add(to *[]byte, data []byte) {
	if len(data) == 0 {
		return
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.last = time.Now()
	data = data[:min(len(data), c.room)]
	c.room -= len(data)
	*to = append(*to, data...)
}

// lastData is when output came last, but not before the given time.
func (c *collector) lastData(notBefore time.Time) time.Time {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.last.Before(notBefore) {
		return notBefore
	}
	return c.last
}
