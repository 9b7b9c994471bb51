package streaming

import (
	"context"
	"io"
	"net"
	"net/http"
	"testing"
	"time"
)

func TestTranslated(t *testing.T) {
	for agent, want := range map[string]bool{
		"Go-http-client/1.1":            true,
		"kubectl/v1.36.3 (linux/amd64)": false,
		"":                              false,
	} {
		if got := translated(&http.Request{Header: http.Header{"User-Agent": {agent}}}); got != want {
			t.Errorf("translated with user agent %q is %t, want %t", agent, got, want)
		}
	}
}

// doneConnection is a connection of which only its end matters.
type doneConnection struct {
	connection
	done chan struct{}
}

func (c doneConnection) Done() <-chan struct{} { return c.done }

// socketPair is a TCP connection over loopback with buffers large enough for a backlog.
func socketPair(t *testing.T) (server, client net.Conn) {
	t.Helper()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer listener.Close() //nolint:errcheck // only for one connection
	if client, err = net.Dial("tcp", listener.Addr().String()); err != nil {
		t.Fatal(err)
	}
	if server, err = listener.Accept(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { server.Close(); client.Close() }) //nolint:errcheck // the test is over
	return server, client
}

// fill writes until the peer takes no more, and returns how much it was.
func fill(t *testing.T, server net.Conn) int64 {
	t.Helper()
	server.SetWriteDeadline(time.Now().Add(500 * time.Millisecond)) //nolint:errcheck // fails only on a closed connection
	var sent int64
	for block := make([]byte, 64<<10); ; {
		n, err := server.Write(block)
		sent += int64(n)
		if err != nil {
			break
		}
	}
	if backlog := unacknowledged(server); backlog < backlogOfSlowReader {
		t.Skipf("only %d bytes of backlog on this machine", backlog)
	}
	return sent
}

// TestAwaitDeliverySlowReader checks that the wait is as long as a reader of the seen speed needs for
// as much again as has been sent.
func TestAwaitDeliverySlowReader(t *testing.T) {
	server, client := socketPair(t)
	sent := fill(t, server)
	drained := make(chan time.Duration, 1)
	go func() {
		began := time.Now()
		pace := time.NewTicker(5 * time.Millisecond)
		defer pace.Stop()
		block := make([]byte, 64<<10)
		for left := sent; left > 0; <-pace.C {
			n, err := io.ReadFull(client, block[:min(left, int64(len(block)))])
			left -= int64(n)
			if err != nil {
				break
			}
		}
		drained <- time.Since(began)
	}()
	delay := awaitDelivery(t.Context(), doneConnection{done: make(chan struct{})}, server, sent)
	if took := <-drained; delay < took {
		t.Errorf("waited for %v, but the client needed %v", delay, took)
	}
}

func TestAwaitDeliveryReaderThatKeepsUp(t *testing.T) {
	server, client := socketPair(t)
	if _, err := server.Write(make([]byte, 1<<10)); err != nil {
		t.Fatal(err)
	}
	if _, err := io.ReadFull(client, make([]byte, 1<<10)); err != nil {
		t.Fatal(err)
	}
	if delay := awaitDelivery(t.Context(), doneConnection{done: make(chan struct{})}, server, 1<<30); delay != 0 {
		t.Errorf("waited for %v although nothing was left to send", delay)
	}
}

// TestAwaitDeliveryEnds checks that a reader that reads nothing is waited for only as long as the
// connection and the session last.
func TestAwaitDeliveryEnds(t *testing.T) {
	server, _ := socketPair(t)
	sent := fill(t, server)
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	awaitDelivery(ctx, doneConnection{done: make(chan struct{})}, server, sent)
	done := make(chan struct{})
	close(done)
	awaitDelivery(t.Context(), doneConnection{done: done}, server, sent)
}
