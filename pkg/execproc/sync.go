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

// Room bounds what several RunSyncs keep of their commands' output.
type Room interface {
	// Take takes n bytes, all or none, and reports whether there was room.
	Take(n int) bool
	// Return gives n bytes back.
	Return(n int)
}

// ownOutput is how many bytes of output each RunSync keeps whether there is room or not. It is more than a
// probe's output, of which the kubelet reads 10 KiB.
const ownOutput = 64 << 10

// afterTimeout is how long RunSync goes on after the timeout to see the killed command's end.
const afterTimeout = 500 * time.Millisecond

// RunSync runs a command with empty stdin and no terminal, and returns when it has ended.
//
// Once the command itself has ended, whoever else holds its output (a background child) is waited
// for only as long as output comes, Config.DrainIdle and Config.DrainMax; the exit code is the
// command's own (containerd#9568, kubernetes#44371). What such a child writes later meets a closed
// pipe.
//
// When there is no Config.OutputRoom for its output, the command is ended as at its timeout, and the error wraps
// ErrNoRoom.
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
	p, err := r.startInTurn(ctx, c, command)
	if err != nil {
		if ctx.Err() != nil && !errors.Is(err, ErrTimeout) {
			err = fmt.Errorf("%w: %w", ErrTimeout, err)
		}
		return workload.Result{}, err
	}
	output := collect(p, r.config.OutputLimit, r.config.OutputRoom)
	defer output.leave()
	exitCode, err := r.waitSync(ctx, p, output)
	p.Close() // ends what is left of the collecting
	<-output.done
	result := workload.Result{Stdout: output.stdout, Stderr: output.stderr, ExitCode: exitCode}
	if err != nil {
		result.ExitCode = 0
	}
	return result, err
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

// waitSync waits for the command's end and then, within limits, for the end of its output.
func (r *Runner) waitSync(ctx context.Context, p *Process, output *collector) (int, error) {
	select {
	case <-p.Exited():
	case <-ctx.Done():
		return 0, r.abandon(p, timeoutOf(ctx))
	case <-output.full:
		return 0, r.abandon(p, ErrNoRoom)
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

// abandon kills a command that may not go on, and returns the reason.
func (r *Runner) abandon(p *Process, reason error) error {
	p.Kill()
	timer := time.NewTimer(afterTimeout)
	defer timer.Stop()
	select {
	case <-p.ended:
	case <-timer.C: // the killing goes on without us
	}
	return reason
}

// timeoutOf is the error of a command whose context is done.
func timeoutOf(ctx context.Context) error {
	cause := context.Cause(ctx)
	if errors.Is(cause, ErrTimeout) {
		return cause
	}
	return fmt.Errorf("%w: %w", ErrTimeout, cause)
}

// collector gathers a process's output up to a limit and drops the rest.
type collector struct {
	done chan struct{} // closed when both streams have ended
	full chan struct{} // closed when there was no room with the others

	mu             sync.Mutex
	left           int // of the limit
	own            int // of ownOutput
	shared         Room
	taken          int // of shared
	refused        bool
	stdout, stderr []byte // to be read once done is closed
	last           time.Time
}

func collect(p *Process, limit int, shared Room) *collector {
	c := &collector{done: make(chan struct{}), full: make(chan struct{}), left: limit, own: ownOutput, shared: shared}
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
	if data = data[:min(len(data), c.left)]; !c.takeLocked(len(data)) {
		return
	}
	c.left -= len(data)
	*to = append(*to, data...)
}

// takeLocked takes room for n bytes. Once there was none, nothing more is kept, so that what is kept has no gap.
func (c *collector) takeLocked(n int) bool {
	own := min(n, c.own)
	if n > own && c.shared != nil && !c.refused {
		if c.refused = !c.shared.Take(n - own); c.refused {
			close(c.full)
		} else {
			c.taken += n - own
		}
	}
	c.own -= own
	return !c.refused
}

// leave returns what was taken. The output is the caller's from now on.
func (c *collector) leave() {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.taken > 0 {
		c.shared.Return(c.taken)
		c.taken = 0
	}
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
