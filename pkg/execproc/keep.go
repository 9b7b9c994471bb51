package execproc

import (
	"os"

	"github.com/streamshim/streamshim/pkg/execproc/internal/stdio"
)

// keepOn keeps reading the process's output, until the process or the Runner ends, so that the process neither
// blocks nor meets a closed pipe. It uses duplicate descriptors because the caller will close its own.
func (p *Process) keepOn() {
	p.mu.Lock()
	was := p.isKept
	p.isKept = true
	p.mu.Unlock()
	if was {
		return
	}
	if p.tty != nil {
		if file, err := stdio.Duplicate(p.tty); err == nil {
			p.keepStream(stdio.NewKept(stdio.NewTerminal(file, p.watch.Exited), false, false))
		} else {
			p.runner.log.Warn("cannot keep a terminal open for a process whose client has gone", "pid", p.leader.Pid, "error", err)
		}
	}
	if p.pipes == nil {
		return
	}
	// Truncated input must not look complete: only a caller who has sent all of it closes stdin.
	if p.pipes.Stdin != nil {
		if file, err := stdio.Duplicate(p.pipes.Stdin); err == nil {
			p.keepStream(stdio.NewKept(file, true, false))
		}
	}
	for _, output := range []*os.File{p.pipes.Stdout, p.pipes.Stderr} {
		if output == nil {
			continue
		}
		file, err := stdio.Duplicate(output)
		if err != nil {
			p.runner.log.Warn("cannot keep the output open of a process whose client has gone", "pid", p.leader.Pid, "error", err)
			continue
		}
		p.keepStream(stdio.NewKept(file, false, false))
	}
}

// keepStream serves a stream in the background until the stream or the Runner ends, then closes it. If the process
// is frozen first, the stream stays open.
func (p *Process) keepStream(k *stdio.Kept) {
	p.mu.Lock()
	p.kept = append(p.kept, k)
	p.mu.Unlock()
	r := p.runner
	r.countKept(p, 1)
	started := r.background(p.panicked, func() {
		k.Keep(r.ctx, p.watch.Exited, p.freezing, func() { r.countKept(p, -1) })
	})
	if !started {
		k.Stream.Close()
		r.countKept(p, -1)
		close(k.Done)
	}
}
