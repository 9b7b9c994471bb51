package session

import (
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/streamshim/streamshim/pkg/handover"
	"github.com/streamshim/streamshim/pkg/workload"
)

// StateVersion is the version of State. A reader with another version refuses it.
const StateVersion = 1

// State is what the registry and its guards know about one session in a hand-over. It is encoded as CBOR.
type State struct {
	Version int
	ID      string
	Start   int64 // Unix nanoseconds
	Info    Info
	Phase   Phase
	Helper  string
	Stopped *EndError // nil unless the session was told to end
	Tapped  bool      // Taps.Open was called
	Size    workload.Size
	Told    []string          // ids of watches; see Session.Told
	Guards  map[string][]byte // by Carrier.Carried
}

// Carrier is a Guard with per-session state that must travel with a session that is handed over.
type Carrier interface {
	Guard
	// Carried names the guard's state. The name is part of the encoded state, so all versions must use the same.
	Carried() string
	// Freeze releases the guard's state of a session and returns it. Nothing moves in the session any more. An
	// error means that the session must not continue.
	Freeze(*Session, *handover.Files) ([]byte, error)
	// Resume takes the state back, in the same program or in another. Ended will follow. The state is nil if the
	// program that froze the session had none of this name. An error means that the session must not continue.
	Resume(*Session, []byte, *handover.Files) error
}

// Frozen is the outcome of a session that has not ended but was frozen, to continue from its state.
var Frozen = Outcome{Reason: "frozen", ExitCode: -1, Err: handover.ErrFrozen}

// Frozen reports whether the outcome is the package's Frozen.
func (o Outcome) Frozen() bool {
	return o.Reason == Frozen.Reason && errors.Is(o.Err, handover.ErrFrozen)
}

// reasonGuard ends a session if a guard's state could not be carried and the guard gave no reason.
const reasonGuard = "not-carried"

// Freeze returns what the registry and its guards know about a session in which nothing moves any more. The
// session stays in the registry, for Resume. If a guard fails, the session is told to end, and does so when it is
// resumed.
func (s *Session) Freeze(files *handover.Files) State {
	state := State{Version: StateVersion, ID: s.ID, Start: s.Start.UnixNano(), Info: s.Info, Guards: make(map[string][]byte)}
	for _, g := range slices.Backward(s.registry.guards) {
		carrier, ok := g.(Carrier)
		if !ok {
			continue
		}
		var kept []byte
		err := s.rescued(func() (err error) { kept, err = carrier.Freeze(s, files); return err })
		if err != nil {
			s.stopUncarried(carrier.Carried(), err)
		}
		state.Guards[carrier.Carried()] = kept
	}
	state.Tapped, state.Size = s.Taps.Opened(), s.Taps.Size()
	s.mu.Lock()
	state.Phase, state.Helper, state.Told = s.phase, s.helper, slices.Clone(s.told)
	s.mu.Unlock()
	if s.ctx.Err() != nil {
		state.Stopped = s.endError()
	}
	return state
}

// endError returns why the session was told to end.
func (s *Session) endError() *EndError {
	var end *EndError
	if !errors.As(context.Cause(s.ctx), &end) {
		end = &EndError{Reason: "stopped", Message: context.Cause(s.ctx).Error()}
	}
	return end
}

func (s *Session) stopUncarried(what string, err error) {
	s.Log().Error("a session ends because a part of it could not be handed over", "part", what, "error", err)
	s.Stop(&EndError{Reason: reasonGuard, Message: fmt.Sprintf("the session was ended because its %s could not go on through an upgrade of streamshim", what)})
}

var errBadState = errors.New("state of a session that cannot be read")

// Validate returns why a session in this state could not be resumed, as far as the registry can tell.
func (state *State) Validate() error {
	id, err := hex.DecodeString(state.ID)
	switch {
	case state.Version != StateVersion:
		return fmt.Errorf("%w: version %d, only %d is known", errBadState, state.Version, StateVersion)
	case err != nil || len(id) != idBytes:
		return fmt.Errorf("%w: %q is no id", errBadState, state.ID)
	case !slices.Contains([]Phase{Starting, Running, Lingering}, state.Phase):
		return fmt.Errorf("%w: unknown phase %q", errBadState, state.Phase)
	}
	return nil
}

// Resume continues a session from its state, with its id, start and phase. Guards are not asked whether it may
// begin, and neither guards nor observers see another start. In the registry that froze it, it is the same
// *Session. If a guard fails, the session is told to end. As after Begin, the caller gives it a connection with
// Connect and ends it with End.
func (r *Registry) Resume(ctx context.Context, state State, files *handover.Files) (*Session, error) {
	if err := state.Validate(); err != nil {
		return nil, err
	}
	s, known, err := r.restore(ctx, state)
	if err != nil {
		return nil, err
	}
	if state.Stopped != nil {
		s.Stop(state.Stopped)
	}
	for _, g := range r.guards {
		carrier, ok := g.(Carrier)
		if !ok {
			continue
		}
		if err := s.rescued(func() error { return carrier.Resume(s, state.Guards[carrier.Carried()], files) }); err != nil {
			s.stopUncarried(carrier.Carried(), err)
		}
	}
	if !known {
		for _, o := range r.observers {
			s.tell(func() { o.Resumed(s) })
		}
		r.log.Info("session goes on", s.attributes()...)
	}
	return s, nil
}

// restore adds the session of a state to the registry, unless it is still there.
func (r *Registry) restore(ctx context.Context, state State) (s *Session, known bool, err error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if s := r.sessions[state.ID]; s != nil {
		return s, true, nil
	}
	if r.closed {
		return nil, false, ErrClosed
	}
	s = &Session{
		Info: state.Info, ID: state.ID, Start: time.Unix(0, state.Start),
		registry: r, phase: state.Phase, helper: state.Helper, told: state.Told[max(0, len(state.Told)-maxTold):],
	}
	s.Taps.open, s.Taps.size = state.Tapped, state.Size
	s.ctx, s.cancel = context.WithCancelCause(ctx)
	r.sessions[s.ID] = s
	return s, false, nil
}
