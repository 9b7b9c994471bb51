package streaming

import (
	"context"
	"errors"
	"io"
	"net"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"testing"

	"github.com/moby/spdystream/spdy"
	"k8s.io/client-go/tools/remotecommand"

	podforward "github.com/streamshim/streamshim/pkg/portforward"
	"github.com/streamshim/streamshim/pkg/workload"
)

// TestUpgradeVariants checks every way in which clients have asked for their protocol, with GET and with POST.
func TestUpgradeVariants(t *testing.T) {
	s := startServer(t, Config{})
	for _, test := range []struct {
		name     string
		lines    []string
		code     int
		protocol string
	}{
		{"one line each", spdyLines("v4.channel.k8s.io", "v3.channel.k8s.io"), 101, "v4.channel.k8s.io"},
		{"one line", spdyLines("v4.channel.k8s.io, v3.channel.k8s.io,v2.channel.k8s.io"), 101, "v4.channel.k8s.io"},
		{"v5 first", spdyLines("v5.channel.k8s.io", "v4.channel.k8s.io", "v3.channel.k8s.io"), 101, "v4.channel.k8s.io"},
		{"v5 first in one line", spdyLines("v5.channel.k8s.io,v4.channel.k8s.io"), 101, "v4.channel.k8s.io"},
		{"client's preference", spdyLines("v2.channel.k8s.io", "v4.channel.k8s.io"), 101, "v2.channel.k8s.io"},
		{"v1", spdyLines("channel.k8s.io"), 101, "channel.k8s.io"},
		{"empty version", spdyLines(""), 101, ""},
		{"no version", spdyLines(), 400, ""},
		{"unknown version", spdyLines("v9.channel.k8s.io"), 403, ""},
		{"only v5", spdyLines("v5.channel.k8s.io"), 403, ""},
		{"lower case", []string{"connection: upgrade", "upgrade: spdy/3.1", "x-stream-protocol-version: v4.channel.k8s.io"}, 101, "v4.channel.k8s.io"},
		{"more in Connection", []string{"Connection: keep-alive, Upgrade", "Upgrade: SPDY/3.1", "X-Stream-Protocol-Version: v4.channel.k8s.io"}, 101, "v4.channel.k8s.io"},
		{"no upgrade", []string{"X-Stream-Protocol-Version: v4.channel.k8s.io"}, 400, ""},
		{"another upgrade", []string{"Connection: Upgrade", "Upgrade: h2c", "X-Stream-Protocol-Version: v4.channel.k8s.io"}, 400, ""},
	} {
		for _, method := range []string{http.MethodGet, http.MethodPost} {
			t.Run(test.name+"/"+method, func(t *testing.T) {
				u := s.execURL(&hostExecutor{t: t}, remotecommand.StreamOptions{Stdout: io.Discard}, "echo", "hello")
				c := dialRaw(t, u, upgradeRequest(method, u, test.lines...))
				if c.response.StatusCode != test.code {
					t.Fatalf("answered %s", c.response.Status)
				}
				if test.code == http.StatusForbidden && len(c.response.Header.Values(headerAcceptedVersions)) == 0 {
					t.Error("the answer does not say what is spoken")
				}
				if test.code != http.StatusSwitchingProtocols {
					c.body()
					return
				}
				if got := c.response.Header.Get(headerProtocolVersion); got != test.protocol {
					t.Errorf("protocol %q, want %q", got, test.protocol)
				}
				ids := c.remoteCommandStreams(streamTypeError, streamTypeStdout)
				if got := c.finished(ids[streamTypeStdout]); got != "hello\n" {
					t.Errorf("output %q", got)
				}
			})
		}
	}
}

// TestStatusOfEachVersion checks the error stream of each version. From v4 on it has JSON after a space. Before v4 it has
// text, and nothing at success.
func TestStatusOfEachVersion(t *testing.T) {
	s := startServer(t, Config{})
	for _, version := range []string{"v4.channel.k8s.io", "v3.channel.k8s.io", "v2.channel.k8s.io", "channel.k8s.io", ""} {
		for code, want := range map[int][2]string{
			0: {`{"status":"Success"}`, ""},
			3: {
				`{"status":"Failure","message":"command terminated with non-zero exit code: 3","reason":"NonZeroExitCode","details":{"causes":[{"reason":"ExitCode","message":"3"}]}}`,
				"command terminated with non-zero exit code: 3",
			},
		} {
			t.Run(version+"/"+strconv.Itoa(code), func(t *testing.T) {
				u := s.execURL(&hostExecutor{t: t}, remotecommand.StreamOptions{Stdout: io.Discard}, "sh", "-c", "exit "+strconv.Itoa(code))
				c := dialRaw(t, u, upgradeRequest(http.MethodPost, u, spdyLines(version)...))
				ids := c.remoteCommandStreams(streamTypeError, streamTypeStdout)
				expected := want[1]
				if version == "v4.channel.k8s.io" {
					expected = " " + want[0] // see protocol.Version.PromiseStatus
				}
				if got := c.finished(ids[streamTypeError]); got != expected {
					t.Errorf("error stream %q, want %q", got, expected)
				}
			})
		}
	}
}

// TestStreamHeaderVariants checks stream headers as clients have written them. A name in capitals on the wire is a fault of
// the frame (draft, 2.6.10), a value in capitals is not.
func TestStreamHeaderVariants(t *testing.T) {
	s := startServer(t, Config{})
	options := remotecommand.StreamOptions{Stdin: strings.NewReader(""), Stdout: io.Discard, Stderr: io.Discard}
	for _, name := range []string{"streamtype", "streamType", "StreamType"} {
		for _, capital := range []bool{false, true} {
			u := s.execURL(&hostExecutor{t: t}, options, "cat")
			c := dialRaw(t, u, upgradeRequest(http.MethodPost, u, spdyLines("v4.channel.k8s.io")...))
			ids := map[string]spdy.StreamId{}
			for _, kind := range []string{streamTypeStderr, streamTypeStdout, streamTypeStdin, streamTypeError} {
				value := kind
				if capital {
					value = strings.ToUpper(kind[:1]) + kind[1:]
				}
				ids[kind] = c.open(name, value) // the framer writes names in lower case, as those of all clients do
			}
			c.send(ids[streamTypeStdin], "hello", false)
			c.send(ids[streamTypeStdin], "", true)
			if got := c.finished(ids[streamTypeStdout]); got != "hello" {
				t.Errorf("%s, capital=%v: output %q", name, capital, got)
			}
			if got := c.finished(ids[streamTypeError]); got != ` {"status":"Success"}` {
				t.Errorf("%s, capital=%v: status %q", name, capital, got)
			}
		}
	}
}

// TestTerminalBeforeResizing checks that a v2 client with a terminal, which opens no resize stream, is not waited for.
func TestTerminalBeforeResizing(t *testing.T) {
	s := startServer(t, Config{})
	options := remotecommand.StreamOptions{Stdin: strings.NewReader(""), Stdout: io.Discard, Tty: true}
	u := s.execURL(&hostExecutor{t: t}, options, "sh", "-c", "test -t 0 && echo terminal")
	c := dialRaw(t, u, upgradeRequest(http.MethodGet, u, spdyLines("v2.channel.k8s.io")...))
	ids := c.remoteCommandStreams(streamTypeError, streamTypeStdin, streamTypeStdout)
	if got := c.finished(ids[streamTypeStdout]); got != "terminal\r\n" {
		t.Errorf("output %q", got)
	}
}

// TestPortForwardWithoutRequestIDs checks clients before Kubernetes 1.2, which send no request IDs with their streams:
// stream ids find the pairs.
func TestPortForwardWithoutRequestIDs(t *testing.T) {
	s := startServer(t, Config{})
	port := pod(t, answer)
	for _, version := range []string{portForwardProtocol, "v1, " + portForwardProtocol} {
		u := s.portForwardURL(make(chan struct{}))
		c := dialRaw(t, u, upgradeRequest(http.MethodPost, u, spdyLines(version)...))
		if got := c.response.Header.Get(headerProtocolVersion); got != portForwardProtocol {
			t.Fatalf("protocol %q", got)
		}
		var pairs [][2]spdy.StreamId
		for range 3 {
			data, failure := c.openPair(strconv.Itoa(port), "")
			pairs = append(pairs, [2]spdy.StreamId{data, failure})
		}
		for _, pair := range pairs {
			c.send(pair[0], "abc", false)
			if got := c.finished(pair[0]); got != "answer to abc" {
				t.Errorf("answer %q", got)
			}
			c.send(pair[0], "", true)
			if got := c.finished(pair[1]); got != "" || c.streams[pair[1]].reset != 0 {
				t.Errorf("error stream %q, reset %v", got, c.streams[pair[1]].reset)
			}
		}
	}
}

// TestPortForwardOddStreams checks that nonsensical streams of a port-forward end alone.
func TestPortForwardOddStreams(t *testing.T) {
	s := startServer(t, Config{})
	port := pod(t, answer)
	u := s.portForwardURL(make(chan struct{}))
	c := dialForward(t, u, "SPDY")
	for name, headers := range map[string][]string{
		"no port":        {headerStreamType, streamTypeData, headerRequestID, "1"},
		"port 0":         {headerStreamType, streamTypeData, headerPort, "0", headerRequestID, "1"},
		"port too large": {headerStreamType, streamTypeData, headerPort, "65536", headerRequestID, "1"},
		"no type":        {headerPort, "80", headerRequestID, "1"},
		"unknown type":   {headerStreamType, "stdin", headerPort, "80", headerRequestID, "1"},
	} {
		id := c.open(headers...)
		c.finished(id)
		if c.streams[id].reset == 0 {
			t.Errorf("%s: not reset", name)
		}
	}
	first := c.open(headerStreamType, streamTypeData, headerPort, strconv.Itoa(port), headerRequestID, "2")
	second := c.open(headerStreamType, streamTypeData, headerPort, strconv.Itoa(port), headerRequestID, "2")
	if c.finished(second); c.streams[second].reset == 0 || c.streams[first].reset != 0 {
		t.Error("of two data streams for one connection not the second was reset")
	}
	data, _ := c.openPair(strconv.Itoa(port), "3")
	c.send(data, "abc", false)
	if got := c.finished(data); got != "answer to abc" {
		t.Errorf("answer %q", got)
	}
}

// TestProtocolOfAnotherKind checks that a port-forward with a remote command's protocol, or the other way round, is refused
// and leaves the token usable.
func TestProtocolOfAnotherKind(t *testing.T) {
	s := startServer(t, Config{})
	forward := s.portForwardURL(make(chan struct{}))
	run := s.execURL(&hostExecutor{t: t}, remotecommand.StreamOptions{Stdout: io.Discard}, "true")
	for _, test := range []struct {
		u        *url.URL
		protocol string
		code     int
	}{
		{forward, "v4.channel.k8s.io", 403}, {run, portForwardProtocol, 403},
		{forward, portForwardProtocol, 101}, {run, "v4.channel.k8s.io", 101},
	} {
		c := dialRaw(t, test.u, upgradeRequest(http.MethodPost, test.u, spdyLines(test.protocol)...))
		if c.response.StatusCode != test.code {
			t.Errorf("%s for %s: %s", test.protocol, test.u.Path, c.response.Status)
		}
		c.conn.Close()
	}
}

// TestErrorStreamEndsWithPodsEOF checks the error stream for clients up to Kubernetes 1.22, which after the pod's EOF
// neither close nor reset anything before the error stream has ended.
func TestErrorStreamEndsWithPodsEOF(t *testing.T) {
	forEachTransport(t, func(t *testing.T, transport string) {
		s := startServer(t, Config{})
		port := pod(t, answer)
		u := s.portForwardURL(make(chan struct{}))
		c := dialForward(t, u, transport)
		data, failure := c.openPair(strconv.Itoa(port), "1")
		c.send(data, "abc", false)
		if got := c.finished(data); got != "answer to abc" {
			t.Errorf("answer %q", got)
		}
		if got := c.finished(failure); got != "" || c.streams[failure].reset != 0 {
			t.Errorf("error stream %q, reset %v", got, c.streams[failure].reset)
		}
	})
}

// TestRefusedPortIsAcceptedThenReset checks that the data stream for a port on which nobody listens is accepted and then
// reset. If it were refused, client-go would keep a goroutine for ever.
func TestRefusedPortIsAcceptedThenReset(t *testing.T) {
	s := startServer(t, Config{})
	u := s.url(s.PortForward(s.podRequest(func() (forwarder, error) {
		f, err := podforward.NewForwarder("", podforward.Config{})
		return refuser{f}, err
	})))
	c := dialForward(t, u, "SPDY")
	for i := range 1000 {
		data, failure := c.openPair("80", strconv.Itoa(i))
		c.finished(data)
		if got := c.streams[data]; got.reset == 0 || !got.replied {
			t.Fatalf("data stream: replied %v, reset %v", got.replied, got.reset)
		}
		if got := c.finished(failure); got != "" {
			t.Fatalf("error stream %q", got)
		}
	}
}

// refuser is a pod on whose ports nobody listens. It refuses at once.
type refuser struct{ *podforward.Forwarder }

func (refuser) Forward(_ context.Context, _ uint16, stream workload.Stream) (sent, received int64, err error) {
	stream.Reset()
	return 0, 0, errors.New("refused")
}

// TestSandboxGoneIsSaidOnErrorStreams checks that when the pod ends, the error stream of every open connection says so. The
// data stream must be reset, so that kubectl reads the error stream.
func TestSandboxGoneIsSaidOnErrorStreams(t *testing.T) {
	s := startServer(t, Config{})
	port := strconv.Itoa(pod(t, func(c *net.TCPConn) { io.Copy(c, c) }))
	gone := make(chan struct{})
	u := s.portForwardURL(gone)
	c := dialForward(t, u, "SPDY")
	var pairs [][2]spdy.StreamId
	for i := range 3 {
		data, failure := c.openPair(port, strconv.Itoa(i))
		c.send(data, "x", false)
		c.until("the echo", func() bool { return len(c.streams[data].data) > 0 })
		pairs = append(pairs, [2]spdy.StreamId{data, failure})
	}
	close(gone)
	for _, pair := range pairs {
		if got := c.finished(pair[1]); got != errSandboxGone.Error() {
			t.Errorf("error stream %q", got)
		}
		if c.finished(pair[0]); c.streams[pair[0]].reset == 0 {
			t.Error("the data stream was not reset")
		}
	}
	c.conn.Close()
}
