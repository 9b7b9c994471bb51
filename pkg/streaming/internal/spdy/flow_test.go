package spdy

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	cryptorand "crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"io"
	"math/big"
	"os"
	"runtime"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/creack/pty"
	"github.com/moby/spdystream"

	"github.com/streamshim/streamshim/internal/testutil"
	"github.com/streamshim/streamshim/pkg/streaming/internal/spdy/frames"
)

// TestUnreadStreamLeavesNeighboursAlone leaves 8 MiB of one stream unread and uses another (kubernetes#78446).
func TestUnreadStreamLeavesNeighboursAlone(t *testing.T) {
	testutil.Slow(t)
	unread := make(chan *Stream, 1)
	client, ours := mobyClient(t, Config{OnStream: func(s *Stream) {
		if s.Header().Get("streamtype") == "unread" {
			unread <- s
			return
		}
		go echo(s)
	}})
	stuck := mobyOpen(t, client, headers("streamtype", "unread"))
	s := testutil.Receive(t, "the stream", unread)
	sent := pattern(8 << 20)
	for p := sent; len(p) > 0; p = p[64<<10:] {
		if _, err := stuck.Write(p[:64<<10]); err != nil {
			t.Fatal(err)
		}
	}
	for range 20 {
		neighbour := mobyOpen(t, client, headers("streamtype", "echo"))
		neighbour.Write([]byte("hello"))
		neighbour.Close()
		if got, err := io.ReadAll(neighbour); string(got) != "hello" {
			t.Fatalf("got %q, %v", got, err)
		}
	}
	stuck.Close()
	if got, err := io.ReadAll(s); err != nil || string(got) != string(sent) {
		t.Errorf("then %d bytes were read, %v", len(got), err)
	}
	if b := ours.limits.Borrowed(); b != 0 {
		t.Errorf("%d bytes still borrowed", b)
	}
}

// blockedPeer returns a connection whose read loop waits for room, and a client that is still sending.
func blockedPeer(t *testing.T, cfg Config) (peer *rawPeer, ours *Conn, s *Stream) {
	streams := make(chan *Stream, 1)
	cfg.StreamBuffer, cfg.ConnBuffer = 64<<10, 1<<20
	cfg.OnStream = func(s *Stream) {
		if s.ID() == 1 {
			streams <- s
			return
		}
		go echo(s)
	}
	peer, ours = newRawPeer(t, cfg)
	peer.open(1)
	s = testutil.Receive(t, "the stream", streams)
	return peer, ours, s
}

// floodUntilStuck sends on stream 1 until the socket accepts no more.
func floodUntilStuck(peer *rawPeer) {
	frame := make([]byte, frames.HeaderLen+32<<10)
	frames.PutDataHeader(frame, 1, 0, 32<<10)
	for {
		peer.SetWriteDeadline(time.Now().Add(500 * time.Millisecond))
		if _, err := peer.Write(frame); err != nil {
			return
		}
	}
}

func TestDoneWhileBlocked(t *testing.T) {
	testutil.Slow(t)
	for name, end := range map[string]func(*rawPeer){
		// The FIN is behind bytes that do not fit the window, so it never arrives.
		"killed while sending": func(p *rawPeer) { p.expect(frames.TypeSynReply, 1); floodUntilStuck(p); p.Close() },
		"reset":                func(p *rawPeer) { floodUntilStuck(p); p.SetLinger(0); p.Close() },
		"closed": func(p *rawPeer) {
			frame := make([]byte, frames.HeaderLen+1<<20+160<<10)
			frames.PutDataHeader(frame, 1, 0, 1<<20+160<<10)
			p.send(frame)
			p.expect(frames.TypeSynReply, 1)
			p.Close()
		},
	} {
		t.Run(name, func(t *testing.T) {
			peer, ours, s := blockedPeer(t, Config{})
			end(peer)
			testutil.Receive(t, "the end to be noticed", ours.Done())
			if name == "closed" {
				// Noticed at the socket, not only by the probe a second later.
				if err := ours.Err(); !errors.Is(err, ErrPeerClosed) {
					t.Errorf("got %v", err)
				}
				// All that was received can still be read.
				var got int
				buf := make([]byte, 100_000)
				for err := error(nil); err == nil; {
					var n int
					n, err = s.Read(buf)
					got += n
				}
				if got != 1<<20+160<<10 {
					t.Errorf("read %d bytes", got)
				}
			}
		})
	}
}

// TestClientDoesNotProbe has a server close right after its last byte, as containerd and CRI-O do, while this side is
// blocked. Nothing may be lost, however late it is read.
func TestClientDoesNotProbe(t *testing.T) {
	a, b := testutil.TCPPair(t)
	client := serve(t, NewClient(b, nil, Config{StreamBuffer: 64 << 10, ConnBuffer: 256 << 10}))
	s, err := client.OpenStream(headers())
	if err != nil {
		t.Fatal(err)
	}
	synStream := make([]byte, frames.HeaderLen)
	if _, err := io.ReadFull(a, synStream); err != nil {
		t.Fatal(err)
	}
	if _, err := io.CopyN(io.Discard, a, int64(frames.ParseHeader(synStream).Length)); err != nil {
		t.Fatal(err)
	}
	// As much as the sockets accept: the rest waits on the server's side when it closes.
	frame := make([]byte, frames.HeaderLen+frames.MaxLen)
	frames.PutDataHeader(frame, 1, frames.FlagFin, frames.MaxLen)
	a.SetWriteDeadline(time.Now().Add(500 * time.Millisecond))
	n, _ := a.Write(frame)
	a.Close()
	testutil.Eventually(t, "the read loop to be blocked", client.block.waiter.Waiting)
	time.Sleep(probeInterval + probeInterval/2) // when a probe would have been sent
	got, err := io.Copy(io.Discard, s)
	if got != int64(n-frames.HeaderLen) || !errors.Is(err, ErrPeerClosed) {
		t.Errorf("read %d bytes of %d, %v", got, n-frames.HeaderLen, err)
	}
}

func TestStalledStreamIsReset(t *testing.T) {
	told := make(chan struct{}, 16)
	peer, _, s := blockedPeer(t, Config{Stall: 300 * time.Millisecond, OnStall: func() { told <- struct{}{} }})
	flooded := make(chan struct{})
	go func() {
		defer close(flooded)
		frame := make([]byte, frames.HeaderLen+16<<20-1)
		frames.PutDataHeader(frame, 1, 0, 16<<20-1)
		peer.Write(frame)
	}()
	testutil.Receive(t, "the reset", s.Done())
	var reset *ResetError
	if err := s.Err(); !errors.As(err, &reset) || reset.Remote || reset.Status != ResetFlowControlError {
		t.Errorf("got %v", err)
	}
	peer.expect(frames.TypeSynReply, 1)
	peer.expect(frames.TypeRstStream, 1, uint32(ResetFlowControlError))
	// The rest of its data is discarded, and the connection goes on.
	testutil.Receive(t, "the flood to end", flooded)
	peer.data(1, 0, nil)
	peer.send(ping(1))
	peer.expect(frames.TypePing, 1)
	if len(told) != 1 {
		t.Errorf("OnStall was called %d times", len(told))
	}
}

// TestStallHitsTheHog has one stream use up the common room and another one block the connection.
func TestStallHitsTheHog(t *testing.T) {
	streams := make(chan *Stream, 2)
	peer, ours := newRawPeer(t, Config{
		StreamBuffer: 64 << 10, ConnBuffer: 1 << 20, Stall: 300 * time.Millisecond,
		OnStream: func(s *Stream) { streams <- s },
	})
	peer.open(1)
	peer.open(3)
	hog, other := testutil.Receive(t, "the stream", streams), testutil.Receive(t, "the stream", streams)
	peer.data(1, 0, make([]byte, 1<<20))
	testutil.Eventually(t, "the data", func() bool { return hog.Received() == 1<<20 })
	peer.data(3, frames.FlagFin, make([]byte, 300<<10))
	testutil.Receive(t, "the reset", hog.Done())
	if n, err := io.Copy(io.Discard, other); err != nil || n != 300<<10 {
		t.Errorf("the other stream: %d bytes, %v", n, err)
	}
	testutil.Eventually(t, "the room to be returned", func() bool { return ours.limits.Borrowed() == 0 })
}

// TestSlowStreamIsNotReset reads a little from time to time, for longer than Stall in all.
func TestSlowStreamIsNotReset(t *testing.T) {
	testutil.Slow(t)
	const stall = 3 * time.Second
	peer, ours, s := blockedPeer(t, Config{Stall: stall})
	frame := make([]byte, frames.HeaderLen+2<<20)
	frames.PutDataHeader(frame, 1, frames.FlagFin, 2<<20)
	goDo(t, func() { peer.Write(frame) })
	testutil.Eventually(t, "the read loop to be blocked", ours.block.waiter.Waiting)
	buf := make([]byte, 1000)
	for range 12 {
		time.Sleep(stall / 8) // the slow reader
		if _, err := io.ReadFull(s, buf); err != nil {
			t.Fatal(err)
		}
	}
	if n, err := io.Copy(io.Discard, s); err != nil || n != 2<<20-12*1000 {
		t.Errorf("got %d, %v", n, err)
	}
}

func TestCloseUnblocksWriters(t *testing.T) {
	peer, ours, s := blockedPeer(t, Config{})
	ended := make(chan error, 4)
	for range 3 {
		go func() {
			_, err := s.Write(make([]byte, 64<<20)) // nobody reads
			ended <- err
		}()
	}
	go func() { _, err := s.Read(make([]byte, 1)); ended <- err }()
	testutil.Eventually(t, "the writers to wait", func() bool { return ours.out.senders.Load() == 3 })
	// A PING meanwhile must not make the read loop wait for the writers.
	testutil.Eventually(t, "a PING to wait for them", func() bool {
		peer.send(ping(1))
		return ours.out.control.Waiting() > 0
	})
	ours.Close()
	for range 4 {
		if err := testutil.Receive(t, "a reader or writer", ended); !errors.Is(err, ErrClosed) {
			t.Errorf("got %v", err)
		}
	}
}

func TestPeerGoneUnblocksWriters(t *testing.T) {
	peer, ours, s := blockedPeer(t, Config{})
	ended := make(chan error, 1)
	go func() { _, err := s.Write(make([]byte, 64<<20)); ended <- err }()
	testutil.Eventually(t, "the writer to wait", func() bool { return ours.out.senders.Load() == 1 })
	peer.CloseWrite() // only the read loop can notice this
	testutil.Receive(t, "the end", ours.Done())
	if err := testutil.Receive(t, "the writer", ended); !errors.Is(err, ErrPeerClosed) {
		t.Errorf("got %v", err)
	}
}

// TestPingOvertakesData has two streams write without end and checks that PINGs are answered meanwhile. While both write,
// no frame is longer than 64 KiB.
func TestPingOvertakesData(t *testing.T) {
	var senders sync.WaitGroup
	peer, ours := newRawPeer(t, Config{OnStream: func(s *Stream) {
		senders.Go(func() { s.Write(make([]byte, 16<<20)) })
	}})
	peer.open(1)
	peer.open(3)
	testutil.Eventually(t, "both to write", func() bool { return ours.out.senders.Load() == 2 })
	peer.send(ping(1))
	before := 0
	sent := map[uint32]int{}
	for ponged := false; !ponged; {
		h, payload := peer.next()
		switch {
		case h.Control && h.Kind == frames.TypePing:
			ponged = true
		case !h.Control:
			before += len(payload)
			sent[h.StreamID] += len(payload)
			both := len(sent) == 2 && sent[1] < 16<<20 && sent[3] < 16<<20
			if both && len(payload) > sharedFrame {
				t.Errorf("a frame of %d bytes", len(payload))
			}
		}
	}
	if before > 24<<20 { // what the sockets hold, and some more
		t.Errorf("PING answered after %d bytes", before)
	}
	ours.Close()
	senders.Wait()
}

func TestCloseRead(t *testing.T) {
	peer, ours, s := blockedPeer(t, Config{})
	frame := make([]byte, frames.HeaderLen+4<<20)
	frames.PutDataHeader(frame, 1, 0, 4<<20)
	goDo(t, func() { peer.Write(frame) })
	testutil.Eventually(t, "the read loop to be blocked", ours.block.waiter.Waiting)
	s.CloseRead()
	testutil.Eventually(t, "the rest to be discarded", func() bool { return s.Received() == 4<<20 })
	if _, err := s.Read(make([]byte, 1)); !errors.Is(err, ErrReadClosed) {
		t.Errorf("got %v", err)
	}
	if _, err := s.Write([]byte("still")); err != nil {
		t.Error(err)
	}
	if b := ours.limits.Borrowed(); b != 0 {
		t.Errorf("%d bytes still borrowed", b)
	}
}

// TestRelay moves data through two connections: from a client to a server, whose stream is copied to a stream of a second
// client, and to an echo server.
func TestRelay(t *testing.T) {
	a, b := testutil.TCPPair(t)
	serve(t, NewServer(a, nil, echoConfig()))
	upstream := serve(t, NewClient(b, nil, Config{}))
	client, _ := mobyClient(t, Config{OnStream: func(s *Stream) {
		up, err := upstream.OpenStream(s.Header())
		if err != nil {
			s.Reset()
			return
		}
		go func() { s.WriteTo(up); up.CloseWrite() }()
		go func() { s.ReadFrom(up); s.CloseWrite() }()
	}})
	s := mobyOpen(t, client, headers("streamtype", "data"))
	sent := pattern(3 << 20)
	goDo(t, func() { s.Write(sent); s.Close() })
	if got, err := io.ReadAll(s); err != nil || string(got) != string(sent) {
		t.Errorf("got %d bytes, %v", len(got), err)
	}
}

// TestReadFromKinds sends from every kind of reader that a session has.
func TestReadFromKinds(t *testing.T) {
	want := string(pattern(700_000))
	for name, open := range map[string]func(t *testing.T) (io.ReadCloser, io.WriteCloser){
		"pipe": func(t *testing.T) (io.ReadCloser, io.WriteCloser) {
			r, w, err := os.Pipe()
			if err != nil {
				t.Fatal(err)
			}
			return r, w
		},
		"tcp":    func(t *testing.T) (io.ReadCloser, io.WriteCloser) { return testutil.TCPPair(t) },
		"reader": func(t *testing.T) (io.ReadCloser, io.WriteCloser) { r, w := io.Pipe(); return r, w },
	} {
		t.Run(name, func(t *testing.T) {
			r, w := open(t)
			defer r.Close()
			sent := make(chan int64, 1)
			server, client := pair(t, Config{OnStream: func(s *Stream) {
				go func() {
					n, err := s.ReadFrom(r)
					if err != nil {
						t.Error(err)
					}
					sent <- n
					s.CloseWrite()
				}()
			}}, Config{})
			_ = server
			s, err := client.OpenStream(headers())
			if err != nil {
				t.Fatal(err)
			}
			goDo(t, func() { io.WriteString(w, want); w.Close() })
			got, err := io.ReadAll(s)
			if err != nil || string(got) != want {
				t.Errorf("got %d bytes, %v", len(got), err)
			}
			if n := testutil.Receive(t, "ReadFrom", sent); n != int64(len(want)) {
				t.Errorf("ReadFrom said %d", n)
			}
		})
	}
}

// TestReadFromTerminal checks that ReadFrom returns the reader's own error when the terminal's other side is closed.
func TestReadFromTerminal(t *testing.T) {
	master, slave, err := pty.Open()
	if err != nil {
		t.Skip(err)
	}
	defer master.Close()
	ended := make(chan error, 1)
	_, client := pair(t, Config{OnStream: func(s *Stream) {
		go func() { _, err := s.ReadFrom(master); ended <- err; s.CloseWrite() }()
	}}, Config{})
	s, err := client.OpenStream(headers())
	if err != nil {
		t.Fatal(err)
	}
	io.WriteString(slave, "prompt")
	got := make([]byte, 6)
	if _, err := io.ReadFull(s, got); err != nil || string(got) != "prompt" {
		t.Errorf("got %q, %v", got, err)
	}
	slave.Close()
	if err := testutil.Receive(t, "ReadFrom", ended); !errors.Is(err, syscall.EIO) {
		t.Errorf("got %v", err)
	}
}

// TestIdleConnectionsAreSmall measures what a thousand idle connections hold, each with the four streams of an exec and a
// reader of each.
func TestIdleConnectionsAreSmall(t *testing.T) {
	const conns = 200
	heap := func() int64 {
		var m runtime.MemStats
		collect(&m)
		return int64(m.HeapInuse + m.StackInuse)
	}
	ready := make(chan *Stream, 4*conns)
	before := heap()
	var all []*Conn
	for range conns {
		peer, ours := newRawPeer(t, Config{OnStream: func(s *Stream) { ready <- s }})
		for id := uint32(1); id < 9; id += 2 {
			peer.open(id, "streamtype", "stdin")
			testutil.Receive(t, "the stream", ready)
		}
		peer.data(1, 0, make([]byte, 10_000))
		s := ours.findStream(1)
		if _, err := io.ReadFull(s, make([]byte, 10_000)); err != nil {
			t.Fatal(err)
		}
		goDo(t, func() { s.WriteTo(io.Discard); ours.Close() })
		t.Cleanup(func() { peer.Close() })
		ours.RefuseStreams()
		all = append(all, ours)
	}
	each := (heap() - before) / conns
	t.Logf("%d bytes each", each)
	if each > 24<<10 {
		t.Errorf("an idle connection holds %d bytes", each)
	}
	runtime.KeepAlive(all)
}

// TestNoAllocationPerFrame checks both directions.
func TestNoAllocationPerFrame(t *testing.T) {
	for _, name := range []string{"send", "receive"} {
		t.Run(name, func(t *testing.T) {
			streams := make(chan *Stream, 1)
			a, b := testutil.TCPPair(t)
			goDo(t, func() { drain(b) })
			serve(t, NewServer(a, nil, Config{OnStream: func(s *Stream) { streams <- s }}))
			b.Write(openRaw())
			s := testutil.Receive(t, "the stream", streams)
			frame := make([]byte, frames.HeaderLen+32<<10)
			frames.PutDataHeader(frame, 1, 0, 32<<10)
			step := func() {
				if _, err := s.Write(frame[frames.HeaderLen:]); err != nil {
					t.Fatal(err)
				}
			}
			if name == "receive" {
				buf := make([]byte, 32<<10)
				step = func() {
					if _, err := b.Write(frame); err != nil {
						t.Fatal(err)
					}
					if _, err := io.ReadFull(s, buf); err != nil {
						t.Fatal(err)
					}
				}
			}
			if n := testing.AllocsPerRun(2000, step); n >= 1 && !raceEnabled {
				t.Errorf("%v allocations per frame", n)
			}
		})
	}
}

// TestOverTLS checks connections that are not plain sockets.
func TestOverTLS(t *testing.T) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), cryptorand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{SerialNumber: big.NewInt(1), NotAfter: time.Now().Add(time.Hour)}
	der, err := x509.CreateCertificate(cryptorand.Reader, template, template, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	cert := tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}
	a, b := testutil.TCPPair(t)
	unread := make(chan *Stream, 1)
	ours := serve(t, NewServer(tls.Server(a, &tls.Config{Certificates: []tls.Certificate{cert}}), nil, Config{
		ConnBuffer: 1 << 20,
		OnStream: func(s *Stream) {
			if s.Header().Get("streamtype") == "unread" {
				unread <- s
				return
			}
			go echo(s)
		},
	}))
	client := mobyConn(t, tls.Client(b, &tls.Config{InsecureSkipVerify: true}), false, spdystream.NoOpStreamHandler)
	s := mobyOpen(t, client, headers())
	sent := pattern(2 << 20)
	goDo(t, func() { s.Write(sent); s.Close() })
	if got, err := io.ReadAll(s); err != nil || string(got) != string(sent) {
		t.Errorf("got %d bytes, %v", len(got), err)
	}
	if _, err := client.Ping(); err != nil {
		t.Error(err)
	}
	stuck := mobyOpen(t, client, headers("streamtype", "unread"))
	testutil.Receive(t, "the stream", unread)
	goDo(t, func() { stuck.Write(make([]byte, 8<<20)) })
	testutil.Eventually(t, "the read loop to be blocked", ours.block.waiter.Waiting)
	b.SetLinger(0)
	b.Close()
	testutil.Receive(t, "the end to be noticed", ours.Done())
}
