package spdy

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"io"
	"net"
	"net/http"
	"os"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/streamshim/streamshim/internal/testutil"
	"github.com/streamshim/streamshim/pkg/streaming/internal/spdy/control"
	"github.com/streamshim/streamshim/pkg/streaming/internal/spdy/frames"
)

// rawPeer is a client that writes raw bytes and collects the control frames that it receives.
type rawPeer struct {
	*net.TCPConn
	t    testing.TB
	zlib bool
}

func newRawPeer(t testing.TB, cfg Config) (*rawPeer, *Conn) {
	a, b := testutil.TCPPair(t)
	return &rawPeer{TCPConn: b, t: t}, serve(t, NewServer(a, nil, cfg))
}

func (p *rawPeer) send(all ...[]byte) {
	p.t.Helper()
	for _, frame := range all {
		if _, err := p.Write(frame); err != nil {
			p.t.Fatal(err)
		}
	}
}

func (p *rawPeer) open(id uint32, kv ...string) {
	p.t.Helper()
	p.send(frames.AppendSynStream(nil, id, 0, frames.AppendHeaderBlock(nil, !p.zlib, headers(kv...))))
	p.zlib = true
}

func (p *rawPeer) data(id uint32, flags byte, payload []byte) {
	p.t.Helper()
	header := make([]byte, frames.HeaderLen)
	frames.PutDataHeader(header, id, flags, len(payload))
	p.send(append(header, payload...))
}

// next returns the next frame other than SETTINGS.
func (p *rawPeer) next() (frames.Header, []byte) {
	p.t.Helper()
	p.SetReadDeadline(time.Now().Add(testTimeout))
	for {
		var head [frames.HeaderLen]byte
		if _, err := io.ReadFull(p, head[:]); err != nil {
			p.t.Fatalf("waiting for a frame: %v", err)
		}
		h := frames.ParseHeader(head[:])
		payload := make([]byte, h.Length)
		if _, err := io.ReadFull(p, payload); err != nil {
			p.t.Fatal(err)
		}
		if h.Control && h.Kind == frames.TypeSettings {
			continue
		}
		return h, payload
	}
}

func (p *rawPeer) expect(kind uint16, words ...uint32) {
	p.t.Helper()
	h, payload := p.next()
	if !h.Control || h.Kind != kind {
		p.t.Fatalf("got frame %+v %x, want kind %d", h, payload, kind)
	}
	for i, want := range words {
		if got := binary.BigEndian.Uint32(payload[4*i:]); got != want {
			p.t.Fatalf("frame kind %d, word %d: got %d, want %d", kind, i, got, want)
		}
	}
}

func (p *rawPeer) expectData(id uint32, want string) {
	p.t.Helper()
	h, payload := p.next()
	if h.Control || h.StreamID != id || string(payload) != want {
		p.t.Fatalf("got %+v %q, want %q on %d", h, payload, want, id)
	}
}

func ping(id uint32) []byte { return frames.AppendPing(nil, id) }

// TestProtocolViolations checks that each one is answered with GOAWAY and a typed error.
func TestProtocolViolations(t *testing.T) {
	block := frames.AppendHeaderBlock(nil, true, nil)
	first := frames.AppendSynStream(nil, 5, 0, block)
	for _, tt := range []struct {
		name  string
		bytes []byte
	}{
		{"data for stream 0", []byte{0, 0, 0, 0, 0, 0, 0, 0}},
		{"other version", []byte{0x80, 2, 0, 6, 0, 0, 0, 4, 0, 0, 0, 1}},
		{"control frame too long", []byte{0x80, 3, 0, 1, 0, 1, 0, 0}},
		{"even stream id", frames.AppendSynStream(nil, 2, 0, block)},
		{"stream id 0", frames.AppendSynStream(nil, 0, 0, block)},
		{"stream id decreasing", frames.AppendSynStream(first, 3, 0, frames.EmptyHeaderBlock)},
		{"broken header block", frames.AppendSynStream(nil, 1, 0, []byte{1, 2, 3})},
		{"no header block", frames.AppendSynStream(nil, 1, 0, nil)},
		{"too many headers", frames.AppendSynStream(nil, 1, 0, slices.Concat(zlibHeader, storedBlock("\x00\x00\x27\x10")))},
		{"short SYN_STREAM", []byte{0x80, 3, 0, 1, 0, 0, 0, 1, 0}},
		{"short RST_STREAM", []byte{0x80, 3, 0, 3, 0, 0, 0, 1, 0}},
		{"SETTINGS that lies", []byte{0x80, 3, 0, 4, 0, 0, 0, 4, 0x10, 0, 0, 0}},
		{"short PING", []byte{0x80, 3, 0, 6, 0, 0, 0, 0}},
		{"short GOAWAY", []byte{0x80, 3, 0, 7, 0, 0, 0, 0}},
		{"short WINDOW_UPDATE", []byte{0x80, 3, 0, 9, 0, 0, 0, 0}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			peer, ours := newRawPeer(t, Config{OnStream: func(s *Stream) {}})
			peer.send(tt.bytes)
			for {
				h, payload := peer.next()
				if h.Kind == frames.TypeSynReply {
					continue
				}
				if h.Kind != frames.TypeGoAway || binary.BigEndian.Uint32(payload[4:]) != uint32(frames.GoAwayProtocolError) {
					t.Fatalf("got %+v %x", h, payload)
				}
				break
			}
			testutil.Receive(t, "the end", ours.Done())
			var fault *ConnectionError
			if !errors.As(ours.Err(), &fault) {
				t.Errorf("got %v", ours.Err())
			}
		})
	}
}

// TestStreamFaultsCostTheStream checks what a peer may do wrong without losing the connection.
func TestStreamFaultsCostTheStream(t *testing.T) {
	peer, _ := newRawPeer(t, Config{MaxStreams: 3, OnStream: func(s *Stream) {}})
	alive := func() {
		t.Helper()
		peer.send(ping(1))
		peer.expect(frames.TypePing, 1)
	}
	peer.open(1)
	peer.expect(frames.TypeSynReply, 1)

	peer.send(frames.AppendSynStream(nil, 1, 0, frames.EmptyHeaderBlock)) // twice
	peer.expect(frames.TypeRstStream, 1, uint32(ResetProtocolError))
	peer.data(1, 0, []byte("late")) // ignored
	alive()

	peer.data(77, 0, []byte("never opened"))
	peer.expect(frames.TypeRstStream, 77, uint32(ResetInvalidStream))
	peer.data(2, 0, []byte("ours to open"))
	peer.expect(frames.TypeRstStream, 2, uint32(ResetInvalidStream))
	peer.send(frames.AppendRstStream(nil, 77, ResetCancel)) // ignored
	alive()

	peer.send(frames.AppendSynStream(nil, 3, 0, storedBlock("\x00\x00\x00\x01\x00\x00\x00\x05Upper\x00\x00\x00\x01v")))
	peer.expect(frames.TypeRstStream, 3, uint32(ResetProtocolError))

	peer.open(5)
	peer.expect(frames.TypeSynReply, 5)
	peer.data(5, frames.FlagFin, []byte("end"))
	peer.data(5, 0, []byte("more"))
	peer.expect(frames.TypeRstStream, 5, uint32(ResetStreamAlreadyClosed))

	for _, id := range []uint32{7, 9, 11} {
		peer.open(id)
		peer.expect(frames.TypeSynReply, id)
	}
	peer.open(13)
	peer.expect(frames.TypeRstStream, 13, uint32(ResetRefusedStream))

	peer.send(frames.AppendSynReply(nil, 2, 0, frames.EmptyHeaderBlock))                    // of no stream of ours
	peer.send([]byte{0x80, 3, 0, 99, 0, 0, 0, 2, 1, 2}, []byte{0x80, 3, 0, 10, 0, 0, 0, 0}) // unknown kinds
	peer.send(ping(2))                                                                      // does not answer a PING of ours
	alive()
}

func TestFinWithSynStream(t *testing.T) {
	peer, _ := newRawPeer(t, echoConfig())
	peer.send(frames.AppendSynStream(nil, 1, frames.FlagFin, frames.AppendHeaderBlock(nil, true, nil)))
	peer.expect(frames.TypeSynReply, 1)
	if h, _ := peer.next(); h.Control || h.Flags != frames.FlagFin || h.Length != 0 {
		t.Errorf("got %+v, want FIN", h)
	}
}

func TestUnidirectionalStream(t *testing.T) {
	streams := make(chan *Stream, 1)
	peer, ours := newRawPeer(t, Config{OnStream: func(s *Stream) { streams <- s }})
	peer.send(frames.AppendSynStream(nil, 1, frames.FlagUnidirectional, frames.AppendHeaderBlock(nil, true, nil)))
	peer.data(1, frames.FlagFin, []byte("one way"))
	s := testutil.Receive(t, "the stream", streams)
	if _, err := s.Write([]byte("x")); !errors.Is(err, ErrWriteClosed) {
		t.Errorf("write: %v", err)
	}
	if got, err := io.ReadAll(s); err != nil || string(got) != "one way" {
		t.Errorf("got %q, %v", got, err)
	}
	peer.send(ping(1))
	peer.expect(frames.TypePing, 1) // and no SYN_REPLY before it

	peer.send(frames.AppendSynStream(nil, 3, frames.FlagUnidirectional|frames.FlagFin, frames.EmptyHeaderBlock))
	testutil.Receive(t, "the end of the stream", testutil.Receive(t, "the stream", streams).Done())
	testutil.Eventually(t, "the streams to be forgotten", func() bool { return streamCount(ours) == 0 })
}

// TestReplyComesBeforeData has OnStream start a writer that may be faster than the read loop.
func TestReplyComesBeforeData(t *testing.T) {
	peer, _ := newRawPeer(t, Config{OnStream: func(s *Stream) {
		wrote := make(chan struct{})
		go func() { s.Write([]byte("early")); close(wrote) }()
		<-wrote
	}})
	for id := uint32(1); id < 10; id += 2 {
		peer.open(id)
		peer.expect(frames.TypeSynReply, id)
		peer.expectData(id, "early")
	}
}

// TestOpenAndDrop opens and resets ten thousand streams and checks that nothing of them remains.
func TestOpenAndDrop(t *testing.T) {
	var before, after runtime.MemStats
	peer, ours := newRawPeer(t, Config{OnStream: func(s *Stream) { go echo(s) }})
	defer peer.Close()
	goDo(t, func() { io.Copy(io.Discard, peer) })
	open := func(from, n uint32) {
		var b []byte
		for id := from; id < from+2*n; id += 2 {
			b = frames.AppendSynStream(b, id, 0, frames.AppendHeaderBlock(nil, !peer.zlib, http.Header{"Port": {"80"}}))
			peer.zlib = true
			b = append(b, 0, 0, byte(id>>8), byte(id), 0, 0, 0, 3, 'a', 'b', 'c')
			b = frames.AppendRstStream(b, id, ResetCancel)
		}
		peer.send(b)
		testutil.Eventually(t, "the streams to go", func() bool {
			return ours.read.lastPeerStream.Load() == from+2*n-2 && streamCount(ours) == 0
		})
	}
	open(1, 100)
	goroutines := runtime.NumGoroutine()
	collect(&before)
	open(201, 10_000)
	testutil.Eventually(t, "the goroutines to go", func() bool { return runtime.NumGoroutine() <= goroutines })
	collect(&after)
	if grown := int64(after.HeapAlloc) - int64(before.HeapAlloc); grown > 4<<20 { // ten thousand streams take more than 10 MB
		t.Errorf("10000 streams left %d bytes", grown)
	}
	if ours.limits.Borrowed() != 0 {
		t.Errorf("%d bytes still borrowed", ours.limits.Borrowed())
	}
}

// TestPingFlood sends PINGs and reads nothing. Memory must stay bounded, and the end must still be noticed.
func TestPingFlood(t *testing.T) {
	peer, ours := newRawPeer(t, echoConfig())
	peer.SetReadBuffer(4 << 10)
	flood := bytes.Repeat(ping(1), 10_000)
	for range 50 {
		peer.send(flood)
	}
	if n := ours.out.control.Waiting(); n > control.MaxMustSend+100 {
		t.Errorf("%d bytes queued", n)
	}
	peer.SetLinger(0)
	peer.Close()
	testutil.Receive(t, "the end", ours.Done())
}

// TestOpenFloodWithoutReading checks that a connection ends whose peer provokes answers of any kind and does not read them.
func TestOpenFloodWithoutReading(t *testing.T) {
	testutil.Slow(t)
	for name, onStream := range map[string]func(*Stream){
		"refused":  nil,
		"reset":    func(s *Stream) { s.Reset() },
		"accepted": func(s *Stream) {},
	} {
		t.Run(name, func(t *testing.T) {
			a, b := testutil.TCPPair(t)
			// Small, because filling the kernel's buffers would take most of the time. The peer's read buffer keeps its
			// size: made smaller on an established connection, it sometimes kept both kernels from sending.
			a.SetWriteBuffer(64 << 10)
			peer, ours := &rawPeer{TCPConn: b, t: t}, serve(t, NewServer(a, nil, Config{OnStream: onStream}))
			go func() {
				block := frames.AppendHeaderBlock(nil, true, nil)
				for id := uint32(1); id < 4_000_000; {
					var b []byte
					for range 1000 {
						b = frames.AppendSynStream(b, id, 0, block)
						b = frames.AppendRstStream(b, id, ResetCancel)
						block = frames.EmptyHeaderBlock
						id += 2
					}
					if _, err := peer.Write(b); err != nil {
						return
					}
				}
			}()
			testutil.Receive(t, "the end", ours.Done())
			var fault *ConnectionError
			if !errors.As(ours.Err(), &fault) || !strings.Contains(fault.Reason, "does not read") {
				t.Errorf("got %v", ours.Err())
			}
			if n := ours.out.control.Waiting(); n > 2*control.MaxMustSend {
				t.Errorf("%d bytes queued", n)
			}
			peer.Close()
		})
	}
}

func TestServeEndsWithContext(t *testing.T) {
	a, _ := testutil.TCPPair(t)
	c := NewServer(a, nil, echoConfig())
	ctx, cancel := context.WithCancelCause(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- c.Serve(ctx) }()
	cancel(os.ErrProcessDone)
	if err := testutil.Receive(t, "the end of Serve", ended); !errors.Is(err, os.ErrProcessDone) {
		t.Errorf("got %v", err)
	}
	c.Close()
}

// collect reads the statistics when the pools are empty, which takes two collections.
func collect(m *runtime.MemStats) {
	runtime.GC()
	runtime.GC()
	runtime.ReadMemStats(m)
}

// TestAcceptThenReset tells a stream that was accepted and then reset from one that was refused.
func TestAcceptThenReset(t *testing.T) {
	peer, _ := newRawPeer(t, Config{OnStream: func(s *Stream) {
		if s.Header().Get("accept") != "" {
			s.Accept()
		}
		s.Reset()
	}})
	peer.open(1, "accept", "yes")
	peer.expect(frames.TypeSynReply, 1)
	peer.expect(frames.TypeRstStream, 1, uint32(ResetCancel))
	peer.open(3, "other", "no")
	peer.expect(frames.TypeRstStream, 3, uint32(ResetCancel))
}

// TestAfterReset checks that f is called once for each way in which a stream breaks off, and not for FIN.
func TestAfterReset(t *testing.T) {
	streams := make(chan *Stream, 1)
	peer, ours := newRawPeer(t, Config{OnStream: func(s *Stream) { streams <- s }})
	called := make(chan uint32, 8)
	next := func(id uint32) *Stream {
		peer.open(id, "a", "b")
		s := testutil.Receive(t, "the stream", streams)
		s.AfterReset(func() { called <- id })
		return s
	}
	finished := next(1)
	peer.data(1, frames.FlagFin, nil)
	finished.CloseWrite()
	testutil.Receive(t, "the end by FIN", finished.Done())
	next(3).Reset()
	if id := testutil.Receive(t, "the call for our reset", called); id != 3 {
		t.Errorf("called for stream %d", id)
	}
	next(5)
	peer.send(frames.AppendRstStream(nil, 5, ResetCancel))
	if id := testutil.Receive(t, "the call for the peer's reset", called); id != 5 {
		t.Errorf("called for stream %d", id)
	}
	next(7)
	late := next(9)
	peer.Close()
	testutil.Receive(t, "the end of the connection", ours.Done())
	for range 2 {
		testutil.Receive(t, "the calls for the connection's end", called)
	}
	late.AfterReset(func() { called <- 11 })
	if id := testutil.Receive(t, "the call for what has happened already", called); id != 11 {
		t.Errorf("called for stream %d", id)
	}
}
