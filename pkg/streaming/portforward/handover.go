package portforward

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/streamshim/streamshim/pkg/handover"
	"github.com/streamshim/streamshim/pkg/session"
	"github.com/streamshim/streamshim/pkg/streaming/internal/bandwidth"
	"github.com/streamshim/streamshim/pkg/streaming/internal/lifetime"
	"github.com/streamshim/streamshim/pkg/streaming/internal/transport"
	"github.com/streamshim/streamshim/pkg/workload"
)

// stateVersion is the version of State. A reader of another version rejects it.
const stateVersion = 1

// State is a frozen port-forward.
type State struct {
	Version   int
	Transport transport.State
	Forwarder []byte // Forwarder.State
	Open      []ConnectionState
	Waiting   []WaitingState
	// Legacy says that Open are the ports of the CRI request, without those that have ended.
	Legacy bool

	Received, Sent int64 // by connections that have ended
	// EndReason is why the session ends; Told, that an error stream says it. Of the time that the client has to close, Grace
	// is left.
	EndReason string
	Told      bool
	Grace     time.Duration

	Bandwidth bandwidth.State
	Timeouts  lifetime.TimeoutsState
}

// ConnectionState is one connection into the pod.
type ConnectionState struct {
	Port           uint16
	Data, Failure  uint32 // streams of the transport
	Received, Sent int64  // by the stream of data, for when it is long over
	// Pod is what FrozenConnection.State gave; nil when it could not be carried: then the connection ends. One that has ended
	// has nothing but Unsaid, which is for the error stream.
	Pod    []byte
	Unsaid string
	// OutputEnded says that the pod will say no more; of ports of the CRI request.
	OutputEnded bool
}

// WaitingState is a pair of which one stream has come.
type WaitingState struct {
	ID            string
	Port          uint16
	Data, Failure uint32 // one of them
	Left          time.Duration
}

// reasonNotCarried ends a session that cannot be handed over.
const reasonNotCarried = "not-carried"

// ErrEnded is a session that has ended by itself while it was to be frozen.
var ErrEnded = errors.New("the session has ended")

// Carriable returns why the session cannot be handed over, or nil if no reason is known.
func (s *Session) Carriable() error {
	if err := s.client.Portable(); err != nil {
		return fmt.Errorf("its client's connection: %w", err)
	}
	return nil
}

func notCarried(err error) session.Outcome {
	return session.Outcome{Reason: reasonNotCarried, ExitCode: -1, Err: err}
}

// Freeze stops the session and returns its state for Resume, in this program or the next one. Run then returns
// session.Frozen. It waits only until the connections know what they have moved.
//
// If the error is Carriable's, the session continues. If it is ErrEnded, or says what could not be handed over, Run
// returns how the session ended. So it does when the connections did not stop before the context was done.
func (s *Session) Freeze(ctx context.Context, files *handover.Files) ([]byte, error) {
	if err := s.Carriable(); err != nil {
		return nil, err
	}
	s.client.Freeze()
	s.forwarder.Freeze()
	select {
	case <-s.still:
	case <-s.ended:
		return nil, ErrEnded
	case <-ctx.Done():
		err := fmt.Errorf("the port-forward does not come to a halt: %w", context.Cause(ctx))
		s.client.Discard()
		s.result <- notCarried(err)
		return nil, err
	}
	encoded, err := s.collect(files)
	if err != nil {
		s.discardFrozen()
		s.result <- notCarried(err)
		return nil, err
	}
	s.result <- session.Frozen
	return encoded, nil
}

// isFrozen reports whether the session is being frozen, or is frozen.
func (s *Session) isFrozen() bool { return transport.Closed(s.client.Frozen()) }

// unlessFrozen returns the outcome, or session.Frozen if the session was frozen meanwhile.
func (s *Session) unlessFrozen(outcome session.Outcome) session.Outcome {
	if s.isFrozen() {
		return session.Frozen
	}
	return outcome
}

// stand waits until a frozen session has stopped, and until Freeze has collected its state.
func (s *Session) stand() session.Outcome {
	s.connections.Wait()
	close(s.still)
	outcome := <-s.result
	s.cancel()
	s.stopWaiting()
	s.forwarder.Close() //nolint:errcheck // what goes on has handles of its own
	return outcome
}

// collect takes the session apart. The client's connection comes first: a pod's connection that cannot be carried is reset
// by whoever resumes.
func (s *Session) collect(files *handover.Files) ([]byte, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	state := State{
		Version: stateVersion, Legacy: s.legacyDone != nil, Received: s.received, Sent: s.sent, Told: s.told,
		Bandwidth: s.bandwidth.State(), Timeouts: s.limits.State(),
	}
	if s.endReason != nil {
		state.EndReason, state.Grace = s.endReason.Error(), max(time.Until(s.graceEnds), 0)
	}
	for id, c := range s.waiting {
		c.timeout.Stop()
		state.Waiting = append(state.Waiting, WaitingState{
			ID: id, Port: c.port, Data: transport.StreamID(c.data), Failure: transport.StreamID(c.failure), Left: time.Until(c.expires),
		})
	}
	var err error
	if state.Forwarder, err = s.forwarder.State(files); err != nil {
		s.client.Discard()
		return nil, err
	}
	if state.Transport, err = s.client.State(files); err != nil {
		return nil, err
	}
	for c := range s.open {
		received, sent := transport.Transferred(c.data)
		frozen := ConnectionState{
			Port: c.port, Data: transport.StreamID(c.data), Failure: transport.StreamID(c.failure),
			Received: received, Sent: sent, OutputEnded: c.outputOver.Load(), Unsaid: c.unsaid,
		}
		if c.frozen != nil {
			if frozen.Pod, err = c.frozen.State(files); err != nil {
				s.session.Log().Error("a forwarded connection is not carried over", "port", c.port, "error", err)
			}
			c.frozen = nil
		}
		state.Open = append(state.Open, frozen)
	}
	return handover.Encode(state)
}

// discardFrozen resets the connections of a session that does not go on.
func (s *Session) discardFrozen() {
	s.mu.Lock()
	defer s.mu.Unlock()
	for c := range s.open {
		if c.frozen != nil {
			c.frozen.Discard()
			c.frozen = nil
		}
	}
}

// CheckState returns why this program could not resume a state, as far as that can be known without changing anything.
func CheckState(encoded []byte) error {
	state, err := decode(encoded)
	if err != nil {
		return err
	}
	return state.Transport.Validate()
}

var errBadState = errors.New("state of a port-forward that cannot be read")

func decode(encoded []byte) (state State, err error) {
	if err := handover.Decode(encoded, &state); err != nil {
		return state, fmt.Errorf("%w: %w", errBadState, err)
	}
	if state.Version != stateVersion {
		return state, fmt.Errorf("%w: version %d, only %d is known", errBadState, state.Version, stateVersion)
	}
	for _, c := range state.Open {
		if c.Port == 0 {
			return state, fmt.Errorf("%w: a connection without a port", errBadState)
		}
	}
	if len(state.Waiting) > maxWaiting {
		return state, fmt.Errorf("%w: %d streams wait", errBadState, len(state.Waiting))
	}
	return state, nil
}

// Resume returns the session of a state, for Session.Run. If the pod cannot be taken over, or the version of the state is
// unknown, Run tells the client. An error means that the client's connection cannot be taken over either.
func Resume(encoded []byte, files *handover.Files, live *session.Session, config Config, terms lifetime.Terms) (*Session, error) {
	state, unknown := decode(encoded)
	if unknown != nil && state.Transport.Version == 0 {
		return nil, unknown
	}
	s := newSession(config, live, terms)
	client, err := transport.Resume(state.Transport, files, transport.ResumeConfig{SPDY: s.spdyConfig(), Channels: s.channelsConfig()})
	if err != nil {
		return nil, err
	}
	s.client, s.network = client.Conn, client.Network
	if client.Channels != nil {
		s.useChannels(client.Channels)
	}
	if s.forwarder, err = config.Pods.ResumeForwarder(state.Forwarder, files); unknown != nil || err != nil {
		s.giveUp(cmp.Or(unknown, err))
	}
	s.resumed = &state.Timeouts
	s.received, s.sent, s.told = state.Received, state.Sent, state.Told
	if state.EndReason != "" { // otherwise all of its grace is still to come
		s.endReason, s.grace = errors.New(state.EndReason), state.Grace
	}
	s.limitBandwidth()
	s.bandwidth.Resume(state.Bandwidth)
	s.resumeConnections(state, client, files)
	return s, nil
}

// giveUp makes Run tell the client that the session ends.
func (s *Session) giveUp(reason error) {
	s.session.Log().Error("a port-forward cannot be taken over", "error", reason)
	s.session.Stop(&session.EndError{Reason: reasonNotCarried, Message: "the port-forward was ended because it could not go on through an upgrade of streamshim"})
	if s.forwarder != nil {
		s.forwarder.Close() //nolint:errcheck // of no use
	}
	s.forwarder = noForwarder{reason}
}

// noStream is the id of a stream of a pair that has not come.
const noStream = 0

// resumeConnections recreates the connections that Run continues, and takes what was handed over of them.
func (s *Session) resumeConnections(state State, client *transport.Resumed, files *handover.Files) {
	stream := func(id uint32, received, sent int64) workload.Stream {
		if stream := client.Stream(id); stream != nil {
			return stream
		}
		return &transport.EndedStream{Number: noStream, Moved: [2]int64{received, sent}, Cause: errStreamOver}
	}
	for _, frozen := range state.Open {
		c := &connection{port: frozen.Port, data: stream(frozen.Data, frozen.Received, frozen.Sent), failure: stream(frozen.Failure, 0, 0)}
		c.outputOver.Store(frozen.OutputEnded)
		if c.unsaid = frozen.Unsaid; c.unsaid == "" {
			c.proceed = s.forwarder.Continue(frozen.Pod, files, c.port, s.forwarded(c))
		}
		s.open[c] = struct{}{}
		if state.Legacy {
			s.legacy = append(s.legacy, c)
		} else {
			s.begun = append(s.begun, c)
		}
	}
	s.isLegacy = state.Legacy
	s.mu.Lock() // the time of the first may be over at once
	defer s.mu.Unlock()
	for _, waiting := range state.Waiting {
		c := &connection{port: waiting.Port}
		if waiting.Data != noStream {
			c.data = stream(waiting.Data, 0, 0)
		}
		if waiting.Failure != noStream {
			c.failure = stream(waiting.Failure, 0, 0)
		}
		s.wait(waiting.ID, c, max(waiting.Left, 0))
	}
}

// errStreamOver is the error of a stream that had ended before the session was resumed.
var errStreamOver = errors.New("the stream was ended by the client before a hand-over")

// noForwarder replaces the Forwarder of a pod that could not be taken over.
type noForwarder struct{ err error }

func (f noForwarder) Forward(_ context.Context, _ uint16, stream workload.Stream) (sent, received int64, err error) {
	stream.Reset() //nolint:errcheck // the client sees the reset
	return 0, 0, f.err
}

func (f noForwarder) Continue(_ []byte, _ *handover.Files, port uint16, stream workload.Stream) func(context.Context) (sent, received int64, err error) {
	return func(ctx context.Context) (sent, received int64, err error) { return f.Forward(ctx, port, stream) }
}

func (noForwarder) Freeze()                                 {}
func (f noForwarder) State(*handover.Files) ([]byte, error) { return nil, f.err }
func (noForwarder) Gone() <-chan struct{}                   { return nil }
func (noForwarder) Close() error                            { return nil }
