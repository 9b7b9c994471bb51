package relay

import (
	"errors"
	"fmt"
	"time"

	"github.com/streamshim/streamshim/pkg/handover"
	"github.com/streamshim/streamshim/pkg/rescue"
	"github.com/streamshim/streamshim/pkg/streaming/buffers"
	"github.com/streamshim/streamshim/pkg/streaming/internal/spdy"
	"github.com/streamshim/streamshim/pkg/streaming/internal/status"
	"github.com/streamshim/streamshim/pkg/streaming/internal/transport"
)

// stateVersion is relayState.Version.
const stateVersion = 1

// relayState is a frozen relay. A stream that does not exist is 0.
type relayState struct {
	Version        int
	Conn           transport.State
	Stdin, Resize  uint32
	Failure        uint32
	JSONStatus     bool // of the protocol
	Grace          time.Duration
	Stdout, Stderr *outputState
	LastOutput     int64 // ns since 1970
	Detaching      int64 // as above
	Detached       bool
	Message        []byte         // of the error stream
	Result         *status.Status // nil before the end
}

// outputState is a stream of output. Skip is nil if Options.Buffer was 0.
type outputState struct {
	Stream uint32
	Skip   *skipState
}

// Halt ends all waits for the upstream. Reads from the streams then return handover.ErrFrozen. It may be called more than
// once. Freeze follows.
func (r *Relay) Halt() {
	r.freezeOnce.Do(func() {
		close(r.frozen)
		r.wire.Freeze()
		for _, o := range []*output{r.stdout, r.stderr} {
			if o != nil && o.skip != nil {
				o.skip.freeze()
			}
		}
	})
}

// Freeze implements remotecommand.Process.
func (r *Relay) Freeze(files *handover.Files) ([]byte, error) {
	r.Halt()
	r.upstream.Wait()
	id := func(s *spdy.Stream) uint32 {
		if s == nil {
			return 0
		}
		return s.ID()
	}
	collect := func(o *output) *outputState {
		if o == nil {
			return nil
		}
		state := &outputState{Stream: id(o.stream)}
		if o.skip != nil {
			state.Skip = o.skip.state()
		}
		return state
	}
	state := relayState{
		Version: stateVersion, Stdin: id(r.stdin), Resize: id(r.resize), Failure: id(r.failure), JSONStatus: r.jsonStatus,
		Grace: r.stdinGrace, Stdout: collect(r.stdout), Stderr: collect(r.stderr), LastOutput: r.lastOutput.Load(),
		Detaching: r.detaching.Load(), Detached: r.detached.Load(), Message: r.message,
	}
	if transport.Closed(r.exited) {
		state.Result = r.result
	}
	var err error
	if state.Conn, err = r.wire.State(files); err != nil {
		return nil, fmt.Errorf("the connection to the container runtime's streaming server: %w", err)
	}
	return handover.Encode(state)
}

// Discard implements remotecommand.Process. It does nothing, because Freeze has closed the connection.
func (r *Relay) Discard() {}

// Resume continues a frozen relay and serves its connection at once. It returns an error if the state cannot be read.
func Resume(encoded []byte, files *handover.Files, buffers *buffers.Share, report rescue.Report) (*Relay, error) {
	var state relayState
	if err := handover.Decode(encoded, &state); err != nil {
		return nil, err
	}
	if state.Version != stateVersion {
		return nil, fmt.Errorf("the state of a relay has version %d, only %d is known", state.Version, stateVersion)
	}
	for _, o := range []*outputState{state.Stdout, state.Stderr} {
		if o != nil && o.Skip != nil && (o.Skip.Max <= 0 || o.Skip.Skipped < 0) {
			return nil, errors.New("the state of a relay has an impossible buffer")
		}
	}
	resumed, err := transport.Resume(state.Conn, files, transport.ResumeConfig{SPDY: spdy.Config{Room: buffers, OnPanic: report}})
	if err != nil {
		return nil, fmt.Errorf("the connection to the container runtime's streaming server: %w", err)
	}
	if resumed.SPDY == nil {
		resumed.Conn.Freeze()
		resumed.Conn.Discard()
		return nil, errors.New("the state of a relay has a connection that is not SPDY")
	}
	r := newRelay(resumed.SPDY, resumed.Network, buffers, report)
	stream := func(id uint32) *spdy.Stream {
		s, _ := resumed.Stream(id).(*spdy.Stream)
		return s
	}
	r.stdin, r.resize, r.failure = stream(state.Stdin), stream(state.Resize), stream(state.Failure)
	r.jsonStatus, r.stdinGrace, r.message, r.result = state.JSONStatus, state.Grace, state.Message, state.Result
	r.lastOutput.Store(state.LastOutput)
	r.detaching.Store(state.Detaching)
	r.detached.Store(state.Detached)
	r.serve()
	r.stdout, r.stderr = r.resumeOutput(state.Stdout, stream), r.resumeOutput(state.Stderr, stream)
	switch {
	case r.result != nil:
		close(r.exited)
	case r.failure == nil:
		r.result = r.readResult(errors.New("its error stream has ended"))
		close(r.exited)
	default:
		r.followStatus()
	}
	if state.Detaching != 0 && !transport.Closed(r.exited) && r.stdin != nil {
		r.startDetaching()
	}
	return r, nil
}

func (r *Relay) resumeOutput(state *outputState, stream func(uint32) *spdy.Stream) *output {
	if state == nil {
		return nil
	}
	o := &output{stream: stream(state.Stream)}
	if state.Skip == nil {
		return o
	}
	o.skip = resumeSkipBuffer(state.Skip, r.buffers)
	if o.stream == nil {
		o.skip.end()
	} else if !state.Skip.Ended {
		r.fill(o)
	}
	return o
}
