package streaming

import (
	"bytes"
	"context"
	"io"
	"net/http"
	"net/url"
	"strings"
	"testing"
	"time"

	"github.com/gorilla/websocket"
	"github.com/moby/spdystream/spdy"
	"k8s.io/client-go/tools/remotecommand"

	"github.com/streamshim/streamshim/internal/testutil"
	"github.com/streamshim/streamshim/pkg/session"
	"github.com/streamshim/streamshim/pkg/workload"
)

// TestClientSaysGoodbye checks that a client that says goodbye but leaves its connection open, as a proxy may, counts as
// gone.
func TestClientSaysGoodbye(t *testing.T) {
	testutil.Slow(t)
	start := func(t *testing.T) (*hostExecutor, *url.URL) {
		s := startServer(t, Config{Commands: commandConfig{InputGrace: 500 * time.Millisecond}}) // a GOAWAY ends input
		executor := &hostExecutor{t: t}
		return executor, s.execURL(executor, remotecommand.StreamOptions{Stdin: strings.NewReader(""), Stdout: io.Discard}, "sleep", "600")
	}
	for name, goodbye := range map[string]func(*rawClient, map[string]spdy.StreamId){
		"GOAWAY":                    func(c *rawClient, _ map[string]spdy.StreamId) { c.write(&spdy.GoAwayFrame{}) },
		"reset of the error stream": func(c *rawClient, ids map[string]spdy.StreamId) { c.reset(ids[streamTypeError]) },
	} {
		t.Run("SPDY/"+name, func(t *testing.T) {
			executor, u := start(t)
			c := dialRaw(t, u, upgradeRequest(http.MethodPost, u, spdyLines("v4.channel.k8s.io")...))
			ids := c.remoteCommandStreams(streamTypeError, streamTypeStdin, streamTypeStdout)
			eventually(t, "the command's start", func() bool { return executor.count() == 1 })
			goodbye(c, ids)
			within(t, executor.last().disconnected, "the command is told")
		})
	}
	t.Run("WebSocket/Close", func(t *testing.T) {
		executor, u := start(t)
		c := dialWebSocket(t, u, "v5.channel.k8s.io")
		eventually(t, "the command's start", func() bool { return executor.count() == 1 })
		if err := c.conn.WriteMessage(websocket.CloseMessage, nil); err != nil {
			t.Fatal(err)
		}
		within(t, executor.last().disconnected, "the command is told")
	})
}

// TestClientGoneWhileOutputIsHeld checks that a background child that keeps the output open does not hold a session whose
// client has gone, even if the wait for the child has no limit.
func TestClientGoneWhileOutputIsHeld(t *testing.T) {
	forEachTransport(t, func(t *testing.T, transport string) {
		s := startServer(t, Config{Commands: commandConfig{DrainIdle: unlimited}})
		executor := &hostExecutor{t: t}
		options := remotecommand.StreamOptions{Stdout: io.Discard}
		u := s.execURL(executor, options, "sh", "-c", "sleep 600 & exit 0")
		cable := newCable(t, u)
		done := make(chan error, 1)
		go func() { done <- stream(t.Context(), t, transport, u, options) }()
		eventually(t, "the command's start", func() bool { return executor.count() == 1 })
		within(t, executor.last().exited, "the command's end")
		eventually(t, "the session lingers", func() bool {
			live := s.config.Sessions.List()
			return len(live) == 1 && live[0].Phase() == session.Lingering
		})
		cable.cut()
		<-done
		eventually(t, "the session's end", func() bool { return len(s.config.Sessions.List()) == 0 })
	})
}

// TestContainerEndIsToldWithinASecond checks that a session ends within a second of its container, with a reason, even
// while the upstream cannot tell why.
func TestContainerEndIsToldWithinASecond(t *testing.T) {
	silent := func(ctx context.Context) string {
		gaveUp, cancel := context.WithTimeout(ctx, 700*time.Millisecond) // as pkg/cri does
		defer cancel()
		<-gaveUp.Done()
		return ""
	}
	for reason, ask := range map[string]func(context.Context) string{
		"container was OOM-killed":               func(context.Context) string { return "container was OOM-killed" },
		"the container's main process has ended": silent,
	} {
		t.Run(reason, func(t *testing.T) {
			forEachTransport(t, func(t *testing.T, transport string) {
				s := startServer(t, Config{})
				soonest := time.Hour
				for attempts := 0; soonest > time.Second && attempts < 60; attempts++ { // a busy machine may delay some of them
					executor := &hostExecutor{t: t}
					request := s.localRequest(executor, workload.Command{Args: []string{"sleep", "600"}, Stdout: true, Stderr: true})
					s.testNode.mu.Lock()
					s.reasons[request.Container.ContainerID] = ask
					s.testNode.mu.Unlock()
					u := s.url(s.Exec(request))
					var stderr bytes.Buffer
					done := make(chan error, 1)
					go func() {
						done <- stream(t.Context(), t, transport, u, remotecommand.StreamOptions{Stdout: io.Discard, Stderr: &stderr})
					}()
					eventually(t, "the command's start", func() bool { return executor.count() == 1 })
					begin := time.Now()
					close(executor.last().containerExited)
					err := <-done
					soonest = min(soonest, time.Since(begin))
					if exitCode(t, err) != 137 || stderr.String() != "[streamshim: "+reason+"]\n" {
						t.Errorf("%v, %q; want %q", err, &stderr, reason)
					}
				}
				if soonest > time.Second {
					t.Errorf("told after %v", soonest)
				}
			})
		})
	}
}

// within waits until a channel is closed.
func within(t *testing.T, done <-chan struct{}, what string) {
	t.Helper()
	select {
	case <-done:
	case <-time.After(testTimeout):
		t.Fatalf("waited in vain: %s", what)
	}
}
