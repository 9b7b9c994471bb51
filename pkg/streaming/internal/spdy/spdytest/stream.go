// Package spdytest connects two ends of package spdy for the tests of other packages.
package spdytest

import (
	"context"
	"sync"
	"testing"

	"github.com/streamshim/streamshim/internal/testutil"
	"github.com/streamshim/streamshim/pkg/streaming/internal/spdy"
)

// Stream returns both ends of a stream over a real connection. The connection is closed when the test ends.
func Stream(t testing.TB) (ours, client *spdy.Stream) {
	t.Helper()
	dialled, accepted := testutil.TCPPair(t)
	opened := make(chan *spdy.Stream, 1)
	server := spdy.NewServer(accepted, nil, spdy.Config{OnStream: func(s *spdy.Stream) { opened <- s }})
	peer := spdy.NewClient(dialled, nil, spdy.Config{})
	var served sync.WaitGroup
	served.Go(func() { server.Serve(context.Background()) }) //nolint:errcheck // it ends with the test
	served.Go(func() { peer.Serve(context.Background()) })   //nolint:errcheck // as above
	t.Cleanup(func() {
		peer.Close()   //nolint:errcheck // of a test
		server.Close() //nolint:errcheck // as above
		served.Wait()
	})
	client, err := peer.OpenStream(nil)
	if err != nil {
		t.Fatal(err)
	}
	return testutil.Receive(t, "the stream", opened), client
}
