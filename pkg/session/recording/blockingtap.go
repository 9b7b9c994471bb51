package recording

import (
	"bytes"
	"errors"
	"sync"
	"time"

	"github.com/streamshim/streamshim/pkg/session"
	"github.com/streamshim/streamshim/pkg/workload"
)

// diskPatience is how long a session waits for one write to its recording before it is ended.
const diskPatience = 10 * time.Second

var (
	errNotRecorded = errors.New("the recording has ended, and nothing may be shown without it")
	errSlowDisk    = errors.New("the recording's disk takes too long")
)

// blockingTap is the tap of a session that must not show anything unrecorded. Its methods return once their data is
// written to the file, or with an error. Terminal sizes are written with the next output.
type blockingTap struct {
	rec      *recording
	room     session.TapRoom // nil means no bound
	patience time.Duration
	events   chan blockingEvent // received by the writer
	ended    chan struct{}      // closed by end when the writer receives no more
	end      func()             // may be called repeatedly
}

type blockingEvent struct {
	session.TapEvent
	written chan<- struct{} // buffered
}

func newBlockingTap(rec *recording, room session.TapRoom) *blockingTap {
	t := &blockingTap{rec: rec, room: room, patience: diskPatience, events: make(chan blockingEvent), ended: make(chan struct{})}
	t.end = sync.OnceFunc(func() { close(t.ended) })
	return t
}

// Output implements session.Tap.
func (t *blockingTap) Output(from session.Output, p []byte) error {
	return t.write(session.TapEvent{Kind: session.TapOutput, From: from}, p)
}

// Input implements session.Tap.
func (t *blockingTap) Input(p []byte) error {
	if !t.rec.config.Input {
		return nil
	}
	return t.write(session.TapEvent{Kind: session.TapInput}, p)
}

// Resize implements session.Tap.
func (t *blockingTap) Resize(size workload.Size) { t.rec.queue.Resize(size) }

// minPiece is how many bytes may be copied for the writer when the shared room is used up.
const minPiece = 16 << 10

// write passes p to the writer in pieces as large as Config.Buffer and the room allow.
func (t *blockingTap) write(event session.TapEvent, p []byte) error {
	timer := time.NewTimer(t.patience)
	defer timer.Stop()
	for len(p) > 0 {
		size := min(len(p), t.rec.config.Buffer)
		taken := size > minPiece && t.room != nil
		if taken && !t.room.Take(size) {
			size, taken = minPiece, false
		}
		event.At = time.Now()
		event.Data = bytes.Clone(p[:size]) // a copy, because the writer keeps it if await gives up
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
func (t *blockingTap) await(event session.TapEvent, late <-chan time.Time) error {
	written := make(chan struct{}, 1)
	select {
	case t.events <- blockingEvent{event, written}:
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

func (t *blockingTap) giveUp() error {
	t.rec.flawed()
	t.rec.failed()
	return errSlowDisk
}
