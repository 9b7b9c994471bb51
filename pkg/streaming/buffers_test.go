package streaming

import (
	"bytes"
	"io"
	"sync"
	"testing"
	"time"

	"k8s.io/client-go/tools/remotecommand"
)

// What clients send to commands that do not read is bounded for all sessions together, a session whose
// command reads goes on meanwhile, and nothing counts any more when the sessions are over.
func TestBuffersAreShared(t *testing.T) {
	forEachTransport(t, func(t *testing.T, transport string) {
		const (
			limit    = 1 << 20
			sessions = 6
			// What one session may have in any case: its first buffer, or 64 KiB and the piece that is being read.
			least = 192 << 10
		)
		buffers := NewBuffers(limit)
		s := startServer(t, Config{Buffers: buffers})
		executor := &hostExecutor{t: t}
		var clients sync.WaitGroup
		options := remotecommand.StreamOptions{Stdin: zeros{}, Stdout: io.Discard}
		for range sessions {
			u := s.execURL(executor, options, "sleep", "1000")
			clients.Go(func() { stream(t.Context(), t, transport, u, options) })
		}
		eventually(t, "the room to be used up", func() bool { return buffers.Used() >= limit && buffers.Refused() > 0 })
		for end := time.Now().Add(time.Second); time.Now().Before(end); time.Sleep(10 * time.Millisecond) {
			if used := buffers.Used(); used > limit+sessions*least {
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
		if used := buffers.Used(); used != 0 {
			t.Errorf("%d bytes are buffered when all sessions are over", used)
		}
	})
}

// An attached client that is too slow misses output earlier when there is no room, and none of it counts later.
func TestAttachWithoutRoom(t *testing.T) {
	buffers := NewBuffers(1000)
	share := buffers.share()
	b := newSkipBuffer(1<<20, false, share)
	for range 10 {
		b.Write(make([]byte, 600))
	}
	b.end()
	if used := buffers.Used(); used < 1000 || used > 1500 {
		t.Errorf("%d bytes are buffered", used)
	}
	text, err := io.ReadAll(b)
	if err != nil || !bytes.Contains(text, []byte("4800 bytes skipped")) {
		t.Errorf("%d bytes, %v: %q", len(text), err, text[max(0, len(text)-100):])
	}
	if used := buffers.Used(); used != 0 {
		t.Errorf("%d bytes are buffered after all is read", used)
	}
	share.Take(10)
	share.Close()
	share.Return(5)
	if used := buffers.Used(); used != 0 {
		t.Errorf("%d bytes are buffered after the end", used)
	}
}
