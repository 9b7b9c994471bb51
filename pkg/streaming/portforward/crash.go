package portforward

import (
	"github.com/streamshim/streamshim/pkg/rescue"
	"github.com/streamshim/streamshim/pkg/session"
	"github.com/streamshim/streamshim/pkg/streaming/internal/lifetime"
	"github.com/streamshim/streamshim/pkg/streaming/internal/transport"
)

// panicked ends the session after one of its goroutines has panicked, and tells the client as far as the protocol can.
// See lifetime.Panic.
func (s *Session) panicked(p *rescue.Panic) { lifetime.Panic(s.session, s.terms, s.network, p) }

// crash ends the session after Run's goroutine has panicked.
func (s *Session) crash(p *rescue.Panic) session.Outcome {
	s.panicked(p)
	again := func(p *rescue.Panic) { s.session.Log().Error("the end of a session panics as well", "panic", p.Value) }
	rescue.Call(again, func() {
		s.cancel()
		s.client.Close() //nolint:errcheck // the session is over
		s.stopWaiting()
		s.connections.Wait()
		s.forwarder.Close() //nolint:errcheck // as above
	})
	if !transport.Closed(s.ended) {
		close(s.ended)
	}
	return lifetime.Stopped(s.session.Context())
}
