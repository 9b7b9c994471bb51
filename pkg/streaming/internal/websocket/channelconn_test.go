package websocket

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"os"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/creack/pty"
	"github.com/gorilla/websocket"
	"go.uber.org/goleak"
	xnet "golang.org/x/net/websocket"

	"github.com/streamshim/streamshim/internal/testutil"
	"github.com/streamshim/streamshim/pkg/streaming/internal/websocket/frames"
)

func execConfig() Config {
	return Config{Channels: RemoteCommandChannels(true, true, true), Greeting: true}
}

func TestHandshakeRefusals(t *testing.T) {
	s := newTestServer(t, execConfig(), untilDone)
	for _, test := range []struct {
		name   string
		header http.Header
		status int
	}{
		{"nothing in common", http.Header{"Sec-Websocket-Protocol": {"chat"}}, http.StatusForbidden},
		{"malformed offer", http.Header{"Sec-Websocket-Protocol": {"a b"}}, http.StatusBadRequest},
		{"foreign origin", http.Header{"Origin": {"http://evil.example"}}, http.StatusForbidden},
	} {
		dialer := websocket.Dialer{Subprotocols: test.header["Sec-Websocket-Protocol"]}
		test.header.Del("Sec-Websocket-Protocol")
		client, response, err := dialer.Dial("ws"+strings.TrimPrefix(s.URL, "http"), test.header)
		if err == nil {
			client.Close()
			t.Errorf("%s: accepted", test.name)
		} else if response == nil || response.StatusCode != test.status {
			t.Errorf("%s: %v, response %v, want status %d", test.name, err, response, test.status)
		}
	}
}

// TestOldClients talks to the server with the client of the stock server's own tests.
func TestOldClients(t *testing.T) {
	for _, protocol := range protocols {
		t.Run(string(protocol), func(t *testing.T) {
			s := newTestServer(t, execConfig(), func(c *ChannelConn) {
				if got := c.protocol; got != protocol {
					t.Errorf("negotiated %q, want %q", got, protocol)
				}
				buffer := make([]byte, 100)
				n, err := c.Channel(Stdin).Read(buffer)
				if err != nil {
					t.Errorf("read stdin: %v", err)
				}
				c.Channel(Stdout).Write(bytes.ToUpper(buffer[:n]))
				c.Channel(Stderr).ReadFrom(strings.NewReader("warning"))
				io.WriteString(c.Channel(Error), "done")
				c.CloseAndWait(t.Context())
			})
			config, err := xnet.NewConfig("ws"+strings.TrimPrefix(s.URL, "http"), s.URL)
			if err != nil {
				t.Fatal(err)
			}
			if protocol != ChannelUnnamed {
				config.Protocol = []string{string(protocol)}
			}
			client, err := xnet.DialConfig(config)
			if err != nil {
				t.Fatal(err)
			}
			defer client.Close()
			encode := func(channel byte, payload string) []byte {
				if protocol.Base64() {
					return append([]byte{'0' + channel}, base64.StdEncoding.EncodeToString([]byte(payload))...)
				}
				return append([]byte{channel}, payload...)
			}
			if err := xnet.Message.Send(client, encode(Stdin, "hello")); err != nil {
				t.Fatal(err)
			}
			for _, want := range [][]byte{encode(Stdout, ""), encode(Stdout, "HELLO"), encode(Stderr, "warning"), encode(Error, "done")} {
				var got []byte
				if err := xnet.Message.Receive(client, &got); err != nil {
					t.Fatalf("receive: %v, want %q", err, want)
				}
				if !bytes.Equal(got, want) {
					t.Errorf("got %q, want %q", got, want)
				}
			}
			var more []byte
			if err := xnet.Message.Receive(client, &more); err != io.EOF {
				t.Errorf("after the end: %v, %q", err, more)
			}
			client.Close()
			if err := s.waitEnded(t); err != nil {
				t.Errorf("Serve: %v", err)
			}
		})
	}
}

// TestBrowserGetsNoUnofferedProtocol checks that no protocol is chosen that the client has not offered: RFC 6455 section
// 4.1 makes the client fail on such a header.
func TestBrowserGetsNoUnofferedProtocol(t *testing.T) {
	s := newTestServer(t, execConfig(), untilDone)
	client, response, err := websocket.DefaultDialer.Dial("ws"+strings.TrimPrefix(s.URL, "http"), nil)
	if err != nil {
		t.Fatal(err)
	}
	defer client.Close()
	if values, present := response.Header["Sec-Websocket-Protocol"]; present {
		t.Errorf("the answer names %q", values)
	}
}

func TestFragmentedMessages(t *testing.T) {
	s := newTestServer(t, execConfig(), echo)
	client := s.dialRaw(t, ChannelV5)
	var wire []byte
	// The channel byte alone, empty fragments, and a Ping between; then a half-close in two parts.
	wire = append(wire, clientFrame(frames.OpBinary, false, "")...)
	wire = append(wire, clientFrame(frames.OpBinary&0, false, "\x00")...)
	wire = append(wire, clientFrame(frames.OpPing, true, "here?")...)
	wire = append(wire, clientFrame(0, false, "\x01\x02ab")...)
	wire = append(wire, clientFrame(0, false, "")...)
	wire = append(wire, clientFrame(0, true, "c")...)
	wire = append(wire, clientFrame(frames.OpBinary, false, "\xff")...)
	wire = append(wire, clientFrame(0, true, "\x00")...)
	if _, err := client.Write(wire); err != nil {
		t.Fatal(err)
	}
	var got []byte
	var status string
	for _, frame := range readUntilClose(t, client) {
		switch {
		case frame.opcode == frames.OpBinary && frame.payload[0] == Stdout:
			got = append(got, frame.payload[1:]...)
		case frame.opcode == frames.OpBinary && frame.payload[0] == Error:
			status += string(frame.payload[1:])
		}
	}
	if string(got) != "\x01\x02abc" {
		t.Errorf("stdout is %q", got)
	}
	if status == "" {
		t.Error("no status")
	}
	client.Write(clientFrame(frames.OpClose, true, "\x03\xe8"))
	if err := s.waitEnded(t); err != nil {
		t.Errorf("Serve: %v", err)
	}
}

// readUntilClose reads a raw client's frames, up to the server's Close and with it.
func readUntilClose(t testing.TB, client net.Conn) (sent []wireFrame) {
	t.Helper()
	client.SetReadDeadline(time.Now().Add(patience))
	for {
		frame, err := readFrame(client)
		if err != nil {
			t.Fatalf("read a frame: %v after %d frames", err, len(sent))
		}
		sent = append(sent, frame)
		if frame.opcode == frames.OpClose {
			return sent
		}
	}
}

func readFrame(r io.Reader) (wireFrame, error) {
	header := make([]byte, 2, 4)
	if _, err := io.ReadFull(r, header); err != nil {
		return wireFrame{}, err
	}
	size := int(header[1])
	if size == 126 {
		header = header[:4]
		if _, err := io.ReadFull(r, header[2:]); err != nil {
			return wireFrame{}, err
		}
		size = int(header[2])<<8 | int(header[3])
	}
	payload := make([]byte, size)
	_, err := io.ReadFull(r, payload)
	return wireFrame{header[0] & 0x0F, payload}, err
}

func TestViolationsAreClosedWithTheirCode(t *testing.T) {
	tests := []struct {
		name     string
		protocol Protocol
		wire     []byte
		code     int
	}{
		{"half-close of an unknown channel", ChannelV5, clientFrame(frames.OpBinary, true, "\xff\x09"), 1002},
		{"bad base64", ChannelV4Base64, clientFrame(frames.OpText, true, "0***"), 1007},
		{"too large a message", ChannelV4, clientFrame(frames.OpBinary, true, "\x00"+strings.Repeat("x", 3000)), 1009},
		{"no mask", ChannelV4, []byte{0x82, 1, 0}, 1002},
		{"reserved bit", ChannelV4, append([]byte{0xC2}, clientFrame(frames.OpBinary, true, "\x00")[1:]...), 1002},
		{"continuation of nothing", ChannelV4, clientFrame(0, true, "\x00"), 1002},
		{"long Ping", ChannelV4, clientFrame(frames.OpPing, true, strings.Repeat("x", 126)), 1002},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			config := execConfig()
			config.MaxMessage = 2000
			s := newTestServer(t, config, untilDone)
			client := s.dialRaw(t, test.protocol)
			// What follows the violation is unread when the server closes. That must not cost the client the Close.
			client.Write(append(test.wire, clientFrame(frames.OpBinary, true, "\x00more")...))
			frames := readUntilClose(t, client)
			closing := frames[len(frames)-1].payload
			if code := int(closing[0])<<8 | int(closing[1]); code != test.code {
				t.Errorf("closed with %d %q, want %d", code, closing[2:], test.code)
			}
			client.Close()
			if err := s.waitEnded(t); err == nil {
				t.Error("Serve returned no error")
			}
		})
	}
}

// TestViolationIsToldBehindOutput checks that the Close arrives even if it is still in our kernel, after output, when the
// connection ends with unread input.
func TestViolationIsToldBehindOutput(t *testing.T) {
	const size = 200 << 10
	written := make(chan struct{})
	s := newTestServer(t, execConfig(), func(c *ChannelConn) {
		if _, err := c.Channel(Stdout).Write(make([]byte, size)); err != nil {
			t.Errorf("write: %v", err)
		}
		close(written)
		<-c.Done()
	})
	client := s.dialTCP(t)
	client.SetReadBuffer(16 << 10)
	fmt.Fprintf(client, rawHandshake, s.Listener.Addr(), ChannelV5)
	skipHead(t, client)
	<-written
	client.Write(append(clientFrame(frames.OpBinary, true, "\xff\x09"), clientFrame(frames.OpBinary, true, "\x00"+strings.Repeat("x", 60<<10))...))
	frames := readUntilClose(t, client)
	if closing := frames[len(frames)-1].payload; string(closing[:2]) != "\x03\xea" {
		t.Errorf("closed with %q", closing)
	}
	client.Close()
	s.waitEnded(t)
}

func TestClientsCloseIsAnswered(t *testing.T) {
	for _, test := range []struct {
		payload string
		orderly bool
	}{{"", true}, {"\x03\xe8", true}, {"\x03\xe9away", true}, {"\x03\xf3broken", false}} {
		s := newTestServer(t, execConfig(), func(c *ChannelConn) {
			<-c.Done()
			if !errors.Is(c.Err(), ErrClientClosed) {
				t.Errorf("Err is %v", c.Err())
			}
			if _, err := c.Channel(Stdout).Write([]byte("late")); !errors.Is(err, ErrClientClosed) {
				t.Errorf("write after the end: %v", err)
			}
			if data, err := io.ReadAll(c.Channel(Stdin)); string(data) != "last" || !errors.Is(err, ErrClientClosed) {
				t.Errorf("stdin after the end: %q, %v", data, err)
			}
		})
		client := s.dialRaw(t, ChannelV5)
		client.Write(append(clientFrame(frames.OpBinary, true, "\x00last"), clientFrame(frames.OpClose, true, test.payload)...))
		frames := readUntilClose(t, client)
		if got := frames[len(frames)-1].payload; string(got) != test.payload[:min(2, len(test.payload))] {
			t.Errorf("Close %q was answered with %q", test.payload, got)
		}
		if _, err := client.Read(make([]byte, 1)); err != io.EOF {
			t.Errorf("after the answer to Close: %v, want EOF", err)
		}
		if err := s.waitEnded(t); (err == nil) != test.orderly {
			t.Errorf("Close %q: Serve returned %v", test.payload, err)
		}
	}
}

// TestSlowReaderGetsEverything checks kubernetes#60140: if the server closes early, a client that pings and reads slowly
// loses what is on its way.
func TestSlowReaderGetsEverything(t *testing.T) {
	const (
		size      = 24 << 20
		pingPause = 5 * time.Millisecond
		latePings = 20 // behind the server's Close
	)
	output := make([]byte, size)
	rand.NewChaCha8([32]byte{1}).Read(output)
	var activityBefore time.Time
	s := newTestServer(t, execConfig(), func(c *ChannelConn) {
		reader, writer, err := os.Pipe()
		if err != nil {
			t.Error(err)
			return
		}
		defer reader.Close()
		go func() {
			defer writer.Close()
			writer.Write(output)
		}()
		if n, err := c.Channel(Stdout).ReadFrom(reader); n != size || err != nil {
			t.Errorf("sent %d bytes: %v", n, err)
		}
		if got := c.Channel(Stdout).Sent(); got != size {
			t.Errorf("Sent is %d", got)
		}
		io.WriteString(c.Channel(Error), "status")
		activityBefore = c.LastActivity()
		ctx, cancel := context.WithTimeout(context.Background(), 2*patience)
		defer cancel()
		if err := c.CloseAndWait(ctx); err != nil {
			t.Errorf("CloseAndWait: %v", err)
		}
		// A resize may still arrive before the end begins. What arrives later, up to the last moment, is not activity.
		if after := c.LastReceived().Sub(c.LastActivity()); after < latePings*pingPause/2 {
			t.Errorf("the last that counts as activity came %v before the last that came", after)
		}
		if !c.LastReceived().After(activityBefore) {
			t.Error("pings are not noticed")
		}
	})
	client := s.dialRaw(t, ChannelV5)
	client.SetReadBuffer(64 << 10)
	stop := make(chan struct{})
	var pings sync.WaitGroup
	var pinged atomic.Int64
	pings.Go(func() {
		for {
			select {
			case <-time.After(pingPause):
				pinged.Add(1)
				// Also resizes: bytes that a session does not read at its end.
				if _, err := client.Write(append(clientFrame(frames.OpPing, true, "p"), clientFrame(frames.OpBinary, true, "\x04{}")...)); err != nil {
					t.Errorf("ping: %v", err)
					return
				}
			case <-stop:
				return
			}
		}
	})
	var got []byte
	var status string
	pongs := 0
	pace := time.NewTicker(time.Millisecond)
	defer pace.Stop()
	client.SetReadDeadline(time.Now().Add(2 * patience))
	for {
		<-pace.C
		frame, err := readFrame(client)
		if err != nil {
			t.Fatalf("after %d bytes: %v", len(got), err)
		}
		if frame.opcode == frames.OpPong {
			pongs++
		}
		if frame.opcode == frames.OpBinary && frame.payload[0] == Stdout {
			got = append(got, frame.payload[1:]...)
		}
		if frame.opcode == frames.OpBinary && frame.payload[0] == Error {
			status += string(frame.payload[1:])
		}
		if frame.opcode == frames.OpClose {
			break
		}
	}
	closed := pinged.Load()
	testutil.Eventually(t, "pings behind the server's Close", func() bool { return pinged.Load() >= closed+latePings })
	close(stop)
	pings.Wait()
	client.Write(clientFrame(frames.OpClose, true, "\x03\xe8"))
	if sha256.Sum256(got) != sha256.Sum256(output) {
		t.Errorf("%d of %d bytes arrived, or others", len(got), size)
	}
	if status != "status" {
		t.Errorf("status is %q", status)
	}
	if pongs == 0 {
		t.Error("no Ping was answered during the output")
	}
	if err := s.waitEnded(t); err != nil {
		t.Errorf("Serve: %v", err)
	}
}

// TestBlockedStdinHoldsUpNothingElse checks that resizes, Pings and the half-close get past stdin that nobody reads.
func TestBlockedStdinHoldsUpNothingElse(t *testing.T) {
	resized := make(chan string, 1)
	proceed := make(chan struct{})
	const size = 2 << 20
	s := newTestServer(t, execConfig(), func(c *ChannelConn) {
		b := make([]byte, 100)
		n, _ := c.Channel(Resize).Read(b)
		resized <- string(b[:n])
		<-proceed
		n64, err := io.Copy(io.Discard, c.Channel(Stdin))
		if n64 != size || err != nil {
			t.Errorf("stdin: %d bytes, %v", n64, err)
		}
		if got := c.Channel(Stdin).Received(); got != size {
			t.Errorf("Received is %d", got)
		}
		c.CloseAndWait(t.Context())
	})
	client := s.dial(t, ChannelV5)
	readMessage(t, client, Stdout)
	for range size / (16 << 10) {
		if err := client.WriteMessage(websocket.BinaryMessage, make([]byte, 1+16<<10)); err != nil {
			t.Fatal(err)
		}
	}
	client.WriteMessage(websocket.BinaryMessage, []byte{halfClose, Stdin})
	client.WriteMessage(websocket.BinaryMessage, append([]byte{Resize}, "{}"...))
	select {
	case got := <-resized:
		if got != "{}" {
			t.Errorf("resize is %q", got)
		}
	case <-time.After(patience):
		t.Error("the resize waits behind stdin")
	}
	close(proceed)
	if _, _, err := client.ReadMessage(); !websocket.IsCloseError(err, CloseNormal) {
		t.Errorf("the end: %v", err)
	}
	if err := s.waitEnded(t); err != nil {
		t.Errorf("Serve: %v", err)
	}
}

// blockStdin sends stdin until the server accepts no more. It reads what arrives meanwhile.
func blockStdin(t *testing.T, client *net.TCPConn) {
	t.Helper()
	message := clientFrame(frames.OpBinary, true, "\x00"+strings.Repeat("x", 32<<10))
	for {
		client.SetWriteDeadline(time.Now().Add(300 * time.Millisecond))
		if _, err := client.Write(message); errors.Is(err, os.ErrDeadlineExceeded) {
			return
		} else if err != nil {
			t.Fatalf("write stdin: %v", err)
		}
	}
}

// TestClientGoneBehindBlockedStdin checks that the read loop notices the client's FIN although the FIN waits in the
// client's kernel, behind stdin that the server does not read (kubernetes#89031).
func TestClientGoneBehindBlockedStdin(t *testing.T) {
	for _, protocol := range []Protocol{ChannelV4, ChannelV5} {
		config := execConfig()
		config.Budget, config.Patience = 128<<10, 2*time.Second
		s := newTestServer(t, config, untilDone)
		client := s.dialRaw(t, protocol)
		reading := make(chan struct{})
		go func() { // nothing may be unread when the client closes, or its kernel would send RST
			defer close(reading)
			io.Copy(io.Discard, client)
		}()
		blockStdin(t, client)
		client.SetReadDeadline(time.Now())
		<-reading
		client.Close()
		if err := s.waitEnded(t); err == nil {
			t.Errorf("%s: Serve took it for an orderly end", protocol)
		}
	}
}

// TestBudgetIsKept checks that unread data is not kept beyond the budget, in however many channels it is.
func TestBudgetIsKept(t *testing.T) {
	config := Config{Channels: []Direction{Read, Read, Read, Read}, Budget: 256 << 10, ChannelBuffer: 1 << 20}
	blocked := make(chan struct{})
	s := newTestServer(t, config, func(c *ChannelConn) {
		<-blocked
		var total int64
		for i := range byte(4) {
			total += c.Channel(i).Received()
		}
		if total > int64(config.Budget) {
			t.Errorf("%d bytes were taken in, the budget is %d", total, config.Budget)
		}
		c.CloseNow()
	})
	client := s.dialRaw(t, ChannelV4)
	for i := range 4 {
		client.Write(clientFrame(frames.OpBinary, true, string(rune(i))+strings.Repeat("x", 1000)))
	}
	blockStdin(t, client)
	close(blocked)
	if err := s.waitEnded(t); !errors.Is(err, ErrClosed) {
		t.Errorf("Serve: %v", err)
	}
}

// TestCloseReadUnblocks checks that data nobody wants any more neither blocks the connection nor uses up its budget.
func TestCloseReadUnblocks(t *testing.T) {
	config := execConfig()
	config.Budget = 64 << 10
	s := newTestServer(t, config, func(c *ChannelConn) {
		waiting := make(chan error)
		go func() {
			_, err := c.Channel(Resize).Read(make([]byte, 1))
			waiting <- err
		}()
		c.Channel(Stdin).Read(make([]byte, 1))
		c.Channel(Stdin).CloseRead()
		c.Channel(Resize).Reset()
		if err := <-waiting; err == nil {
			t.Error("a Read after Reset returned no error")
		}
		<-c.Done()
	})
	client := s.dial(t, ChannelV5)
	for range 100 {
		if err := client.WriteMessage(websocket.BinaryMessage, make([]byte, 32<<10)); err != nil {
			t.Fatal(err)
		}
	}
	client.WriteControl(websocket.CloseMessage, websocket.FormatCloseMessage(CloseNormal, ""), time.Now().Add(patience))
	if err := s.waitEnded(t); err != nil {
		t.Errorf("Serve: %v", err)
	}
}

// TestCloseIsBounded checks that Close returns although a writer is blocked by a client that does not read.
func TestCloseIsBounded(t *testing.T) {
	s := newTestServer(t, execConfig(), func(c *ChannelConn) {
		stuck := make(chan error)
		go func() {
			for {
				if _, err := c.Channel(Stdout).Write(make([]byte, 1<<20)); err != nil {
					stuck <- err
					return
				}
			}
		}()
		for last := int64(-1); c.Channel(Stdout).Sent() != last; { // until the writer is blocked
			last = c.Channel(Stdout).Sent()
			time.Sleep(200 * time.Millisecond)
		}
		if err := c.Ping(); err != nil {
			t.Errorf("Ping: %v", err)
		}
		if err := c.Close(CloseGoingAway, "bye"); err == nil {
			t.Error("Close behind a stuck writer returned no error")
		}
		if err := <-stuck; !errors.Is(err, ErrClosed) {
			t.Errorf("the stuck writer got %v", err)
		}
	})
	client := s.dialRaw(t, ChannelV4)
	if err := s.waitEnded(t); !errors.Is(err, ErrClosed) {
		t.Errorf("Serve: %v", err)
	}
	client.Close()
}

func TestServeEndsWithItsContext(t *testing.T) {
	accepted := make(chan *ChannelConn, 1)
	ctx, cancel := context.WithCancel(context.Background())
	served := make(chan error, 1)
	s := newTestServer(t, execConfig(), untilDone)
	s.Config.Handler = http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		c, err := Accept(w, r, ChannelV4, execConfig())
		if err != nil {
			t.Error(err)
			return
		}
		accepted <- c
		served <- c.Serve(ctx)
	})
	s.dialRaw(t, ChannelV4)
	c := <-accepted
	cancel()
	if err := <-served; !errors.Is(err, ErrClosed) {
		t.Errorf("Serve: %v", err)
	}
	c.CloseNow()
	if err := c.Ping(); !errors.Is(err, ErrClosed) {
		t.Errorf("Ping after the end: %v", err)
	}
}

func TestServerPing(t *testing.T) {
	s := newTestServer(t, execConfig(), func(c *ChannelConn) {
		c.Ping()
		<-c.Done()
	})
	client := s.dialRaw(t, ChannelV4)
	client.SetReadDeadline(time.Now().Add(patience))
	for {
		frame, err := readFrame(client)
		if err != nil {
			t.Fatal(err)
		}
		if frame.opcode == frames.OpPing {
			break
		}
	}
	client.Close()
	if err := s.waitEnded(t); !errors.Is(err, io.ErrUnexpectedEOF) {
		t.Errorf("Serve: %v", err)
	}
}

func TestWriteSides(t *testing.T) {
	s := newTestServer(t, execConfig(), func(c *ChannelConn) {
		stdout := c.Channel(Stdout)
		if err := stdout.CloseWrite(); err != nil {
			t.Errorf("CloseWrite: %v", err)
		}
		if _, err := stdout.Write([]byte("x")); !errors.Is(err, errWriteClosed) {
			t.Errorf("Write after CloseWrite: %v", err)
		}
		if _, err := stdout.ReadFrom(strings.NewReader("x")); !errors.Is(err, errWriteClosed) {
			t.Errorf("ReadFrom after CloseWrite: %v", err)
		}
		if _, err := c.Channel(Stdin).Write([]byte("x")); !errors.Is(err, errWriteClosed) {
			t.Errorf("Write on stdin: %v", err)
		}
		if c.Channel(5) != nil {
			t.Error("there is a channel 5")
		}
		io.WriteString(c.Channel(Stderr), "still open")
		c.CloseAndWait(t.Context())
		if _, err := c.Channel(Stderr).Write([]byte("x")); err == nil {
			t.Error("Write after CloseAndWait succeeded")
		}
	})
	client := s.dial(t, ChannelV5)
	readMessage(t, client, Stdout)
	// Nothing, not even [255, 1], may come before this: client-go would take it for an unknown channel.
	if got := readMessage(t, client, Stderr); got != "still open" {
		t.Errorf("got %q", got)
	}
	if _, _, err := client.ReadMessage(); !websocket.IsCloseError(err, CloseNormal) {
		t.Errorf("the end: %v", err)
	}
	s.waitEnded(t)
}

// TestLargeWrites sends in all ways, over TCP and TLS, in binary and base64.
func TestLargeWrites(t *testing.T) {
	payload := make([]byte, 1<<20+17)
	rand.NewChaCha8([32]byte{2}).Read(payload)
	ways := map[string]func(*Channel) error{
		"Write": func(ch *Channel) error {
			_, err := ch.Write(payload)
			return err
		},
		"ReadFrom a reader": func(ch *Channel) error {
			_, err := ch.ReadFrom(bytes.NewReader(payload))
			return err
		},
		"ReadFrom a pipe": func(ch *Channel) error {
			r, w, err := os.Pipe()
			if err != nil {
				return err
			}
			defer r.Close()
			go func() {
				defer w.Close()
				w.Write(payload)
			}()
			_, err = ch.ReadFrom(r)
			return err
		},
	}
	for name, way := range ways {
		for _, protocol := range []Protocol{ChannelV4, ChannelV4Base64} {
			for _, scheme := range []string{"ws", "wss"} {
				t.Run(fmt.Sprintf("%s/%s/%s", name, protocol, scheme), func(t *testing.T) {
					plain := newTestServer(t, execConfig(), func(c *ChannelConn) {
						if err := way(c.Channel(Stdout)); err != nil {
							t.Errorf("write: %v", err)
						}
						c.CloseAndWait(t.Context())
					})
					address := plain.URL
					dialer := websocket.Dialer{Subprotocols: []string{string(protocol)}}
					if scheme == "wss" {
						secure, config := newTLSServer(t, plain)
						address, dialer.TLSClientConfig = secure.URL, config
					}
					client, _, err := dialer.Dial(scheme+address[strings.Index(address, ":"):], nil)
					if err != nil {
						t.Fatal(err)
					}
					defer client.Close()
					client.SetReadLimit(frames.MaxMessage) // the strictest limit of all clients
					client.SetReadDeadline(time.Now().Add(patience))
					var got []byte
					for {
						_, message, err := client.ReadMessage()
						if err != nil {
							if !websocket.IsCloseError(err, CloseNormal) {
								t.Errorf("the end: %v", err)
							}
							break
						}
						piece := message[1:]
						if protocol.Base64() {
							piece, err = base64.StdEncoding.DecodeString(string(piece))
							if err != nil {
								t.Fatal(err)
							}
						}
						got = append(got, piece...)
					}
					if !bytes.Equal(got, payload) {
						t.Errorf("%d of %d bytes arrived, or others", len(got), len(payload))
					}
					plain.waitEnded(t)
				})
			}
		}
	}
}

// TestReadFromEndsWithTheTerminal checks the end of a pseudo-terminal, whose master returns EIO where a pipe returns EOF.
func TestReadFromEndsWithTheTerminal(t *testing.T) {
	s := newTestServer(t, execConfig(), func(c *ChannelConn) {
		master, terminal, err := pty.Open()
		if err != nil {
			t.Error(err)
			return
		}
		defer master.Close()
		io.WriteString(terminal, "$ ")
		finished := make(chan error)
		go func() {
			n, err := c.Channel(Stdout).ReadFrom(master)
			if n != 2 {
				t.Errorf("%d bytes from the terminal", n)
			}
			finished <- err
		}()
		for c.Channel(Stdout).Sent() == 0 && c.Err() == nil {
			runtime.Gosched()
		}
		terminal.Close()
		if err := <-finished; err != nil {
			t.Errorf("ReadFrom: %v", err)
		}
		c.CloseAndWait(t.Context())
	})
	client := s.dial(t, ChannelV5)
	readMessage(t, client, Stdout)
	if got := readMessage(t, client, Stdout); got != "$ " {
		t.Errorf("got %q", got)
	}
	client.ReadMessage()
	s.waitEnded(t)
}

// reopenable is the master of a terminal that waits until the other end is opened again.
type reopenable struct {
	*os.File
	asked, reopened chan struct{}
}

func (r *reopenable) Read(p []byte) (int, error) {
	r.asked <- struct{}{}
	<-r.reopened
	return r.File.Read(p)
}

// TestReadFromReopenedTerminal checks a command that closes its terminal and opens /dev/tty again. Only the reader decides
// whether that may happen.
func TestReadFromReopenedTerminal(t *testing.T) {
	for _, protocol := range []Protocol{ChannelV5, ChannelV4Base64} {
		s := newTestServer(t, execConfig(), func(c *ChannelConn) {
			master, terminal, err := pty.Open()
			if err != nil {
				t.Error(err)
				return
			}
			defer master.Close()
			source := &reopenable{master, make(chan struct{}), make(chan struct{})}
			finished := make(chan error)
			go func() {
				n, err := c.Channel(Stdout).ReadFrom(source)
				if n != 10 {
					t.Errorf("%d bytes from the terminal", n)
				}
				finished <- err
			}()
			for i, text := range []string{"first", "again"} {
				if i > 0 {
					if terminal, err = os.OpenFile(terminal.Name(), os.O_RDWR, 0); err != nil {
						t.Error(err)
					}
				}
				io.WriteString(terminal, text)
				if i > 0 {
					source.reopened <- struct{}{}
				}
				for c.Channel(Stdout).Sent() < int64(5*(i+1)) && c.Err() == nil {
					runtime.Gosched()
				}
				terminal.Close()
				<-source.asked
			}
			close(source.reopened) // now it returns EIO itself
			if err := <-finished; err != nil {
				t.Errorf("ReadFrom: %v", err)
			}
			c.CloseAndWait(t.Context())
		})
		client := s.dial(t, protocol)
		go func() {
			for {
				if _, _, err := client.ReadMessage(); err != nil {
					return
				}
			}
		}()
		s.waitEnded(t)
	}
}

func TestReadFromFileErrors(t *testing.T) {
	s := newTestServer(t, execConfig(), func(c *ChannelConn) {
		defer c.CloseNow()
		r, w, err := os.Pipe()
		if err != nil {
			t.Error(err)
			return
		}
		defer w.Close()
		finished := make(chan error)
		go func() {
			_, err := c.Channel(Stdout).ReadFrom(r)
			finished <- err
		}()
		r.Close()
		if err := <-finished; !errors.Is(err, os.ErrClosed) {
			t.Errorf("a pipe closed under ReadFrom: %v", err)
		}
		directory, err := os.Open(t.TempDir())
		if err != nil {
			t.Error(err)
			return
		}
		defer directory.Close()
		if _, err := c.Channel(Stdout).ReadFrom(directory); !errors.Is(err, syscall.EISDIR) {
			t.Errorf("ReadFrom of a directory: %v", err)
		}
	})
	s.dialRaw(t, ChannelV4)
	s.waitEnded(t)
}

// TestClientVanishesAtAnyByte cuts the client's side after every byte of a session, the handshake included, and checks that
// nothing is left.
func TestClientVanishesAtAnyByte(t *testing.T) {
	s := newTestServer(t, execConfig(), echo)
	var wire []byte
	wire = fmt.Appendf(wire, rawHandshake, s.Listener.Addr(), ChannelV5)
	head := len(wire)
	wire = append(wire, clientFrame(frames.OpBinary, true, "\x00hello, this is stdin")...)
	wire = append(wire, clientFrame(frames.OpPing, true, "ping")...)
	wire = append(wire, clientFrame(frames.OpBinary, false, "\x04{\"Width\"")...)
	wire = append(wire, clientFrame(0, true, ":80}")...)
	wire = append(wire, clientFrame(frames.OpBinary, true, "\xff\x00")...)
	wire = append(wire, clientFrame(frames.OpClose, true, "\x03\xe8")...)
	for cut := head - 3; cut <= len(wire); cut++ {
		for _, reset := range []bool{false, true} {
			client := s.dialTCP(t)
			if reset {
				client.SetLinger(0)
			}
			client.Write(wire[:cut])
			if cut >= head {
				skipHead(t, client)
			}
			client.Close()
			if cut >= head {
				s.waitEnded(t)
			}
		}
	}
	s.CloseClientConnections()
	if err := goleak.Find(goleak.IgnoreCurrent()); err != nil {
		t.Error(err)
	}
}

// FuzzServe sends arbitrary bytes after the handshake. Whatever they are, the connection must end, in order or not, when
// the client has sent them all.
func FuzzServe(f *testing.F) {
	for _, seed := range [][]byte{
		nil,
		clientFrame(frames.OpBinary, true, "\x00hello"),
		append(clientFrame(frames.OpBinary, false, "\xff"), clientFrame(0, true, "\x00")...),
		append(clientFrame(frames.OpPing, true, "p"), clientFrame(frames.OpClose, true, "\x03\xe8")...),
		{0x82, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0, 0, 0, 0},
		{0x82, 0xFE, 0xFF, 0xFF, 1, 2, 3, 4, 5},
		{0xFF, 0xFF},
	} {
		f.Add(true, seed)
		f.Add(false, seed)
	}
	s := newTestServer(f, execConfig(), echo)
	f.Fuzz(func(t *testing.T, base64 bool, wire []byte) {
		protocol := ChannelV5
		if base64 {
			protocol = ChannelV4Base64
		}
		client := s.dialRaw(t, protocol)
		client.Write(wire)
		client.CloseWrite()
		client.SetReadDeadline(time.Now().Add(patience))
		io.Copy(io.Discard, client)
		client.Close()
		s.waitEnded(t)
	})
}

// TestClientVanishesDuringOutput cuts the client's side after more and more of the server's bytes.
func TestClientVanishesDuringOutput(t *testing.T) {
	s := newTestServer(t, execConfig(), func(c *ChannelConn) {
		stdout := c.Channel(Stdout)
		for {
			if _, err := stdout.Write(make([]byte, 100<<10)); err != nil {
				<-c.Done()
				return
			}
		}
	})
	for size := int64(1); size < 8<<20; size *= 3 {
		client := s.dialRaw(t, ChannelV4)
		io.CopyN(io.Discard, client, size)
		client.Close()
		s.waitEnded(t)
	}
}

// TestEndOfConnectionAfterClose checks that a client of a protocol without half-close sees the end of the connection soon
// after our Close, even if it does not answer. What it sends afterwards is still read, so it gets no reset. A client of v5
// closes itself.
func TestEndOfConnectionAfterClose(t *testing.T) {
	for protocol, ends := range map[Protocol]bool{ChannelV4: true, ChannelUnnamed: true, ChannelV5: false} {
		t.Run(string(protocol), func(t *testing.T) {
			s := newTestServer(t, execConfig(), func(c *ChannelConn) {
				io.WriteString(c.Channel(Error), "status")
				c.CloseAndWait(t.Context())
			})
			client := s.dialRaw(t, protocol)
			limit := 4 * closedQuiet // for what must not come
			if ends {
				limit = patience
			}
			client.SetReadDeadline(time.Now().Add(limit))
			if _, err := io.Copy(io.Discard, client); (err == nil) != ends {
				t.Fatalf("reading ended with %v", err)
			}
			for range 10 {
				if _, err := client.Write(clientFrame(frames.OpPing, true, "p")); err != nil {
					t.Fatal(err)
				}
				time.Sleep(10 * time.Millisecond) // time for a reset to arrive
			}
			client.Write(clientFrame(frames.OpClose, true, "\x03\xe8"))
		})
	}
}
