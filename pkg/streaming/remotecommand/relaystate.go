package remotecommand

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

// relayStateVersion is relayState.Version.
const relayStateVersion = 1

// relayState is a relay that was frozen. Streams are 0 where there is none.
type relayState struct {
	Version        int
	Conn           transport.State
	Stdin, Resize  uint32
	Failure        uint32
	JSONStatus     bool // of the protocol
	Grace          time.Duration
	Stdout, Stderr *relayOutputState
	LastOutput     int64 // ns since 1970
	Detaching      int64 // as above
	Detached       bool
	Message        []byte         // of the error stream
	Result         *status.Status // nil before the end
}

// relayOutputState is a stream of output; Skip is nil where the client's pace is the command's.
type relayOutputState struct {
	Stream uint32
	Skip   *skipState
}

// freeze ends all waiting for the upstream.
func (r *relay) freeze() {
	r.freezeOnce.Do(func() {
		close(r.frozen)
		r.wire.Freeze()
		for _, o := range []*relayOutput{r.stdout, r.stderr} {
			if o != nil && o.skip != nil {
				o.skip.freeze()
			}
		}
	})
}

// Freeze implements Process.
func (r *relay) Freeze(files *handover.Files) ([]byte, error) {
	r.freeze()
	r.upstream.Wait()
	id := func(s *spdy.Stream) uint32 {
		if s == nil {
			return 0
		}
		return s.ID()
	}
	output := func(o *relayOutput) *relayOutputState {
		if o == nil {
			return nil
		}
		state := &relayOutputState{Stream: id(o.stream)}
		if o.skip != nil {
			state.Skip = o.skip.state()
		}
		return state
	}
	state := relayState{
		Version: relayStateVersion, Stdin: id(r.stdin), Resize: id(r.resize), Failure: id(r.failure), JSONStatus: r.jsonStatus,
		Grace: r.stdinGrace, Stdout: output(r.stdout), Stderr: output(r.stderr), LastOutput: r.lastOutput.Load(),
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

// Discard implements Process: the connection was closed when its state was taken.
func (r *relay) Discard() {}

// resumeRelay goes on with a relay, whose connection is served at once.
func resumeRelay(encoded []byte, files *handover.Files, buffers *buffers.Share, report rescue.Report) (*relay, error) {
	var state relayState
	if err := handover.Decode(encoded, &state); err != nil {
		return nil, err
	}
	if state.Version != relayStateVersion {
		return nil, fmt.Errorf("the state of a relay has version %d, only %d is known", state.Version, relayStateVersion)
	}
	for _, o := range []*relayOutputState{state.Stdout, state.Stderr} {
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

func (r *relay) resumeOutput(state *relayOutputState, stream func(uint32) *spdy.Stream) *relayOutput {
	if state == nil {
		return nil
	}
	o := &relayOutput{stream: stream(state.Stream)}
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
