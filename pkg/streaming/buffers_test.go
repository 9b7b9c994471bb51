package streaming

import (
	"bytes"
	"io"
	"sync"
	"testing"
	"time"

	"k8s.io/client-go/tools/remotecommand"

	"github.com/streamshim/streamshim/internal/testutil"
	"github.com/streamshim/streamshim/pkg/streaming/buffers"
)

// TestBuffersAreShared checks that what clients send to commands that do not read is bounded for all sessions together,
// that a session whose command reads goes on meanwhile, and that nothing counts any more when the sessions are over.
func TestBuffersAreShared(t *testing.T) {
	testutil.Slow(t)
	forEachTransport(t, func(t *testing.T, transport string) {
		const (
			limit    = 1 << 20
			sessions = 6
			// What one session may always have: its first buffer, or 64 KiB and the piece that is being read.
			least = 192 << 10
		)
		pool := buffers.New(limit)
		s := startServer(t, Config{Buffers: pool})
		executor := &hostExecutor{t: t}
		var clients sync.WaitGroup
		options := remotecommand.StreamOptions{Stdin: zeros{}, Stdout: io.Discard}
		for range sessions {
			u := s.execURL(executor, options, "sleep", "1000")
			clients.Go(func() { stream(t.Context(), t, transport, u, options) })
		}
		eventually(t, "the room to be used up", func() bool { return pool.Used() >= limit && pool.Refused() > 0 })
		for end := time.Now().Add(time.Second); time.Now().Before(end); time.Sleep(10 * time.Millisecond) {
			if used := pool.Used(); used > limit+sessions*least {
				t.Fatalf("%d bytes are buffered", used)
			}
		}
		sent := bytes.Repeat([]byte("0123456789abcdef"), 1<<16)
		var got bytes.Buffer
		options = remotecommand.StreamOptions{Stdin: bytes.NewReader(sent), Stdout: &got}
		if err := stream(t.Context(), t, transport, s.execURL(executor, options, "cat"), options); err != nil {
			t.Error(err)
		}
		if !bytes.Equal(got.Bytes(), sent) {
			t.Errorf("a session whose command reads brought %d bytes of %d", got.Len(), len(sent))
		}
		s.stop()
		clients.Wait()
		if used := pool.Used(); used != 0 {
			t.Errorf("%d bytes are buffered when all sessions are over", used)
		}
	})
}
