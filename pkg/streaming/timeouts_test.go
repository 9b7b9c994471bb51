package streaming

import (
	"io"
	"net"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/gorilla/websocket"
	"github.com/moby/spdystream/spdy"
	"k8s.io/client-go/tools/remotecommand"

	"github.com/streamshim/streamshim/pkg/session"
)

func streamOptionsOfCat() remotecommand.StreamOptions {
	return remotecommand.StreamOptions{Stdin: strings.NewReader(""), Stdout: io.Discard}
}

// attachURL returns the URL of an attach to what an upstream's streaming server serves.
func (s *testServer) attachURL(upstream func() *url.URL, options remotecommand.StreamOptions) *url.URL {
	s.t.Helper()
	return s.url(s.Attach(s.relayedRequest(upstream, streamsOf(options))))
}

// limitOf returns a limit for one kind of session, so that the test of one kind does not meet another's.
func limitOf(kind session.Kind, limit time.Duration) map[session.Kind]time.Duration {
	return map[session.Kind]time.Duration{kind: limit}
}

// TestLimitsEndSessionsWithAStatus checks that both limits end a session of each kind, over each transport, with a reason.
func TestLimitsEndSessionsWithAStatus(t *testing.T) {
	const limits = 5 * time.Second // a busy machine may take seconds to start a command
	runTogether(t, func(t *testing.T) {
		forEachTransport(t, func(t *testing.T, transport string) {
			for _, limit := range []struct {
				name, says string
				config     func(session.Kind) Config
			}{
				{"idle", "nothing was sent or received for 5s", func(k session.Kind) Config {
					return Config{Settings: Settings{IdleTimeout: limitOf(k, limits)}}
				}},
				{"lifetime", "sessions may last 5s at most", func(k session.Kind) Config {
					return Config{Settings: Settings{MaxLifetime: limitOf(k, limits)}}
				}},
			} {
				options := remotecommand.StreamOptions{Stdout: io.Discard}
				t.Run("exec/"+limit.name, func(t *testing.T) {
					t.Parallel()
					s := startServer(t, limit.config(session.Exec))
					executor := &hostExecutor{t: t}
					err := stream(t.Context(), t, transport, s.execURL(executor, options, "sleep", "600"), options)
					if err == nil || !strings.Contains(err.Error(), limit.says) {
						t.Errorf("the client got %v", err)
					}
					receive(t, executor.last().disconnected, "the process to be told that its client has gone")
				})
				t.Run("attach/"+limit.name, func(t *testing.T) {
					t.Parallel()
					upstream := startServer(t, Config{})
					s := startServer(t, limit.config(session.Attach))
					main := func() *url.URL { return upstream.execURL(&hostExecutor{t: t}, options, "sleep", "600") }
					err := stream(t.Context(), t, transport, s.attachURL(main, options), options)
					if err == nil || !strings.Contains(err.Error(), limit.says) {
						t.Errorf("the client got %v", err)
					}
				})
				t.Run("portforward/"+limit.name, func(t *testing.T) {
					t.Parallel()
					s := startServer(t, limit.config(session.PortForward))
					port := pod(t, func(c *net.TCPConn) { io.Copy(io.Discard, c) })
					u := s.portForwardURL(make(chan struct{}))
					c := dialForward(t, u, transport)
					data, failure := c.openPair(itoa(port), "1")
					if got := c.finished(failure); !strings.Contains(got, limit.says) {
						t.Errorf("the error stream says %q", got)
					}
					c.finished(data)
					c.conn.Close()
				})
			}
		})
	})
}

// TestOnlyPayloadCounts checks that pings of either side keep no session alive, but payload and terminal sizes do
// (containerd#5563).
func TestOnlyPayloadCounts(t *testing.T) {
	runTogether(t, func(t *testing.T) {
		for name, active := range map[string]bool{"ping": false, "stdin": true, "stdout": true, "resize": true} {
			t.Run(name, func(t *testing.T) {
				t.Parallel()
				forEachTransport(t, func(t *testing.T, transport string) {
					if !active {
						if !endsAsIdle(t, transport, name, time.Second) {
							t.Error("a session lived on " + name)
						}
						return
					}
					// A busy machine may take seconds between two activities. Then a longer limit is tried.
					for idle := 2 * time.Second; endsAsIdle(t, transport, name, idle); idle *= 2 {
						if idle > 10*time.Second {
							t.Fatalf("sessions with %s ended as idle, also after %v", name, idle)
						}
					}
				})
			})
		}
	})
}

// endsAsIdle repeats one kind of action in a session with this limit, and reports whether the session ends. If the action
// counts as activity, it gives up after a while.
func endsAsIdle(t *testing.T, transport, kind string, idle time.Duration) bool {
	t.Helper()
	s := startServer(t, Config{Settings: Settings{IdleTimeout: limitOf(session.Exec, idle)}})
	command := "stty -echo; sleep 600"
	if kind == "stdout" {
		command = "while sleep 0.05; do echo x; done"
	}
	options := remotecommand.StreamOptions{Stdin: strings.NewReader(""), Stdout: io.Discard, Tty: true}
	executor := &hostExecutor{t: t}
	act, conn := activity(t, transport, s.execURL(executor, options, "sh", "-c", command), kind)
	discarded := make(chan struct{})
	go func() {
		defer close(discarded)
		io.Copy(io.Discard, conn)
	}()
	defer func() { conn.Close(); <-discarded }()
	sessionEnded := func() bool { return len(s.config.Sessions.List()) == 0 }
	eventually(t, "the command's start", func() bool { return executor.count() == 1 || sessionEnded() })
	if executor.count() == 0 {
		return true
	}
	ticker := time.NewTicker(idle / 40)
	defer ticker.Stop()
	enough := time.After(idle * 3 / 2)
	if kind == "ping" {
		enough = time.After(testTimeout)
	}
	for {
		select {
		case <-executor.last().disconnected:
			return true
		case <-enough:
			return false
		case <-ticker.C:
			act()
		}
	}
}

// activity connects a client and returns a function that does one kind of action once.
func activity(t *testing.T, transport string, u *url.URL, kind string) (act func(), conn net.Conn) {
	size, widths := "", 80
	next := func() string {
		widths++
		size = `{"Width":` + itoa(widths) + `,"Height":24}`
		return size
	}
	if transport == "WebSocket" {
		c := dialWebSocket(t, u, "v5.channel.k8s.io").conn
		send := func(m string) { c.WriteMessage(websocket.BinaryMessage, []byte(m)) } //nolint:errcheck // the server may have ended it
		return map[string]func(){
			"ping":   func() { c.WriteControl(websocket.PingMessage, nil, time.Now().Add(testTimeout)) }, //nolint:errcheck // as above
			"stdin":  func() { send("\x00x") },
			"stdout": func() {},
			"resize": func() { send("\x04" + next()) },
		}[kind], c.NetConn()
	}
	c := dialRaw(t, u, upgradeRequest(http.MethodPost, u, spdyLines("v4.channel.k8s.io")...))
	ids := c.remoteCommandStreams(streamTypeError, streamTypeStdin, streamTypeStdout, streamTypeResize)
	send := func(frame spdy.Frame) { c.framer.WriteFrame(frame) } //nolint:errcheck // as above
	return map[string]func(){
		"ping":   func() { send(&spdy.PingFrame{Id: 1}) },
		"stdin":  func() { send(&spdy.DataFrame{StreamId: ids[streamTypeStdin], Data: []byte("x")}) },
		"stdout": func() {},
		"resize": func() { send(&spdy.DataFrame{StreamId: ids[streamTypeResize], Data: []byte(next())}) },
	}[kind], c.conn
}

// TestWarningBeforeALimit checks that the user of a terminal is warned before either limit, and that the warning does not
// count as activity.
func TestWarningBeforeALimit(t *testing.T) {
	runTogether(t, func(t *testing.T) {
		forEachTransport(t, func(t *testing.T, transport string) {
			for says, settings := range map[string]func(limit time.Duration) Settings{
				"is idle and will be ended in": func(limit time.Duration) Settings {
					return Settings{IdleTimeout: limitOf(session.Exec, limit)}
				},
				"has reached its longest lifetime and will be ended in": func(limit time.Duration) Settings {
					return Settings{MaxLifetime: limitOf(session.Exec, limit)}
				},
			} {
				t.Run(says, func(t *testing.T) {
					t.Parallel()
					// A busy machine may do nothing between the warning and the end. Then a longer limit is tried.
					for limit, warned := 3*time.Second, false; !warned; limit *= 2 {
						// The warning comes less than half of the limit before its end, otherwise there is none.
						config := Config{Settings: settings(limit)}
						config.warning = limit * 2 / 5
						s := startServer(t, config)
						var output syncBuffer
						options := remotecommand.StreamOptions{Stdin: openStdin(t), Stdout: &output, Tty: true}
						start := time.Now()
						err := stream(t.Context(), t, transport, s.execURL(&hostExecutor{t: t}, options, "sleep", "600"), options)
						if err == nil || !strings.Contains(err.Error(), "the session was ended because") {
							t.Errorf("the client got %v", err)
						}
						n := strings.Count(output.String(), says)
						if n > 1 || n == 0 && limit > 20*time.Second {
							t.Fatalf("%d warnings in %q", n, output.String())
						}
						warned = n == 1
						if lasted := time.Since(start); lasted < limit {
							t.Errorf("the session lasted %v", lasted)
						}
					}
				})
			}
		})
	})
}

func itoa(n int) string { return strconv.Itoa(n) }
