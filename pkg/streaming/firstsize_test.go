package streaming

import (
	"io"
	"net/http"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/moby/spdystream/spdy"
	"k8s.io/client-go/tools/remotecommand"

	"github.com/streamshim/streamshim/internal/testutil"
)

// TestClientWithoutASize checks that a client that sends no size is waited for only until it answers a ping or sends
// something else. A client that has done neither may be far away, behind a translator.
func TestClientWithoutASize(t *testing.T) {
	testutil.Slow(t)
	terminal := remotecommand.StreamOptions{Stdin: strings.NewReader(""), Stdout: io.Discard, Tty: true}
	handedOn := "X-Forwarded-For: 192.0.2.1, 192.0.2.2"
	for _, test := range []struct {
		name    string
		lines   []string
		input   bool
		pings   bool // the client answers pings
		waits   bool
		overWeb bool
	}{
		{name: "WebSocket", pings: true, overWeb: true},
		{name: "WebSocket, input first", input: true, overWeb: true},
		{name: "WebSocket, deaf", overWeb: true, waits: true},
		{name: "SPDY, handed on by API server and kubelet", lines: []string{handedOn}, pings: true},
		{name: "SPDY, maybe translated", pings: true, waits: true},
		{name: "SPDY, maybe translated, input first", input: true},
		{name: "SPDY, kubectl", lines: []string{handedOn, "Kubectl-Command: kubectl exec"}, pings: true, input: true, waits: true},
	} {
		t.Run(test.name, func(t *testing.T) {
			wait := testTimeout // without the wait it takes less on any machine
			if test.waits {
				wait = time.Second
			}
			s := startServer(t, Config{Commands: commandConfig{Waits: commandWaits{FirstSize: wait}}})
			executor := &hostExecutor{t: t}
			u := s.execURL(executor, terminal, "sleep", "600")
			began := time.Now()
			switch {
			case test.overWeb && !test.pings:
				client := dialWebSocket(t, u, "v4.channel.k8s.io") // this client does not read
				if test.input {
					client.write([]byte("\x00x"))
				}
			case test.overWeb:
				dialChannels(t, u, "v4.channel.k8s.io")
			default:
				client := dialRaw(t, u, upgradeRequest(http.MethodPost, u, append(spdyLines("v4.channel.k8s.io"), test.lines...)...))
				streams := client.remoteCommandStreams(streamTypeError, streamTypeStdin, streamTypeStdout, streamTypeResize)
				if test.input {
					client.send(streams[streamTypeStdin], "x", false)
				}
				if test.pings {
					var reading sync.WaitGroup
					reading.Go(client.answerPings)
					defer reading.Wait()
					defer client.conn.Close()
				}
			}
			eventually(t, "the command's start", func() bool { return executor.count() == 1 })
			if took := time.Since(began); (took >= wait) != test.waits {
				t.Errorf("it started after %v", took)
			}
		})
	}
}

// answerPings reads until the end and answers pings.
func (c *rawClient) answerPings() {
	for {
		frame, err := c.framer.ReadFrame()
		if err != nil {
			return
		}
		if ping, ok := frame.(*spdy.PingFrame); ok && c.framer.WriteFrame(ping) != nil {
			return
		}
	}
}
