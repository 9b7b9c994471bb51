package recording

import (
	"bytes"
	"errors"
	"time"

	"github.com/streamshim/streamshim/pkg/session"
	"github.com/streamshim/streamshim/pkg/workload"
)

// diskPatience is how long a session waits for one write of its recording before it is ended.
const diskPatience = 10 * time.Second

var (
	errNotRecorded = errors.New("the recording has ended, and nothing may be shown without it")
	errSlowDisk    = errors.New("the recording's disk takes too long")
)

// firmTap is the tap of a session of which nothing may be shown that is not recorded: its methods return when
// what they were given is written to the file, or with an error. Sizes of the terminal are written with the next
// output.
type firmTap struct {
	rec      *recording
	room     session.TapRoom // nil is no bound
	patience time.Duration
	events   chan firmEvent // taken by the writer
	ended    chan struct{}  // closed when the writer takes no more
}

type firmEvent struct {
	session.TapEvent
	written chan<- struct{} // has room
}

func newFirmTap(rec *recording, room session.TapRoom) *firmTap {
	return &firmTap{rec: rec, room: room, patience: diskPatience, events: make(chan firmEvent), ended: make(chan struct{})}
}

// Output implements session.Tap.
func (t *firmTap) Output(from session.Output, p []byte) error {
	return t.write(session.TapEvent{Kind: session.TapOutput, From: from}, p)
}

// Input implements session.Tap.
func (t *firmTap) Input(p []byte) error {
	if !t.rec.config.Input {
		return nil
	}
	return t.write(session.TapEvent{Kind: session.TapInput}, p)
}

// Resize implements session.Tap.
func (t *firmTap) Resize(size workload.Size) { t.rec.queue.Resize(size) }

// firmPiece is how much may be copied for the writer when there is no room with the other sessions.
const firmPiece = 16 << 10

// write has as much written at a time as Config.Buffer and the room allow.
func (t *firmTap) write(event session.TapEvent, p []byte) error {
	timer := time.NewTimer(t.patience)
	defer timer.Stop()
	for len(p) > 0 {
		size := min(len(p), t.rec.config.Buffer)
		taken := size > firmPiece && t.room != nil
		if taken && !t.room.Take(size) {
			size, taken = firmPiece, false
		}
		event.At = time.Now()
		event.Data = bytes.Clone(p[:size]) // which the writer still has if this gives up
		p = p[size:]
		err := t.await(event, timer.C)
		if taken {
			t.room.Return(size)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// await returns when the event is written.
func (t *firmTap) await(event session.TapEvent, late <-chan time.Time) error {
	written := make(chan struct{}, 1)
	select {
	case t.events <- firmEvent{event, written}:
	case <-t.ended:
		return errNotRecorded
	case <-late:
		return t.giveUp()
	}
	select {
	case <-written:
		return nil
	case <-t.ended:
		return errNotRecorded
	case <-late:
		return t.giveUp()
	}
}

func (t *firmTap) giveUp() error {
	t.rec.flawed()
	t.rec.failed()
	return errSlowDisk
}
