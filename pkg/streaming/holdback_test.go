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
	"github.com/streamshim/streamshim/pkg/streaming/event"
)

// pacedReader reads rate bytes a second at most. When it was late it does not hurry.
type pacedReader struct {
	rate  float64
	taken int
}

func (r *pacedReader) Write(p []byte) (int, error) {
	r.taken += len(p)
	time.Sleep(time.Duration(float64(len(p)) / r.rate * float64(time.Second)))
	return len(p), nil
}

// heldBack counts StatusHeld.
func heldBack(c Config) (Config, *atomic.Int64) {
	held := new(atomic.Int64)
	c.Observe = func(e event.Event) {
		if e == event.StatusHeld {
			held.Add(1)
		}
	}
	return c, held
}

// TestSlowReaderBehindTranslator checks that output is complete behind a translator of WebSocket. A translator closes its
// client's connection when it has the status, and then the client's next ping, five seconds later, would lose the rest
// (kubernetes#60140). The output is 12 MB, the readers read 2 MB/s, and they are about 5 MB behind when the translator has
// read everything.
func TestSlowReaderBehindTranslator(t *testing.T) {
	testutil.Slow(t)
	const size, readers = 12_000_000, 4
	config, held := heldBack(Config{})
	s := startServer(t, config)
	// On a busy machine the translator may be no faster than the readers. Then slower ones are tried.
	for rate := 2_000_000.0; held.Load() < readers; rate /= 2 {
		if rate < 500_000 {
			t.Fatalf("%d of %d were held back", held.Load(), readers)
		}
		held.Store(0)
		var all sync.WaitGroup
		for range readers {
			output := &pacedReader{rate: rate}
			options := remotecommand.StreamOptions{Stdout: output, Stderr: io.Discard}
			u := s.execURL(&hostExecutor{t: t}, options, "sh", "-c", "head -c 12000000 /dev/zero; exit 3")
			u = throughProxies(t, u, 1, "WebSocket", options)
			all.Go(func() {
				begin := time.Now()
				err := stream(t.Context(), t, "WebSocket", u, options)
				took := time.Since(begin)
				if output.taken != size || err == nil || err.Error() != "command terminated with exit code 3" {
					t.Errorf("%d of %d bytes after %v: %v", output.taken, size, took, err)
				}
				t.Logf("the reader needs %.0f s, the session took %v", size/rate, took)
			})
		}
		all.Wait()
	}
}

// TestFastReaderIsNotHeldBack checks that the holdback costs a fast reader nothing, whatever is between.
func TestFastReaderIsNotHeldBack(t *testing.T) {
	testutil.Slow(t)
	forEachTransport(t, func(t *testing.T, transport string) {
		for hops := range 3 {
			config, held := heldBack(Config{})
			s := startServer(t, config)
			options := remotecommand.StreamOptions{Stdout: io.Discard, Stderr: io.Discard}
			const attempts = 5 // on a busy machine no reader is fast each time
			for range attempts {
				held.Store(0)
				u := s.execURL(&hostExecutor{t: t}, options, "head", "-c", "40000000", "/dev/zero")
				u = throughProxies(t, u, hops, transport, options)
				if err := stream(t.Context(), t, transport, u, options); err != nil {
					t.Error(err)
				}
				if held.Load() == 0 {
					break
				}
			}
			if held.Load() > 0 {
				t.Errorf("%d proxies: the status was held back %d times of %d", hops, attempts, attempts)
			}
		}
	})
}

// TestBothWaysAtOnce checks that a command which writes what it reads, more than all buffers hold, is not blocked by its
// own output.
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

// stuckReader reads some bytes and then nothing until it is released.
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

// beginHeldBack begins a session whose command has ended with exit code 3. Its status waits for a reader that has stopped.
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

// TestHoldbackEndsWithTheClient checks that the wait for a reader ends at once when the client leaves.
func TestHoldbackEndsWithTheClient(t *testing.T) {
	s := startServer(t, Config{Commands: commandConfig{StatusWait: 10 * testTimeout}})
	reader, cable, ended := beginHeldBack(t, s)
	cable.cut()
	eventually(t, "the session's end", func() bool { return len(s.config.Sessions.List()) == 0 })
	close(reader.goOn)
	<-ended
}

// TestHoldbackEndsWithTheServer checks that the wait ends at once at shutdown, and that the client is told how its command
// has ended.
func TestHoldbackEndsWithTheServer(t *testing.T) {
	s := startServer(t, Config{Commands: commandConfig{StatusWait: 10 * testTimeout}})
	reader, _, ended := beginHeldBack(t, s)
	begin := time.Now()
	time.AfterFunc(time.Second/2, func() { close(reader.goOn) })
	s.stop()
	if took := time.Since(begin); took > testTimeout/2 {
		t.Errorf("shutdown took %v", took)
	}
	if err := <-ended; exitCode(t, err) != 3 || reader.taken != 240_000 {
		t.Errorf("%d bytes, %v", reader.taken, err)
	}
}

// TestHoldbackIsBounded checks that the wait ends when the reader makes no progress for StatusWait.
func TestHoldbackIsBounded(t *testing.T) {
	config, held := heldBack(Config{Commands: commandConfig{StatusWait: 1100 * time.Millisecond}})
	s := startServer(t, config)
	reader, _, ended := beginHeldBack(t, s)
	eventually(t, "the end of the wait", func() bool { return held.Load() == 1 })
	close(reader.goOn)
	if err := <-ended; exitCode(t, err) != 3 || reader.taken != 240_000 {
		t.Errorf("%d bytes, %v", reader.taken, err)
	}
}
