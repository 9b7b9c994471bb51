package streaming

import (
	"bytes"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"k8s.io/client-go/tools/remotecommand"

	"github.com/moby/spdystream/spdy"

	"github.com/streamshim/streamshim/pkg/workload"
)

// roughNetwork leads the URL through a network that splits, joins and delays what it carries.
func roughNetwork(t *testing.T, u *url.URL) {
	t.Helper()
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	target := u.Host
	u.Host = listener.Addr().String()
	var copies sync.WaitGroup
	copies.Go(func() {
		for n := uint64(0); ; n++ {
			client, err := listener.Accept()
			if err != nil {
				return
			}
			server, err := net.Dial("tcp", target)
			if err != nil {
				client.Close()
				return
			}
			for i, way := range [][2]net.Conn{{client, server}, {server, client}} {
				random := rand.New(rand.NewPCG(seed, 2*n+uint64(i)))
				copies.Go(func() { carryRoughly(way[0], way[1], random) })
			}
		}
	})
	t.Cleanup(func() {
		listener.Close()
		copies.Wait()
	})
}

func carryRoughly(to, from net.Conn, random *rand.Rand) {
	defer to.Close()
	defer from.Close()
	buffer := make([]byte, 128<<10)
	for {
		filled, err := 0, error(nil)
		want := 1 + random.IntN(len(buffer)) // wait a little for this much, so that writes are joined
		for filled < want && err == nil {
			from.SetReadDeadline(time.Now().Add(time.Duration(random.IntN(5)+1) * time.Millisecond))
			if filled == 0 {
				from.SetReadDeadline(time.Time{})
			}
			var n int
			n, err = from.Read(buffer[filled:want])
			filled += n
		}
		for rest := buffer[:filled]; len(rest) > 0; {
			n := len(rest)
			switch random.IntN(4) {
			case 0:
				n = min(n, 1+random.IntN(16))
			case 1:
				n = min(n, 1+random.IntN(4<<10))
			}
			if _, err := to.Write(rest[:n]); err != nil {
				return
			}
			rest = rest[n:]
			if random.IntN(64) == 0 {
				time.Sleep(time.Duration(random.IntN(3)) * time.Millisecond)
			}
		}
		if netErr, ok := err.(net.Error); err != nil && !(ok && netErr.Timeout()) {
			return
		}
	}
}

// TestExecOverRoughNetwork checks that an exec loses nothing, whatever the network does to its frames.
func TestExecOverRoughNetwork(t *testing.T) {
	forEachTransport(t, func(t *testing.T, transport string) {
		s := startServer(t, Config{})
		input := bytes.Repeat([]byte("some input that is no round number of bytes\n"), 40_000)
		var stdout, stderr bytes.Buffer
		options := remotecommand.StreamOptions{Stdin: bytes.NewReader(input), Stdout: &stdout, Stderr: &stderr}
		u := s.execURL(&hostExecutor{t: t}, options, "sh", "-c", "cat; echo done >&2; exit 7")
		roughNetwork(t, u)
		err := stream(t.Context(), t, transport, u, options)
		if got := exitCode(t, err); got != 7 || !bytes.Equal(stdout.Bytes(), input) || stderr.String() != "done\n" {
			t.Errorf("exit code %d, %d bytes of %d, stderr %q", got, stdout.Len(), len(input), &stderr)
		}
	})
}

// TestPortForwardOverRoughNetwork checks the same for a port-forward.
func TestPortForwardOverRoughNetwork(t *testing.T) {
	forEachTransport(t, func(t *testing.T, transport string) {
		s := startServer(t, Config{})
		port := pod(t, func(c *net.TCPConn) {
			io.Copy(c, c)
			c.CloseWrite()
		})
		f := s.portForwardThrough(t, func(u *url.URL) { roughNetwork(t, u) }, transport, port)
		var clients sync.WaitGroup
		for i := range 8 {
			clients.Go(func() {
				sent := strings.Repeat(strconv.Itoa(i), 200_000+i)
				conn := f.dial(port)
				go func() {
					io.WriteString(conn, sent)
					conn.CloseWrite()
				}()
				if got, err := io.ReadAll(conn); string(got) != sent {
					t.Errorf("connection %d: %d bytes of %d, %v", i, len(got), len(sent), err)
				}
			})
		}
		clients.Wait()
		f.alive()
	})
}

// sentBytes collects what a client sends.
type sentBytes struct{ bytes.Buffer }

func (r *sentBytes) Read([]byte) (int, error) { return 0, io.EOF }

// record returns what a client sends after the head of its request.
func record(t *testing.T, speak func(c *rawClient)) []byte {
	var wire sentBytes
	speak(newRawClient(t, nil, &wire))
	return wire.Bytes()
}

// cutAnywhere sends a client's part of a session up to each of its bytes and then ends the connection, alternately with FIN
// and RST. Before the end it calls sent with the number of bytes after the upgrade, and afterwards check, which looks at
// what is left of the session.
func cutAnywhere(t *testing.T, s *testServer, u func() *url.URL, head func(*url.URL) []byte, body []byte, sent, check func(cut int)) {
	t.Helper()
	length := len(head(u())) + len(body)
	for cut := 1; cut <= length; cut++ {
		target := u()
		wire := append(head(target), body...)
		conn, err := net.Dial("tcp", target.Host)
		if err != nil {
			t.Fatal(err)
		}
		if cut > len(wire)-len(body) { // the head is complete, so wait for the upgrade, after which there is a session
			conn.Write(wire[:len(wire)-len(body)])
			readHead(t, conn)
			conn.Write(wire[len(wire)-len(body) : min(cut, len(wire))])
			sent(min(cut, len(wire)) - (len(wire) - len(body)))
		} else {
			conn.Write(wire[:cut])
		}
		if cut%2 == 0 {
			conn.(*net.TCPConn).SetLinger(0)
		}
		conn.Close()
		eventually(t, fmt.Sprintf("the end of the session cut at byte %d of %d", cut, length), func() bool {
			return len(s.config.Sessions.List()) == 0
		})
		check(cut)
	}
}

// readHead reads the head of the answer byte by byte, and nothing after it.
func readHead(t *testing.T, conn net.Conn) {
	t.Helper()
	conn.SetDeadline(time.Now().Add(testTimeout))
	var head []byte
	for b := make([]byte, 1); !bytes.HasSuffix(head, []byte("\r\n\r\n")); head = append(head, b...) {
		if _, err := io.ReadFull(conn, b); err != nil {
			t.Fatalf("%v after %q", err, head)
		}
	}
}

// TestExecCutAnywhere checks that an exec that is cut anywhere ends, that its process is told, and that nothing is left.
func TestExecCutAnywhere(t *testing.T) {
	opened := map[string]int{ // bytes after which the command starts
		"SPDY": len(record(t, func(c *rawClient) {
			c.remoteCommandStreams(streamTypeError, streamTypeStdin, streamTypeStdout, streamTypeResize)
		})),
	}
	bodies := map[string][]byte{
		"SPDY": record(t, func(c *rawClient) {
			ids := c.remoteCommandStreams(streamTypeError, streamTypeStdin, streamTypeStdout, streamTypeResize)
			c.send(ids[streamTypeResize], `{"Width":80,"Height":24}`, false)
			c.send(ids[streamTypeStdin], "hello", false)
			c.ping()
			c.send(ids[streamTypeStdin], "", true)
			c.write(&spdy.GoAwayFrame{})
		}),
		"WebSocket": bytes.Join([][]byte{
			maskedMessage("\x04{\"Width\":80,\"Height\":24}"), maskedMessage("\x00hello"), {0x89, 0x80, 0, 0, 0, 0},
			maskedMessage("\xff\x00"), {0x88, 0x82, 0, 0, 0, 0, 0x03, 0xe8},
		}, nil),
	}
	heads := map[string]func(*url.URL) []byte{
		"SPDY":      func(u *url.URL) []byte { return upgradeRequest(http.MethodPost, u, spdyLines("v4.channel.k8s.io")...) },
		"WebSocket": func(u *url.URL) []byte { return upgradeWebSocket(u, "v5.channel.k8s.io") },
	}
	forEachTransport(t, func(t *testing.T, transport string) {
		s := startServer(t, Config{Commands: commandConfig{Waits: commandWaits{FirstSize: time.Millisecond}}})
		var mu sync.Mutex
		var started, told int
		executor := executorFunc(func(workload.Command) (remoteProcess, error) {
			mu.Lock()
			defer mu.Unlock()
			started++
			p, err := newIdleProcess()
			if err == nil {
				p.disconnectedBy = func() { mu.Lock(); told++; mu.Unlock() }
			}
			return p, err
		})
		options := remotecommand.StreamOptions{Stdin: strings.NewReader(""), Stdout: io.Discard, Tty: true}
		isStarted := func() bool {
			mu.Lock()
			defer mu.Unlock()
			return started > told
		}
		cutAnywhere(t, s, func() *url.URL { return s.execURL(executor, options, "cat") }, heads[transport], bodies[transport], func(sent int) {
			// Some clients wait for the start: on a busy machine all others may leave before it.
			if sent >= opened[transport] && sent%3 == 0 {
				eventually(t, "the command's start", isStarted)
			}
		}, func(cut int) {
			mu.Lock()
			defer mu.Unlock()
			if started != told {
				t.Fatalf("cut at %d: of %d processes %d were told", cut, started, told)
			}
		})
		if started < 5 {
			t.Errorf("only %d processes were started", started)
		}
	})
}

// TestPortForwardCutAnywhere checks the same for a port-forward and its connections into the pod.
func TestPortForwardCutAnywhere(t *testing.T) {
	s := startServer(t, Config{})
	var open atomic.Int32
	port := pod(t, func(c *net.TCPConn) {
		open.Add(1)
		defer open.Add(-1)
		io.Copy(c, c)
	})
	body := record(t, func(c *rawClient) {
		data, _ := c.openPair(strconv.Itoa(port), "1")
		c.send(data, "abc", false)
		c.ping()
		c.send(data, "", true)
		data, _ = c.openPair(strconv.Itoa(port), "2")
		c.send(data, "abc", false)
		c.reset(data)
		c.write(&spdy.GoAwayFrame{})
	})
	head := func(u *url.URL) []byte { return upgradeRequest(http.MethodPost, u, spdyLines(portForwardProtocol)...) }
	cutAnywhere(t, s, func() *url.URL { return s.portForwardURL(make(chan struct{})) }, head, body, func(int) {}, func(cut int) {
		eventually(t, fmt.Sprintf("the end of the pod's connections after a cut at byte %d", cut), func() bool { return open.Load() == 0 })
	})
}
