package holdback

import (
	"context"
	"net/http"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/moby/spdystream"

	"github.com/streamshim/streamshim/internal/testutil"
	"github.com/streamshim/streamshim/pkg/streaming/internal/spdy"
)

// testTimeout only bounds tests that would hang.
const testTimeout = 60 * time.Second

// stubConn is a connection that only the test answers.
type stubConn struct{ pings int }

func (c *stubConn) Pings(n int) (first uint32, ok bool) {
	first = uint32(2 + 2*c.pings)
	c.pings += n
	return first, true
}

func (c *stubConn) Flush() {}

// told passes receipts on.
type told struct {
	*receipts
	came chan receipt
}

func (t told) Answered(id uint32) {
	if r, ok := t.answered(id); ok {
		t.came <- r
	}
}

// stockClient returns a stock client connected to a server of ours. streams and ours pass on the server's streams and
// receipts.
func stockClient(t *testing.T) (client *spdystream.Connection, streams chan *spdy.Stream, ours told) {
	t.Helper()
	dialled, accepted := testutil.TCPPair(t)
	streams, ours = make(chan *spdy.Stream, 8), told{&receipts{}, make(chan receipt, 1024)}
	server := spdy.NewServer(accepted, nil, spdy.Config{
		OnStream: func(s *spdy.Stream) { streams <- s },
		Receipts: func(c *spdy.Conn) spdy.Receipts {
			ours.conn = c
			return ours
		},
	})
	client, err := spdystream.NewConnection(dialled, false)
	if err != nil {
		t.Fatal(err)
	}
	var served sync.WaitGroup
	served.Go(func() { client.Serve(spdystream.NoOpStreamHandler) })
	served.Go(func() { server.Serve(context.Background()) })
	t.Cleanup(func() {
		server.Close()
		client.Close()
		served.Wait()
	})
	return client, streams, ours
}

func open(t *testing.T, client *spdystream.Connection, streams chan *spdy.Stream) (theirs *spdystream.Stream, ours *spdy.Stream) {
	t.Helper()
	theirs, err := client.CreateStream(http.Header{}, nil, false)
	if err == nil {
		err = theirs.WaitTimeout(testTimeout)
	}
	if err != nil {
		t.Fatal(err)
	}
	return theirs, <-streams
}

// TestReceiptsFollowTheReader checks that the receipts of a stock client report what its reader has read, except for the
// frame that the client is delivering. The sender must stay within the window, whichever worker of the client has the
// stream.
func TestReceiptsFollowTheReader(t *testing.T) {
	for _, streamsBefore := range []int{0, 1, 2, 3, 4} {
		const size = 6 << 20
		client, streams, ours := stockClient(t)
		for range streamsBefore {
			open(t, client, streams)
		}
		theirs, s := open(t, client, streams)
		// A machine that pauses makes the way to the client look long, and widens the window.
		var longestTrip, read atomic.Int64
		window := func() int64 {
			return (&receipts{trip: time.Duration(longestTrip.Load()), taken: size}).window()
		}
		unasked := make(chan int64, 1) // a little at the end that is not worth a PING
		var flows sync.WaitGroup
		flows.Go(func() {
			if _, err := s.Write(make([]byte, size)); err != nil {
				t.Error(err)
			}
			ours.ask()
			ours.mu.Lock()
			unasked <- ours.sent - ours.asked
			ours.mu.Unlock()
		})
		flows.Go(func() {
			p := make([]byte, 10_000)
			for read.Load() < size {
				n, err := theirs.Read(p)
				if err != nil {
					t.Error(err)
					return
				}
				// A frame is sent before it is counted.
				ahead := s.Sent() - read.Load()
				// The longest trip may not be reported yet.
				for end := time.Now().Add(testTimeout); ahead > 2*window() && time.Now().Before(end); {
					time.Sleep(time.Millisecond)
				}
				if ahead > 2*window() {
					t.Errorf("the sender is %d bytes ahead", ahead)
				}
				read.Add(int64(n))
			}
		})
		last, wanted := int64(0), int64(size)
		for last < wanted {
			var r receipt
			select {
			case r = <-ours.came:
			case rest := <-unasked:
				if rest >= minQuestionBytes {
					t.Errorf("%d bytes at the end without a question", rest)
				}
				wanted -= rest
				continue
			case <-time.After(testTimeout):
				t.Fatal("timed out waiting for a receipt")
			}
			longestTrip.Store(max(longestTrip.Load(), int64(r.came.Sub(r.asked))))
			if ahead := r.bytes - read.Load(); ahead > window() {
				t.Errorf("a receipt for %d bytes more than were read", ahead)
			}
			if r.bytes <= last || r.asked.Before(r.first) || r.came.Before(r.asked) {
				t.Errorf("after %d bytes came %+v", last, r)
			}
			last = r.bytes
		}
		flows.Wait()
		if coming, ever := ours.ask(); coming || !ever || last != wanted {
			t.Errorf("after the last receipt, for %d bytes: coming %v, ever %v", last, coming, ever)
		}
	}
}

func TestWindow(t *testing.T) {
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

// send sends as a connection does, until a wait ends for another reason than a receipt. It returns how long that took.
func send(r *receipts, bytes int, stream, conn, freezing <-chan struct{}) time.Duration {
	begin := time.Now()
	for bytes > 0 {
		n := min(bytes, r.Await(stream, conn, freezing))
		r.Sent(n)
		bytes -= n
	}
	return time.Since(begin)
}

// TestPeerThatSendsNoReceipts checks that a peer that does not answer PINGs gets its data after one wait.
func TestPeerThatSendsNoReceipts(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := &receipts{conn: &stubConn{}}
		if took := send(r, 4<<20, nil, nil, nil); took != firstReceipt {
			t.Errorf("it took %v", took)
		}
		if coming, ever := r.ask(); !coming || ever {
			t.Errorf("coming %v, ever %v", coming, ever)
		}
	})
}

// TestPeerThatStopsSendingReceipts checks that a peer that stops answering delays each window for a while, and gets its
// data.
func TestPeerThatStopsSendingReceipts(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := &receipts{conn: &stubConn{}}
		r.Sent(minWindow)
		for id := uint32(2); id <= 2*questionPings; id += 2 {
			r.answered(id)
		}
		if took := send(r, 2*minWindow, nil, nil, nil); took < laterReceipt || took > 5*laterReceipt {
			t.Errorf("it took %v", took)
		}
	})
}

// TestNoReceiptsForALittle checks that little output is not worth a PING: ordinary commands cost nothing.
func TestNoReceiptsForALittle(t *testing.T) {
	conn := &stubConn{}
	r := &receipts{conn: conn}
	r.Sent(minQuestionBytes - 1)
	if coming, ever := r.ask(); coming || ever || conn.pings > 0 {
		t.Errorf("coming %v, ever %v, %d PINGs", coming, ever, conn.pings)
	}
}

// TestWaitForReceiptsEnds checks that a receipt unblocks a sender that waits for it, and that each of the ends does.
func TestWaitForReceiptsEnds(t *testing.T) {
	for i, name := range []string{"stream", "connection", "hand-over", "receipt"} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				r := &receipts{conn: &stubConn{}}
				r.Sent(minWindow)
				var ends [3]chan struct{}
				for j := range ends {
					ends[j] = make(chan struct{})
				}
				var room int
				begin, done := time.Now(), make(chan struct{})
				go func() {
					defer close(done)
					room = r.Await(ends[0], ends[1], ends[2])
				}()
				synctest.Wait()
				if i < len(ends) {
					close(ends[i])
				} else {
					for id := uint32(2); id <= 2*questionPings; id += 2 {
						r.answered(id)
					}
				}
				<-done
				if took := time.Since(begin); took > 0 || room < 1 {
					t.Errorf("it took %v, and there is room for %d bytes", took, room)
				}
			})
		})
	}
}
