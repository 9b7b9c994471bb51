package remotecommand

import (
	"context"
	"net/http"
	"time"

	"github.com/streamshim/streamshim/pkg/streaming/internal/transport"
)

// sizeLook is how often firstSize checks for input and for the answer to a ping.
const sizeLook = 5 * time.Millisecond

// firstSize waits a moment for the terminal's size, so that the command never sees a wrong one. Clients send the size at
// once. For a client that sends none the wait is shorter: its first input, or its answer to our ping, shows that a size
// would have arrived by then. firstSize returns false if the session was frozen meanwhile.
func (s *Session) firstSize(ctx context.Context) bool {
	timeout := s.timer(s.config.FirstSize)
	defer timeout.Stop()
	looks := time.NewTicker(sizeLook)
	defer looks.Stop()
	asked := time.Now()
	if s.client.answersItself {
		s.client.Ping() //nolint:errcheck // the loop notices a client that has gone
	}
	for ticks := looks.C; ; {
		select {
		case <-s.terminal.Known():
		case <-timeout.C:
		case <-s.client.Done():
		case <-ctx.Done():
		case <-s.freezer.frozen:
			return false
		case <-ticks:
			if s.client.sendsOtherThanSize(asked) {
				ticks = nil
				if sooner := time.Now().Add(s.config.SizeSlack); sooner.Before(s.deadline) {
					s.deadline = sooner
				}
				timeout.Reset(max(0, time.Until(s.deadline)))
			}
			continue
		}
		return true
	}
}

// followSizes starts to read the sizes that the client of a terminal sends.
func (s *Session) followSizes() {
	if s.request.Command.TTY && s.client.resize != nil {
		s.others.Go(func() { s.terminal.Follow(s.client.resize) })
	}
}

// sendsOtherThanSize reports whether the client has sent input, or anything after the ping.
func (c *client) sendsOtherThanSize(pinged time.Time) bool {
	if c.sendsSize {
		return false
	}
	if c.stdin != nil && (c.stdin.Received() > 0 || c.stdin.InputEnded()) {
		return true
	}
	return c.answersItself && c.LastReceived().After(pinged)
}

// answersItself reports whether the client itself answers a ping, and not a translator, whose client may be far away.
// Translators speak SPDY to us. The translator is either the API server, whose request the kubelet forwards, or the kubelet.
// If both have forwarded the request, it is the client's own.
func answersItself(r *http.Request, overWebSocket bool) bool {
	return overWebSocket || len(transport.CommaSeparated(r.Header, "X-Forwarded-For")) >= 2
}
