package remotecommand

import (
	"time"

	"github.com/streamshim/streamshim/pkg/rescue"
	"github.com/streamshim/streamshim/pkg/session"
	"github.com/streamshim/streamshim/pkg/streaming/internal/lifetime"
	"github.com/streamshim/streamshim/pkg/streaming/internal/status"
	"github.com/streamshim/streamshim/pkg/streaming/internal/transport"
)

// crashGrace is how long a session whose own goroutine has panicked has to tell its client.
const crashGrace = 2 * time.Second

// endedBy is what the client of a session is told that is ended from outside.
func endedBy(outcome session.Outcome) *status.Status {
	if outcome.Reason == lifetime.Panicked {
		return status.InternalError(outcome.Err.Error())
	}
	return status.Ended(outcome.Err.Error())
}

// panicked ends a session one of whose goroutines has panicked: its client gets a status, and its process is treated as
// if the client had gone.
func (s *Session) panicked(p *rescue.Panic) { lifetime.Panic(s.session, s.terms, s.client.network, p) }

// crash ends a session whose own goroutine has panicked, wherever it was.
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
