package streaming

import (
	"errors"
	"io"
	"net"
	"net/http"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/moby/spdystream/spdy"

	"github.com/streamshim/streamshim/internal/testutil"
)

// fairTest is a port-forward with one connection into a pod that does not read, and others beside it.
type fairTest struct {
	*rawClient
	good, stuck string
	neighbours  int
}

func newFairTest(t *testing.T, transport string, config Config) *fairTest {
	t.Helper()
	s := startServer(t, config)
	release := make(chan struct{})
	f := &fairTest{
		good:  strconv.Itoa(pod(t, answer)),
		stuck: strconv.Itoa(pod(t, func(*net.TCPConn) { <-release })),
	}
	t.Cleanup(func() { close(release) })
	u := s.portForwardURL(make(chan struct{}))
	f.rawClient = dialForward(t, u, transport)
	return f
}

// neighbourAnswers opens another connection and checks that it is answered.
func (f *fairTest) neighbourAnswers() {
	f.t.Helper()
	f.neighbours++
	data, failure := f.openPair(f.good, "neighbour"+strconv.Itoa(f.neighbours))
	f.send(data, "abc", false)
	if got := f.finished(data); got != "answer to abc" {
		f.t.Fatalf("the neighbour answered %q, reset %v", got, f.streams[data].reset)
	}
	f.send(data, "", true)
	if got := f.finished(failure); got != "" {
		f.t.Fatalf("the neighbour's error stream says %q", got)
	}
}

// TestUnreadConnectionLeavesNeighboursAlone checks that 8 MiB that a pod does not read cost its neighbours nothing: none
// waits for the stall timeout, and no stream is reset.
func TestUnreadConnectionLeavesNeighboursAlone(t *testing.T) {
	forEachTransport(t, func(t *testing.T, transport string) {
		f := newFairTest(t, transport, Config{PortForwards: forwardConfig{Stall: time.Hour}})
		stuck, _ := f.openPair(f.stuck, "stuck")
		chunk := strings.Repeat("x", 1<<20)
		for range 8 {
			f.send(stuck, chunk, false)
			f.neighbourAnswers()
		}
		if f.streams[stuck].reset != 0 {
			t.Error("the connection that is not read was reset")
		}
	})
}

// TestStalledConnectionIsResetAlone checks that neighbours wait when the room is used up, but only for the stall timeout.
// Then only the connection that blocks them is reset, and the data on its way to it is discarded.
func TestStalledConnectionIsResetAlone(t *testing.T) {
	testutil.Slow(t)
	forEachTransport(t, func(t *testing.T, transport string) {
		f := newFairTest(t, transport, Config{PortForwards: forwardConfig{Stall: 500 * time.Millisecond}})
		patient, _ := f.openPair(f.stuck, "patient") // does not read either, but blocks nobody
		f.send(patient, "x", false)
		stuck, failure := f.openPair(f.stuck, "stuck")
		f.neighbourAnswers()
		sent := make(chan error, 1)
		go func() { // 16 MiB of room for all streams, and what the kernel buffers
			chunk := []byte(strings.Repeat("x", 1<<20))
			for range 48 {
				if err := f.framer.WriteFrame(&spdy.DataFrame{StreamId: stuck, Data: chunk}); err != nil {
					sent <- err
					return
				}
			}
			sent <- nil
		}()
		if f.finished(stuck); f.streams[stuck].reset == 0 {
			t.Error("the stuck connection was not reset")
		}
		if got := f.finished(failure); got != "" {
			t.Errorf("its error stream says %q, which ends kubectl's port-forward", got)
		}
		if err := receive(t, sent, "the data to be taken"); err != nil {
			t.Fatal(err)
		}
		f.neighbourAnswers()
		if f.streams[patient].reset != 0 {
			t.Error("a connection that was not in the way was reset too")
		}
	})
}

// TestSlowConnectionIsNotReset checks that a pod that reads slowly causes backpressure but no reset.
func TestSlowConnectionIsNotReset(t *testing.T) {
	testutil.Slow(t)
	const size = 40 << 20
	s := startServer(t, Config{PortForwards: forwardConfig{Stall: 3 * time.Second}})
	read := make(chan int64, 1)
	port := strconv.Itoa(pod(t, func(c *net.TCPConn) {
		c.SetReadBuffer(64 << 10)
		var n int64
		for b := make([]byte, 512<<10); ; time.Sleep(60 * time.Millisecond) {
			m, err := io.ReadFull(c, b)
			n += int64(m)
			if err != nil {
				read <- n
				return
			}
		}
	}))
	u := s.portForwardURL(make(chan struct{}))
	c := dialForward(t, u, "SPDY")
	data, _ := c.openPair(port, "1")
	chunk := strings.Repeat("x", 1<<20)
	for range size >> 20 {
		c.send(data, chunk, false)
	}
	c.send(data, "", true)
	c.finished(data)
	if got := receive(t, read, "the pod to have read everything"); got != size || c.streams[data].reset != 0 {
		t.Errorf("the pod got %d bytes of %d, reset %v", got, size, c.streams[data].reset)
	}
}

// TestUnreadStdinIsNoStall checks that an exec's stdin may stay unread for as long as the command likes.
func TestUnreadStdinIsNoStall(t *testing.T) {
	s := startServer(t, Config{PortForwards: forwardConfig{Stall: 100 * time.Millisecond}})
	options := streamOptionsOfCat()
	u := s.execURL(&hostExecutor{t: t}, options, "sh", "-c", "sleep 1; wc -c")
	c := dialRaw(t, u, upgradeRequest(http.MethodPost, u, spdyLines("v4.channel.k8s.io")...))
	ids := c.remoteCommandStreams(streamTypeError, streamTypeStdin, streamTypeStdout)
	chunk := strings.Repeat("x", 1<<20)
	for range 24 {
		c.send(ids[streamTypeStdin], chunk, false)
	}
	c.send(ids[streamTypeStdin], "", true)
	if got := strings.TrimSpace(c.finished(ids[streamTypeStdout])); got != strconv.Itoa(24<<20) {
		t.Errorf("the command read %s bytes", got)
	}
	for c.read() {
		if c.streams[ids[streamTypeError]].fin {
			return
		}
	}
	if !errors.Is(c.ended, io.EOF) {
		t.Error(c.ended)
	}
}

// TestClientGivesUpStuckConnection checks that nothing is left of a connection that its client gives up, even if both
// directions wait for the pod.
func TestClientGivesUpStuckConnection(t *testing.T) {
	testutil.Slow(t)
	forEachTransport(t, func(t *testing.T, transport string) {
		f := newFairTest(t, transport, Config{PortForwards: forwardConfig{Stall: time.Hour}})
		f.neighbourAnswers()
		before := settled(t, ourGoroutines)
		for i := range 3 {
			stuck, failure := f.openPair(f.stuck, "stuck"+strconv.Itoa(i))
			f.send(stuck, strings.Repeat("x", 8<<20), i == 1) // one with FIN
			f.reset(stuck)
			if got := f.finished(failure); got != "" {
				t.Errorf("the error stream says %q", got)
			}
		}
		eventually(t, "the end of the goroutines", func() bool { return ourGoroutines() <= before })
		f.neighbourAnswers()
	})
}
