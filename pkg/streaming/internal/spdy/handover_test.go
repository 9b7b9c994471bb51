package spdy

import (
	"bytes"
	"compress/zlib"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"reflect"
	"slices"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/streamshim/streamshim/internal/testutil"
	"github.com/streamshim/streamshim/pkg/handover"
	"github.com/streamshim/streamshim/pkg/streaming/internal/spdy/frames"
)

// carried is a connection that is handed over on the same network connection.
type carried struct {
	*Conn
	t       testing.TB
	network net.Conn
	config  Config
	served  chan error
}

func carry(t testing.TB, network net.Conn, config Config) *carried {
	c := &carried{Conn: NewServer(network, nil, config), t: t, network: network, config: config}
	c.serve()
	return c
}

func (c *carried) serve() {
	conn, served := c.Conn, make(chan error, 1)
	go func() { served <- conn.Serve(context.Background()) }()
	c.served = served
}

// freeze returns the state as another program decodes it.
func (c *carried) freeze() State {
	c.t.Helper()
	c.Freeze()
	if err := testutil.Receive(c.t, "Serve of a frozen connection", c.served); err != handover.ErrFrozen {
		c.t.Fatalf("Serve: %v", err)
	}
	s, err := c.State()
	if err != nil {
		c.t.Fatal(err)
	}
	return testutil.Reread(c.t, s)
}

func (c *carried) handOver() {
	c.t.Helper()
	s := c.freeze()
	c.network.SetDeadline(time.Time{})
	resumed, err := Resume(c.network, s, c.config)
	if err != nil {
		c.t.Fatal(err)
	}
	c.Conn = resumed
	c.serve()
}

// end closes the connection from outside.
func (c *carried) end() {
	c.Close()
	testutil.Receive(c.t, "the end of Serve", c.served)
}

// blocks compresses header blocks as spdystream does.
type blocks struct {
	wire bytes.Buffer
	w    *zlib.Writer
}

func newBlocks() *blocks {
	b := &blocks{}
	b.w, _ = zlib.NewWriterLevelDict(&b.wire, zlib.BestCompression, frames.Dictionary)
	return b
}

func (b *blocks) block(kv ...string) []byte {
	b.w.Write(frames.AppendHeaderPairs(nil, headers(kv...)))
	b.w.Flush()
	return slices.Clone(b.wire.Next(b.wire.Len()))
}

func dataFrame(id uint32, flags byte, payload string) []byte {
	b := make([]byte, frames.HeaderLen)
	frames.PutDataHeader(b, id, flags, len(payload))
	return append(b, payload...)
}

// conversation returns each kind of frame that a client may send, once.
func conversation() []byte {
	b := newBlocks()
	headersFrame := func(id uint32, flags byte, block []byte) []byte {
		frame := frames.AppendControlHeader(nil, frames.TypeHeaders, flags, 4+len(block))
		return append(append(frame, byte(id>>24), byte(id>>16), byte(id>>8), byte(id)), block...)
	}
	return slices.Concat(
		frames.AppendSynStream(nil, 1, 0, b.block("streamtype", "data", "port", "8080", "requestid", "17")),
		dataFrame(1, 0, "hello "), ping(1), dataFrame(1, 0, ""),
		frames.AppendSynStream(nil, 3, 0, b.block("streamtype", "error", "port", "8080", "requestid", "17")),
		dataFrame(3, frames.FlagFin, "bye"), frames.AppendEmptySettings(nil),
		dataFrame(1, frames.FlagFin, "world"),
		frames.AppendSynStream(nil, 5, frames.FlagFin, b.block("streamtype", "data", "port", "8081", "requestid", "18")),
		frames.AppendRstStream(nil, 3, ResetCancel),
		frames.AppendSynStream(nil, 7, 0, b.block("streamtype", "data", "port", "8082", "requestid", "18")),
		dataFrame(7, 0, "more"), headersFrame(7, frames.FlagFin, b.block("x", "y")),
		frames.AppendRstStream(nil, 9, ResetCancel), dataFrame(11, 0, "to nobody"), ping(3),
	)
}

// talk sends the conversation to a connection that is handed over after each of the given numbers of bytes. It returns, in
// words, what has become of the connection.
func talk(t *testing.T, ours, peer net.Conn, cuts ...int) string {
	t.Helper()
	var opened []string
	c := carry(t, ours, Config{OnStream: func(s *Stream) {
		opened = append(opened, fmt.Sprintf("%d %v", s.ID(), s.Header()))
	}})
	var answers bytes.Buffer
	answered := make(chan struct{}) // closed with the last PING, after which nothing happens
	var reading sync.WaitGroup
	reading.Go(func() {
		p := make([]byte, 1<<10)
		for {
			n, err := peer.Read(p)
			answers.Write(p[:n])
			if n > 0 && bytes.HasSuffix(answers.Bytes(), ping(3)) {
				close(answered)
			}
			if err != nil {
				return
			}
		}
	})
	wire := conversation()
	at := 0
	for _, cut := range append(cuts, len(wire)) {
		if at == cut {
			continue // net.Pipe would turn it into an empty read
		}
		if _, err := peer.Write(wire[at:cut]); err != nil {
			t.Fatal(err)
		}
		at = cut
		taken(t, ours)
		if cut < len(wire) {
			c.handOver()
		}
	}
	c.handOver()
	testutil.Receive(t, "the last answer", answered)
	c.handOver()
	story := fmt.Sprintln(opened)
	for id := uint32(1); id <= 7; id += 2 {
		s := c.Stream(id)
		if s == nil {
			t.Fatalf("cut at %v: stream %d is lost", cuts, id)
		}
		content, err := io.ReadAll(s)
		story += fmt.Sprintf("%d: %q, %v, received %d, %v, %v\n", id, content, err, s.Received(), s.InputEnded(), s.Err())
	}
	c.handOver() // also when all of it was read
	c.Freeze()
	testutil.Receive(t, "Serve", c.served)
	c.Discard()
	reading.Wait()
	peer.Close()
	return story + fmt.Sprintf("answers %x", answers.Bytes())
}

// taken waits until what was sent has been read from the socket.
func taken(t *testing.T, conn net.Conn) {
	t.Helper()
	tcp, ok := conn.(*net.TCPConn)
	if !ok {
		return // a write to a net.Pipe returns when it is read
	}
	raw, err := tcp.SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	testutil.Eventually(t, "the peer's bytes", func() (empty bool) {
		raw.Control(func(fd uintptr) {
			n, err := unix.IoctlGetInt(int(fd), unix.SIOCINQ)
			empty = err == nil && n == 0
		})
		return empty
	})
}

// TestHandOverBehindEachByte cuts what a client sends after each byte.
func TestHandOverBehindEachByte(t *testing.T) {
	for _, network := range []struct {
		name string
		pair func() (net.Conn, net.Conn)
	}{
		{"pipe", net.Pipe},
		{"TCP", func() (net.Conn, net.Conn) { a, b := testutil.TCPPair(t); return a, b }},
	} {
		t.Run(network.name, func(t *testing.T) {
			run := func(cuts ...int) string {
				ours, peer := network.pair()
				defer ours.Close()
				return talk(t, ours, peer, cuts...)
			}
			want := run()
			all := []int{}
			for cut := range len(conversation()) {
				all = append(all, cut)
				if got := run(cut); got != want {
					t.Fatalf("handed over behind byte %d:\n%s\nwant\n%s", cut, got, want)
				}
			}
			if got := run(all...); got != want {
				t.Errorf("handed over behind each byte:\n%s\nwant\n%s", got, want)
			}
			if testing.Verbose() {
				t.Log(want)
			}
		})
	}
}

// contents returns the frames in wire: payload by stream, others by kind.
func contents(t *testing.T, wire []byte) (payload map[uint32]string, others string) {
	t.Helper()
	payload = map[uint32]string{}
	for len(wire) > 0 {
		h := frames.ParseHeader(wire)
		body := wire[frames.HeaderLen : frames.HeaderLen+h.Length]
		wire = wire[frames.HeaderLen+h.Length:]
		if h.Control {
			others += fmt.Sprintf("%d %x\n", h.Kind, body)
			continue
		}
		payload[h.StreamID] += string(body)
		if h.Flags&frames.FlagFin != 0 {
			payload[h.StreamID] += "<FIN>"
		}
	}
	return payload, others
}

// TestHandOverOfOutputBehindEachByte cuts what is sent after each byte: the peer reads as many bytes and no more.
func TestHandOverOfOutputBehindEachByte(t *testing.T) {
	for cut, total := 0, 1; cut < total; cut++ {
		ours, peer := net.Pipe()
		streams := make(chan *Stream, 2)
		c := carry(t, ours, Config{OnStream: func(s *Stream) { streams <- s }})
		b := newBlocks()
		peer.Write(slices.Concat(frames.AppendSynStream(nil, 1, 0, b.block("a", "b")), frames.AppendSynStream(nil, 3, 0, b.block("a", "c"))))
		first, second := testutil.Receive(t, "a stream", streams), testutil.Receive(t, "a stream", streams)
		var writers sync.WaitGroup
		ids := map[uint32]string{first.ID(): "one", second.ID(): "two"}
		refused := make(chan uint32, len(ids))
		write := func(s *Stream) {
			writers.Go(func() {
				if n, err := s.Write([]byte(ids[s.ID()])); err == handover.ErrFrozen && n == 0 {
					refused <- s.ID()
				} else if err != nil || n != 3 {
					t.Errorf("cut at %d: written %d, %v", cut, n, err)
				} else if err := s.CloseWrite(); err != nil {
					t.Errorf("cut at %d: CloseWrite: %v", cut, err)
				}
			})
		}
		write(first)
		write(second)
		wire := make([]byte, cut, 1<<10)
		if _, err := io.ReadFull(peer, wire); err != nil {
			t.Fatal(err)
		}
		c.Freeze()
		writers.Wait()
		c.handOver()
		close(refused)
		ended := make(chan struct{})
		go func() {
			defer close(ended)
			rest, _ := io.ReadAll(peer)
			wire = append(wire, rest...)
		}()
		for id := range refused {
			write(c.Stream(id))
		}
		writers.Wait()
		testutil.Eventually(t, "the output", func() bool { return c.out.control.Waiting() == 0 })
		c.Freeze()
		testutil.Receive(t, "Serve", c.served)
		c.Discard()
		testutil.Receive(t, "the peer", ended)
		peer.Close()
		payload, others := contents(t, wire)
		if payload[1] != "one<FIN>" || payload[3] != "two<FIN>" {
			t.Fatalf("cut at %d: sent %v", cut, payload)
		}
		if want := fmt.Sprintf("2 %x\n2 %x\n", append([]byte{0, 0, 0, 1}, frames.AppendHeaderBlock(nil, true, nil)...), append([]byte{0, 0, 0, 3}, frames.EmptyHeaderBlock...)); others != want {
			t.Fatalf("cut at %d: sent %s, want %s", cut, others, want)
		}
		total = len(wire)
	}
}

// TestHandOverOfHeaders has the peer's headers refer to those of long ago.
func TestHandOverOfHeaders(t *testing.T) {
	ours, peer := testutil.TCPPair(t)
	opened := make(chan http.Header, 1)
	c := carry(t, ours, Config{OnStream: func(s *Stream) {
		s.Reset()
		opened <- s.Header()
	}})
	defer c.end()
	b := newBlocks()
	go io.Copy(io.Discard, peer)
	for i := range 1500 {
		want := headers("streamtype", "data", "port", fmt.Sprint(i%1000), "requestid", fmt.Sprint(i*7919), "x-pod", fmt.Sprintf("name-%d", i/3))
		block := b.block("streamtype", want.Get("streamtype"), "port", want.Get("port"), "requestid", want.Get("requestid"), "x-pod", want.Get("x-pod"))
		if _, err := peer.Write(frames.AppendSynStream(nil, uint32(2*i+1), 0, block)); err != nil {
			t.Fatal(err)
		}
		if got := testutil.Receive(t, "a stream", opened); !reflect.DeepEqual(got, want) {
			t.Fatalf("stream %d has headers %v, want %v", 2*i+1, got, want)
		}
		if i%97 == 0 || i == 1 {
			c.handOver()
		}
	}
	peer.Close()
}

// TestHeadersWithoutFlush checks a peer whose header blocks do not end with a sync flush: its compressor has state that is
// not visible here.
func TestHeadersWithoutFlush(t *testing.T) {
	ours, peer := testutil.TCPPair(t)
	opened := make(chan struct{}, 1)
	c := carry(t, ours, Config{OnStream: func(*Stream) { opened <- struct{}{} }})
	var wire bytes.Buffer
	w, _ := zlib.NewWriterLevelDict(&wire, zlib.BestCompression, frames.Dictionary)
	w.Write(frames.AppendHeaderPairs(nil, headers("a", "b")))
	w.Close()
	peer.Write(frames.AppendSynStream(nil, 1, 0, wire.Bytes()))
	testutil.Receive(t, "the stream", opened)
	c.Freeze()
	testutil.Receive(t, "Serve", c.served)
	if _, err := c.State(); err == nil {
		t.Error("there is a state")
	}
	c.Discard()
}

// TestFreezeWithAPeerThatDoesNotRead checks that a frozen connection does not wait for its peer.
func TestFreezeWithAPeerThatDoesNotRead(t *testing.T) {
	ours, peer := testutil.TCPPair(t)
	streams := make(chan *Stream, 1)
	c := carry(t, ours, Config{OnStream: func(s *Stream) { streams <- s }})
	b := newBlocks()
	peer.Write(frames.AppendSynStream(nil, 1, 0, b.block("a", "b")))
	s := testutil.Receive(t, "a stream", streams)
	sent := pattern(32 << 20)
	written := make(chan int, 1)
	go func() {
		n, err := s.Write(sent)
		if err != nil {
			t.Errorf("Write: %v", err)
		}
		written <- n
	}()
	testutil.Eventually(t, "a full socket", func() bool {
		before := s.Sent()
		time.Sleep(20 * time.Millisecond)
		return before > 0 && s.Sent() == before
	})
	peer.Write(ping(1)) // its answer waits, too
	for range 3 {
		began := time.Now()
		c.Freeze()
		err := testutil.Receive(t, "Serve", c.served)
		if err != handover.ErrFrozen {
			t.Errorf("frozen: %v", err)
		}
		t.Logf("frozen after %v", time.Since(began))
		c.served <- err
		if written != nil {
			if n := testutil.Receive(t, "the writer", written); n != len(sent) {
				t.Fatalf("written %d bytes of %d", n, len(sent))
			}
			written = nil
		}
		c.handOver()
	}
	// Few answers wait for it, whatever else waits.
	peer.Write(slices.Concat(ping(3), ping(5)))
	var got bytes.Buffer
	for got.Len() < len(sent) {
		head := make([]byte, frames.HeaderLen)
		if _, err := io.ReadFull(peer, head); err != nil {
			t.Fatal(err)
		}
		h := frames.ParseHeader(head)
		body := make([]byte, h.Length)
		if _, err := io.ReadFull(peer, body); err != nil {
			t.Fatal(err)
		}
		if !h.Control {
			got.Write(body)
		}
	}
	if !bytes.Equal(got.Bytes(), sent) {
		t.Error("other bytes came")
	}
	c.end()
}

// TestFrozenStreams checks calls on the streams of a frozen connection.
func TestFrozenStreams(t *testing.T) {
	ours, peer := testutil.TCPPair(t)
	streams := make(chan *Stream, 4)
	c := carry(t, ours, Config{OnStream: func(s *Stream) { streams <- s }})
	b := newBlocks()
	for id := uint32(1); id <= 7; id += 2 {
		peer.Write(frames.AppendSynStream(nil, id, 0, b.block("a", "b")))
		testutil.Receive(t, "a stream", streams)
	}
	peer.Write(slices.Concat(dataFrame(1, 0, "unread"), dataFrame(3, frames.FlagFin, ""), dataFrame(7, 0, "unwanted")))
	one, three, five, seven := c.Stream(1), c.Stream(3), c.Stream(5), c.Stream(7)
	testutil.Eventually(t, "the data", func() bool { return seven.Received() == 8 })
	taken(t, ours)
	// A short write keeps the rest, and a reader that waits is unblocked.
	r, w := io.Pipe()
	writing := make(chan error, 1)
	go func() {
		n, err := one.WriteTo(w)
		if n != 2 {
			t.Errorf("WriteTo has written %d bytes", n)
		}
		writing <- err
	}()
	io.ReadFull(r, make([]byte, 2))
	reading := make(chan error, 1)
	go func() {
		_, err := five.Read(make([]byte, 1))
		reading <- err
	}()
	c.Freeze()
	r.CloseWithError(os.ErrDeadlineExceeded) // as the writer of a pipe does
	if err := testutil.Receive(t, "WriteTo", writing); err != handover.ErrFrozen {
		t.Errorf("WriteTo: %v", err)
	}
	if err := testutil.Receive(t, "Read", reading); err != handover.ErrFrozen {
		t.Errorf("Read: %v", err)
	}
	if n, err := one.Read(make([]byte, 1)); n != 0 || err != handover.ErrFrozen {
		t.Errorf("Read while frozen: %d, %v", n, err)
	}
	if _, err := three.Read(make([]byte, 1)); err != io.EOF {
		t.Errorf("Read at the end: %v", err)
	}
	if n, err := one.Write([]byte("x")); n != 0 || err != handover.ErrFrozen {
		t.Errorf("Write while frozen: %d, %v", n, err)
	}
	if n, err := one.ReadFrom(bytes.NewReader([]byte("x"))); n != 0 || err != handover.ErrFrozen {
		t.Errorf("ReadFrom while frozen: %d, %v", n, err)
	}
	if _, err := c.OpenStream(nil); err != handover.ErrFrozen {
		t.Errorf("OpenStream while frozen: %v", err)
	}
	if err := c.Close(); err != nil || c.Err() != nil {
		t.Errorf("Close while frozen: %v, %v", err, c.Err())
	}
	if err := one.CloseWrite(); err != nil {
		t.Errorf("CloseWrite while frozen: %v", err)
	}
	if err := five.Reset(); err != nil {
		t.Errorf("Reset while frozen: %v", err)
	}
	seven.CloseRead()
	c.handOver()
	defer c.end()
	one, three, five, seven = c.Stream(1), c.Stream(3), c.Stream(5), c.Stream(7)
	if five == nil || five.Err() == nil {
		t.Fatal("a stream that was reset has no error")
	}
	var reset *ResetError
	if !errors.As(five.Err(), &reset) || reset.Remote {
		t.Errorf("a stream that was reset: %v", five.Err())
	}
	if _, err := one.Write([]byte("x")); err != ErrWriteClosed {
		t.Errorf("Write after CloseWrite: %v", err)
	}
	p := make([]byte, 10)
	if n, _ := one.Read(p); string(p[:n]) != "read" {
		t.Errorf("left to be read: %q", p[:n])
	}
	if _, err := seven.Read(p); err != ErrReadClosed {
		t.Errorf("Read after CloseRead: %v", err)
	}
	three.CloseWrite()
	wire := make([]byte, 1<<10)
	var sent []byte
	testutil.Eventually(t, "FIN and RST_STREAM", func() bool {
		peer.SetReadDeadline(time.Now().Add(testTimeout))
		n, _ := peer.Read(wire)
		sent = append(sent, wire[:n]...)
		return bytes.Contains(sent, dataFrame(1, frames.FlagFin, "")) && bytes.Contains(sent, frames.AppendRstStream(nil, 5, ResetCancel)) &&
			bytes.Contains(sent, dataFrame(3, frames.FlagFin, ""))
	})
}

// TestHandOverOfEnds checks that ends from before a hand-over are the same after it.
func TestHandOverOfEnds(t *testing.T) {
	for _, test := range []struct {
		name string
		end  func(c *carried, peer *net.TCPConn)
		is   error
	}{
		{"FIN", func(_ *carried, peer *net.TCPConn) { peer.CloseWrite() }, ErrPeerClosed},
		{"RST", func(_ *carried, peer *net.TCPConn) { peer.SetLinger(0); peer.Close() }, ErrPeerReset},
		{"GOAWAY", func(_ *carried, peer *net.TCPConn) { peer.Write(frames.AppendGoAway(nil, 0, frames.GoAwayOK)) }, ErrGoAway},
		{"a violation", func(_ *carried, peer *net.TCPConn) { peer.Write(dataFrame(0, 0, "x")) }, nil},
		{"our Close", func(c *carried, _ *net.TCPConn) { c.Close() }, ErrClosed},
	} {
		t.Run(test.name, func(t *testing.T) {
			ours, peer := testutil.TCPPair(t)
			streams := make(chan *Stream, 1)
			c := carry(t, ours, Config{OnStream: func(s *Stream) { streams <- s }})
			peer.Write(frames.AppendSynStream(nil, 1, 0, newBlocks().block("a", "b")))
			s := testutil.Receive(t, "a stream", streams)
			peer.Write(dataFrame(1, 0, "unread"))
			testutil.Eventually(t, "the data", func() bool { return s.Received() == 6 })
			test.end(c, peer)
			testutil.Receive(t, "the end", c.Done())
			err := c.Err()
			if test.is != nil && err != test.is {
				t.Fatalf("ended with %v", err)
			}
			if test.is != ErrGoAway {
				testutil.Receive(t, "Serve", c.served)
				c.served <- handover.ErrFrozen
			}
			var violation, again *ConnectionError
			isViolation := errors.As(err, &violation)
			for range 2 {
				c.handOver()
				if test.is != ErrGoAway {
					if got := testutil.Receive(t, "Serve", c.served); got == nil || got.Error() != err.Error() {
						t.Errorf("Serve returns %v", got)
					}
					c.served <- handover.ErrFrozen
				}
				testutil.Receive(t, "the end, once more", c.Done())
				if c.Err().Error() != err.Error() || test.is != nil && c.Err() != test.is || isViolation != errors.As(c.Err(), &again) {
					t.Fatalf("%v has become %v", err, c.Err())
				}
			}
			want, wantErr := "unread", test.is
			if test.is == ErrClosed || isViolation {
				want = ""
			}
			s = c.Stream(1)
			if test.is == ErrGoAway {
				peer.Close()
			}
			content, readErr := io.ReadAll(s)
			if string(content) != want || wantErr != nil && readErr != wantErr {
				t.Errorf("read %q, %v", content, readErr)
			}
			if err := s.Err(); err == nil {
				t.Error("the stream has no error")
			}
			if _, err := s.Write([]byte("x")); err == nil && test.is != ErrGoAway {
				t.Error("a write succeeds")
			}
			c.end()
		})
	}
}

// TestHandOverTakesRoom checks that unread data of a resumed connection counts against the limits again, and no longer
// against those of the old one.
func TestHandOverTakesRoom(t *testing.T) {
	ours, peer := testutil.TCPPair(t)
	streams := make(chan *Stream, 1)
	before, after := &testutil.Room{}, &testutil.Room{}
	c := carry(t, ours, Config{Room: before, OnStream: func(s *Stream) { streams <- s }})
	peer.Write(frames.AppendSynStream(nil, 1, 0, newBlocks().block("a", "b")))
	s := testutil.Receive(t, "a stream", streams)
	peer.Write(dataFrame(1, 0, string(pattern(100<<10))))
	testutil.Eventually(t, "the data", func() bool { return s.Received() == 100<<10 })
	c.config.Room = after
	c.handOver()
	if before.Held() != 0 || after.Held() < 100<<10 || c.limits.Borrowed() < 36<<10 {
		t.Errorf("room of the old one %d, of the new one %d, borrowed %d", before.Held(), after.Held(), c.limits.Borrowed())
	}
	c.Stream(1).CloseRead()
	if after.Held() != 0 || c.limits.Borrowed() != 0 {
		t.Errorf("room after all is gone: %d, borrowed %d", after.Held(), c.limits.Borrowed())
	}
	c.end()
}

// fields calls f for each field that is set in a state, with the field set to zero. It does so for the fields of the first
// stream, too.
func fields(t *testing.T, s State, f func(name string, without State)) {
	t.Helper()
	of := reflect.TypeFor[State]()
	for i := range of.NumField() {
		without := testutil.Reread(t, s)
		if field := reflect.ValueOf(&without).Elem().Field(i); !field.IsZero() {
			field.SetZero()
			f(of.Field(i).Name, without)
		}
	}
	of = reflect.TypeFor[StreamState]()
	for i := range of.NumField() {
		for j := range s.Streams {
			without := testutil.Reread(t, s)
			if field := reflect.ValueOf(&without.Streams[j]).Elem().Field(i); !field.IsZero() {
				field.SetZero()
				f("StreamState."+of.Field(i).Name, without)
			}
		}
	}
}

// expectation is a state and what a connection resumed from it must do. The error tells what it did not do. limit is how
// long to wait for each of these things.
type expectation struct {
	name  string
	state State
	check func(c *Conn, peer net.Conn, limit time.Duration) error
}

func expectations() []expectation {
	now := time.Now().UnixNano()
	b := newBlocks()
	past := append(slices.Clone(frames.Dictionary), frames.AppendHeaderPairs(nil, headers("streamtype", "data", "port", "8080"))...)
	b.block("streamtype", "data", "port", "8080")
	next := frames.AppendSynStream(nil, 9, 0, b.block("streamtype", "data", "port", "8080"))
	end := names.Failure(io.EOF)
	return []expectation{
		{"live", State{
			Server: true, Input: []byte("12"), Stream: 1, Remaining: 5, Fin: true, Output: []byte("output"),
			LastPeerStream: 7, OpenNext: 4, PingNext: 8, HeadersSent: true, History: past,
			LastActivity: now - 1e9, LastReceived: now - 2e9,
			Streams: []StreamState{
				{ID: 1, Header: headers("a", "b"), Received: 10, Sent: 20, Unread: []byte("unread"), Replied: true},
				{ID: 2, Opened: true, Accepted: true, Replied: true},
				{ID: 3, ReadEnd: end, Replied: true},
				{ID: 5, Replied: true, FinSent: true, ReadClosed: true},
				{ID: 7, ReadEnd: writeFailure(&ResetError{Status: ResetCancel, Remote: true}), WriteEnd: writeFailure(&ResetError{Status: ResetCancel, Remote: true}), Replied: true},
			},
		}, func(c *Conn, peer net.Conn, limit time.Duration) error {
			if c.LastActivity().UnixNano() != now-1e9 || c.LastReceived().UnixNano() != now-2e9 {
				return errors.New("times")
			}
			s := map[uint32]*Stream{}
			for _, id := range []uint32{1, 2, 3, 5, 7} {
				if s[id] = c.Stream(id); s[id] == nil {
					return fmt.Errorf("no stream %d", id)
				}
			}
			if s[1].Header().Get("a") != "b" || s[1].Received() != 10 || s[1].Sent() != 20 {
				return errors.New("stream 1")
			}
			defer c.Close() // also ends reads that wait
			ctx, cancel := context.WithTimeout(context.Background(), limit)
			defer cancel()
			if err := s[2].WaitAccepted(ctx); err != nil {
				return err
			}
			if !s[3].InputEnded() || s[7].Err() == nil {
				return errors.New("ends")
			}
			if err := readSoon(s[7], limit); err == nil || err == io.EOF {
				return errors.New("the end of stream 7")
			}
			if err := readSoon(s[5], limit); err != ErrReadClosed {
				return errors.New("CloseRead")
			}
			if _, err := s[5].Write([]byte("x")); err != ErrWriteClosed {
				return errors.New("CloseWrite")
			}
			opened := make(chan *Stream, 1)
			c.cfg.OnStream = func(s *Stream) { opened <- s }
			served := make(chan error, 1)
			go func() { served <- c.Serve(context.Background()) }()
			defer func() { c.Close(); peer.Close(); <-served }()
			peer.SetDeadline(time.Now().Add(limit))
			if _, err := peer.Write([]byte("345")); err != nil {
				return err
			}
			content := make(chan string, 1)
			go func() { p, _ := io.ReadAll(s[1]); content <- string(p) }()
			select {
			case got := <-content:
				if got != "unread12345" {
					return fmt.Errorf("stream 1 has %q", got)
				}
			case <-time.After(limit):
				return errors.New("stream 1 does not end")
			}
			if _, err := peer.Write(next); err != nil {
				return err
			}
			select {
			case s := <-opened:
				if !reflect.DeepEqual(s.Header(), headers("streamtype", "data", "port", "8080")) {
					return fmt.Errorf("headers %v", s.Header())
				}
			case err := <-served:
				served <- err
				return err
			case <-time.After(limit):
				return errors.New("no stream")
			}
			sent := func(want []byte) error {
				got := make([]byte, len(want))
				if n, err := io.ReadFull(peer, got); err != nil || !bytes.Equal(got, want) {
					return fmt.Errorf("%x was sent, %v, want %x", got[:n], err, want)
				}
				return nil
			}
			// The reader sends the reply, so what others send may come before it.
			if err := sent(slices.Concat([]byte("output"), frames.AppendSynReply(nil, 9, 0, frames.EmptyHeaderBlock))); err != nil {
				return err
			}
			go func() { // a writer waits for the reader
				for _, id := range []uint32{1, 3} {
					c.Stream(id).Write([]byte("x"))
				}
				c.OpenStream(nil)
				c.Ping()
			}()
			return sent(slices.Concat(dataFrame(1, 0, "x"), dataFrame(3, 0, "x"),
				frames.AppendSynStream(nil, 4, 0, frames.AppendHeaderBlock(nil, false, nil)), ping(8)))
		}},
		{"refusing", State{Server: true, RefuseStreams: true, OpenNext: 2, PingNext: 2}, func(c *Conn, peer net.Conn, limit time.Duration) error {
			c.cfg.OnStream = func(*Stream) {}
			served := make(chan error, 1)
			go func() { served <- c.Serve(context.Background()) }()
			defer func() { c.Close(); peer.Close(); <-served }()
			peer.SetDeadline(time.Now().Add(limit))
			peer.Write(next)
			want := frames.AppendRstStream(nil, 9, ResetRefusedStream)
			got := make([]byte, len(want))
			if _, err := io.ReadFull(peer, got); err != nil || !bytes.Equal(got, want) {
				return fmt.Errorf("%x was sent, %v", got, err)
			}
			return nil
		}},
		{"ended", State{
			Server: true, OpenNext: 2, PingNext: 2, LastPeerStream: 1,
			Gone: writeFailure(ErrPeerClosed), Ended: writeFailure(ErrPeerClosed), Unwanted: writeFailure(ErrPeerClosed),
			Streams: []StreamState{{ID: 1, Replied: true}},
		}, func(c *Conn, peer net.Conn, limit time.Duration) error {
			defer peer.Close()
			defer c.Close()
			if c.Err() != ErrPeerClosed {
				return errors.New("Err")
			}
			if s := c.Stream(1); s == nil {
				return errors.New("no stream")
			} else if _, err := s.Write([]byte("x")); err != ErrPeerClosed {
				return fmt.Errorf("write: %w", err)
			}
			served := make(chan error, 1)
			go func() { served <- c.Serve(context.Background()) }()
			select {
			case err := <-served:
				if err != ErrPeerClosed {
					return err
				}
			case <-time.After(limit):
				peer.Close()
				<-served
				return errors.New("it is served")
			}
			return nil
		}},
		{"closed", State{Server: true, Closed: true, OpenNext: 2, PingNext: 2, Gone: writeFailure(ErrClosed)}, func(c *Conn, peer net.Conn, limit time.Duration) error {
			defer peer.Close()
			defer c.Close()
			peer.SetDeadline(time.Now().Add(limit))
			go c.Ping()
			if c.conn.LocalAddr().Network() != "pipe" {
				return errors.New("it has a socket")
			}
			return nil
		}},
	}
}

// readSoon returns the error of a read, or nil if the read waits.
func readSoon(s *Stream, limit time.Duration) error {
	read := make(chan error, 1)
	go func() {
		_, err := s.Read(make([]byte, 1))
		read <- err
	}()
	select {
	case err := <-read:
		return err
	case <-time.After(limit):
		return nil
	}
}

// TestEachFieldOfAState checks that no field of a state can be left out.
func TestEachFieldOfAState(t *testing.T) {
	noticed := map[string]bool{}
	for _, e := range expectations() {
		run := func(s State, limit time.Duration) error {
			ours, peer := testutil.TCPPair(t)
			defer ours.Close()
			c, err := Resume(ours, testutil.Reread(t, s), Config{OnStream: func(*Stream) {}})
			if err != nil {
				peer.Close()
				return err
			}
			return e.check(c, peer, limit)
		}
		if err := run(e.state, testTimeout); err != nil {
			t.Fatalf("%s: %v", e.name, err)
		}
		fields(t, e.state, func(name string, without State) {
			if err := run(without, time.Second); err != nil {
				noticed[name] = true
			} else {
				t.Logf("%s: nobody misses %s", e.name, name)
			}
		})
	}
	for _, of := range []reflect.Type{reflect.TypeFor[State](), reflect.TypeFor[StreamState]()} {
		prefix := ""
		if of == reflect.TypeFor[StreamState]() {
			prefix = "StreamState."
		}
		for i := range of.NumField() {
			if name := prefix + of.Field(i).Name; !noticed[name] {
				t.Errorf("nobody misses %s", name)
			}
		}
	}
}

// FuzzResume checks that a damaged state gives an error or a connection that fails, and never a panic.
func FuzzResume(f *testing.F) {
	for _, e := range expectations() {
		encoded, err := handover.Encode(e.state)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(encoded, conversation())
	}
	f.Fuzz(func(t *testing.T, encoded, input []byte) {
		var s State
		if handover.Decode(encoded, &s) != nil {
			return
		}
		c, err := Resume(&fedEnd{input: input}, s, Config{OnStream: func(s *Stream) { s.CloseRead() }, StreamBuffer: 1 << 30})
		if err != nil {
			return
		}
		c.Serve(context.Background())
		for id := range uint32(10) {
			if s := c.Stream(id); s != nil {
				s.Write([]byte("x"))
				s.Reset()
			}
		}
		c.Close()
	})
}

// fedEnd is a peer that sends its input and leaves.
type fedEnd struct {
	deadEnd
	input []byte
}

func (f *fedEnd) Read(p []byte) (int, error) {
	if len(f.input) == 0 {
		return 0, io.EOF
	}
	n := copy(p, f.input)
	f.input = f.input[n:]
	return n, nil
}
