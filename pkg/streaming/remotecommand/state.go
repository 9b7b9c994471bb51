package remotecommand

import (
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/streamshim/streamshim/pkg/handover"
	"github.com/streamshim/streamshim/pkg/streaming/internal/bandwidth"
	"github.com/streamshim/streamshim/pkg/streaming/internal/holdback"
	"github.com/streamshim/streamshim/pkg/streaming/internal/lifetime"
	"github.com/streamshim/streamshim/pkg/streaming/internal/status"
	"github.com/streamshim/streamshim/pkg/streaming/internal/transport"
	"github.com/streamshim/streamshim/pkg/streaming/remotecommand/internal/drain"
	"github.com/streamshim/streamshim/pkg/streaming/remotecommand/internal/stdin"
	"github.com/streamshim/streamshim/pkg/streaming/remotecommand/internal/terminal"
)

// stateVersion is State.Version. A reader of another version ends the session, with a status that says so.
const stateVersion = 1

// State is a frozen session: all that is needed to continue it, encoded as CBOR. Times are those of the wall clock, so that
// deadlines do not change. What belongs to the registry and its guards is in session.State.
type State struct {
	Envelope

	Phase    phase
	Deadline time.Time // of the phase; zero if none has begun
	Request  Request   // after the start, without what only the start needs

	Ending    EndingState
	CutAt     time.Time // when the client's connection is closed, if the session has not ended before; zero is never
	Terminal  terminal.State
	Input     *stdin.State // nil if there is none, or the process does not run yet
	Drain     drain.State
	Timeouts  *lifetime.TimeoutsState // nil before the process runs
	Bandwidth bandwidth.State
	Withheld  bool     // output was not sent because it could not be recorded
	Warnings  []string // not sent yet
}

// Envelope is the part of a State that every version can read. With it, a program can tell the client why a session of an
// unknown version ends.
type Envelope struct {
	Version int
	Client  ClientState
	Process *ProcessState // nil before it runs and after it was closed
}

// ClientState is the client's side.
type ClientState struct {
	Conn transport.State

	Protocol           string
	Resize, JSONStatus bool // of the protocol

	Ready   bool                   // all streams are open
	Streams map[string]StreamState // the open streams by name

	AnswersItself, SendsSize bool
	Holdback                 *holdback.State // nil if the status does not wait
}

// StreamState is one stream of the client.
type StreamState struct {
	ID             uint32
	Received, Sent int64 // for when the connection does not know the stream any more
}

// ProcessState is the process. One of the two is set.
type ProcessState struct {
	Local []byte // from Process.Freeze of Config.Runtime's process
	Relay []byte // from Relay.Freeze of package relay
}

// EndingState is how the session ends, as far as that is decided.
type EndingState struct {
	Reason                         string
	ExitCode                       int
	Error                          string // empty if there was none
	Status                         *status.Status
	Line                           string // still to be sent before Status
	Said                           bool   // Status was sent
	Hold                           bool   // the status may wait
	Holding                        time.Time
	Stopped, Unopened, WatchesStop bool

	HeldInput handover.Descriptor // see holdInput; zero if there is none
}

var errState = errors.New("the state of the session cannot be read")

func stateError(format string, arguments ...any) error {
	return fmt.Errorf("%w: %s", errState, fmt.Sprintf(format, arguments...))
}

// withProcess are the phases that have a process, before those before it, and withStatus those that have a status.
var (
	withProcess = []phase{running, finishing, reaping, explaining, draining, following}
	before      = []phase{opening, sizing, starting}
	withStatus  = []phase{explaining, draining, telling, holding, saying, parting}
)

// validate returns why a session cannot continue from a state.
func (s *State) validate() error {
	hasProcess := slices.Contains(withProcess, s.Phase)
	failure, hasFailure := s.Client.Streams[transport.StreamError]
	switch {
	case s.Version != stateVersion:
		return fmt.Errorf("its state has version %d, only %d is known", s.Version, stateVersion)
	case !hasProcess && !slices.Contains(before, s.Phase) && !slices.Contains(withStatus, s.Phase):
		return stateError("it has an unknown phase %q", s.Phase)
	case hasProcess != (s.Process != nil) && s.Phase != telling && s.Phase != holding && s.Phase != saying && s.Phase != parting:
		return stateError("phase %q, and a process: %v", s.Phase, s.Process != nil)
	case s.Process != nil && (s.Process.Local == nil) == (s.Process.Relay == nil):
		return stateError("its process is neither here nor there")
	case s.Ending.Stopped && !s.Ending.Unopened && s.Process == nil:
		return stateError("it is told to end, and has no process")
	case slices.Contains(withStatus, s.Phase) && s.Ending.Status == nil:
		return stateError("phase %q, and no status", s.Phase)
	case s.Phase == finishing && s.Input == nil:
		return stateError("there is no input to finish")
	case s.Phase != opening && !s.Ending.Unopened && !s.Client.Ready:
		return stateError("phase %q, and not all streams", s.Phase)
	case (s.Client.Ready || s.Ending.Unopened) && !hasFailure:
		return stateError("there is no error stream")
	case hasProcess && (len(s.Drain.Outputs) != 2 || s.Timeouts == nil):
		return stateError("its process has %d outputs", len(s.Drain.Outputs))
	case s.Client.Holdback != nil && s.Client.Holdback.Unanswered < 0:
		return stateError("the client has taken more than was sent")
	case failure.Received < 0 || failure.Sent < 0:
		return stateError("its error stream has moved less than nothing")
	}
	if err := s.Drain.Check(); err != nil {
		return stateError("%v", err)
	}
	if s.Input != nil {
		if err := s.Input.Check(); err != nil {
			return stateError("%v", err)
		}
	}
	return nil
}

// sooner returns a time of a state with a reading of the monotonic clock, so that setting the wall clock no longer affects
// it.
func sooner(at time.Time) time.Time {
	if at.IsZero() {
		return at
	}
	now := time.Now()
	return now.Add(at.Sub(now))
}
