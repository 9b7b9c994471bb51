package remotecommand

import (
	"context"
	"net/http"
	"time"

	"github.com/streamshim/streamshim/pkg/streaming/internal/transport"
)

// sizeLook is how often is looked for input and for the answer to a ping while a size is awaited.
const sizeLook = 5 * time.Millisecond

// firstSize waits a moment for the terminal's size, which clients send at once, so that the command never sees
// a wrong one. A client that sends none is not to cost its user the whole of it: what it sends instead, or its
// answer to our ping, says that a size would have been here. It returns false when the session was frozen meanwhile.
func (s *Session) firstSize(ctx context.Context) bool {
	timeout := s.timer(s.config.FirstSize)
	defer timeout.Stop()
	looks := time.NewTicker(sizeLook)
	defer looks.Stop()
	asked := time.Now()
	if s.client.answersItself {
		s.client.Ping() //nolint:errcheck // a client that has gone is noticed below
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

// followSizes begins to take the sizes that the client of a terminal sends.
func (s *Session) followSizes() {
	if s.request.Command.TTY && s.client.resize != nil {
		s.others.Go(func() { s.terminal.Follow(s.client.resize) })
	}
}

// sendsOtherThanSize reports whether the client has sent input, or, since the ping, anything at all.
func (c *client) sendsOtherThanSize(pinged time.Time) bool {
	if c.sendsSize {
		return false
	}
	if c.stdin != nil && (c.stdin.Received() > 0 || c.stdin.InputEnded()) {
		return true
	}
	return c.answersItself && c.LastReceived().After(pinged)
}

// answersItself reports whether a ping over the request's connection is answered by the client itself, and not by a
// translator, whose client may be far away. Translators speak SPDY to us: the API server, whose request the kubelet
// passes on, or the kubelet. What both have passed on comes from the client.
func answersItself(r *http.Request, overWebSocket bool) bool {
	return overWebSocket || len(transport.CommaSeparated(r.Header, "X-Forwarded-For")) >= 2
}
