package streaming

import (
	"context"
	"io"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"k8s.io/client-go/tools/remotecommand"

	"github.com/streamshim/streamshim/internal/testutil"
	"github.com/streamshim/streamshim/pkg/session"
)

// pacedReader takes rate bytes a second.
type pacedReader struct {
	rate  float64
	taken int
	begin time.Time
}

func (r *pacedReader) Write(p []byte) (int, error) {
	if r.begin.IsZero() {
		r.begin = time.Now()
	}
	r.taken += len(p)
	time.Sleep(time.Until(r.begin.Add(time.Duration(float64(r.taken) / r.rate * float64(time.Second)))))
	return len(p), nil
}

// heldBack counts StatusHeld.
func heldBack(c Config) (Config, *atomic.Int64) {
	held := new(atomic.Int64)
	c.Observe = func(e Event) {
		if e == StatusHeld {
			held.Add(1)
		}
	}
	return c, held
}

// Who translates WebSocket closes its client's connection as soon as it has the status, and the client's
// ping after five seconds would make the rest be lost (kubernetes#60140): 12 MB to readers of 2 MB/s, who
// are behind by some 5 MB when the translator has taken everything.
func TestSlowReaderBehindTranslator(t *testing.T) {
	testutil.Slow(t)
	const size, readers = 12_000_000, 4
	config, held := heldBack(Config{})
	s := startServer(t, config)
	var all sync.WaitGroup
	for range readers {
		output := &pacedReader{rate: 2_000_000}
		options := remotecommand.StreamOptions{Stdout: output, Stderr: io.Discard}
		u := s.execURL(&hostExecutor{t: t}, options, "sh", "-c", "head -c 12000000 /dev/zero; exit 3")
		u = throughProxies(t, u, 1, "WebSocket", options)
		all.Go(func() {
			err := stream(t.Context(), t, "WebSocket", u, options)
			took := time.Since(output.begin)
			if output.taken != size || err == nil || err.Error() != "command terminated with exit code 3" {
				t.Errorf("%d of %d bytes after %v: %v", output.taken, size, took, err)
			}
			t.Logf("the reader needs 6 s, the session took %v", took)
		})
	}
	all.Wait()
	if held.Load() != readers {
		t.Errorf("%d of %d were held back", held.Load(), readers)
	}
}

// A fast reader pays nothing, whatever is between.
func TestFastReaderIsNotHeldBack(t *testing.T) {
	testutil.Slow(t)
	forEachTransport(t, func(t *testing.T, transport string) {
		for hops := range 3 {
			config, held := heldBack(Config{})
			s := startServer(t, config)
			options := remotecommand.StreamOptions{Stdout: io.Discard, Stderr: io.Discard}
			u := s.execURL(&hostExecutor{t: t}, options, "head", "-c", "40000000", "/dev/zero")
			u = throughProxies(t, u, hops, transport, options)
			if err := stream(t.Context(), t, transport, u, options); err != nil {
				t.Error(err)
			}
			if held.Load() > 0 {
				t.Errorf("%d proxies: the status was held back", hops)
			}
		}
	})
}

// kubectl's own SPDY needs no receipts.
func TestKubectlIsNotAsked(t *testing.T) {
	s := startServer(t, Config{})
	for _, test := range []struct {
		header string
		asked  bool
	}{{"Kubectl-Command: kubectl exec", false}, {"User-Agent: Go-http-client/1.1", true}} {
		u := s.execURL(&hostExecutor{t: t}, remotecommand.StreamOptions{Stdout: io.Discard}, "sleep", "600")
		c := dialRaw(t, u, upgradeRequest("POST", u, append(spdyLines("v4.channel.k8s.io"), test.header)...))
		eventually(t, "the session's connection", func() bool { // it has it a moment after it began
			live := s.config.Sessions.List()
			return len(live) == 1 && live[0].Connection() != nil
		})
		client := s.config.Sessions.List()[0].Connection().(*remoteCommandClient)
		if asked := client.holdback != nil; asked != test.asked {
			t.Errorf("%s: asked %v", test.header, asked)
		}
		c.conn.Close()
		eventually(t, "its end", func() bool { return len(s.config.Sessions.List()) == 0 })
	}
}

// A command that writes what it reads, more than all buffers hold, is not held up by its own output.
func TestBothWaysAtOnce(t *testing.T) {
	forEachTransport(t, func(t *testing.T, transport string) {
		s := startServer(t, Config{})
		const size = 24 << 20
		var received atomic.Int64
		options := remotecommand.StreamOptions{Stdin: io.LimitReader(zeros{}, size), Stdout: countingWriter{&received}}
		u := s.execURL(&hostExecutor{t: t}, options, "cat")
		if err := stream(t.Context(), t, transport, u, options); err != nil || received.Load() != size {
			t.Errorf("%v, %d of %d bytes", err, received.Load(), size)
		}
	})
}

// stuckReader takes some bytes and then nothing until it is let go.
type stuckReader struct {
	takes int
	goOn  chan struct{}
	taken int
}

func (r *stuckReader) Write(p []byte) (int, error) {
	if r.taken >= r.takes {
		<-r.goOn
	}
	r.taken += len(p)
	return len(p), nil
}

// beginHeldBack begins a session whose command has ended with exit code 3 and whose status waits for a reader that has
// stopped.
func beginHeldBack(t *testing.T, s *testServer) (reader *stuckReader, c *cable, ended <-chan error) {
	reader = &stuckReader{takes: 140_000, goOn: make(chan struct{})}
	options := remotecommand.StreamOptions{Stdout: reader}
	u := s.execURL(&hostExecutor{t: t}, options, "sh", "-c", "head -c 140000 /dev/zero; sleep 0.3; head -c 100000 /dev/zero; exit 3")
	c = newCable(t, u)
	result := make(chan error, 1)
	ctx, cancel := context.WithCancel(t.Context())
	t.Cleanup(cancel)
	go func() { result <- stream(ctx, t, "SPDY", u, options) }()
	eventually(t, "the end of the command", func() bool {
		list := s.config.Sessions.List()
		if len(list) != 1 || list[0].Phase() != session.Lingering {
			return false
		}
		_, sent := list[0].Connection().Transferred()
		return sent == 240_000
	})
	return reader, c, result
}

// The wait for a reader ends at once when the client goes.
func TestHoldbackEndsWithTheClient(t *testing.T) {
	s := startServer(t, Config{StatusWait: 10 * testTimeout})
	reader, cable, ended := beginHeldBack(t, s)
	cable.cut()
	eventually(t, "the session's end", func() bool { return len(s.config.Sessions.List()) == 0 })
	close(reader.goOn)
	<-ended
}

// It ends at once at shutdown, and the client is told how its command has ended.
func TestHoldbackEndsWithTheServer(t *testing.T) {
	s := startServer(t, Config{StatusWait: 10 * testTimeout})
	reader, _, ended := beginHeldBack(t, s)
	begin := time.Now()
	time.AfterFunc(shutdownGrace/4, func() { close(reader.goOn) })
	s.stop()
	if took := time.Since(begin); took > testTimeout/2 {
		t.Errorf("shutdown took %v", took)
	}
	if err := <-ended; exitCode(t, err) != 3 || reader.taken != 240_000 {
		t.Errorf("%d bytes, %v", reader.taken, err)
	}
}

// It ends when the reader shows no progress for StatusWait.
func TestHoldbackIsBounded(t *testing.T) {
	config, held := heldBack(Config{StatusWait: minStatusHeld + 100*time.Millisecond})
	s := startServer(t, config)
	reader, _, ended := beginHeldBack(t, s)
	eventually(t, "the end of the wait", func() bool { return held.Load() == 1 })
	close(reader.goOn)
	if err := <-ended; exitCode(t, err) != 3 || reader.taken != 240_000 {
		t.Errorf("%d bytes, %v", reader.taken, err)
	}
}

func TestHoldbackUntil(t *testing.T) {
	start := time.Unix(1000, 0)
	begin := start.Add(12 * time.Second)
	const limit = 20 * time.Second
	for _, test := range []struct {
		name         string
		coming, ever bool
		last         time.Duration // of the last receipt, from begin; 0 is none
		rest         time.Duration // according to the model, from the last receipt on
		want         time.Duration // from begin; negative or 0 is no wait
	}{
		{"nothing was asked", false, false, 0, 0, 0},
		{"nothing was seen", false, true, -time.Second, 0, 0},
		{"first receipt is due", true, false, 0, 0, firstReceiptWait},
		{"receipt is due, none since the end", true, true, -time.Second, 0, limit},
		{"receipt is due, one since the end", true, true, 5 * time.Second, 0, 5*time.Second + limit},
		{"read long before the ping at 15 s", false, true, -time.Second, 2 * time.Second, -time.Second},
		{"read about the time of that ping", false, true, 0, 2 * time.Second, 4 * time.Second},
		{"read after that ping", false, true, 0, 4 * time.Second, 4 * time.Second},
		{"read about the time of the next", false, true, 0, 6500 * time.Millisecond, 9 * time.Second},
		{"reader is far behind", false, true, time.Second, time.Hour, time.Second + limit},
		{"reader is a little behind", false, true, 2900 * time.Millisecond, 80 * time.Millisecond, 3040 * time.Millisecond},
		{"reader is hardly behind", false, true, 2999 * time.Millisecond, minHoldback / 2, 0},
	} {
		h := newHoldback()
		h.ask = func() (bool, bool) { return test.coming, test.ever }
		if test.last != 0 || test.rest != 0 {
			h.last = begin.Add(test.last)
			h.backlog.rate, h.backlog.level = 1000, 1000*test.rest.Seconds()
		}
		got := h.until(start, begin, limit).Sub(begin)
		if got != test.want && (got > 0 || test.want > 0) {
			t.Errorf("%s: until %v, want %v", test.name, got, test.want)
		}
	}
}

// Before the client's first ping there is nothing to wait for.
func TestHoldbackOfShortSessions(t *testing.T) {
	start := time.Unix(1000, 0)
	if got := beforeNoPing(start, start.Add(time.Second), 2*time.Second); got.After(start.Add(time.Second)) {
		t.Errorf("wait until %v", got.Sub(start))
	}
}
