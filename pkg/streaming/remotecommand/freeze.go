package remotecommand

import (
	"context"
	"errors"
	"fmt"
	"sync"

	"github.com/streamshim/streamshim/pkg/handover"
	"github.com/streamshim/streamshim/pkg/rescue"
	"github.com/streamshim/streamshim/pkg/session"
	"github.com/streamshim/streamshim/pkg/streaming/internal/status"
	"github.com/streamshim/streamshim/pkg/streaming/internal/transport"
	"github.com/streamshim/streamshim/pkg/streaming/remotecommand/internal/drain"
)

var (
	// ErrStarting means that a session was not frozen because its command is still being started. The session continues.
	ErrStarting = errors.New("the command of the session is still being started")
	// ErrEnded means that a session has ended by itself before it could be frozen.
	ErrEnded = errors.New("the session has ended")
)

// isFrozen reports whether a call ended because its session was frozen.
func isFrozen(err error) bool { return errors.Is(err, handover.ErrFrozen) }

// AwaitStarted waits until the session's command is not being started.
func (s *Session) AwaitStarted(ctx context.Context) error { return s.freezer.settle(ctx, func() {}) }

// Carriable returns why the session cannot be handed over, or nil if no reason is known.
func (s *Session) Carriable() error {
	if err := s.client.Portable(); err != nil && !transport.Closed(s.client.Done()) { // a client that has gone has no connection
		return fmt.Errorf("its client's connection: %w", err)
	}
	if upstream := s.upstream.Load(); upstream != nil {
		return upstream.Portable()
	}
	return nil
}

// Freeze stops the session and returns its state for Resume, in this program or in the next one. Run then returns
// session.Frozen. What the state refers to is in the files. Freeze waits for a command that is being started.
//
// If the error is ErrStarting, which wraps the context's, or Carriable's, the session continues. After any other error Run
// returns how the session ended: ErrEnded, or the session did not stop before the context was done, or its state could not
// be collected.
func (s *Session) Freeze(ctx context.Context, files *handover.Files) ([]byte, error) {
	if err := s.freezer.settle(ctx, func() {}); err != nil {
		return nil, err
	}
	if err := s.Carriable(); err != nil {
		return nil, err
	}
	if err := s.freezer.begin(ctx); err != nil {
		return nil, err
	}
	s.client.Freeze()
	if upstream := s.upstream.Load(); upstream != nil {
		upstream.Halt()
	}
	s.drain.Freeze()
	if s.input != nil {
		s.input.Freeze()
	}
	select {
	case <-s.freezer.still:
	case <-s.freezer.ended:
		return nil, ErrEnded
	case <-ctx.Done():
		err := fmt.Errorf("the session does not come to a halt (phase %s): %w", s.session.Phase(), context.Cause(ctx))
		s.client.Discard()
		s.freezer.result <- notCarried(err)
		return nil, err
	}
	var encoded []byte
	var err error
	rescue.Call(func(p *rescue.Panic) { s.panicked(p); err = p }, func() { encoded, err = s.collect(files) })
	if err != nil {
		s.freezer.result <- notCarried(err)
		return nil, err
	}
	s.freezer.result <- session.Frozen
	return encoded, nil
}

func notCarried(err error) session.Outcome {
	return session.Outcome{Reason: reasonNotCarried, ExitCode: -1, Err: err}
}

const reasonNotCarried = "not-carried"

// collect returns the state of a session that has stopped. The session cannot continue after it.
func (s *Session) collect(files *handover.Files) ([]byte, error) {
	state := State{Phase: s.at, Deadline: s.deadline, Request: *s.request, Withheld: s.withheld.Load(), Warnings: s.warnings.take()}
	state.Version = stateVersion
	state.CutAt = s.cut.at
	if s.upstream.Load() != nil || s.process != nil {
		state.Request.Call, state.Request.Container.Process = nil, nil
		state.Request.Command.Args, state.Request.Command.Env = nil, nil
	}
	state.Terminal = s.terminal.State()
	state.Drain = s.drain.State()
	state.Bandwidth = s.bandwidth.State()
	if s.limits != nil {
		timeouts := s.limits.State()
		state.Timeouts = &timeouts
	}
	err := s.collectEnding(&state, files)
	if err == nil && s.input != nil {
		state.Input, err = s.input.State(files)
	}
	if err == nil && s.process != nil {
		err = s.collectProcess(&state, files)
	}
	if err != nil {
		state.refuse(err)
		s.abandon()
		s.process = nil
	}
	if err := s.collectClient(&state, files); err != nil {
		return nil, err
	}
	return handover.Encode(state)
}

func (s *Session) collectEnding(state *State, files *handover.Files) (err error) {
	e := &s.ending
	state.Ending = EndingState{
		Reason: e.outcome.Reason, ExitCode: e.outcome.ExitCode, Status: e.status, Line: e.line, Said: e.said,
		Hold: e.hold, Holding: e.holding, Stopped: e.stopped, Unopened: e.unopened, WatchesStop: e.cutsAfterStop,
	}
	if e.outcome.Err != nil {
		state.Ending.Error = e.outcome.Err.Error()
	}
	if s.heldInput != nil {
		state.Ending.HeldInput, err = files.Keep(s.heldInput)
		s.heldInput.Close() //nolint:errcheck // files has a duplicate
	}
	return err
}

func (s *Session) collectProcess(state *State, files *handover.Files) error {
	frozen, err := s.process.Freeze(files)
	if err != nil {
		return fmt.Errorf("its process: %w", err)
	}
	s.process.Discard()
	state.Process = &ProcessState{Local: frozen}
	if s.upstream.Load() != nil {
		state.Process = &ProcessState{Relay: frozen}
	}
	return nil
}

// abandon treats the process as if its client had gone.
func (s *Session) abandon() {
	if s.process != nil {
		s.process.Disconnect()
		s.process.Close() //nolint:errcheck // nobody is left to read it
	}
}

// refuse changes the state to that of a session which only tells its client why it is not handed over.
func (s *State) refuse(reason error) {
	message := "the session was ended because streamshim is being upgraded and it cannot be carried over: " + reason.Error()
	s.Phase, s.Process, s.Input, s.Drain = telling, nil, nil, drain.State{}
	s.Ending = EndingState{
		Reason: reasonNotCarried, ExitCode: -1, Error: message, Status: status.Ended(message), Line: reasonLine(message, s.Request.Command.TTY),
	}
}

func (s *Session) collectClient(state *State, files *handover.Files) error {
	c := s.client
	state.Client = ClientState{
		Protocol: c.protocol.Name, Resize: c.protocol.Resize, JSONStatus: c.protocol.JSONStatus,
		Ready: transport.Closed(c.ready), Streams: map[string]StreamState{}, AnswersItself: c.answersItself, SendsSize: c.sendsSize,
		Holdback: c.holdback.State(),
	}
	for name, slot := range s.slots() {
		if stream := *slot; stream != nil {
			state.Client.Streams[name] = StreamState{transport.StreamID(stream), stream.Received(), stream.Sent()}
		}
	}
	var err error
	if state.Client.Conn, err = c.State(files); err != nil {
		return fmt.Errorf("its client's connection: %w", err)
	}
	return nil
}

// freezer stops Run, and passes it the outcome to return.
type freezer struct {
	frozen chan struct{} // closed to make Run leave its phase
	still  chan struct{} // closed when the session has stopped
	ended  chan struct{} // closed when the session has ended by itself
	result chan session.Outcome

	mu       sync.Mutex
	starting chan struct{} // closed when the current start is over; nil if there is none
}

func newFreezer() *freezer {
	return &freezer{
		starting: make(chan struct{}), // until Run has begun
		frozen:   make(chan struct{}), still: make(chan struct{}), ended: make(chan struct{}), result: make(chan session.Outcome, 1),
	}
}

// proceed reports whether a phase may be entered.
func (f *freezer) proceed(next phase) bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.starting != nil {
		close(f.starting)
		f.starting = nil
	}
	if transport.Closed(f.frozen) {
		return false
	}
	if next == starting {
		f.starting = make(chan struct{})
	}
	return true
}

// settle waits until no start is in progress and calls then. No start can begin during that call.
func (f *freezer) settle(ctx context.Context, then func()) error {
	for {
		f.mu.Lock()
		under := f.starting
		if under == nil {
			then()
		}
		f.mu.Unlock()
		if under == nil {
			return nil
		}
		select {
		case <-under:
		case <-ctx.Done():
			return fmt.Errorf("%w: %w", ErrStarting, context.Cause(ctx))
		}
	}
}

// begin makes Run leave its phase, once no start is in progress.
func (f *freezer) begin(ctx context.Context) error {
	return f.settle(ctx, func() { close(f.frozen) })
}

// halted reports that the session has stopped, and returns how Run is to end.
func (f *freezer) halted() session.Outcome {
	close(f.still)
	return <-f.result
}

// end reports that the session has ended by itself.
func (f *freezer) end() {
	close(f.ended)
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.starting != nil { // the start has panicked
		close(f.starting)
		f.starting = nil
	}
}
