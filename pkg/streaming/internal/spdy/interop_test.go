package spdy

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"sync"
	"testing"
	"time"

	"github.com/moby/spdystream"

	"github.com/streamshim/streamshim/internal/testutil"
)

// The other side of these tests is moby/spdystream, which kubectl, the kubelet, containerd and CRI-O use.

// pattern returns n bytes: random ones, repeated after a prime number of them. Random megabytes would take seconds with the
// race detector.
func pattern(n int) []byte {
	p := make([]byte, n)
	r := rand.New(rand.NewPCG(1, uint64(n)))
	random := p[:min(n, 131_071)]
	for i := range random {
		random[i] = byte(r.Uint32())
	}
	for done := len(random); done < n; done *= 2 {
		copy(p[done:], p[:done])
	}
	return p
}

// mobyConn runs a spdystream connection until the test ends.
func mobyConn(t testing.TB, conn net.Conn, server bool, handler spdystream.StreamHandler) *spdystream.Connection {
	t.Helper()
	c, err := spdystream.NewConnection(conn, server)
	if err != nil {
		t.Fatal(err)
	}
	ended := make(chan struct{})
	go func() { defer close(ended); c.Serve(handler) }()
	t.Cleanup(func() {
		conn.Close()
		testutil.Receive(t, "the end of spdystream", ended)
	})
	return c
}

// mobyClient connects a spdystream client to a server of ours.
func mobyClient(t testing.TB, cfg Config) (*spdystream.Connection, *Conn) {
	t.Helper()
	a, b := testutil.TCPPair(t)
	ours := serve(t, NewServer(a, nil, cfg))
	return mobyConn(t, b, false, spdystream.NoOpStreamHandler), ours
}

func mobyOpen(t testing.TB, c *spdystream.Connection, header http.Header) *spdystream.Stream {
	t.Helper()
	s, err := c.CreateStream(header, nil, false)
	if err != nil {
		t.Fatal(err)
	}
	if err := s.WaitTimeout(testTimeout); err != nil {
		t.Fatal(err)
	}
	return s
}

func TestInteropServerEcho(t *testing.T) {
	testutil.Slow(t)
	client, _ := mobyClient(t, echoConfig())
	for range 3 { // the second reply is made differently from the first
		s := mobyOpen(t, client, headers("streamtype", "data"))
		sent := pattern(5 << 20)
		goDo(t, func() {
			for p := sent; len(p) > 0; {
				n := min(len(p), 1+rand.IntN(100_000))
				if _, err := s.Write(p[:n]); err != nil {
					t.Error(err)
					return
				}
				p = p[n:]
			}
			s.Close()
		})
		got, err := io.ReadAll(s)
		if err != nil {
			t.Fatal(err)
		}
		if sha256.Sum256(got) != sha256.Sum256(sent) {
			t.Fatalf("sent %d bytes, got %d, or others", len(sent), len(got))
		}
	}
}

func TestInteropServerReadsHeaders(t *testing.T) {
	got := make(chan http.Header, 10)
	client, _ := mobyClient(t, Config{OnStream: func(s *Stream) { got <- s.Header() }})
	for _, want := range []http.Header{
		{"Streamtype": {"error"}},
		{"Streamtype": {"data"}, "Port": {"8080"}, "Requestid": {"0"}},
		{"Many": {"one", "two", "three"}, "Empty": {""}},
		{},
	} {
		mobyOpen(t, client, want)
		h := testutil.Receive(t, "the stream", got)
		if len(h) != len(want) {
			t.Errorf("got %v, want %v", h, want)
		}
		for name, values := range want {
			if g := h.Values(name); len(g) != len(values) || g[0] != values[0] || g[len(g)-1] != values[len(values)-1] {
				t.Errorf("header %s: got %q, want %q", name, g, values)
			}
		}
	}
}

func TestInteropServerHalfClose(t *testing.T) {
	streams := make(chan *Stream, 1)
	client, _ := mobyClient(t, Config{OnStream: func(s *Stream) { streams <- s }})
	theirs := mobyOpen(t, client, headers("streamtype", "data"))
	ours := testutil.Receive(t, "the stream", streams)

	// The peer closes first: the answer still arrives.
	theirs.Write([]byte("question"))
	theirs.Close()
	if got, err := io.ReadAll(ours); err != nil || string(got) != "question" {
		t.Fatalf("got %q, %v", got, err)
	}
	if _, err := ours.Write([]byte("late answer")); err != nil {
		t.Fatal(err)
	}
	if err := ours.CloseWrite(); err != nil {
		t.Fatal(err)
	}
	if got, err := io.ReadAll(theirs); err != nil || string(got) != "late answer" {
		t.Fatalf("got %q, %v", got, err)
	}
	testutil.Receive(t, "the end of the stream", ours.Done())
	if _, err := ours.Write([]byte("x")); !errors.Is(err, ErrWriteClosed) {
		t.Errorf("write after FIN: %v", err)
	}
	if ours.Err() != nil || ours.Received() != 8 || ours.Sent() != 11 {
		t.Errorf("err %v, received %d, sent %d", ours.Err(), ours.Received(), ours.Sent())
	}
}

func TestInteropServerManyStreams(t *testing.T) {
	client, ours := mobyClient(t, echoConfig())
	var wg sync.WaitGroup
	for i := range 100 {
		s := mobyOpen(t, client, headers("streamtype", "data"))
		wg.Go(func() {
			sent := pattern(10_000 + i)
			// spdystream blocks its whole connection while a stream is not read.
			wg.Go(func() { s.Write(sent); s.Close() })
			if got, err := io.ReadAll(s); err != nil || !bytes.Equal(got, sent) {
				t.Errorf("stream %d: %d bytes, %v", i, len(got), err)
			}
		})
	}
	wg.Wait()
	testutil.Eventually(t, "all streams to be forgotten", func() bool { return streamCount(ours) == 0 })
}

func streamCount(c *Conn) int {
	c.mu.Lock()
	defer c.mu.Unlock()
	return len(c.streams)
}

func TestInteropServerRefusesStream(t *testing.T) {
	client, ours := mobyClient(t, Config{OnStream: func(s *Stream) {
		if s.Header().Get("streamtype") == "bad" {
			s.Reset()
			return
		}
		go echo(s)
	}})
	bad, err := client.CreateStream(headers("streamtype", "bad"), nil, false)
	if err != nil {
		t.Fatal(err)
	}
	if err := bad.WaitTimeout(testTimeout); !errors.Is(err, spdystream.ErrReset) {
		t.Errorf("refused stream: %v", err)
	}
	good := mobyOpen(t, client, headers("streamtype", "good"))
	good.Write([]byte("still there"))
	good.Close()
	if got, _ := io.ReadAll(good); string(got) != "still there" {
		t.Errorf("got %q", got)
	}

	ours.RefuseStreams()
	late, err := client.CreateStream(headers("streamtype", "good"), nil, false)
	if err != nil {
		t.Fatal(err)
	}
	if err := late.WaitTimeout(testTimeout); !errors.Is(err, spdystream.ErrReset) {
		t.Errorf("stream after RefuseStreams: %v", err)
	}
}

func TestInteropResets(t *testing.T) {
	streams := make(chan *Stream, 1)
	client, _ := mobyClient(t, Config{OnStream: func(s *Stream) { streams <- s }})

	theirs := mobyOpen(t, client, http.Header{})
	ours := testutil.Receive(t, "the stream", streams)
	theirs.Write([]byte("before"))
	theirs.Reset()
	got, err := io.ReadAll(ours)
	var reset *ResetError
	if string(got) != "before" || !errors.As(err, &reset) || !reset.Remote || reset.Status != ResetCancel {
		t.Errorf("peer's reset: read %q, %v", got, err)
	}
	testutil.Receive(t, "the end of the stream", ours.Done())
	if _, err := ours.Write([]byte("x")); !errors.As(err, &reset) {
		t.Errorf("write after the peer's reset: %v", err)
	}

	theirs = mobyOpen(t, client, http.Header{})
	ours = testutil.Receive(t, "the stream", streams)
	ours.Reset()
	if _, err := io.ReadAll(theirs); err != nil {
		t.Error(err)
	}
	if _, err := ours.Read(make([]byte, 1)); !errors.As(err, &reset) || reset.Remote {
		t.Errorf("read after own reset: %v", err)
	}
	theirs.Write([]byte("after the reset")) // ignored
	if _, err := client.Ping(); err != nil {
		t.Errorf("connection after a reset: %v", err)
	}
}

func TestInteropPings(t *testing.T) {
	client, ours := mobyClient(t, echoConfig())
	before := ours.LastActivity()
	for range 20 {
		if _, err := client.Ping(); err != nil {
			t.Fatal(err)
		}
	}
	if !ours.LastActivity().Equal(before) {
		t.Error("PING counted as activity")
	}
	received := ours.LastReceived()
	if !received.After(before) {
		t.Error("PING not counted as received")
	}
	if err := ours.Ping(); err != nil {
		t.Fatal(err)
	}
	testutil.Eventually(t, "the answer to our PING", func() bool { return ours.LastReceived().After(received) })
}

// TestInteropProbeIsHarmless sends what a blocked connection sends, many times.
func TestInteropProbeIsHarmless(t *testing.T) {
	client, ours := mobyClient(t, echoConfig())
	for range 20 {
		ours.out.probe()
	}
	s := mobyOpen(t, client, http.Header{})
	for range 20 {
		ours.out.probe()
		s.Write([]byte("x"))
		if _, err := io.ReadFull(s, make([]byte, 1)); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := client.Ping(); err != nil {
		t.Error(err)
	}
}

func TestInteropGoAwayIsTheEnd(t *testing.T) {
	streams := make(chan *Stream, 1)
	client, ours := mobyClient(t, Config{OnStream: func(s *Stream) { streams <- s }})
	theirs := mobyOpen(t, client, http.Header{})
	s := testutil.Receive(t, "the stream", streams)
	theirs.Write([]byte("last words"))
	client.Close()
	testutil.Receive(t, "the end", ours.Done())
	if !errors.Is(ours.Err(), ErrGoAway) {
		t.Errorf("got %v", ours.Err())
	}
	buf := make([]byte, 100)
	if n, err := s.Read(buf); string(buf[:n]) != "last words" {
		t.Errorf("got %q, %v", buf[:n], err)
	}
}

func TestInteropOurCloseEndsThePeer(t *testing.T) {
	client, ours := mobyClient(t, echoConfig())
	s := mobyOpen(t, client, http.Header{})
	if err := ours.Close(); err != nil {
		t.Fatal(err)
	}
	if _, err := io.ReadAll(s); err != nil {
		t.Error(err)
	}
	select {
	case <-client.CloseChan():
	case <-time.After(testTimeout):
		t.Fatal("the peer did not notice")
	}
}

// mobyServer connects a client of ours to a spdystream server that handles streams as containerd and CRI-O do: the handler
// replies before it returns.
func mobyServer(t testing.TB, handler func(*spdystream.Stream)) *Conn {
	t.Helper()
	a, b := testutil.TCPPair(t)
	mobyConn(t, a, true, func(s *spdystream.Stream) {
		s.SendReply(http.Header{}, false)
		go handler(s)
	})
	return serve(t, NewClient(b, nil, Config{}))
}

func TestInteropClientEcho(t *testing.T) {
	client := mobyServer(t, func(s *spdystream.Stream) { io.Copy(s, s); s.Close() })
	var wg sync.WaitGroup
	for i := range 100 {
		wg.Go(func() {
			s, err := client.OpenStream(headers("streamType", "data", "Port", "80"))
			if err != nil {
				t.Error(err)
				return
			}
			sent := pattern(50_000 + i)
			wg.Go(func() {
				// At once, without waiting for the reply.
				if _, err := s.ReadFrom(bytes.NewReader(sent)); err != nil {
					t.Error(err)
				}
				s.CloseWrite()
			})
			got, err := io.ReadAll(s)
			if err != nil || !bytes.Equal(got, sent) {
				t.Errorf("stream %d: sent %d bytes, got %d, %v", i, len(sent), len(got), err)
			}
		})
	}
	wg.Wait()
	testutil.Eventually(t, "all streams to be forgotten", func() bool { return streamCount(client) == 0 })
}

func TestInteropClientHeaders(t *testing.T) {
	got := make(chan http.Header, 1)
	client := mobyServer(t, func(s *spdystream.Stream) { got <- s.Headers() })
	for _, want := range []http.Header{
		headers("streamType", "stdin"),
		headers("streamType", "data", "port", "1", "requestID", "7"),
		headers("x-many", "a", "x-many", "b"),
		headers("x-long", string(bytes.Repeat([]byte("long"), 3000))),
		headers(),
		headers("streamType", "resize"),
	} {
		if _, err := client.OpenStream(want); err != nil {
			t.Fatal(err)
		}
		h := testutil.Receive(t, "the stream", got)
		if len(h) != len(want) {
			t.Errorf("got %v, want %v", h, want)
		}
		for name := range want {
			if len(h.Values(name)) != len(want.Values(name)) || h.Get(name) != want.Get(name) {
				t.Errorf("header %s: got %q, want %q", name, h.Values(name), want.Values(name))
			}
		}
	}
	if _, err := client.OpenStream(headers("x", string(make([]byte, maxControlFrame)))); err == nil {
		t.Error("headers past the limit were sent")
	}
}

func TestInteropClientRefusedAndReset(t *testing.T) {
	a, b := testutil.TCPPair(t)
	mobyConn(t, a, true, func(s *spdystream.Stream) {
		if s.Headers().Get("refuse") != "" {
			s.Refuse()
			return
		}
		s.SendReply(http.Header{}, false)
		s.Write([]byte("partial"))
		s.Reset()
	})
	client := serve(t, NewClient(b, nil, Config{}))

	var reset *ResetError
	s, err := client.OpenStream(headers("refuse", "yes"))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := io.ReadAll(s); !errors.As(err, &reset) || !reset.Remote || reset.Status != ResetRefusedStream {
		t.Errorf("refused: %v", err)
	}
	s, err = client.OpenStream(headers("refuse", ""))
	if err != nil {
		t.Fatal(err)
	}
	if got, err := io.ReadAll(s); string(got) != "partial" || !errors.As(err, &reset) || reset.Status != ResetCancel {
		t.Errorf("reset: %q, %v", got, err)
	}
}

func TestInteropServerGoesAway(t *testing.T) {
	a, b := testutil.TCPPair(t)
	server := mobyConn(t, a, true, func(s *spdystream.Stream) { s.SendReply(http.Header{}, false) })
	client := NewClient(b, nil, Config{})
	ended := make(chan error, 1)
	go func() { ended <- client.Serve(context.Background()) }()
	server.Close()
	testutil.Receive(t, "the end", client.Done())
	testutil.Receive(t, "the end of Serve", ended)
	if err := client.Err(); !errors.Is(err, ErrGoAway) {
		t.Errorf("got %v", err)
	}
	client.Close()
}
