package streaming

import (
	"crypto/sha256"
	"encoding/base64"
	"encoding/binary"
	"encoding/hex"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/gorilla/websocket"
	"github.com/moby/spdystream/spdy"
	"k8s.io/client-go/tools/remotecommand"

	"github.com/streamshim/streamshim/internal/testutil"
)

// The tests in this file check the table of ends in docs/protocols.md.

// channelClient is a client of the channel protocols that decides how its connection ends.
type channelClient struct {
	t        *testing.T
	protocol string
	ws       *websocket.Conn
	tcp      *net.TCPConn
	reading  sync.WaitGroup

	mu     sync.Mutex
	output map[byte][]byte // by channel
	ended  error           // of reading
}

func dialChannels(t *testing.T, u *url.URL, protocol string) *channelClient {
	t.Helper()
	return dialNumbered(t, u, protocol, true)
}

// dialNumbered is like dialChannels, for a server that greets, as for exec and attach, or does not.
func dialNumbered(t *testing.T, u *url.URL, protocol string, greeted bool) *channelClient {
	t.Helper()
	c := dialSilent(t, u, protocol)
	if greeted { // the greeting is an empty message; left unread, it would turn the close into a reset
		if _, _, err := c.ws.ReadMessage(); err != nil {
			t.Fatal(err)
		}
	}
	c.reading.Go(c.read)
	return c
}

// dialSilent returns a client that reads nothing until the test calls read.
func dialSilent(t *testing.T, u *url.URL, protocol string) *channelClient {
	t.Helper()
	dialer := websocket.Dialer{}
	if protocol != "" {
		dialer.Subprotocols = []string{protocol}
	}
	ws, response, err := dialer.Dial("ws://"+u.Host+u.Path, nil)
	if err != nil {
		t.Fatalf("%v: %+v", err, response)
	}
	response.Body.Close()
	ws.SetCloseHandler(func(int, string) error { return nil })
	c := &channelClient{t: t, protocol: protocol, ws: ws, tcp: ws.NetConn().(*net.TCPConn), output: map[byte][]byte{}}
	t.Cleanup(func() {
		ws.Close()
		c.reading.Wait()
	})
	return c
}

func (c *channelClient) base64() bool { return strings.Contains(c.protocol, "base64") }

// read reads everything, so that closing the socket does not reset the connection.
func (c *channelClient) read() {
	for {
		_, message, err := c.ws.ReadMessage()
		c.mu.Lock()
		if err != nil {
			c.ended = err
			c.mu.Unlock()
			return
		}
		if len(message) > 0 {
			channel, payload := message[0], message[1:]
			if c.base64() {
				payload, _ = base64.StdEncoding.DecodeString(string(payload))
				channel -= '0'
			}
			c.output[channel] = append(c.output[channel], payload...)
		}
		c.mu.Unlock()
	}
}

func (c *channelClient) on(channel byte) string {
	c.mu.Lock()
	defer c.mu.Unlock()
	return string(c.output[channel])
}

// awaitClose waits until reading has ended with the server's Close.
func (c *channelClient) awaitClose() {
	c.t.Helper()
	eventually(c.t, "the server's Close", func() bool {
		c.mu.Lock()
		defer c.mu.Unlock()
		return c.ended != nil
	})
}

func (c *channelClient) send(channel byte, data []byte) {
	c.t.Helper()
	for first := true; first || len(data) > 0; first = false {
		piece := data[:min(len(data), 1+rand.IntN(60_000))]
		data = data[len(piece):]
		kind, message := websocket.BinaryMessage, append([]byte{channel}, piece...)
		if c.base64() {
			kind, message = websocket.TextMessage, append([]byte{'0' + channel}, base64.StdEncoding.EncodeToString(piece)...)
		}
		if err := c.ws.WriteMessage(kind, message); err != nil {
			c.t.Fatal(err)
		}
	}
}

// closeFrame returns a Close with this code. 0 is no code.
func (c *channelClient) closeFrame(code int) {
	var payload []byte
	if code != 0 {
		payload = binary.BigEndian.AppendUint16(nil, uint16(code)) //nolint:gosec // a close code
	}
	c.ws.WriteControl(websocket.CloseMessage, payload, time.Now().Add(testTimeout)) //nolint:errcheck // seen by its effect
}

// end ends the connection in one of the ways of the table.
func (c *channelClient) end(how string) {
	switch how {
	case "Close 1000":
		c.closeFrame(1000)
	case "Close":
		c.closeFrame(0)
	case "Close 1000, socket closed":
		c.closeFrame(1000)
		c.tcp.Close()
	case "Close 1001":
		c.closeFrame(1001)
	case "Close 1011":
		c.closeFrame(1011)
	case "FIN":
		c.tcp.CloseWrite()
	case "socket closed":
		c.tcp.Close()
	case "FIN inside a message":
		begin := []byte{0x82, 0xfe, 0x10, 0x00, 0, 0, 0, 0, 0, 'x'}
		if c.base64() {
			begin[0], begin[8] = 0x81, '0'
		}
		c.tcp.Write(begin) //nolint:errcheck // as in closeFrame
		c.tcp.CloseWrite()
	case "RST":
		c.tcp.SetLinger(0)
		c.tcp.Close()
	case "half-close, Close 1000", "half-close, FIN", "half-close, socket closed":
		c.ws.WriteMessage(websocket.BinaryMessage, []byte{255, 0})
		c.end(strings.TrimPrefix(how, "half-close, "))
	default:
		c.t.Fatalf("no such end: %s", how)
	}
}

func sum(data []byte) string {
	s := sha256.Sum256(data)
	return hex.EncodeToString(s[:])
}

func randomBytes(size int) []byte {
	data := make([]byte, size)
	rand.NewChaCha8([32]byte{byte(size)}).Read(data) //nolint:errcheck // never fails
	return data
}

// upload is a command that writes its stdin to a file and, only after the end of its input, its sum to another.
type upload struct {
	t   *testing.T
	dir string
}

func newUpload(t *testing.T) upload { return upload{t, t.TempDir()} }

// args returns the command. It runs before, and then reads with read.
func (u upload) args(before, read string) []string {
	return []string{"sh", "-c", fmt.Sprintf("cd %s; %s; %s > up; sha256sum < up > whole.tmp; mv whole.tmp whole", u.dir, before, read)}
}

// received returns how many bytes have arrived.
func (u upload) received() int {
	data, _ := os.ReadFile(filepath.Join(u.dir, "up"))
	return len(data)
}

// whole returns the sum of what the command takes as the complete input. It is empty while the command waits for more.
func (u upload) whole() string {
	text, _ := os.ReadFile(filepath.Join(u.dir, "whole"))
	return strings.TrimSuffix(string(text), "  -\n")
}

var readers = map[string][2]string{
	"at once": {":", "cat"},
	"late":    {"sleep 1.5", "cat"},
	// Reads 32 KiB and then pauses.
	"slow": {":", "while dd bs=32k count=1 2>/dev/null | tee piece && test -s piece; do sleep 0.05; done"},
}

// TestInputArrivesWhole checks that what was sent before an orderly end of the client arrives completely, and that only
// complete input looks complete.
func TestInputArrivesWhole(t *testing.T) {
	testutil.Slow(t)
	ends := map[string][]string{
		"":                         {"Close 1000", "FIN"},
		"channel.k8s.io":           {"Close 1000", "Close"},
		"base64.channel.k8s.io":    {"Close 1000", "FIN"},
		"v4.base64.channel.k8s.io": {"Close 1000", "socket closed"},
		"v4.channel.k8s.io":        {"Close 1000", "Close", "FIN", "socket closed", "Close 1000, socket closed"},
		"v5.channel.k8s.io":        {"half-close, Close 1000", "half-close, FIN", "half-close, socket closed"},
		"SPDY":                     {"FIN, GOAWAY", "FIN, FIN", "FIN, socket closed"},
	}
	type reading struct {
		name string
		size int
	}
	const more = 5 << 20 // more than a connection with a small client buffer keeps
	runTogether(t, func(t *testing.T) {
		for protocol, ways := range ends {
			for _, way := range ways {
				for _, r := range []reading{
					{"at once", 1}, {"late", 1}, {"late", 32_000}, {"slow", 400_000}, {"late", 3_200_000}, {"at once", more}, {"late", more},
				} {
					if r.size > 4<<20 && way != ways[0] {
						continue // the ways differ in their end, not in their bytes
					}
					t.Run(fmt.Sprintf("%s/%s/%s/%d", protocol, way, r.name, r.size), func(t *testing.T) {
						t.Parallel()
						s, up, data := startServer(t, Config{Commands: commandConfig{InputGrace: 10 * time.Second}}), newUpload(t), randomBytes(r.size)
						executor := &hostExecutor{t: t}
						options := remotecommand.StreamOptions{Stdin: strings.NewReader(""), Stdout: io.Discard}
						u := s.execURL(executor, options, up.args(readers[r.name][0], readers[r.name][1])...)
						if protocol == "SPDY" {
							uploadOverSPDY(t, u, data, way)
						} else {
							client := dialChannels(t, u, protocol)
							narrowFor(client.tcp, data)
							client.send(0, data)
							client.end(way)
						}
						eventually(t, "the end of input", func() bool { return up.whole() != "" })
						if up.whole() != sum(data) {
							t.Errorf("%d bytes of %d arrived, or others", up.received(), len(data))
						}
						eventually(t, "the session's end", func() bool { return len(s.config.Sessions.List()) == 0 })
						select {
						case <-executor.last().disconnected:
							t.Error("a command that has ended was hung up")
						default:
						}
					})
				}
			}
		}
	})
}

// narrowFor makes the kernel keep little for a sender of much data, so that the sender waits for the reader.
func narrowFor(conn net.Conn, data []byte) {
	if len(data) > 4<<20 {
		conn.(*net.TCPConn).SetWriteBuffer(64 << 10) //nolint:errcheck // it only makes the test quicker
	}
}

// uploadOverSPDY sends stdin and ends the stream and the connection in one of these ways.
func uploadOverSPDY(t *testing.T, u *url.URL, data []byte, way string) {
	t.Helper()
	client := dialRaw(t, u, upgradeRequest(http.MethodPost, u, spdyLines("v4.channel.k8s.io")...))
	streams := client.remoteCommandStreams(streamTypeError, streamTypeStdin, streamTypeStdout)
	client.until("the reply", func() bool { return client.streams[streams[streamTypeStdout]].replied })
	streamEnd, connectionEnd, _ := strings.Cut(way, ", ")
	narrowFor(client.conn, data)
	for len(data) > 0 {
		n := min(len(data), 1+rand.IntN(60_000))
		client.send(streams[streamTypeStdin], string(data[:n]), n == len(data) && streamEnd == "FIN")
		data = data[n:]
	}
	client.end(connectionEnd)
}

// end ends the connection in one of these ways. Any other value closes the socket.
func (c *rawClient) end(way string) {
	tcp := c.conn.(*net.TCPConn)
	switch way {
	case "GOAWAY":
		c.write(&spdy.GoAwayFrame{})
		tcp.CloseWrite()
	case "FIN":
		tcp.CloseWrite()
	case "RST":
		tcp.SetLinger(0)
		tcp.Close()
	default:
		tcp.Close()
	}
}

// TestCutInputDoesNotLookWhole checks that the command gets input that was cut as far as it arrived, but sees no end of
// input before it is hung up.
func TestCutInputDoesNotLookWhole(t *testing.T) {
	testutil.Slow(t)
	runTogether(t, func(t *testing.T) {
		for protocol, ways := range map[string][]string{
			"v4.channel.k8s.io":        {"Close 1001", "Close 1011", "FIN inside a message", "RST"},
			"v4.base64.channel.k8s.io": {"Close 1011", "RST"},
			"v5.channel.k8s.io":        {"Close 1000", "Close 1001", "FIN", "socket closed", "RST"},
			"SPDY":                     {"open, GOAWAY", "open, FIN", "open, RST"},
		} {
			for _, way := range ways {
				t.Run(protocol+"/"+way, func(t *testing.T) {
					t.Parallel()
					s, up, data := startServer(t, Config{}), newUpload(t), randomBytes(300_000)
					executor := &hostExecutor{t: t}
					options := remotecommand.StreamOptions{Stdin: strings.NewReader(""), Stdout: io.Discard}
					u := s.execURL(executor, options, up.args("sleep 0.5; : > reads", "cat")...)
					if protocol == "SPDY" {
						uploadOverSPDY(t, u, data, way)
					} else {
						client := dialChannels(t, u, protocol)
						client.send(0, data)
						client.end(way)
					}
					left := time.Now()
					eventually(t, "the command's start", func() bool { return executor.count() == 1 || len(s.config.Sessions.List()) == 0 })
					if executor.count() == 0 { // the reset came first
						return
					}
					receive(t, executor.last().disconnected, "the command to be hung up")
					inOrder := !strings.HasSuffix(way, "RST") && !strings.HasSuffix(way, "1011")
					// On a busy machine the command may begin to read after it was given up.
					if reads, err := os.Stat(filepath.Join(up.dir, "reads")); err != nil || reads.ModTime().Sub(left) > time.Second {
						t.Logf("the machine is too busy to tell what is given to the command: %v", err)
					} else if inOrder && up.received() < len(data) {
						t.Errorf("%d bytes of %d arrived before the hang-up", up.received(), len(data))
					}
					eventually(t, "the session's end", func() bool { return len(s.config.Sessions.List()) == 0 })
					if up.whole() != "" {
						t.Error("the command took it for the whole input")
					}
				})
			}
		}
	})
}

// TestHangUpAfterInput checks that a command which does not end although it has all its input is hung up after
// Config.InputGrace, and so is one that reads nothing. That holds neither for a terminal nor for a command without input.
func TestHangUpAfterInput(t *testing.T) {
	testutil.Slow(t)
	runTogether(t, func(t *testing.T) {
		for _, test := range []struct {
			name, command string
			options       remotecommand.StreamOptions
			size          int
			waits         bool
		}{
			{"has everything", "cat > /dev/null; sleep 600", remotecommand.StreamOptions{Stdin: strings.NewReader("")}, 100_000, true},
			{"takes nothing", "sleep 600", remotecommand.StreamOptions{Stdin: strings.NewReader("")}, 2 << 20, true},
			{"no input", "sleep 600", remotecommand.StreamOptions{Stdout: io.Discard}, 0, false},
			{"terminal", "sleep 600", remotecommand.StreamOptions{Stdin: strings.NewReader(""), Stdout: io.Discard, Tty: true}, 10, false},
		} {
			t.Run(test.name, func(t *testing.T) {
				t.Parallel()
				grace := testTimeout // without the wait it takes less on any machine
				if test.waits {
					grace = time.Second
				}
				s := startServer(t, Config{Commands: commandConfig{InputGrace: grace}})
				executor := &hostExecutor{t: t}
				client := dialChannels(t, s.execURL(executor, test.options, "sh", "-c", test.command), "v4.channel.k8s.io")
				eventually(t, "the command's start", func() bool { return executor.count() == 1 })
				client.send(0, make([]byte, test.size))
				began := time.Now()
				client.end("Close 1000")
				receive(t, executor.last().disconnected, "the hang-up")
				if took := time.Since(began); (took >= grace) != test.waits {
					t.Errorf("hung up after %v", took)
				}
			})
		}
	})
}

// TestOutputOfAnUploadGoesNowhere checks that a command still reads its input when its client no longer reads its output:
// it must not end because of its output.
func TestOutputOfAnUploadGoesNowhere(t *testing.T) {
	s, up, data := startServer(t, Config{}), newUpload(t), randomBytes(100_000)
	options := remotecommand.StreamOptions{Stdin: strings.NewReader(""), Stdout: io.Discard}
	command := fmt.Sprintf("cd %s; sleep 0.5; tee up; sha256sum < up > whole.tmp; mv whole.tmp whole", up.dir)
	client := dialChannels(t, s.execURL(&hostExecutor{t: t}, options, "bash", "-o", "pipefail", "-c", command), "v4.channel.k8s.io")
	client.send(0, data)
	client.end("Close 1000, socket closed")
	eventually(t, "the end of input", func() bool { return up.whole() != "" })
	if up.whole() != sum(data) {
		t.Errorf("%d bytes of %d arrived, or others", up.received(), len(data))
	}
}

// TestUploadInOneBreath checks a client that sends everything in one write and leaves.
func TestUploadInOneBreath(t *testing.T) {
	testutil.Slow(t)
	s := startServer(t, Config{})
	for range 20 {
		up := newUpload(t)
		options := remotecommand.StreamOptions{Stdin: strings.NewReader(""), Stdout: io.Discard}
		u := s.execURL(&hostExecutor{t: t}, options, up.args(":", "cat")...)
		conn, err := net.Dial("tcp", u.Host)
		if err != nil {
			t.Fatal(err)
		}
		head := upgradeRequest(http.MethodGet, u, "Connection: Upgrade", "Upgrade: websocket", "Sec-WebSocket-Version: 13",
			"Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==", "Sec-WebSocket-Protocol: v4.channel.k8s.io")
		if _, err := conn.Write(append(head, "\x82\x85\x00\x00\x00\x00\x00data\x88\x82\x00\x00\x00\x00\x03\xe8"...)); err != nil {
			t.Fatal(err)
		}
		eventually(t, "the end of input", func() bool { return up.whole() == sum([]byte("data")) })
		conn.Close()
	}
}
