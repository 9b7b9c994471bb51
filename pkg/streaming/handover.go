package streaming

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"net"
	"runtime"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/streamshim/streamshim/pkg/handover"
	"github.com/streamshim/streamshim/pkg/rescue"
	"github.com/streamshim/streamshim/pkg/session"
	"github.com/streamshim/streamshim/pkg/streaming/internal/lifetime"
	"github.com/streamshim/streamshim/pkg/streaming/internal/transport"
	"github.com/streamshim/streamshim/pkg/streaming/portforward"
	"github.com/streamshim/streamshim/pkg/streaming/remotecommand"
)

// stateVersion is the version of State. A reader of another version rejects it.
const stateVersion = 1

// State is what a Server hands over, encoded as CBOR. Each session is encoded separately, so that one that cannot be
// read does not affect the others.
type State struct {
	Version  int
	Tokens   []TokenState
	Sessions []SessionState
}

// TokenState is a URL that was issued and not opened yet.
type TokenState struct {
	Token   string
	Kind    session.Kind
	Left    time.Duration          // until it expires
	Command *remotecommand.Request // of an exec or attach
	Forward *portforward.Request   // of a port-forward
}

// SessionState is one session.
type SessionState struct {
	ID        string // also in Live; for a program that cannot read that
	Kind      session.Kind
	Live      []byte              // session.State as CBOR
	State     []byte              // the State of the package that serves the kind, as CBOR
	Limits    lifetime.Limits     // as they were when the session began
	Bandwidth int64               // as above
	Network   handover.Descriptor // the client's connection, to close it if the rest cannot be read
}

// requestGrace is how long a freeze waits for requests that are being read or answered.
const requestGrace = 250 * time.Millisecond

// panickedGrace is how long a freeze waits for the end of sessions that have panicked.
const panickedGrace = 500 * time.Millisecond

// reasonNotCarried ends a session that cannot be handed over.
const reasonNotCarried = "not-carried"

func errNotCarried(err error) *session.EndError {
	return &session.EndError{
		Reason:  reasonNotCarried,
		Message: fmt.Sprintf("the session was ended because streamshim is being upgraded and it cannot be carried over: %v", err),
	}
}

// Pausable is a listener that can leave new connections in its queue.
type Pausable interface {
	net.Listener
	// Pause stops Accept. After it has returned, Accept returns no connection until Resume.
	Pause()
	Resume()
	// Keep adds the listener's descriptor to the files.
	Keep(*handover.Files) (handover.Descriptor, error)
}

// listen sets the listener that Serve uses.
func (s *Server) listen(listener net.Listener) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.listener = listener
}

// pausable returns the listener that Serve uses, or false if it cannot be paused or is not open.
func (s *Server) pausable() (Pausable, bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	listener, ok := s.listener.(Pausable)
	return listener, ok && !s.deaf
}

// KeepListener adds the descriptor of the listener that Serve uses now. After a failure it is not the one that was
// passed to Serve. The error is ErrNotListening if there is no listener, or one that is not a Pausable.
func (s *Server) KeepListener(files *handover.Files) (handover.Descriptor, error) {
	listener, ok := s.pausable()
	if !ok {
		return 0, ErrNotListening
	}
	return listener.Keep(files)
}

// Freeze stops the server and returns its state for Resume, in this program or the next one. It pauses the listener, so
// that new connections wait in the listener's queue. It waits for a moment for requests that are being served, and until
// the context ends for commands that are being started. Then it freezes all sessions at once.
//
// A client whose request is not complete by then waits, as does one that sends another request on an open connection.
// Their connections end without a response when the next program takes over.
//
// A session that cannot be handed over ends, with a status that says so. An error means that not all sessions could be
// frozen in time. Then everything continues as before.
func (s *Server) Freeze(ctx context.Context, files *handover.Files) ([]byte, error) {
	states, err := s.freeze(ctx, files)
	if err == nil {
		var encoded []byte
		rescue.Call(func(p *rescue.Panic) { err = p }, func() {
			encoded, err = handover.Encode(State{Version: stateVersion, Tokens: s.tokens.state(), Sessions: states})
		})
		if err == nil {
			return encoded, nil
		}
	}
	s.resumeSessions(states, files)
	s.thaw()
	return nil, fmt.Errorf("freeze the streaming server: %w", err)
}

func (s *Server) freeze(ctx context.Context, files *handover.Files) ([]SessionState, error) {
	if listener, ok := s.pausable(); ok {
		listener.Pause()
	}
	waitOr(ctx, s.plain.quiet(), requestGrace)
	passed := make(chan struct{})
	s.mu.Lock()
	s.thawed = make(chan struct{})
	if s.passing == 0 {
		close(passed)
	} else {
		s.passed = passed
	}
	s.mu.Unlock()
	select {
	case <-passed:
	case <-ctx.Done():
		return nil, fmt.Errorf("requests are still being served: %w", context.Cause(ctx))
	}
	if err := s.awaitStarts(ctx); err != nil {
		return nil, err
	}
	s.mu.Lock()
	s.frozen = handover.Now()
	s.mu.Unlock()
	return s.freezeSessions(ctx, files)
}

// Frozen returns when the last Freeze began to freeze sessions, after its waits.
func (s *Server) Frozen() handover.Instant {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.frozen
}

// awaitStarts waits until no session is starting its command, so that no frozen session waits for another one's start.
func (s *Server) awaitStarts(ctx context.Context) error {
	for _, each := range s.all() {
		if starting, ok := each.running.(interface{ AwaitStarted(context.Context) error }); ok && !each.terms.Fault.Happened() {
			if err := starting.AwaitStarted(ctx); err != nil {
				return fmt.Errorf("session %s: %w", each.live.ID, err)
			}
		}
	}
	return nil
}

// all returns the sessions that are served now.
func (s *Server) all() []*served {
	s.mu.Lock()
	defer s.mu.Unlock()
	all := make([]*served, 0, len(s.served))
	for each := range s.served {
		all = append(all, each)
	}
	return all
}

// Carriable returns how many sessions could be handed over now, and those that could not. It changes nothing.
func (s *Server) Carriable() (carried int, refused []Refusal) {
	for _, each := range s.all() {
		if err := each.running.Carriable(); err != nil {
			refused = append(refused, Refusal{each.live.ID, each.live.Kind, err})
		} else {
			carried++
		}
	}
	return carried, refused
}

// Refusal is a session that cannot be handed over, with the reason.
type Refusal struct {
	ID   string
	Kind session.Kind
	Err  error
}

func (r Refusal) String() string {
	return fmt.Sprintf("%s %s: %v", cmp.Or(r.ID, "unknown"), r.Kind, r.Err)
}

// EndUncarried ends the sessions whose ids are in reasons, with a status that gives the reason why they cannot be
// handed over. It waits until they have ended or the context is done.
func (s *Server) EndUncarried(ctx context.Context, reasons map[string]string) {
	var ending []*served
	for _, each := range s.all() {
		if reason, ok := reasons[each.live.ID]; ok {
			each.live.Stop(errNotCarried(errors.New(reason)))
			ending = append(ending, each)
		}
	}
	for _, each := range ending {
		select {
		case <-each.done:
		case <-ctx.Done():
			return
		}
	}
}

// CheckState returns how many sessions of a state this program could take over, and those that it could not. It does not
// touch what the state refers to. An error means that the state cannot be read at all.
func CheckState(encoded []byte) (carried int, refused []Refusal, err error) {
	state, err := decode(encoded)
	if err != nil {
		return 0, nil, err
	}
	errs := make([]error, len(state.Sessions))
	onAllCPUs(len(errs), func(i int) { errs[i] = state.Sessions[i].check() })
	for i, each := range state.Sessions {
		if errs[i] != nil {
			refused = append(refused, Refusal{each.ID, each.Kind, errs[i]})
		} else {
			carried++
		}
	}
	return carried, refused, nil
}

func errKind(a, b session.Kind) error {
	return fmt.Errorf("it is said to be of the kinds %q and %q", a, b)
}

func (state *SessionState) check() error {
	var live session.State
	if err := handover.Decode(state.Live, &live); err != nil {
		return err
	}
	if err := live.Validate(); err != nil {
		return err
	}
	switch {
	case live.Info.Kind != state.Kind:
		return errKind(state.Kind, live.Info.Kind)
	case state.Kind == session.PortForward:
		return portforward.CheckState(state.State)
	case state.Kind == session.Exec, state.Kind == session.Attach:
		return remotecommand.CheckState(state.State)
	}
	return fmt.Errorf("sessions of the kind %q are not carried", state.Kind)
}

// thaw lets requests and connections continue.
func (s *Server) thaw() {
	s.mu.Lock()
	if s.thawed != nil {
		close(s.thawed)
		s.thawed = nil
	}
	s.mu.Unlock()
	if listener, ok := s.pausable(); ok {
		listener.Resume()
	}
}

// freezeSessions freezes all sessions at once and returns the states of those that are frozen. The error names those that
// could not be frozen in time.
func (s *Server) freezeSessions(ctx context.Context, files *handover.Files) ([]SessionState, error) {
	var (
		mu     sync.Mutex
		states []SessionState
		errs   []error
	)
	freeze := rescue.Group{Report: func(p *rescue.Panic) {
		s.config.Log.Error("the freeze of a session has panicked", "panic", p.Value, "stack", string(p.Stack))
		mu.Lock()
		defer mu.Unlock()
		errs = append(errs, p)
	}}
	for _, each := range s.all() {
		freeze.Go(func() {
			state, err := s.freezeSession(ctx, each, files)
			mu.Lock()
			defer mu.Unlock()
			if err != nil {
				errs = append(errs, err)
			} else if state != nil {
				states = append(states, *state)
			}
		})
	}
	freeze.Wait()
	return states, errors.Join(errs...)
}

// freezeSession returns the state of a session, or nil if the session has ended instead. It returns an error only when the
// context is done.
func (s *Server) freezeSession(ctx context.Context, each *served, files *handover.Files) (state *SessionState, err error) {
	if !each.terms.Fault.Happened() {
		rescue.Call(each.reportPanic, func() { state, err = s.freezeSound(ctx, each, files) })
	}
	if state != nil || !each.terms.Fault.Happened() {
		return state, err
	}
	// It may never come to a point where it could be frozen, and its end may wait for a lock that was left.
	ended := make(chan struct{})
	rescue.Go(each.reportPanic, func() {
		defer close(ended)
		s.awaitEnd(each, panickedGrace)
	})
	select {
	case <-ended:
	case <-ctx.Done():
	}
	return nil, nil
}

// freezeSound is freezeSession for a session none of whose goroutines has panicked.
func (s *Server) freezeSound(ctx context.Context, each *served, files *handover.Files) (*SessionState, error) {
	state, err := each.freeze(ctx, files)
	if err == nil {
		<-each.done
		if !each.outcome.Frozen() {
			return nil, nil
		}
		return state, nil
	}
	if transport.Closed(each.done) {
		if each.outcome.Frozen() {
			s.endUncarried(each, err)
		}
		return nil, nil
	}
	if ctx.Err() != nil {
		return nil, fmt.Errorf("session %s could not be frozen in time: %w", each.live.ID, err)
	}
	each.live.Stop(errNotCarried(err))
	select {
	case <-each.done:
		return nil, nil
	case <-ctx.Done():
		return nil, fmt.Errorf("session %s, which cannot be carried (%w), did not end in time", each.live.ID, err)
	}
}

// endUncarried ends a frozen session that has no state to resume.
func (s *Server) endUncarried(each *served, err error) {
	each.running.Close() //nolint:errcheck // its client learns no more than that
	each.live.End(session.Outcome{Reason: reasonNotCarried, ExitCode: -1, Err: err})
}

// freeze returns the state of a session. After an error the session continues, or has ended.
func (each *served) freeze(ctx context.Context, files *handover.Files) (_ *SessionState, err error) {
	if err := each.running.Carriable(); err != nil {
		return nil, err
	}
	state := &SessionState{ID: each.live.ID, Kind: each.live.Kind, Limits: each.terms.Limits, Bandwidth: each.terms.Bandwidth}
	if socket, ok := each.running.Network().(syscall.Conn); ok {
		state.Network, _ = files.Keep(socket) //nolint:errcheck // it may be closed already, because the client has gone
	}
	if state.State, err = each.running.Freeze(ctx, files); err != nil {
		state.release(files)
		return nil, err
	}
	state.Live, err = handover.Encode(each.live.Freeze(files))
	return state, err
}

// release closes the descriptor that is needed only if the rest of the state cannot be read.
func (state *SessionState) release(files *handover.Files) {
	if file, err := files.Take(state.Network, "connection"); err == nil {
		file.Close() //nolint:errcheck // a duplicate
	}
}

// Resume continues from the state, in the server that was frozen or in a new one. It returns how many sessions continue
// and how many had to end instead. An error means that the state cannot be read at all.
func (s *Server) Resume(encoded []byte, files *handover.Files) (carried, ended int, err error) {
	state, err := decode(encoded)
	if err != nil {
		return 0, 0, err
	}
	s.tokens.restore(state.Tokens)
	carried, ended = s.resumeSessions(state.Sessions, files)
	s.thaw()
	return carried, ended, nil
}

func decode(encoded []byte) (State, error) {
	var state State
	if err := handover.Decode(encoded, &state); err != nil {
		return State{}, fmt.Errorf("streaming server: %w", err)
	}
	if state.Version != stateVersion {
		return State{}, fmt.Errorf("streaming server: the state has version %d, only %d is known", state.Version, stateVersion)
	}
	return state, nil
}

func (s *Server) resumeSessions(states []SessionState, files *handover.Files) (carried, ended int) {
	var failed atomic.Int64
	onAllCPUs(len(states), func(i int) {
		state := states[i]
		if err := s.resumeSession(state, files); err != nil {
			s.config.Log.Error("a session could not be taken over", "kind", state.Kind, "error", err)
			state.hangUp(files)
			failed.Add(1)
			return
		}
		state.release(files)
	})
	ended = int(failed.Load())
	return len(states) - ended, ended
}

// onAllCPUs calls f for each number below n, at the same time on all CPUs: the sessions stand still meanwhile.
func onAllCPUs(n int, f func(i int)) {
	var next atomic.Int64
	group := rescue.Group{Report: rescue.Die}
	for range min(n, runtime.GOMAXPROCS(0)) {
		group.Go(func() {
			for i := int(next.Add(1)) - 1; i < n; i = int(next.Add(1)) - 1 {
				f(i)
			}
		})
	}
	group.Wait()
}

// hangUp resets the connection of a session that could not be taken over. After an orderly close the client could think
// that it has seen all output.
func (state SessionState) hangUp(files *handover.Files) {
	conn, err := files.TakeConn(state.Network)
	if err != nil {
		return // it was not kept, or has been closed
	}
	if tcp, ok := conn.(*net.TCPConn); ok {
		tcp.SetLinger(0) //nolint:errcheck // it is closed either way
	}
	conn.Close() //nolint:errcheck // as above
}

// resumeSession resumes one session. After an error it has ended.
func (s *Server) resumeSession(state SessionState, files *handover.Files) error {
	var frozen session.State
	if err := handover.Decode(state.Live, &frozen); err != nil {
		return err
	}
	if frozen.Info.Kind != state.Kind {
		return errKind(state.Kind, frozen.Info.Kind)
	}
	live, err := s.config.Sessions.Resume(s.ctx, frozen, files)
	if err != nil {
		return err
	}
	terms := s.shared()
	terms.Limits, terms.Bandwidth = state.Limits, state.Bandwidth
	var resumed running
	rescue.Call(func(p *rescue.Panic) {
		live.Log().Error("the resume of a session has panicked", "panic", p.Value, "stack", string(p.Stack))
		err = p
	}, func() { resumed, err = s.resumeRunning(live, state.State, files, terms) })
	if err != nil {
		terms.Buffers.Close()
		live.End(session.Outcome{Reason: reasonNotCarried, ExitCode: -1, Err: err})
		return fmt.Errorf("session %s: %w", live.ID, err)
	}
	s.run(live, resumed, terms)
	return nil
}

// resumeRunning passes a state to the package that serves its kind of session.
func (s *Server) resumeRunning(live *session.Session, state []byte, files *handover.Files, terms lifetime.Terms) (running, error) {
	switch live.Kind {
	case session.Exec, session.Attach:
		resumed, err := remotecommand.Resume(s.ctx, state, files, live, s.config.Commands, terms)
		if err != nil {
			return nil, err // a nil *Session would not be a nil interface
		}
		return resumed, nil
	case session.PortForward:
		resumed, err := portforward.Resume(state, files, live, s.config.PortForwards, terms)
		if err != nil {
			return nil, err // as above
		}
		return resumed, nil
	default:
		return nil, fmt.Errorf("sessions of the kind %q are not carried", live.Kind)
	}
}
