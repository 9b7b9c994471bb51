package control

import (
	"bytes"
	"errors"
	"net/http"
	"testing"

	"github.com/streamshim/streamshim/pkg/streaming/internal/spdy/frames"
)

func bytesOf(n int) func([]byte) []byte {
	return func(b []byte) []byte { return append(b, make([]byte, n)...) }
}

func TestPriorities(t *testing.T) {
	tests := []struct {
		name      string
		waiting   int
		priority  Priority
		added     int
		overflown bool
	}{
		{"best effort, some wait", MaxBestEffort, BestEffort, 8, false},
		{"best effort, many wait", MaxBestEffort + 1, BestEffort, 0, false},
		{"must be sent, many wait", MaxMustSend, MustSend, 8, false},
		{"must be sent, too many wait", MaxMustSend + 1, MustSend, 0, true},
		{"no limit", MaxMustSend + 1, Unlimited, 8, false},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			var q Queue
			q.Add(Unlimited, bytesOf(test.waiting))
			err := q.Add(test.priority, bytesOf(8))
			var fault *frames.ConnectionError
			if errors.As(err, &fault) != test.overflown {
				t.Errorf("error %v", err)
			}
			if added := int(q.Waiting()) - test.waiting; added != test.added {
				t.Errorf("%d bytes were added, want %d", added, test.added)
			}
			if taken := len(q.Take()); taken != int(q.Waiting()) {
				t.Errorf("%d bytes were taken, %d wait", taken, q.Waiting())
			}
		})
	}
}

// TestLeftOversAreNoAnswers checks that a peer is not blamed for what a hand-over has left.
func TestLeftOversAreNoAnswers(t *testing.T) {
	var q Queue
	q.Start(State{OpenNext: 2, PingNext: 2}, 2*MaxMustSend)
	if q.Waiting() != 2*MaxMustSend || q.Answers() != 0 || q.Overflow() != nil {
		t.Errorf("%d wait, %d of them answers, %v", q.Waiting(), q.Answers(), q.Overflow())
	}
	q.Add(MustSend, bytesOf(8))
	q.Wrote(MaxMustSend)
	if q.Waiting() != MaxMustSend+8 || q.Answers() != 8 {
		t.Errorf("%d wait, %d of them answers", q.Waiting(), q.Answers())
	}
	q.Wrote(MaxMustSend + 8)
	q.Held(5)
	if q.Waiting() != 5 || q.Answers() != 5 {
		t.Errorf("%d wait, %d of them answers", q.Waiting(), q.Answers())
	}
}

func TestOpen(t *testing.T) {
	var q Queue
	q.Start(State{OpenNext: 1, PingNext: 1}, 0)
	refused := errors.New("refused")
	if err := q.Open(nil, 1<<10, func(uint32) error { return refused }); err != refused {
		t.Error(err)
	}
	if err := q.Open(http.Header{"A": {string(make([]byte, 1<<10))}}, 1<<10, func(uint32) error { t.Error("called"); return nil }); err == nil {
		t.Error("no error for headers that fit no frame")
	}
	if q.Waiting() != 0 || q.Opened(1) {
		t.Errorf("%d bytes wait, opened %v", q.Waiting(), q.Opened(1))
	}
	var want []byte
	for _, id := range []uint32{1, 3} {
		if err := q.Open(http.Header{}, 1<<10, func(got uint32) error {
			if got != id {
				t.Errorf("stream %d, want %d", got, id)
			}
			return nil
		}); err != nil {
			t.Error(err)
		}
		want = frames.AppendSynStream(want, id, 0, frames.AppendHeaderBlock(nil, id == 1, http.Header{}))
	}
	if got := q.Take(); !bytes.Equal(got, want) {
		t.Errorf("got % x\nwant % x", got, want)
	}
	if !q.Opened(3) || q.Opened(5) || q.State() != (State{HeadersSent: true, OpenNext: 5, PingNext: 1}) {
		t.Errorf("state %+v", q.State())
	}
	q.Start(State{OpenNext: frames.MaxStreamID + 2}, 0)
	if err := q.Open(nil, 1<<10, func(uint32) error { return nil }); err != ErrNoStreamID {
		t.Error(err)
	}
}

func TestPings(t *testing.T) {
	var q Queue
	q.Start(State{OpenNext: 2, PingNext: 2}, 0)
	q.Ping()
	q.Ping() // the first is still in the queue
	if first, ok := q.Pings(3); first != 4 || !ok {
		t.Errorf("PINGs from %d, %v", first, ok)
	}
	var want []byte
	for _, id := range []uint32{2, 4, 6, 8} {
		want = frames.AppendPing(want, id)
	}
	if got := q.Take(); !bytes.Equal(got, want) {
		t.Errorf("got % x\nwant % x", got, want)
	}
	q.Ping()
	if got := q.Take(); !bytes.Equal(got, frames.AppendPing(nil, 10)) {
		t.Errorf("after the first was taken: % x", got)
	}
	q.Start(State{PingNext: frames.MaxStreamID - 1}, 0)
	if first, _ := q.Pings(2); first != 2 {
		t.Errorf("behind the last id comes %d", first)
	}
	q.Add(Unlimited, bytesOf(MaxBestEffort+1))
	if _, ok := q.Pings(1); ok {
		t.Error("a PING in a full queue")
	}
}
