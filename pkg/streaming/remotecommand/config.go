package remotecommand

import (
	"cmp"
	"time"
)

// Config is how commands are served. Runtime is required. Every value is taken as it is: the defaults of what users
// may set stand in pkg/config alone, and zero is off where a comment says so.
type Config struct {
	Runtime Runtime
	// Starts bounds how many commands start at the same time. Nil is no bound.
	Starts StartGate
	// DrainIdle is how long the output of a command that has exited must be silent before it is
	// taken to be complete although some background child still holds it (kubernetes#44371).
	// Zero waits for the end of output for ever, as other runtimes do.
	DrainIdle time.Duration
	// DrainMax bounds the same wait while output still flows.
	DrainMax time.Duration
	// StatusWait bounds how long the status of a finished command is held back for a client over SPDY,
	// which may translate for somebody else, to have read the output: since the last sign that it has read
	// something. Zero does not hold it back.
	StatusWait time.Duration
	// InputGrace is how long a command without a terminal, whose client has left in order, may take none of
	// the input that came before, and, once it has all of it, how long it may run on before it is treated as
	// one whose client has gone. Zero is not at all.
	InputGrace time.Duration
	// KeepProcesses says that processes live on without their clients, so that a session whose client
	// has gone does not wait for its process to follow.
	KeepProcesses bool
	// AttachBuffer is how many bytes of output wait for an attached client that reads too slowly;
	// what comes beyond is skipped.
	AttachBuffer int
	// AttachStays keeps an attached client whose input has ended, without a terminal, until it leaves. Otherwise
	// it is detached as the runtimes do, but not before the container has been silent for a moment.
	AttachStays bool

	Waits // those that are zero become the package's own
}

// Waits are the times that no user sets.
type Waits struct {
	// StreamCreation is how long a client may take to open its streams after the upgrade.
	StreamCreation time.Duration
	// FirstSize is how long the start of a command with a terminal waits for the terminal's size, so
	// that the command finds it right from its first instruction (kubernetes#47990). A busy node with two
	// proxies between needs it. A client that is known to send none waits less, see firstsize.go.
	FirstSize time.Duration
	// SizeSlack is how long the size may come after the first input, or after the answer to a ping: a client
	// that sends one does so at once, but maybe from another thread.
	SizeSlack time.Duration
	// ProcessEnd is how long a session whose client has gone stays in the registry until its process has
	// followed.
	ProcessEnd time.Duration
}

func (w Waits) complete() Waits {
	return Waits{
		StreamCreation: cmp.Or(w.StreamCreation, 30*time.Second),
		FirstSize:      cmp.Or(w.FirstSize, 500*time.Millisecond),
		SizeSlack:      cmp.Or(w.SizeSlack, 60*time.Millisecond),
		ProcessEnd:     cmp.Or(w.ProcessEnd, 30*time.Second),
	}
}
