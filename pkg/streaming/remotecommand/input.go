package remotecommand

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"github.com/streamshim/streamshim/pkg/handover"
	"github.com/streamshim/streamshim/pkg/rescue"
	"github.com/streamshim/streamshim/pkg/streaming/internal/socket"
	"github.com/streamshim/streamshim/pkg/streaming/internal/spdy"
	"github.com/streamshim/streamshim/pkg/streaming/internal/transport"
	"github.com/streamshim/streamshim/pkg/workload"
)

// The end of a client's input and the end of the client are two things, in every protocol.
//
// The end of input is a Stream's: WriteTo and Read end without an error, whatever a protocol's clients say it
// with. An error instead means that the input was cut. The end of the client is its connection's: Done, and
// transport.LeftInOrder of Err. A client that has left in order has its input finished; docs/protocols.md has the table.

const (
	// cutInputGrace is how long a command may take nothing of input that was cut, after its client has left.
	cutInputGrace = 2 * time.Second
	// takenGrace is how long a command has for the last that it took of input that was cut, before it is hung up.
	takenGrace = 500 * time.Millisecond
	// inputLook is how often it is looked at what a command takes whose client has left.
	inputLook = 50 * time.Millisecond
	// leftPiece is how much is written at once then, so that a slow reader is told from one that stands still.
	leftPiece = 4 << 10
)

// input is the client's input on its way into a process. It is the writer that the client's stream is copied
// to.
type input struct {
	from  workload.Stream
	stdin io.WriteCloser

	ended chan struct{} // closed when the copy has ended, not when it was frozen
	cut   bool          // the input's end did not come, valid once ended is closed

	moved atomic.Int64 // bytes that stdin took, those that were written directly not counted
	// left is set when the client has left, and failed when stdin takes no more.
	left, failed atomic.Bool
	shown        int // bytes at the beginning of what comes that taps have seen already; belongs to the copy

	mu      sync.Mutex
	stopped bool     // the rest is not wanted
	frozen  bool     // the copy is to end where it is
	unread  *os.File // another reader of stdin's pipe, to see what of the input is in it; nil without
	closed  bool     // close was called

	// since and last are what finishInput has seen of progress, and endSeen is set when it has seen the end. They
	// belong to it.
	since   time.Time
	last    inputProgress
	endSeen bool
}

func newInput() *input { return &input{ended: make(chan struct{})} }

// copy begins to move the client's input into the process, in a goroutine of the group. The client's end
// of input is the process's; its cut is not: a file that was cut must not look whole. When the process closes
// its stdin early, the rest is thrown away and the session goes on.
func (in *input) copy(group *rescue.Group) {
	group.Go(func() {
		_, err := in.from.WriteTo(in)
		if isFrozen(err) {
			return
		}
		defer close(in.ended)
		if err == nil {
			in.watchPipe()
			in.stdin.Close() //nolint:errcheck // the process may have closed it first
		}
		unwanted := in.failed.Load() || errors.Is(err, unix.EPIPE) && !errors.Is(err, spdy.ErrPeerClosed)
		in.cut = err != nil && !unwanted
		in.from.CloseRead()
	})
}

// DirectFile is what package spdy looks for: where it may write past Write.
func (in *input) DirectFile() *os.File {
	file, _ := in.stdin.(*os.File)
	return file
}

// Write implements io.Writer.
func (in *input) Write(p []byte) (int, error) {
	written := 0
	for written < len(p) {
		piece := p[written:]
		if in.left.Load() {
			piece = piece[:min(len(piece), leftPiece)]
		}
		n, err := in.stdin.Write(piece)
		written += n
		in.moved.Add(int64(n))
		if errors.Is(err, os.ErrDeadlineExceeded) && in.goesOn() {
			continue
		}
		if errors.Is(err, os.ErrDeadlineExceeded) && in.isFrozen() {
			return written, handover.ErrFrozen
		}
		if isFrozen(err) {
			return written, err
		}
		if err != nil {
			in.failed.Store(true)
			return written, err
		}
	}
	return written, nil
}

type writeDeadliner interface{ SetWriteDeadline(time.Time) error }

// interrupt ends a Write of stdin that waits.
func (in *input) interrupt() {
	if stdin, ok := in.stdin.(writeDeadliner); ok {
		stdin.SetWriteDeadline(time.Unix(1, 0)) //nolint:errcheck // a stdin that is closed blocks nobody
	}
}

// goesOn lets a Write go on that was interrupted by clientLeft.
func (in *input) goesOn() bool {
	in.mu.Lock()
	defer in.mu.Unlock()
	if in.stopped || in.frozen {
		return false
	}
	stdin, ok := in.stdin.(writeDeadliner)
	return ok && stdin.SetWriteDeadline(time.Time{}) == nil
}

// clientLeft makes progress visible in small steps.
func (in *input) clientLeft() {
	in.mu.Lock()
	defer in.mu.Unlock()
	in.left.Store(true)
	if !in.stopped {
		in.interrupt()
	}
}

// freeze ends the copy where it is.
func (in *input) freeze() {
	in.mu.Lock()
	defer in.mu.Unlock()
	in.frozen = true
	in.interrupt()
}

func (in *input) isFrozen() bool {
	in.mu.Lock()
	defer in.mu.Unlock()
	return in.frozen
}

// stop ends the copy and throws away what the client still sends: a client that goes on writing must not fill
// the connection up. The process's stdin is not closed: that would look like the end of input.
func (in *input) stop() {
	in.mu.Lock()
	in.stopped = true
	in.interrupt()
	in.mu.Unlock()
	in.from.CloseRead()
}

// watchPipe opens another reader of the pipe whose writer is about to be closed, if the command has not read
// it to its end. For the command nothing changes: that there are other readers matters to writers alone.
func (in *input) watchPipe() {
	file, ok := in.stdin.(*os.File)
	if !ok || socket.Pending(file) == 0 {
		return
	}
	var reader *os.File
	socket.Control(file, func(fd int) {
		reader, _ = os.OpenFile(fmt.Sprintf("/proc/self/fd/%d", fd), os.O_RDONLY|unix.O_NONBLOCK, 0) //nolint:errcheck // then what is in the pipe counts as taken
	})
	in.mu.Lock()
	defer in.mu.Unlock()
	if in.closed {
		reader.Close() //nolint:errcheck // was only read from
		return
	}
	in.unread = reader
}

// close releases what is kept to see the command read.
func (in *input) close() {
	in.mu.Lock()
	defer in.mu.Unlock()
	in.closed = true
	if in.unread != nil {
		in.unread.Close() //nolint:errcheck // was only read from
		in.unread = nil
	}
}

// inputProgress changes whenever the command has taken something.
type inputProgress struct {
	Moved    int64
	Received int64
	Pending  int
}

// progress is also the number of bytes that were handed on and are known not to be taken yet.
func (in *input) progress() inputProgress {
	p := inputProgress{Moved: in.moved.Load(), Received: in.from.Received()}
	in.mu.Lock()
	defer in.mu.Unlock()
	switch stdin := in.stdin.(type) {
	case relayInput:
		p.Pending = stdin.Pending()
	case *os.File:
		p.Pending = socket.Pending(stdin)
	}
	if in.unread != nil {
		p.Pending = socket.Pending(in.unread)
	}
	return p
}

// finishInput gives the command the input of a client that has left in order, and the time to do something
// with it. It ends when the command has ended, or is to be hung up: it has taken nothing for too long, does
// not end although it has everything, or there is nothing it could be given. A terminal has no input to
// finish: who closes one leaves.
func (s *Session) finishInput(ctx context.Context) phase {
	in := s.input
	in.clientLeft()
	ticker := time.NewTicker(inputLook)
	defer ticker.Stop()
	if in.since.IsZero() {
		in.since = time.Now()
	}
	ended := in.ended
	if in.endSeen {
		ended = nil
	}
	for {
		select {
		case <-s.process.Exited():
			return s.disconnected()
		case <-s.process.ContainerExited():
			return s.disconnected()
		case <-ctx.Done():
			return s.disconnected()
		case <-s.freezer.frozen:
			return finishing
		case <-ended:
			ended, in.endSeen, in.since = nil, true, time.Now()
			if upstream, ok := in.stdin.(relayInput); ok {
				upstream.ClientLeft(!in.cut)
			}
		case <-ticker.C:
		}
		now := in.progress()
		if now != in.last {
			in.last, in.since = now, time.Now()
		}
		limit := s.config.InputGrace
		if ended == nil && in.cut || ended != nil && transport.Closed(s.served) && !in.from.InputEnded() {
			limit = cutInputGrace
			if ended == nil && now.Pending == 0 {
				limit = takenGrace
			}
		}
		if time.Since(in.since) >= limit {
			return s.disconnected()
		}
	}
}

// hasInputToFinish tells whether the client has left, or is leaving, in order, and has or may have sent input
// that its command has not been given.
func (s *Session) hasInputToFinish() bool {
	return s.client.stdin != nil && !s.request.Command.TTY && s.config.InputGrace > 0 && transport.LeftInOrder(s.client.Err())
}
