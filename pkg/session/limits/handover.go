package limits

import (
	"github.com/streamshim/streamshim/pkg/handover"
	"github.com/streamshim/streamshim/pkg/session"
)

// Carried implements session.Carrier.
func (l *Limiter) Carried() string { return "limits" }

// Freeze implements session.Carrier: the session no longer counts.
func (l *Limiter) Freeze(s *session.Session, _ *handover.Files) ([]byte, error) {
	l.Ended(s, session.Frozen)
	return nil, nil
}

// Resume implements session.Carrier: the session counts again, whatever the limits are now.
func (l *Limiter) Resume(s *session.Session, _ []byte, _ *handover.Files) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.countLocked(s)
	return nil
}
