package execproc

import (
	"os"

	"github.com/streamshim/streamshim/pkg/execproc/internal/stdio"
)

// keepOn keeps what the process writes being read, so that it neither blocks nor meets a closed
// pipe, until it ends or the Runner does. It works on descriptors of its own, as the caller is going
// to Close the others.
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
	// Input that was cut must not look whole: only who has given it all closes stdin.
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

// keepStream works on a stream in the background until it ends or the Runner does, and closes it; or until the process
// is frozen, and leaves it open.
func (p *Process) keepStream(k *stdio.Kept) {
	p.mu.Lock()
	p.kept = append(p.kept, k)
	p.mu.Unlock()
	r := p.runner
	r.countKept(p, 1)
	started := r.background(func() {
		if !k.Keep(r.ctx, p.watch.Exited, p.freezing) {
			r.countKept(p, -1)
		}
		close(k.Done)
	})
	if !started {
		k.Stream.Close()
		r.countKept(p, -1)
		close(k.Done)
	}
}
