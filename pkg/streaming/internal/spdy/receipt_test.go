package spdy

import (
	"errors"
	"io"
	"sync/atomic"
	"testing"

	"github.com/streamshim/streamshim/internal/testutil"
	"github.com/streamshim/streamshim/pkg/streaming/internal/spdy/frames"
)

// smallRoom lets a connection send a little at a time.
type smallRoom struct {
	room     int
	sent     atomic.Int64
	answered chan uint32
}

func (r *smallRoom) Await(_, _, _ <-chan struct{}) int { return r.room }
func (r *smallRoom) Sent(n int)                        { r.sent.Add(int64(n)) }
func (r *smallRoom) Answered(id uint32)                { r.answered <- id }

// TestReceiptsAreAsked checks that a connection sends no more than there is room for, and reports what it has sent and
// which of its PINGs were answered.
func TestReceiptsAreAsked(t *testing.T) {
	const size, room = 10_000, 3000
	receipts, streams := &smallRoom{room: room, answered: make(chan uint32, 3)}, make(chan *Stream, 1)
	peer, ours := newRawPeer(t, Config{
		OnStream: func(s *Stream) { streams <- s },
		Receipts: func(*Conn) Receipts { return receipts },
	})
	peer.open(1)
	s := testutil.Receive(t, "the stream", streams)
	if _, err := s.Write(pattern(size)); err != nil {
		t.Fatal(err)
	}
	peer.expect(frames.TypeSynReply, 1)
	for left := size; left > 0; {
		h, payload := peer.next()
		if h.Control || len(payload) == 0 || len(payload) > room {
			t.Fatalf("a frame of %d bytes: %+v", len(payload), h)
		}
		left -= len(payload)
	}
	if sent := receipts.sent.Load(); sent != size {
		t.Errorf("%d bytes were told, of %d", sent, size)
	}
	first, ok := ours.Pings(3)
	ours.Flush()
	if !ok {
		t.Fatal("no PINGs")
	}
	for i := range uint32(3) {
		peer.expect(frames.TypePing, first+2*i)
		peer.send(ping(first + 2*i))
		if id := testutil.Receive(t, "an answer", receipts.answered); id != first+2*i {
			t.Errorf("the answer to %d is told as %d", first+2*i, id)
		}
	}
}

// noRoom waits until one of the channels is closed.
type noRoom struct{ waiting chan struct{} }

func (r noRoom) Await(stream, conn, freezing <-chan struct{}) int {
	select {
	case r.waiting <- struct{}{}:
	default:
	}
	select {
	case <-stream:
	case <-conn:
	case <-freezing:
	}
	return frames.MaxLen
}
func (noRoom) Sent(int)        {}
func (noRoom) Answered(uint32) {}

// TestWaitForReceiptsEnds checks that a sender that waits for receipts is unblocked when the stream is reset, or the
// connection ends or is frozen.
func TestWaitForReceiptsEnds(t *testing.T) {
	for name, end := range map[string]func(*rawPeer, *Conn){
		"reset":       func(p *rawPeer, _ *Conn) { p.send(frames.AppendRstStream(nil, 1, ResetCancel)) },
		"peer closes": func(p *rawPeer, _ *Conn) { p.Close() },
		"own close":   func(_ *rawPeer, c *Conn) { c.Close() },
		"frozen":      func(_ *rawPeer, c *Conn) { c.Freeze() },
	} {
		t.Run(name, func(t *testing.T) {
			receipts, streams := noRoom{make(chan struct{}, 1)}, make(chan *Stream, 1)
			peer, ours := newRawPeer(t, Config{
				OnStream: func(s *Stream) { streams <- s },
				Receipts: func(*Conn) Receipts { return receipts },
			})
			peer.open(1)
			s := testutil.Receive(t, "the stream", streams)
			goDo(t, func() { io.Copy(io.Discard, peer) })
			t.Cleanup(func() { peer.Close() })
			ended := make(chan error, 1)
			go func() {
				_, err := s.Write(pattern(1 << 20))
				ended <- err
			}()
			testutil.Receive(t, "the wait", receipts.waiting)
			end(peer, ours)
			err := testutil.Receive(t, "the end of the write", ended)
			var reset *ResetError
			if err == nil || (name == "reset") != errors.As(err, &reset) {
				t.Errorf("the write ended with %v", err)
			}
		})
	}
}
