package remotecommand

import (
	"context"
	"errors"
	"fmt"

	"github.com/streamshim/streamshim/pkg/handover"
	"github.com/streamshim/streamshim/pkg/session"
	"github.com/streamshim/streamshim/pkg/streaming/internal/bandwidth"
	"github.com/streamshim/streamshim/pkg/streaming/internal/holdback"
	"github.com/streamshim/streamshim/pkg/streaming/internal/lifetime"
	"github.com/streamshim/streamshim/pkg/streaming/internal/spdy"
	"github.com/streamshim/streamshim/pkg/streaming/internal/transport"
	"github.com/streamshim/streamshim/pkg/streaming/remotecommand/internal/protocol"
	"github.com/streamshim/streamshim/pkg/streaming/remotecommand/internal/relay"
	"github.com/streamshim/streamshim/pkg/streaming/remotecommand/internal/stdin"
	"github.com/streamshim/streamshim/pkg/workload"
)

// CheckState returns why Resume would reject a state, or nil if it finds no reason.
func CheckState(encoded []byte) error {
	var state State
	if err := handover.Decode(encoded, &state); err != nil {
		return err
	}
	if err := state.Client.Conn.Validate(); err != nil {
		return err
	}
	return state.validate()
}

// Resume continues a session where Freeze has left it, for Session.Run. If its state is unknown, or its process cannot be
// resumed, the session tells its client and ends. An error means that the client's connection cannot be resumed. Resume takes
// what the state refers to out of the files.
func Resume(ctx context.Context, encoded []byte, files *handover.Files, live *session.Session, config Config, terms lifetime.Terms) (*Session, error) {
	var envelope struct{ Envelope }
	if err := handover.Decode(encoded, &envelope); err != nil {
		return nil, err
	}
	var state State
	fault := handover.Decode(encoded, &state)
	if fault == nil {
		fault = state.validate()
	}
	if fault != nil {
		state = State{Envelope: envelope.Envelope}
	}
	request := state.Request
	if fault != nil {
		request = requestOf(live, envelope.Client)
	}
	s := newSession(&request, live, config, terms)
	if err := s.resumeClient(&state.Client, files); err != nil {
		return nil, err
	}
	var process Process
	if state.Process != nil {
		var err error
		if process, err = s.resumeProcess(ctx, state.Process, files); err != nil && fault == nil {
			fault = fmt.Errorf("its process: %w", err)
		}
	}
	if fault != nil {
		if process != nil {
			process.Disconnect()
			process.Close() //nolint:errcheck // nobody is left to read it
		}
		live.Log().Error("a session cannot go on after a hand-over", "error", fault)
		state = State{Envelope: Envelope{Version: stateVersion, Client: state.Client}, Request: request}
		state.refuse(fault)
		process = nil
		if !state.Client.Ready {
			state.Phase, state.Ending.Unopened = saying, true
			if s.client.failure == nil {
				state.Phase = over
			}
		}
	}
	s.process = process
	s.restore(&state, files)
	return s, nil
}

// requestOf returns what is known of a request whose state cannot be read.
func requestOf(live *session.Session, client ClientState) Request {
	_, input := client.Streams[transport.StreamStdin]
	_, stdout := client.Streams[transport.StreamStdout]
	_, stderr := client.Streams[transport.StreamStderr]
	return Request{
		Container: workload.Container{Target: live.Target},
		Command:   workload.Command{TTY: live.TTY, Stdin: input, Stdout: stdout, Stderr: stderr},
	}
}

// resumeClient continues the client's connection.
func (s *Session) resumeClient(state *ClientState, files *handover.Files) error {
	s.client = &client{
		protocol: protocol.Version{Name: state.Protocol, Resize: state.Resize, JSONStatus: state.JSONStatus}, ready: make(chan struct{}),
		failureOpened: make(chan workload.Stream, 1), answersItself: state.AnswersItself, sendsSize: state.SendsSize,
	}
	if state.Holdback != nil {
		s.client.holdback = holdback.Resume(*state.Holdback)
	}
	opener := &opener{client: s.client}
	resumed, err := transport.Resume(state.Conn, files, transport.ResumeConfig{SPDY: s.spdyConfig(opener), Channels: s.channelConfig()})
	if err != nil {
		return fmt.Errorf("its client's connection: %w", err)
	}
	s.client.network = resumed.Network
	for name, slot := range s.slots() {
		known, ok := state.Streams[name]
		if !ok {
			continue
		}
		if *slot = resumed.Stream(known.ID); *slot == nil {
			*slot = &transport.EndedStream{Number: known.ID, Moved: [2]int64{known.Received, known.Sent}}
		}
	}
	if state.Ready {
		close(s.client.ready)
	}
	if s.client.failure != nil {
		s.client.failureOpened <- s.client.failure
	}
	if resumed.SPDY == nil {
		s.client.Conn = resumed.Conn
		s.client.closeAndWait = closeHandshake(resumed.Channels)
		return nil
	}
	opener.expected = s.newOpener().expected
	opener.serve(resumed.SPDY)
	if failure, ok := s.client.failure.(*spdy.Stream); ok {
		s.client.statusRefused = failure.Done()
		if !state.Ready && failure.Sent() == 0 {
			s.client.protocol.PromiseStatus(failure) // it was opened while the connection was being frozen
		}
	}
	return nil
}

func (s *Session) resumeProcess(ctx context.Context, state *ProcessState, files *handover.Files) (Process, error) {
	if state.Relay == nil {
		return s.config.Runtime.Resume(ctx, state.Local, files)
	}
	upstream, err := relay.Resume(state.Relay, files, s.terms.Buffers, s.panicked)
	if err != nil {
		return nil, err // a nil *relay.Relay would not be a nil interface
	}
	s.upstream.Store(upstream)
	return upstream, nil
}

// restore restores everything except the connection and the process. It cannot fail.
func (s *Session) restore(state *State, files *handover.Files) {
	s.at, s.deadline = state.Phase, sooner(state.Deadline)
	e := state.Ending
	s.ending = ending{
		outcome: session.Outcome{Reason: e.Reason, ExitCode: e.ExitCode}, status: e.Status, line: e.Line, said: e.Said,
		hold: e.Hold, holding: sooner(e.Holding), stopped: e.Stopped, unopened: e.Unopened, cutsAfterStop: e.WatchesStop,
	}
	if e.Error != "" {
		s.ending.outcome.Err = errors.New(e.Error)
	}
	s.heldInput, _ = files.Take(e.HeldInput, "held input") //nolint:errcheck // then there is none
	s.cut.at = sooner(state.CutAt)
	s.terminal.Resume(state.Terminal)
	if in := state.Input; in != nil {
		in.Since = sooner(in.Since)
		s.input = stdin.Resume(in, files)
	}
	state.Drain.Until = sooner(state.Drain.Until)
	for i := range state.Drain.Outputs {
		state.Drain.Outputs[i].LookUntil = sooner(state.Drain.Outputs[i].LookUntil)
	}
	s.drain.Resume(state.Drain)
	if state.Timeouts != nil {
		s.limits = lifetime.ResumeTimeouts(s.terms.Limits, s.session, *state.Timeouts)
	}
	if s.bandwidth = bandwidth.New(s.terms.Bandwidth, s.client.Done(), s.freezer.frozen); s.bandwidth != nil {
		s.bandwidth.Resume(bandwidth.State{Sent: sooner(state.Bandwidth.Sent), Received: sooner(state.Bandwidth.Received)})
	}
	s.withheld.Store(state.Withheld)
	s.warnings.lines = state.Warnings
}
