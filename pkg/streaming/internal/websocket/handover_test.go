package websocket

import (
	"bufio"
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"reflect"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/streamshim/streamshim/internal/testutil"
	"github.com/streamshim/streamshim/pkg/handover"
	"github.com/streamshim/streamshim/pkg/streaming/internal/memory"
	"github.com/streamshim/streamshim/pkg/streaming/internal/websocket/frames"
	"github.com/streamshim/streamshim/pkg/streaming/internal/websocket/inbox"
)

// carried is a connection that is handed over on the same network connection.
type carried struct {
	*ChannelConn
	t       testing.TB
	network net.Conn
	config  Config
	served  chan error
}

func carry(t testing.TB, network net.Conn, protocol Protocol) *carried {
	return carryIn(t, network, protocol, nil)
}

func carryIn(t testing.TB, network net.Conn, protocol Protocol, room memory.Room) *carried {
	c := &carried{t: t, network: network, config: execConfig()}
	c.config.Room = room
	c.ChannelConn = newChannelConn(protocol, c.config)
	c.conn = newConn(network, bufio.NewReaderSize(network, readBuffer), c.ChannelConn.config.MaxMessage)
	c.serve()
	return c
}

func (c *carried) serve() {
	conn, served := c.ChannelConn, make(chan error, 1)
	go func() { served <- conn.Serve(context.Background()) }()
	c.served = served
}

// handOver continues from an encoded state. Serve may have ended by itself before.
func (c *carried) handOver() {
	c.t.Helper()
	c.Freeze()
	testutil.Receive(c.t, "Serve of a frozen connection", c.served)
	s, err := c.State()
	if err != nil {
		c.t.Fatal(err)
	}
	c.network.SetDeadline(time.Time{})
	resumed, err := Resume(c.network, testutil.Reread(c.t, s), c.config)
	if err != nil {
		c.t.Fatal(err)
	}
	c.ChannelConn = resumed
	c.serve()
}

// conversation returns each kind of frame that a client may send, once.
func conversation(protocol Protocol) []byte {
	var wire []byte
	frame := func(opcode byte, final bool, payload string) {
		wire = append(wire, clientFrame(opcode, final, payload)...)
	}
	if protocol.Base64() {
		frame(frames.OpText, false, "0aGVs") // "hello "
		frame(frames.OpPing, true, "there?")
		frame(frames.OpContinuation, false, "bG\r\n")
		frame(frames.OpContinuation, true, "8g")
		frame(frames.OpText, true, "4e30=") // {}
		frame(frames.OpText, true, "9aGVs") // no channel
		frame(frames.OpText, true, "0d29ybGQ=")
		frame(frames.OpText, true, "")
	} else {
		frame(frames.OpBinary, false, "\x00hel")
		frame(frames.OpPing, true, "there?")
		frame(frames.OpContinuation, false, "")
		frame(frames.OpContinuation, true, "lo ")
		frame(frames.OpBinary, true, "\x04{}")
		frame(frames.OpBinary, false, "\x09to ")
		frame(frames.OpContinuation, true, "nobody")
		frame(frames.OpBinary, true, "\x01output")
		frame(frames.OpBinary, true, "")
		frame(frames.OpPong, true, "unasked")
		frame(frames.OpBinary, true, "\x00"+strings.Repeat("world", 60))
	}
	if protocol.HalfClose() {
		frame(frames.OpBinary, false, "\xff")
		frame(frames.OpContinuation, false, "\x00")
		frame(frames.OpContinuation, true, "")
	}
	frame(frames.OpClose, true, "\x03\xe8bye")
	return wire
}

// talk sends the conversation to a connection that is handed over after each of the given numbers of bytes. It returns, in
// words, what has become of the connection.
func talk(t *testing.T, protocol Protocol, cuts ...int) string {
	t.Helper()
	ours, peer := net.Pipe()
	c := carry(t, ours, protocol)
	answers := make(chan []byte, 1)
	go func() {
		p, _ := io.ReadAll(peer)
		answers <- p
	}()
	wire := conversation(protocol)
	at := 0
	for _, cut := range append(cuts, len(wire)) {
		if at < cut {
			if _, err := peer.Write(wire[at:cut]); err != nil {
				t.Fatal(err)
			}
		}
		at = cut
		if cut < len(wire) {
			c.handOver()
		}
	}
	testutil.Receive(t, "the client's Close", c.Done())
	c.handOver() // while it ends, or after its end
	served := testutil.Receive(t, "the end", c.served)
	c.served <- nil
	c.handOver()
	story := fmt.Sprintf("served: %v; %v\n", served, c.Err())
	for number := range c.channels {
		ch := c.Channel(byte(number))
		var content []byte
		var err error
		if ch.direction.readable() {
			content, err = io.ReadAll(ch)
		}
		story += fmt.Sprintf("%d: %q, %v, received %d, %v\n", number, content, err, ch.Received(), ch.InputEnded())
	}
	testutil.Receive(t, "the end", c.served)
	ours.Close()
	return story + fmt.Sprintf("answers %x", testutil.Receive(t, "the answers", answers))
}

// TestHandOverBehindEachByte cuts what a client sends after each byte.
func TestHandOverBehindEachByte(t *testing.T) {
	for _, protocol := range []Protocol{ChannelV5, ChannelV4, ChannelV4Base64} {
		t.Run(string(protocol), func(t *testing.T) {
			// A pong may be left out once the Close was received (RFC 6455, section 5.5.2).
			const pong = "8a0674686572653f"
			talk := func(cuts ...int) string { return strings.Replace(talk(t, protocol, cuts...), pong, "", 1) }
			want := talk()
			all := []int{}
			for cut := range len(conversation(protocol)) {
				all = append(all, cut)
				if got := talk(cut); got != want {
					t.Fatalf("handed over behind byte %d:\n%s\nwant\n%s", cut, got, want)
				}
			}
			if got := talk(all...); got != want {
				t.Errorf("handed over behind each byte:\n%s\nwant\n%s", got, want)
			}
			if testing.Verbose() {
				t.Log(want)
			}
		})
	}
}

// sentFrames returns the frames in wire that a server has sent, in words.
func sentFrames(t *testing.T, wire []byte) (frames []string) {
	t.Helper()
	for len(wire) > 0 {
		size, head := int(wire[1]), 2
		if size == 126 {
			size, head = int(binary.BigEndian.Uint16(wire[2:])), 4
		}
		if len(wire) < head+size {
			t.Fatalf("the last frame is cut: %q", wire)
		}
		frames = append(frames, fmt.Sprintf("%x %q", wire[0], wire[head:head+size]))
		wire = wire[head+size:]
	}
	return frames
}

// TestHandOverOfOutputBehindEachByte cuts what is sent after each byte: the peer reads as many bytes and no more.
func TestHandOverOfOutputBehindEachByte(t *testing.T) {
	for _, protocol := range []Protocol{ChannelV5, ChannelV4Base64} {
		total := 1
		for cut := 0; cut < total; cut++ {
			ours, peer := net.Pipe()
			c := carry(t, ours, protocol)
			peer.Write(clientFrame(frames.OpPing, true, "there?"))
			var writers sync.WaitGroup
			refused := make(chan byte, 2)
			write := func(conn *ChannelConn, channel byte) {
				writers.Go(func() {
					if n, err := conn.Channel(channel).Write([]byte("text")); err == handover.ErrFrozen && n == 0 {
						refused <- channel
					} else if err != nil || n != 4 {
						t.Errorf("cut at %d: written %d, %v", cut, n, err)
					}
				})
			}
			write(c.ChannelConn, Stdout)
			write(c.ChannelConn, Stderr)
			wire := make([]byte, cut, 1<<10)
			if _, err := io.ReadFull(peer, wire); err != nil {
				t.Fatal(err)
			}
			c.Freeze()
			writers.Wait()
			c.handOver()
			ended := make(chan struct{})
			conn := c.ChannelConn
			var reading sync.Mutex
			go func() {
				defer close(ended)
				p := make([]byte, 100)
				for {
					n, err := peer.Read(p)
					reading.Lock()
					wire = append(wire, p[:n]...)
					reading.Unlock()
					if err != nil {
						return
					}
				}
			}()
			close(refused)
			for channel := range refused {
				refused := make(chan byte, 1)
				writers.Go(func() {
					if n, err := conn.Channel(channel).Write([]byte("text")); n != 4 || err != nil {
						t.Errorf("cut at %d: written again %d, %v", cut, n, err)
					}
				})
				close(refused)
			}
			writers.Wait()
			for answered := false; !answered; time.Sleep(time.Millisecond) {
				reading.Lock()
				answered = bytes.Contains(wire, []byte("\x8a\x06there?"))
				reading.Unlock()
			}
			if err := conn.sendClose(t.Context(), CloseNormal, ""); err != nil {
				t.Error(err)
			}
			c.handOver()
			if err := c.sendClose(t.Context(), CloseNormal, ""); err != nil {
				t.Error(err)
			}
			peer.Write(clientFrame(frames.OpClose, true, "\x03\xe8"))
			testutil.Receive(t, "the end", c.served)
			peer.Close()
			testutil.Receive(t, "the peer", ended)
			frames := sentFrames(t, wire)
			last := len(frames) - 1
			if frames[last] != `88 "\x03\xe8"` {
				t.Fatalf("cut at %d: sent %q", cut, frames)
			}
			slices.Sort(frames[:last])
			want := []string{`82 "\x01text"`, `82 "\x02text"`, `8a "there?"`}
			if protocol.Base64() {
				want = []string{`81 "1dGV4dA=="`, `81 "2dGV4dA=="`, `8a "there?"`}
			}
			if !slices.Equal(frames[:last], want) {
				t.Fatalf("cut at %d: sent %q", cut, frames)
			}
			total = len(wire) - 4 // without the Close
		}
	}
}

// TestFreezeWithAClientThatDoesNotRead checks that a frozen connection does not wait for its client.
func TestFreezeWithAClientThatDoesNotRead(t *testing.T) {
	accepted := make(chan *ChannelConn, 1)
	s := newTestServer(t, execConfig(), func(c *ChannelConn) { accepted <- c; <-c.Frozen() })
	client := s.dialRaw(t, ChannelV5)
	client.SetReadBuffer(64 << 10) // so that less data does not fit: it must be read within closeTimeout
	c := testutil.Receive(t, "the connection", accepted)
	sent := bytes.Repeat([]byte("0123456789abcdef"), 3<<18)
	written := make(chan int, 1)
	go func() {
		n, err := c.Channel(Stdout).Write(sent)
		if err != nil {
			t.Errorf("Write: %v", err)
		}
		written <- n
	}()
	for before := int64(-1); before != c.Channel(Stdout).Sent() || before == 0; time.Sleep(20 * time.Millisecond) {
		before = c.Channel(Stdout).Sent()
	}
	client.Write(clientFrame(frames.OpPing, true, "there?"))
	ended := make(chan error, 1)
	go func() { ended <- s.waitEnded(t) }()
	// goOn freezes and resumes.
	goOn := func() {
		began := time.Now()
		c.Freeze()
		if n := testutil.Receive(t, "the writer", written); n != len(sent) {
			t.Errorf("written %d bytes", n)
		}
		written <- len(sent)
		if err := testutil.Receive(t, "Serve", ended); err != handover.ErrFrozen {
			t.Errorf("frozen: %v", err)
		}
		t.Logf("frozen after %v", time.Since(began))
		state, err := c.State()
		if err != nil {
			t.Fatal(err)
		}
		c.network.SetDeadline(time.Time{})
		resumed, err := Resume(c.network, testutil.Reread(t, state), c.config)
		if err != nil {
			t.Fatal(err)
		}
		c = resumed
		go func() { ended <- resumed.Serve(context.Background()) }()
	}
	goOn()
	goOn()
	client.Write(clientFrame(frames.OpClose, true, "\x03\xe8"))
	testutil.Receive(t, "the client's Close", c.Done())
	goOn() // its answer waits
	wire, err := io.ReadAll(client)
	if err != nil {
		t.Error(err)
	}
	if frames := sentFrames(t, wire); len(frames) < 300 || frames[len(frames)-1] != `88 "\x03\xe8"` || !slices.Contains(frames, `8a "there?"`) {
		t.Errorf("%d frames were sent, at last %x", len(frames), wire[max(0, len(wire)-20):])
	}
	if err := testutil.Receive(t, "the end", ended); err != nil {
		t.Errorf("Serve: %v", err)
	}
}

// TestFrozenChannels checks calls on the channels of a frozen connection.
func TestFrozenChannels(t *testing.T) {
	ours, peer := net.Pipe()
	c := carry(t, ours, ChannelV5)
	go io.Copy(io.Discard, peer)
	peer.Write(clientFrame(frames.OpBinary, true, "\x00unread"))
	peer.Write(clientFrame(frames.OpBinary, true, "\xff\x04"))
	stdin, resize, stdout := c.Channel(Stdin), c.Channel(Resize), c.Channel(Stdout)
	for !resize.InputEnded() {
		time.Sleep(time.Millisecond)
	}
	r, w := io.Pipe()
	writing := make(chan error, 1)
	go func() {
		n, err := stdin.WriteTo(w)
		if n != 2 {
			t.Errorf("WriteTo has written %d bytes", n)
		}
		writing <- err
	}()
	io.ReadFull(r, make([]byte, 2))
	c.Freeze()
	r.CloseWithError(os.ErrDeadlineExceeded) // as the writer of a pipe does
	if err := testutil.Receive(t, "WriteTo", writing); err != handover.ErrFrozen {
		t.Errorf("WriteTo: %v", err)
	}
	if n, err := stdin.Read(make([]byte, 1)); n != 0 || err != handover.ErrFrozen {
		t.Errorf("Read while frozen: %d, %v", n, err)
	}
	if _, err := resize.Read(make([]byte, 1)); err != io.EOF {
		t.Errorf("Read at the end: %v", err)
	}
	if n, err := stdout.Write([]byte("x")); n != 0 || err != handover.ErrFrozen {
		t.Errorf("Write while frozen: %d, %v", n, err)
	}
	if n, err := stdout.ReadFrom(strings.NewReader("x")); n != 0 || err != handover.ErrFrozen {
		t.Errorf("ReadFrom while frozen: %d, %v", n, err)
	}
	stdout.CloseWrite()
	resize.CloseRead()
	c.CloseNow()
	if c.Err() != nil {
		t.Errorf("CloseNow while frozen: %v", c.Err())
	}
	if err := c.CloseWrite(t.Context()); err != nil {
		t.Errorf("CloseWrite while frozen: %v", err)
	}
	c.handOver()
	stdin, resize, stdout = c.Channel(Stdin), c.Channel(Resize), c.Channel(Stdout)
	p := make([]byte, 10)
	if n, _ := stdin.Read(p); string(p[:n]) != "read" {
		t.Errorf("left to be read: %q", p[:n])
	}
	if _, err := stdout.Write(p); err != errWriteClosed {
		t.Errorf("Write after CloseWrite: %v", err)
	}
	if _, err := resize.Read(p); err != inbox.ErrReadClosed {
		t.Errorf("Read after CloseRead: %v", err)
	}
	c.CloseNow()
	testutil.Receive(t, "Serve", c.served)
	peer.Close()
}

// TestHandOverOfAClose checks that a close handshake continues after a hand-over, and that no second Close is sent.
func TestHandOverOfAClose(t *testing.T) {
	ours, peer := net.Pipe()
	c := carry(t, ours, ChannelV5)
	wire := make(chan []byte, 1)
	go func() {
		p, _ := io.ReadAll(peer)
		wire <- p
	}()
	for range 5 {
		closing := make(chan error, 1)
		go func() { closing <- c.CloseAndWait(context.Background()) }()
		for !c.closeSent.Load() {
			time.Sleep(time.Millisecond)
		}
		conn := c.ChannelConn
		conn.Freeze()
		if err := testutil.Receive(t, "CloseAndWait", closing); err != handover.ErrFrozen {
			t.Errorf("CloseAndWait: %v", err)
		}
		c.handOver()
	}
	go peer.Write(clientFrame(frames.OpClose, true, "\x03\xe8"))
	if err := c.CloseAndWait(context.Background()); err != nil {
		t.Error(err)
	}
	testutil.Receive(t, "Serve", c.served)
	if frames := sentFrames(t, testutil.Receive(t, "the end", wire)); len(frames) != 1 {
		t.Errorf("sent %q", frames)
	}
	peer.Close()
}

// TestHandOverOfEnds checks that ends from before a hand-over are the same after it.
func TestHandOverOfEnds(t *testing.T) {
	for _, test := range []struct {
		name string
		end  func(c *ChannelConn, client *net.TCPConn)
		is   error
	}{
		{"Close", func(_ *ChannelConn, client *net.TCPConn) { client.Write(clientFrame(frames.OpClose, true, "\x03\xe8")) }, ErrClientClosed},
		{"Close with an error", func(_ *ChannelConn, client *net.TCPConn) {
			client.Write(clientFrame(frames.OpClose, true, "\x0f\xa0oops"))
		}, ErrClientClosed},
		{"FIN", func(_ *ChannelConn, client *net.TCPConn) { client.CloseWrite() }, ErrClientVanished},
		{"RST", func(_ *ChannelConn, client *net.TCPConn) { client.SetLinger(0); client.Close() }, ErrClientReset},
		{"a violation", func(_ *ChannelConn, client *net.TCPConn) { client.Write([]byte{0xff, 0xff}); client.Close() }, nil},
		{"our CloseNow", func(c *ChannelConn, _ *net.TCPConn) { c.CloseNow() }, ErrClosed},
	} {
		for _, protocol := range []Protocol{ChannelV5, ChannelV4} {
			t.Run(test.name+" "+string(protocol), func(t *testing.T) {
				accepted := make(chan *ChannelConn, 1)
				s := newTestServer(t, execConfig(), func(c *ChannelConn) { accepted <- c; <-c.Done() })
				client := s.dialRaw(t, protocol)
				c := testutil.Receive(t, "the connection", accepted)
				client.Write(clientFrame(frames.OpBinary, true, "\x00unread"))
				for c.Channel(Stdin).Received() < 6 {
					time.Sleep(time.Millisecond)
				}
				test.end(c, client)
				servedErr := s.waitEnded(t)
				err := c.Err()
				if test.is != nil && !errors.Is(err, test.is) {
					t.Fatalf("ended with %v", err)
				}
				ended := c.Channel(Stdin).InputEnded()
				for range 2 {
					c.Freeze()
					state, stateErr := c.State()
					if stateErr != nil {
						t.Fatal(stateErr)
					}
					again, resumeErr := Resume(nil, testutil.Reread(t, state), c.config)
					if resumeErr != nil {
						t.Fatal(resumeErr)
					}
					c = again
					if got := c.Serve(t.Context()); fmt.Sprint(got) != fmt.Sprint(servedErr) {
						t.Errorf("Serve: %v, was %v", got, servedErr)
					}
					if c.Err() == nil || c.Err().Error() != err.Error() || (c.Err() == test.is) != (err == test.is) || test.is != nil && !errors.Is(c.Err(), test.is) {
						t.Errorf("%v has become %v", err, c.Err())
					}
				}
				content, readErr := io.ReadAll(c.Channel(Stdin))
				if string(content) != "unread" || c.Channel(Stdin).InputEnded() != ended || (readErr == nil) != ended {
					t.Errorf("read %q, %v; ended %v", content, readErr, ended)
				}
			})
		}
	}
}

// TestHandOverTakesRoom checks that unread data of a resumed connection counts against the limits again, and no longer
// against those of the old one.
func TestHandOverTakesRoom(t *testing.T) {
	ours, peer := net.Pipe()
	before, after := &testutil.Room{}, &testutil.Room{}
	c := carryIn(t, ours, ChannelV5, before)
	peer.Write(clientFrame(frames.OpBinary, true, "\x00"+strings.Repeat("x", 100<<10)))
	for c.Channel(Stdin).Received() < 100<<10 {
		time.Sleep(time.Millisecond)
	}
	c.config.Room = after
	c.handOver()
	if before.Held() != 0 || after.Held() != 100<<10 {
		t.Errorf("room of the old one %d, of the new one %d", before.Held(), after.Held())
	}
	c.Channel(Stdin).CloseRead()
	if after.Held() != 0 || !c.inbound.Empty() {
		t.Errorf("room after all is gone: %d", after.Held())
	}
	c.CloseNow()
	testutil.Receive(t, "Serve", c.served)
	peer.Close()
}

// eachField calls f with the name of each plain field of a state, and with the value, which f may change.
func eachField(path string, v reflect.Value, f func(name string, field reflect.Value)) {
	switch {
	case v.Kind() == reflect.Struct && v.Type().PkgPath() == reflect.TypeFor[State]().PkgPath():
		for i := range v.NumField() {
			eachField(path+"."+v.Type().Field(i).Name, v.Field(i), f)
		}
	case v.Type() == reflect.TypeFor[[]ChannelState]():
		for i := range v.Len() {
			eachField(path+"[]", v.Index(i), f)
		}
		f(path, v)
	default:
		f(path, v)
	}
}

// expectation is a state and what a connection resumed from it must do. The error tells what it did not do.
type expectation struct {
	name  string
	state ChannelsState
	check func(c *ChannelConn, peer net.Conn) error
}

// expectations waits up to limit for each thing that a connection must do.
func expectations(limit time.Duration) []expectation {
	now := time.Now().UnixNano()
	mask := uint32(0x04030201)
	masked := []byte("12345")
	after := frames.Unmask(masked[:2], mask)
	frames.Unmask(masked[2:], after)
	channels := func() []ChannelState {
		return []ChannelState{
			Stdin:  {Direction: Read, Received: 10, Unread: []byte("unread")},
			Stdout: {Direction: Write, Sent: 20, Discard: true},
			Stderr: {Direction: Write, WriteClosed: true, Discard: true},
			Error:  {Direction: Write, Discard: true},
			Resize: {Direction: Read, Ended: true},
			5:      {Direction: Read, Discard: true},
		}
	}
	// served serves until the check is over.
	served := func(c *ChannelConn, peer net.Conn, check func(served <-chan error) error) error {
		result := make(chan error, 1)
		over := make(chan struct{})
		go func() { defer close(over); result <- c.Serve(context.Background()) }()
		defer func() { c.CloseNow(); peer.Close(); <-over }()
		peer.SetDeadline(time.Now().Add(limit))
		return check(result)
	}
	expect := func(peer net.Conn, want []byte) error {
		got := make([]byte, len(want))
		if n, err := io.ReadFull(peer, got); err != nil || !bytes.Equal(got, want) {
			return fmt.Errorf("%x was sent, %v, want %x", got[:n], err, want)
		}
		return nil
	}
	readSoon := func(ch *Channel) (string, error) {
		type result struct {
			p   []byte
			err error
		}
		read := make(chan result, 1)
		go func() { p, err := io.ReadAll(ch); read <- result{p, err} }()
		select {
		case r := <-read:
			return string(r.p), r.err
		case <-time.After(limit):
			return "", errors.New("a read waits")
		}
	}
	return []expectation{
		{"live", ChannelsState{
			Protocol: ChannelV5,
			Conn: State{
				Input: masked[:2], Read: frames.ReadState{InMessage: true, Last: true, Remaining: 5, Mask: mask, Size: 6},
				Output: []byte("output"), PingDue: true, PongDue: true, Pong: []byte("pong"),
				LastReceived: now - 2e9, LastActivity: now - 1e9,
			},
			Receiving: true, Payload: true, Channel: 0, Channels: channels(),
		}, func(c *ChannelConn, peer net.Conn) error {
			if c.LastActivity().UnixNano() != now-1e9 || c.LastReceived().UnixNano() != now-2e9 {
				return errors.New("times")
			}
			for i := range channels() {
				if c.Channel(byte(i)) == nil {
					return fmt.Errorf("no channel %d", i)
				}
			}
			if c.Channel(Stdin).Received() != 10 || c.Channel(Stdout).Sent() != 20 || !c.Channel(Resize).InputEnded() {
				return errors.New("counters or ends")
			}
			if _, err := readSoon(c.Channel(5)); err != inbox.ErrReadClosed {
				return err
			}
			return served(c, peer, func(<-chan error) error {
				if err := expect(peer, append([]byte("output"), "\x8a\x04pong\x89\x00"...)); err != nil {
					return err
				}
				for _, channel := range []byte{Stdout, Error} {
					go c.Channel(channel).Write([]byte("x"))
					if err := expect(peer, []byte{frames.Final | frames.OpBinary, 2, channel, 'x'}); err != nil {
						return err
					}
				}
				if _, err := c.Channel(Stderr).Write([]byte("x")); err != errWriteClosed {
					return fmt.Errorf("stderr: %w", err)
				}
				peer.Write(append(slices.Clone(masked[2:]), clientFrame(frames.OpBinary, true, "\xff\x00")...))
				if got, err := readSoon(c.Channel(Stdin)); got != "unread12345" || err != nil {
					return fmt.Errorf("stdin has %q, %w", got, err)
				}
				return nil
			})
		}},
		{"another channel", ChannelsState{
			Protocol:  ChannelV5,
			Conn:      State{Read: frames.ReadState{InMessage: true, Last: true, Remaining: 1, Size: 2}},
			Receiving: true, Payload: true, Channel: 1,
			Channels: []ChannelState{{Direction: Read}, {Direction: Read}},
		}, func(c *ChannelConn, peer net.Conn) error {
			return served(c, peer, func(<-chan error) error {
				peer.Write(append([]byte("x"), clientFrame(frames.OpBinary, true, "\xff\x01")...))
				if got, err := readSoon(c.Channel(1)); got != "x" || err != nil {
					return fmt.Errorf("channel 1 has %q, %w", got, err)
				}
				return nil
			})
		}},
		{"large", ChannelsState{
			Protocol: ChannelV5, Conn: State{Read: frames.ReadState{InMessage: true, Size: 31 << 20}}, Receiving: true, Payload: true, Channels: channels(),
		}, func(c *ChannelConn, peer net.Conn) error {
			return served(c, peer, func(<-chan error) error {
				go io.Copy(io.Discard, peer)
				peer.Write(binary.BigEndian.AppendUint32(binary.BigEndian.AppendUint64([]byte{frames.Final, 0xff}, 2<<20), 0))
				select {
				case <-c.Done():
					var violation *frames.Violation
					if err := c.Err(); !errors.As(err, &violation) || violation.Code != frames.CloseTooBig {
						return fmt.Errorf("ended with %w", err)
					}
				case <-time.After(limit):
					return errors.New("it is taken in")
				}
				return nil
			})
		}},
		{"half-close", ChannelsState{
			Protocol: ChannelV5, Conn: State{Read: frames.ReadState{InMessage: true, Last: true, Remaining: 1, Size: 2}}, Receiving: true, Header: []byte{0xff},
			Channels: channels(),
		}, func(c *ChannelConn, peer net.Conn) error {
			return served(c, peer, func(<-chan error) error {
				peer.Write([]byte{0})
				if got, err := readSoon(c.Channel(Stdin)); got != "unread" || err != nil {
					return fmt.Errorf("stdin has %q, %w", got, err)
				}
				return nil
			})
		}},
		{"base64", ChannelsState{
			Protocol: ChannelV4Base64, Conn: State{Read: frames.ReadState{InMessage: true, Last: true, Remaining: 2, Size: 5}}, Receiving: true, Payload: true,
			Encoded: []byte("eH"), Channels: channels(),
		}, func(c *ChannelConn, peer net.Conn) error {
			return served(c, peer, func(<-chan error) error {
				go io.Copy(io.Discard, peer)
				peer.Write(append([]byte("h4"), clientFrame(frames.OpClose, true, "")...))
				if got, err := readSoon(c.Channel(Stdin)); got != "unreadxxx" || err != nil {
					return fmt.Errorf("stdin has %q, %w", got, err)
				}
				return nil
			})
		}},
		{"padded", ChannelsState{
			Protocol: ChannelV4Base64, Conn: State{Read: frames.ReadState{InMessage: true, Last: true, Remaining: 4, Size: 9}}, Receiving: true, Payload: true,
			Padded: true, Channels: channels(),
		}, func(c *ChannelConn, peer net.Conn) error {
			return served(c, peer, func(<-chan error) error {
				go io.Copy(io.Discard, peer)
				peer.Write([]byte("eHh4"))
				select {
				case <-c.Done():
					var violation *frames.Violation
					if err := c.Err(); !errors.As(err, &violation) || violation.Code != frames.CloseInvalidPayload {
						return fmt.Errorf("ended with %w", err)
					}
				case <-time.After(limit):
					return errors.New("it is taken in")
				}
				return nil
			})
		}},
		{"over", ChannelsState{
			Protocol: ChannelV5, Conn: State{CloseSent: true, Done: writeFailure(ErrClientVanished)}, Over: true, InputEnd: writeFailure(ErrClientVanished),
			Channels: channels(),
		}, func(c *ChannelConn, peer net.Conn) error {
			if c.Err() != ErrClientVanished {
				return errors.New("Err")
			}
			return served(c, peer, func(served <-chan error) error {
				select {
				case err := <-served:
					if err != nil {
						return err
					}
				case <-time.After(limit):
					return errors.New("it is served")
				}
				if got, err := readSoon(c.Channel(Stdin)); got != "unread" || err != ErrClientVanished {
					return fmt.Errorf("stdin has %q, %w", got, err)
				}
				return nil
			})
		}},
		{"broken", ChannelsState{Protocol: ChannelV5, Conn: State{Unwanted: writeFailure(errors.New("broken"))}, Channels: channels()}, func(c *ChannelConn, peer net.Conn) error {
			return served(c, peer, func(<-chan error) error {
				if _, err := c.Channel(Stdout).Write([]byte("x")); err == nil {
					return errors.New("a write succeeds")
				}
				return nil
			})
		}},
		{"closed", ChannelsState{Protocol: ChannelV5, Conn: State{Closed: true, Done: writeFailure(ErrClosed)}, Over: true, Channels: channels()}, func(c *ChannelConn, peer net.Conn) error {
			peer.Close()
			if !c.closed {
				return errors.New("it has a socket")
			}
			return nil
		}},
	}
}

// TestEachFieldOfAState checks that no field of a state can be left out.
func TestEachFieldOfAState(t *testing.T) {
	noticed := map[string]bool{}
	all := map[string]bool{}
	eachField("", reflect.ValueOf(&ChannelsState{Channels: make([]ChannelState, 1)}).Elem(), func(name string, _ reflect.Value) { all[name] = true })
	patient := expectations(patience)
	for i, e := range expectations(200 * time.Millisecond) {
		run := func(e expectation, s ChannelsState) error {
			a, b := testutil.TCPPair(t)
			defer a.Close()
			c, err := Resume(a, s, Config{})
			if err != nil {
				b.Close()
				return err
			}
			defer c.CloseNow() // also ends reads that wait
			return e.check(c, b)
		}
		if err := run(patient[i], testutil.Reread(t, patient[i].state)); err != nil {
			t.Fatalf("%s: %v", e.name, err)
		}
		number := 0
		eachField("", reflect.ValueOf(&e.state).Elem(), func(string, reflect.Value) { number++ })
		for i := range number {
			without := testutil.Reread(t, e.state)
			at, name, zero := 0, "", false
			eachField("", reflect.ValueOf(&without).Elem(), func(field string, v reflect.Value) {
				if at == i {
					name, zero = field, v.IsZero()
					v.SetZero()
				}
				at++
			})
			if zero || noticed[name] {
				continue
			}
			if err := run(e, without); err != nil {
				noticed[name] = true
			}
		}
	}
	for name := range all {
		if !noticed[name] {
			t.Errorf("nobody misses %s", name)
		}
	}
}

// FuzzResume checks that a damaged state gives an error or a connection that fails, and never a panic.
func FuzzResume(f *testing.F) {
	for _, e := range expectations(patience) {
		encoded, err := handover.Encode(e.state)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(encoded, conversation(e.state.Protocol))
	}
	f.Fuzz(func(t *testing.T, encoded, input []byte) {
		var s ChannelsState
		if handover.Decode(encoded, &s) != nil {
			return
		}
		c, err := Resume(&fedConn{Reader: bytes.NewReader(input)}, s, Config{})
		if err != nil {
			return
		}
		c.inbound.DiscardAll()
		c.Serve(context.Background())
		for i := range c.channels {
			c.channels[i].Write([]byte("x"))
			c.channels[i].Reset()
		}
		c.CloseNow()
	})
}

// fedConn is a client that sends its input and leaves.
type fedConn struct {
	net.Conn
	*bytes.Reader
}

func (c *fedConn) Read(p []byte) (int, error)       { return c.Reader.Read(p) }
func (c *fedConn) Write(p []byte) (int, error)      { return len(p), nil }
func (c *fedConn) Close() error                     { return nil }
func (c *fedConn) SetDeadline(time.Time) error      { return nil }
func (c *fedConn) SetReadDeadline(time.Time) error  { return nil }
func (c *fedConn) SetWriteDeadline(time.Time) error { return nil }
func (c *fedConn) LocalAddr() net.Addr              { return nil }
