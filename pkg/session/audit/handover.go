package audit

import (
	"context"
	"fmt"
	"slices"
	"time"

	"github.com/streamshim/streamshim/pkg/handover"
	"github.com/streamshim/streamshim/pkg/session"
)

// State is a Log's state in a hand-over.
type State struct {
	Lost int64 // records lost and not yet noted in the log
}

// Carried implements session.Carrier.
func (l *Log) Carried() string { return "audit" }

// Freeze implements session.Carrier. All that is kept of a session is its file in Config.OpenDir, so a program
// that is killed after a hand-over leaves an open session like any other.
func (l *Log) Freeze(*session.Session, *handover.Files) ([]byte, error) { return nil, nil }

// Resume implements session.Carrier: Settle will not end the session.
func (l *Log) Resume(s *session.Session, _ []byte, _ *handover.Files) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.unclaimed = slices.DeleteFunc(l.unclaimed, func(r *Record) bool { return r.Session == s.ID })
	return nil
}

// FreezeLog waits until all records are written, and synced if Config.Fsync says so, and returns the state for
// Settle. Call it after all sessions were frozen. What is logged afterwards is logged as usual.
func (l *Log) FreezeLog(ctx context.Context) ([]byte, error) {
	settled := make(chan settlement, 1)
	if err := l.put(entry{settled: settled}); err != nil {
		return nil, fmt.Errorf("audit log: %w", err)
	}
	select {
	case s := <-settled:
		if s.err != nil {
			return nil, fmt.Errorf("audit log: %w", s.err)
		}
		return handover.Encode(State{Lost: s.lost})
	case <-ctx.Done():
		return nil, fmt.Errorf("audit records are still being written: %w", context.Cause(ctx))
	}
}

// Settle continues from the state of another program's log, nil if there was none. Call it after all sessions were
// resumed: it ends the sessions that were left open and not resumed.
func (l *Log) Settle(state []byte) error {
	var before State
	if state != nil {
		if err := handover.Decode(state, &before); err != nil {
			return fmt.Errorf("audit log: %w", err)
		}
	}
	l.mu.Lock()
	unclaimed := l.unclaimed
	l.unclaimed = nil
	l.lost += max(before.Lost, 0)
	l.mu.Unlock()
	for _, record := range unclaimed {
		record.Error = "the session could not be taken over by an upgraded streamshim"
		if l.put(entry{line: record.line(), ends: record.Session}) != nil { // losses are counted
			l.open.end(record.Session)
		}
	}
	return nil
}

// HandedOver records that this program has taken over from another one: how many sessions continue, how many it
// ended, and how long they were paused.
func (l *Log) HandedOver(carried, ended int, pause time.Duration) {
	if l.current().Destination == Off {
		return
	}
	seconds := pause.Seconds()
	record := &Record{
		Version: SchemaVersion, Time: time.Now().UTC(), Event: Handover,
		Carried: &carried, NotCarried: &ended, Pause: &seconds,
	}
	l.put(entry{line: record.line()}) //nolint:errcheck // losses are counted
}
