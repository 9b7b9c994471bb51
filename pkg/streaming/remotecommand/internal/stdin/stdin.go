// Package stdin moves the client's input into a process.
//
// The end of a client's input and the end of the client are two events, in every protocol.
//
// The end of input is an event of the stream: WriteTo and Read end without an error, however the protocol's clients signal
// it. An error instead means that the input was cut. The end of the client is an event of its connection: Done, and
// transport.LeftInOrder of Err. The input of a client that has left in order is still delivered; docs/protocols.md has the
// table.
package stdin

import (
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

const (
	// cutGrace is how long a command may read nothing of input that was cut, after its client has left.
	cutGrace = 2 * time.Second
	// takenGrace is how long a command may run after it has read all of the input that was cut, before it is hung up.
	takenGrace = 500 * time.Millisecond
	// leftPiece bounds one write after the client has left, so that a slow reader can be distinguished from one that
	// has stopped.
	leftPiece = 4 << 10
)

// Input delivers the client's input to a process. It is the writer that the client's stream is copied to.
type Input struct {
	// Shown is how many of the next bytes were already recorded, before a hand-over. Only the copy uses it.
	Shown int

	from  workload.Stream
	stdin io.WriteCloser

	ended chan struct{} // closed when the copy has ended, but not when it was frozen
	cut   bool          // the input ended without its end; valid once ended is closed

	moved atomic.Int64 // bytes that stdin accepted, not counting those written directly
	// left is set when the client has left, and failed when stdin accepts no more.
	left, failed atomic.Bool

	mu      sync.Mutex
	stopped bool     // the rest is discarded
	frozen  bool     // the copy must end
	unread  *os.File // another reader of stdin's pipe, to see how much input is in it; may be nil
	closed  bool     // Close was called

	// The progress after the client has left. Only the caller of ClientLeft, EndSeen and Stalled uses it.
	since   time.Time // of the last progress
	last    Progress
	endSeen bool
}

// upstream is the stdin of a process that the upstream serves.
type upstream interface {
	// Pending returns how many bytes are known to be still on their way.
	Pending() int
	// ClientLeft is called when the client has left and all of its input was written. complete says whether the input was
	// complete, not cut.
	ClientLeft(complete bool)
}

// State is a frozen Input.
type State struct {
	Ended, Cut bool // see Input
	Stopped    bool
	Left       bool
	Failed     bool
	Moved      int64
	Shown      int
	Unread     handover.Descriptor // another reader of the pipe; zero if there is none
	Since      time.Time
	Last       Progress
	EndSeen    bool
}

// Progress changes whenever the command has read something.
type Progress struct {
	Moved    int64
	Received int64
	Pending  int // bytes that were written to stdin and are known to be unread
}

// Check returns why Resume cannot continue from a state.
func (s *State) Check() error {
	if s.Shown < 0 || s.Moved < 0 {
		return fmt.Errorf("input %+v", *s)
	}
	return nil
}

// New returns a new Input.
func New() *Input { return &Input{ended: make(chan struct{})} }

// Resume continues from a state and takes its files.
func Resume(state *State, files *handover.Files) *Input {
	in := New()
	in.cut, in.stopped, in.Shown = state.Cut, state.Stopped, state.Shown
	in.since, in.last, in.endSeen = state.Since, state.Last, state.EndSeen
	in.left.Store(state.Left)
	in.failed.Store(state.Failed)
	in.moved.Store(state.Moved)
	in.unread, _ = files.Take(state.Unread, "unread input") //nolint:errcheck // then there is none
	if state.Ended {
		close(in.ended)
	}
	return in
}

// State returns the state for Resume and closes the Input. Call it after Freeze and the end of the copy.
func (in *Input) State(files *handover.Files) (*State, error) {
	defer in.Close()
	state := &State{
		Ended: transport.Closed(in.ended), Cut: in.cut, Stopped: in.stopped, Left: in.left.Load(), Failed: in.failed.Load(),
		Moved: in.moved.Load(), Shown: in.Shown, Since: in.since, Last: in.last, EndSeen: in.endSeen,
	}
	var err error
	if in.unread != nil {
		state.Unread, err = files.Keep(in.unread)
	}
	return state, err
}

// Copy starts to move the client's input to the process, in a goroutine of the group, or continues where it was frozen.
// The process sees the end of the client's input, but not the end of input that was cut: a file that was cut must not look
// complete. If the process closes its stdin early, the rest is discarded and the session continues. stdin is nil if it was
// closed before a hand-over.
func (in *Input) Copy(group *rescue.Group, from workload.Stream, stdin io.WriteCloser) {
	in.from, in.stdin = from, stdin
	switch {
	case transport.Closed(in.ended):
		return
	case stdin == nil || in.stopped: // already before a hand-over
		from.CloseRead()
		close(in.ended)
		return
	}
	group.Go(func() {
		_, err := in.from.WriteTo(in)
		if errors.Is(err, handover.ErrFrozen) {
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

// DirectFile returns the file to which package spdy may write without calling Write.
func (in *Input) DirectFile() *os.File {
	file, _ := in.stdin.(*os.File)
	return file
}

// Write implements io.Writer.
func (in *Input) Write(p []byte) (int, error) {
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
		if errors.Is(err, handover.ErrFrozen) {
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

// interrupt ends a blocked Write of stdin.
func (in *Input) interrupt() {
	if stdin, ok := in.stdin.(writeDeadliner); ok {
		stdin.SetWriteDeadline(time.Unix(1, 0)) //nolint:errcheck // a stdin that is closed blocks nobody
	}
}

// goesOn reports whether a Write that ClientLeft has interrupted continues.
func (in *Input) goesOn() bool {
	in.mu.Lock()
	defer in.mu.Unlock()
	if in.stopped || in.frozen {
		return false
	}
	stdin, ok := in.stdin.(writeDeadliner)
	return ok && stdin.SetWriteDeadline(time.Time{}) == nil
}

// Freeze ends the copy.
func (in *Input) Freeze() {
	in.mu.Lock()
	defer in.mu.Unlock()
	in.frozen = true
	in.interrupt()
}

func (in *Input) isFrozen() bool {
	in.mu.Lock()
	defer in.mu.Unlock()
	return in.frozen
}

// Stop ends the copy and discards what the client still sends, so that it does not fill the connection. It does not close the
// process's stdin, because that would look like the end of input.
func (in *Input) Stop() {
	in.mu.Lock()
	in.stopped = true
	in.interrupt()
	in.mu.Unlock()
	in.from.CloseRead()
}

// Hold returns a duplicate of the process's stdin if the process has not received all of its input, and nil otherwise. While
// the duplicate is open, the process does not see an end of input: input that was cut must not look complete.
func (in *Input) Hold() (held *os.File) {
	if transport.Closed(in.ended) && !in.cut {
		return nil
	}
	if stdin, ok := in.stdin.(*os.File); ok {
		socket.Control(stdin, func(fd int) {
			if duplicate, err := unix.FcntlInt(uintptr(fd), unix.F_DUPFD_CLOEXEC, 0); err == nil { //nolint:gosec // a descriptor
				held = os.NewFile(uintptr(duplicate), "held input")
			}
		})
	}
	return held
}

// watchPipe opens another reader of the pipe whose writer is about to be closed, if the command has not read it to its end.
// The command does not notice, because only writers are affected by other readers.
func (in *Input) watchPipe() {
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

// Close releases what is kept to watch the command read.
func (in *Input) Close() {
	in.mu.Lock()
	defer in.mu.Unlock()
	in.closed = true
	if in.unread != nil {
		in.unread.Close() //nolint:errcheck // was only read from
		in.unread = nil
	}
}

// ClientLeft begins to watch how the command reads the rest of the input of a client that has gone. The returned channel is
// closed when everything was written. It is nil if EndSeen was called.
func (in *Input) ClientLeft() (ended <-chan struct{}) {
	in.mu.Lock()
	in.left.Store(true)
	if !in.stopped {
		in.interrupt()
	}
	in.mu.Unlock()
	if in.since.IsZero() {
		in.since = time.Now()
	}
	if in.endSeen {
		return nil
	}
	return in.ended
}

// EndSeen must be called when the channel that ClientLeft has returned is closed.
func (in *Input) EndSeen() {
	in.endSeen, in.since = true, time.Now()
	if to, ok := in.stdin.(upstream); ok {
		to.ClientLeft(!in.cut)
	}
}

// Stalled reports whether the command has read nothing for the grace period, or has not ended for that long after it has read
// everything. For input that was cut, the periods are shorter. served says that nothing more will arrive from the client.
func (in *Input) Stalled(grace time.Duration, served bool) bool {
	now := in.progress()
	if now != in.last {
		in.last, in.since = now, time.Now()
	}
	if in.endSeen && in.cut || !in.endSeen && served && !in.from.InputEnded() {
		grace = cutGrace
		if in.endSeen && now.Pending == 0 {
			grace = takenGrace
		}
	}
	return time.Since(in.since) >= grace
}

func (in *Input) progress() Progress {
	p := Progress{Moved: in.moved.Load(), Received: in.from.Received()}
	in.mu.Lock()
	defer in.mu.Unlock()
	switch stdin := in.stdin.(type) {
	case upstream:
		p.Pending = stdin.Pending()
	case *os.File:
		p.Pending = socket.Pending(stdin)
	}
	if in.unread != nil {
		p.Pending = socket.Pending(in.unread)
	}
	return p
}
