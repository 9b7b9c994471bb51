package spdy

import (
	"context"
	"io"
	"net/http"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/streamshim/streamshim/internal/testutil"
	"github.com/streamshim/streamshim/pkg/streaming/internal/spdy/frames"
)

func TestMain(m *testing.M) {
	// spdystream waits a second for a reader of the error of a close.
	goleak.VerifyTestMain(m, goleak.IgnoreTopFunction("github.com/moby/spdystream.(*Connection).shutdown"))
}

// testTimeout only bounds tests that would hang.
const testTimeout = 60 * time.Second

// serve runs Serve until the test ends, and then closes the connection.
func serve(t testing.TB, c *Conn) *Conn {
	t.Helper()
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		c.Serve(context.Background())
	}()
	t.Cleanup(func() {
		c.Close()
		testutil.Receive(t, "the end of Serve", ended)
	})
	return c
}

// goDo runs f in a goroutine that the test waits for.
func goDo(t testing.TB, f func()) {
	t.Helper()
	var wg sync.WaitGroup
	wg.Go(f)
	t.Cleanup(func() {
		done := make(chan struct{})
		go func() { wg.Wait(); close(done) }()
		testutil.Receive(t, "a goroutine of the test", done)
	})
}

// echo answers each stream with what it receives, then FIN.
func echo(s *Stream) {
	io.Copy(s, s)
	s.CloseWrite()
}

func echoConfig() Config {
	return Config{OnStream: func(s *Stream) { go echo(s) }}
}

// pair connects two ends of this package.
func pair(t testing.TB, server, client Config) (*Conn, *Conn) {
	a, b := testutil.TCPPair(t)
	return serve(t, NewServer(a, nil, server)), serve(t, NewClient(b, nil, client))
}

func headers(kv ...string) http.Header {
	h := http.Header{}
	for i := 0; i < len(kv); i += 2 {
		h.Add(kv[i], kv[i+1])
	}
	return h
}

// storedBlock returns a header block of raw bytes, at most 255, which may be invalid.
func storedBlock(plain string) []byte {
	n := byte(len(plain))
	b := append([]byte{0, n, 0, ^n, 0xff}, plain...)
	return append(b, 0, 0, 0, 0xff, 0xff)
}

// zlibHeader is what precedes the first block.
var zlibHeader = frames.AppendHeaderBlock(nil, true, nil)[:6]
