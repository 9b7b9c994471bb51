package portforward

import (
	"github.com/streamshim/streamshim/pkg/rescue"
	"github.com/streamshim/streamshim/pkg/session"
	"github.com/streamshim/streamshim/pkg/streaming/internal/lifetime"
	"github.com/streamshim/streamshim/pkg/streaming/internal/transport"
)

// panicked ends a session one of whose goroutines has panicked: its client learns that, as far as the protocol can say
// it. What the goroutine has left, such as a lock, may keep the session from that: its connection is reset after a while.
func (s *Session) panicked(p *rescue.Panic) { lifetime.Panic(s.session, s.terms, s.network, p) }

// crash ends a session whose own goroutine has panicked, wherever it was.
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
