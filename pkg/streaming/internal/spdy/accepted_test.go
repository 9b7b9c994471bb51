package spdy

import (
	"context"
	"errors"
	"io"
	"net/http"
	"testing"
	"time"

	"github.com/streamshim/streamshim/internal/testutil"
	"github.com/streamshim/streamshim/pkg/streaming/internal/spdy/frames"
)

// TestWaitAccepted checks that WaitAccepted returns when the peer has replied. The relay must know that before it may
// close.
func TestWaitAccepted(t *testing.T) {
	near, far := testutil.TCPPair(t)
	c := NewClient(near, nil, Config{})
	goDo(t, func() { c.Serve(context.Background()) })
	goDo(t, func() { io.Copy(io.Discard, far) })
	defer c.Close()
	defer far.Close()
	var streams []*Stream
	for range 3 {
		s, err := c.OpenStream(http.Header{"Streamtype": {"error"}})
		if err != nil {
			t.Fatal(err)
		}
		streams = append(streams, s)
	}
	soon, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	if err := streams[0].WaitAccepted(soon); !errors.Is(err, context.DeadlineExceeded) {
		t.Fatalf("before the reply: %v", err)
	}
	replies := frames.AppendSynReply(nil, streams[0].ID(), 0, frames.AppendHeaderBlock(nil, true, nil))
	replies = append(replies, frames.AppendRstStream(nil, streams[1].ID(), ResetRefusedStream)...)
	if _, err := far.Write(replies); err != nil {
		t.Fatal(err)
	}
	for range 2 { // a second reply changes nothing
		if err := streams[0].WaitAccepted(t.Context()); err != nil {
			t.Errorf("after the reply: %v", err)
		}
	}
	if err := streams[1].WaitAccepted(t.Context()); err == nil {
		t.Error("a refused stream counts as accepted")
	}
	far.Close()
	if err := streams[2].WaitAccepted(t.Context()); err == nil {
		t.Error("a stream of a connection that has ended counts as accepted")
	}
}
