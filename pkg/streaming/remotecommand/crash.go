package remotecommand

import (
	"time"

	"github.com/streamshim/streamshim/pkg/rescue"
	"github.com/streamshim/streamshim/pkg/session"
	"github.com/streamshim/streamshim/pkg/streaming/internal/lifetime"
	"github.com/streamshim/streamshim/pkg/streaming/internal/status"
	"github.com/streamshim/streamshim/pkg/streaming/internal/transport"
)

// crashGrace is how long a session has to tell its client after its own goroutine has panicked.
const crashGrace = 2 * time.Second

// endedBy returns the status for the client of a session that is ended from outside.
func endedBy(outcome session.Outcome) *status.Status {
	if outcome.Reason == lifetime.Panicked {
		return status.InternalError(outcome.Err.Error())
	}
	return status.Ended(outcome.Err.Error())
}

// panicked ends the session after one of its goroutines has panicked. Its client gets a status, and its process is treated
// as if the client had gone. See lifetime.Panic.
func (s *Session) panicked(p *rescue.Panic) { lifetime.Panic(s.session, s.terms, s.client.network, p) }

// crash ends the session after Run's goroutine has panicked, in any phase.
func (s *Session) crash(p *rescue.Panic) session.Outcome {
	s.panicked(p)
	outcome := lifetime.Stopped(s.session.Context())
	over := make(chan struct{})
	rescue.Go(func(p *rescue.Panic) { s.session.Log().Error("the end of a session panics as well", "panic", p.Value) }, func() {
		defer close(over)
		if s.process != nil {
			s.process.Disconnect()
			defer s.process.Close() //nolint:errcheck // the session is over
		}
		s.stopInput()
		if failure := s.failureStream(); failure != nil && !s.ending.said {
			failure.Write(endedBy(outcome).Encode(s.client.protocol.JSONStatus)) //nolint:errcheck // best effort
			failure.CloseWrite()                                                 //nolint:errcheck // as above
			s.cut.by(time.Now().Add(crashGrace))
			s.part()
		}
		s.release()
		s.outputs.Wait()
	})
	if !transport.WaitFor(over, 2*crashGrace) {
		lifetime.Reset(s.client.network)
	}
	s.freezer.end()
	return outcome
}
