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
	// ErrStarting is a session that was not frozen because its command was being started all the time. It goes on.
	ErrStarting = errors.New("the command of the session is still being started")
	// ErrEnded is a session that has ended by itself while it was to be frozen.
	ErrEnded = errors.New("the session has ended")
)

// isFrozen reports whether a call ended because its session was frozen.
func isFrozen(err error) bool { return errors.Is(err, handover.ErrFrozen) }

// AwaitStarted waits until the session's command is not being started.
func (s *Session) AwaitStarted(ctx context.Context) error { return s.freezer.settle(ctx, func() {}) }

// Carriable says why the session could not be handed over, nil when it can be as far as that is known.
func (s *Session) Carriable() error {
	if err := s.client.Portable(); err != nil && !transport.Closed(s.client.Done()) { // a client that has gone has no connection
		return fmt.Errorf("its client's connection: %w", err)
	}
	if upstream := s.upstream.Load(); upstream != nil {
		return upstream.Portable()
	}
	return nil
}

// Freeze brings the session to a halt and returns its state for Resume, in this program or in the next one; Run then
// returns session.Frozen. What the state refers to is in the files. A command that is being started is waited for.
//
// The error is ErrStarting with the context's, or Carriable's: then the session goes on. Or it is ErrEnded, or that of a
// session that did not come to a halt before the context was done, or could not be taken apart: then Run says how it ended.
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

// collect takes a session apart in which nothing moves any more.
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
		s.heldInput.Close() //nolint:errcheck // has a duplicate
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

// abandon treats the process as one whose client has gone.
func (s *Session) abandon() {
	if s.process != nil {
		s.process.Disconnect()
		s.process.Close() //nolint:errcheck // nobody is left to read it
	}
}

// refuse makes a session say to its client why it is not carried, and no more.
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

// freezer brings Run to a halt, and takes from there what it returns.
type freezer struct {
	frozen chan struct{} // closed when every phase is to be left
	still  chan struct{} // closed when nothing of the session moves any more
	ended  chan struct{} // closed when the session has ended by itself
	result chan session.Outcome

	mu       sync.Mutex
	starting chan struct{} // closed when the start is over that is under way; nil without one
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

// settle calls then when no start is under way, which then cannot begin one meanwhile.
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

// begin has all phases left, once no start is under way.
func (f *freezer) begin(ctx context.Context) error {
	return f.settle(ctx, func() { close(f.frozen) })
}

// halted says that nothing moves any more, and returns how Run is to end.
func (f *freezer) halted() session.Outcome {
	close(f.still)
	return <-f.result
}

// end says that the session has ended by itself.
func (f *freezer) end() {
	close(f.ended)
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.starting != nil { // that has panicked
		close(f.starting)
		f.starting = nil
	}
}
