package remotecommand

import (
	"cmp"
	"time"
)

// Config configures exec and attach sessions. Runtime is required. The defaults of what users may set stand in pkg/config
// only. Zero means off where a comment says so.
type Config struct {
	Runtime Runtime
	// Starts bounds how many commands start at the same time. Nil is no bound.
	Starts StartGate
	// DrainIdle is how long the output of a command that has exited must be silent before it counts as complete
	// although a background child still holds it open (kubernetes#44371). Zero waits for the end of output for ever,
	// as other runtimes do.
	DrainIdle time.Duration
	// DrainMax bounds the same wait while output still flows.
	DrainMax time.Duration
	// StatusWait bounds how long the status of a finished command waits for a client over SPDY, which may be a
	// translator, to read the output. It counts from the last sign that the client has read something. Zero does not
	// wait.
	StatusWait time.Duration
	// InputGrace is for a command without a terminal whose client has left in order. It is how long the command may
	// read none of the remaining input, and how long it may run after it has read all of it. Then it is treated as one
	// whose client has gone. Zero is off.
	InputGrace time.Duration
	// KeepProcesses says that processes outlive their clients, so that a session whose client has gone does not wait
	// for its process to end.
	KeepProcesses bool
	// AttachBuffer bounds the bytes of output that wait for an attached client that reads too slowly. More than that
	// is skipped.
	AttachBuffer int
	// AttachStays keeps an attached client without a terminal after its input has ended, until it leaves. Otherwise
	// it is detached, as with the runtimes, but not before the container has been silent for a moment.
	AttachStays bool

	Waits // zero means the package's default
}

// Waits are times that no user sets.
type Waits struct {
	// StreamCreation is how long a client may take to open its streams after the upgrade.
	StreamCreation time.Duration
	// FirstSize is how long the start of a command with a terminal waits for the terminal's size, so that the command
	// sees the right size from its first instruction (kubernetes#47990). A busy node behind two proxies needs it.
	// For a client that is known to send no size it is shorter, see firstsize.go.
	FirstSize time.Duration
	// SizeSlack is how long the wait continues after the first input, or after the answer to a ping. A client that
	// sends a size does so at once, but maybe from another thread.
	SizeSlack time.Duration
	// ProcessEnd bounds how long a session whose client has gone stays in the registry to wait for its process to
	// end.
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
