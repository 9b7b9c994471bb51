package audit

import (
	"context"
	"fmt"
	"slices"
	"time"

	"github.com/streamshim/streamshim/pkg/handover"
	"github.com/streamshim/streamshim/pkg/session"
)

// State is what a Log hands over.
type State struct {
	Lost int64 // records that are missing in the log, which does not say so yet
}

// Carried implements session.Carrier.
func (l *Log) Carried() string { return "audit" }

// Freeze implements session.Carrier. All that is kept of a session is its file in Config.OpenDir: a program that is killed
// after a hand-over has left it open as any other.
func (l *Log) Freeze(*session.Session, *handover.Files) ([]byte, error) { return nil, nil }

// Resume implements session.Carrier: Settle will not end the session.
func (l *Log) Resume(s *session.Session, _ []byte, _ *handover.Files) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.unclaimed = slices.DeleteFunc(l.unclaimed, func(r *Record) bool { return r.Session == s.ID })
	return nil
}

// FreezeLog waits until all records are written, and forced to the disk where Config.Fsync says so, and returns the
// state for Settle. It comes after all sessions were frozen; what is logged afterwards is logged as ever.
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

// Settle goes on from the state of another program's log, nil where there is none, after all sessions were resumed. Those that it
// has left open and that were not resumed have come to their end.
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
		if l.put(entry{line: record.line(), ends: record.Session}) != nil { // what is lost is counted
			l.open.end(record.Session)
		}
	}
	return nil
}

// HandedOver writes that this program has taken over from another one: how many sessions go on, how many have ended by it,
// and for how long they stood still.
func (l *Log) HandedOver(carried, ended int, pause time.Duration) {
	if l.current().Destination == Off {
		return
	}
	seconds := pause.Seconds()
	record := &Record{
		Version: SchemaVersion, Time: time.Now().UTC(), Event: Handover,
		Carried: &carried, NotCarried: &ended, Pause: &seconds,
	}
	l.put(entry{line: record.line()}) //nolint:errcheck // what is lost is counted
}
