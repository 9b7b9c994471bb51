package spdy

import (
	"errors"
	"io"
	"net/http"
	"sync/atomic"
	"testing"
	"time"

	"github.com/streamshim/streamshim/internal/testutil"
	"github.com/streamshim/streamshim/pkg/streaming/internal/spdy/frames"
)

// receiptConfig hands on streams and receipts.
func receiptConfig() (cfg Config, streams chan *Stream, receipts chan Receipt) {
	streams, receipts = make(chan *Stream, 4), make(chan Receipt, 1024)
	return Config{
		OnStream:  func(s *Stream) { streams <- s },
		OnReceipt: func(r Receipt) { receipts <- r },
	}, streams, receipts
}

// A stock client's receipts say what its reader has taken, but for the frame that it has in its hands, and
// the sender gets no further ahead than the window, whichever of the client's workers has the stream.
func TestReceiptsFollowTheReader(t *testing.T) {
	for _, streamsBefore := range []int{0, 1, 2, 3, 4} {
		const size = 6 << 20
		cfg, streams, came := receiptConfig()
		// A machine that stops for a moment makes the way to the client look long, and the window wide.
		var longestTrip atomic.Int64
		tell := cfg.OnReceipt
		cfg.OnReceipt = func(r Receipt) {
			longestTrip.Store(max(longestTrip.Load(), int64(r.Came.Sub(r.Asked))))
			tell(r)
		}
		window := func() int64 {
			return (&receipts{trip: time.Duration(longestTrip.Load()), taken: size}).window()
		}
		client, ours := mobyClient(t, cfg)
		for range streamsBefore {
			mobyOpen(t, client, http.Header{})
			await(t, streams, "a stream")
		}
		theirs := mobyOpen(t, client, http.Header{})
		s := await(t, streams, "the stream")
		var read atomic.Int64
		unasked := make(chan int64, 1) // a little at the end that is not worth a question
		goDo(t, func() {
			if _, err := s.Write(pattern(size)); err != nil {
				t.Error(err)
			}
			ours.AskReceipt()
			ours.receipts.mu.Lock()
			unasked <- ours.receipts.sent - ours.receipts.asked
			ours.receipts.mu.Unlock()
		})
		goDo(t, func() {
			p := make([]byte, 10_000)
			for read.Load() < size {
				n, err := theirs.Read(p)
				if err != nil {
					t.Error(err)
					return
				}
				// A frame is sent before it is counted.
				ahead := s.Sent() - read.Load()
				for range 100 { // the longest trip may be about to be told
					if ahead <= 2*window() {
						break
					}
					time.Sleep(time.Millisecond)
				}
				if ahead > 2*window() {
					t.Errorf("the sender is %d bytes ahead", ahead)
					return
				}
				read.Add(int64(n))
			}
		})
		last, wanted := int64(0), int64(size)
		for last < wanted {
			var r Receipt
			select {
			case r = <-came:
			case rest := <-unasked:
				if rest >= receiptRest {
					t.Errorf("%d bytes at the end without a question", rest)
				}
				wanted -= rest
				continue
			case <-time.After(testTimeout):
				t.Fatal("timed out waiting for a receipt")
			}
			if ahead := r.Bytes - read.Load(); ahead > window() {
				t.Errorf("a receipt for %d bytes more than were read", ahead)
			}
			if r.Bytes <= last || r.Asked.Before(r.First) || r.Came.Before(r.Asked) {
				t.Errorf("after %d bytes came %+v", last, r)
			}
			last = r.Bytes
		}
		if coming, ever := ours.AskReceipt(); coming || !ever || last != wanted {
			t.Errorf("after the last receipt, for %d bytes: coming %v, ever %v", last, coming, ever)
		}
	}
}

func TestReceiptWindow(t *testing.T) {
	for _, test := range []struct {
		trip  time.Duration
		taken int64
		want  int64
	}{
		{0, 0, 256 << 10},
		{time.Millisecond, 16 << 20, 256 << 10},
		{time.Millisecond, 32 << 20, 256<<10 + 1<<20},
		{50 * time.Millisecond, 0, 5 << 20},
		{time.Second, 0, 8 << 20},
		{0, 1 << 40, 8 << 20},
	} {
		if got := (&receipts{trip: test.trip, taken: test.taken}).window(); got != test.want {
			t.Errorf("%v, %d bytes taken: %d, want %d", test.trip, test.taken, got, test.want)
		}
	}
}

// A peer that does not answer PINGs gets its data all the same.
func TestPeerThatSendsNoReceipts(t *testing.T) {
	const size = 4 << 20
	cfg, streams, _ := receiptConfig()
	peer, ours := newRawPeer(t, cfg)
	peer.open(1)
	s := await(t, streams, "the stream")
	goDo(t, func() { io.Copy(io.Discard, peer) })
	t.Cleanup(func() { peer.Close() })
	begin := time.Now()
	if _, err := s.Write(pattern(size)); err != nil {
		t.Fatal(err)
	}
	if took := time.Since(begin); took < firstReceipt || took > 10*firstReceipt {
		t.Errorf("it took %v", took)
	}
	if coming, ever := ours.AskReceipt(); !coming || ever {
		t.Errorf("coming %v, ever %v", coming, ever)
	}
}

// A little is not worth a question: ordinary commands cost nothing.
func TestNoReceiptsForALittle(t *testing.T) {
	cfg, streams, _ := receiptConfig()
	peer, ours := newRawPeer(t, cfg)
	peer.open(1)
	s := await(t, streams, "the stream")
	s.Write(pattern(receiptRest - 1))
	if coming, ever := ours.AskReceipt(); coming || ever {
		t.Errorf("coming %v, ever %v", coming, ever)
	}
}

// A sender that waits for a receipt is woken when the stream is reset or the connection ends.
func TestWaitForReceiptsEnds(t *testing.T) {
	testutil.Slow(t)
	for name, end := range map[string]func(*rawPeer, *Conn){
		"reset":       func(p *rawPeer, _ *Conn) { p.send(frames.AppendRstStream(nil, 1, ResetCancel)) },
		"peer closes": func(p *rawPeer, _ *Conn) { p.Close() },
		"own close":   func(_ *rawPeer, c *Conn) { c.Close() },
	} {
		t.Run(name, func(t *testing.T) {
			cfg, streams, _ := receiptConfig()
			peer, ours := newRawPeer(t, cfg)
			peer.open(1)
			s := await(t, streams, "the stream")
			ended := make(chan error, 1)
			go func() {
				_, err := s.Write(pattern(64 << 20))
				ended <- err
			}()
			// One receipt, so that the wait is the long one; then none.
			goDo(t, func() { io.Copy(io.Discard, peer) })
			t.Cleanup(func() { peer.Close() })
			for id := uint32(2); id <= 2*receiptPings; id += 2 {
				eventually(t, "the question", func() bool {
					ours.receipts.mu.Lock()
					defer ours.receipts.mu.Unlock()
					return len(ours.receipts.questions) > 0
				})
				peer.send(ping(id))
			}
			eventually(t, "the wait", func() bool {
				ours.receipts.mu.Lock()
				defer ours.receipts.mu.Unlock()
				return ours.receipts.any && ours.receipts.came != nil
			})
			begin := time.Now()
			end(peer, ours)
			err := await(t, ended, "the end of the write")
			var reset *ResetError
			if err == nil || (name == "reset") != errors.As(err, &reset) {
				t.Errorf("the write ended with %v", err)
			}
			if took := time.Since(begin); took > laterReceipt/2 {
				t.Errorf("it took %v", took)
			}
		})
	}
}
