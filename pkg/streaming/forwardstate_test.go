package streaming

import (
	"errors"
	"fmt"
	"io"
	"net"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/gorilla/websocket"
	spdystreams "github.com/moby/spdystream/spdy"

	"github.com/streamshim/streamshim/pkg/session"
	"github.com/streamshim/streamshim/pkg/streaming/portforward"
)

// TestClocksOfAPortForward checks that a port-forward keeps the bandwidth that it has used and the time since which it is
// idle.
func TestClocksOfAPortForward(t *testing.T) {
	for name, drop := range map[string]func(*portforward.State){
		"complete":           func(*portforward.State) {},
		"Bandwidth.Sent":     func(s *portforward.State) { s.Bandwidth.Sent = time.Time{} },
		"Bandwidth.Received": func(s *portforward.State) { s.Bandwidth.Received = time.Time{} },
		"Timeouts.Last":      func(s *portforward.State) { s.Timeouts.Last = time.Time{} },
		"Timeouts.Moved":     func(s *portforward.State) { s.Timeouts.Moved = 0 },
	} {
		t.Run(name, func(t *testing.T) {
			if err := clocksAfter(t, drop); (err != nil) != (name != "complete") {
				t.Errorf("what is missed: %v", err)
			}
		})
	}
}

// clocksAfter returns what is wrong with the clocks of a port-forward after two hand-overs, the first of which sets them.
func clocksAfter(t *testing.T, drop func(*portforward.State)) error {
	s := startCarried(t, Config{Settings: Settings{
		Bandwidth: 1 << 20, IdleTimeout: map[session.Kind]time.Duration{session.PortForward: time.Hour},
	}})
	u := s.portForwardURL(make(chan struct{}))
	c := dialForward(t, u, "SPDY")
	data, _ := c.openPair(fmt.Sprint(pod(t, answer)), "1")
	c.send(data, "abc", true)
	c.finished(data)
	const moved = 1 << 40
	now := time.Now()
	last, sent, received := now.Add(-time.Minute), now.Add(time.Hour), now.Add(2*time.Hour)
	err := errors.New("the session has ended")
	s.upgradeForward(func(s *portforward.State) {
		if s.Bandwidth.Sent.IsZero() || s.Bandwidth.Received.IsZero() || s.Timeouts.Last.IsZero() {
			t.Errorf("the clocks stand at %+v, %+v", s.Bandwidth, s.Timeouts)
		}
		s.Bandwidth.Sent, s.Bandwidth.Received, s.Timeouts.Last, s.Timeouts.Moved = sent, received, last, moved
		drop(s)
	})
	s.upgradeForward(func(s *portforward.State) {
		err = nil
		near := func(a, b time.Time) bool { return a.Sub(b).Abs() < time.Second }
		if !near(s.Bandwidth.Sent, sent) || !near(s.Bandwidth.Received, received) || !near(s.Timeouts.Last, last) || s.Timeouts.Moved != moved {
			err = fmt.Errorf("the clocks stand at %+v, %+v", s.Bandwidth, s.Timeouts)
		}
	})
	return err
}

// patience returns how long a test waits for something that must come, or must not.
func patience(comes bool) time.Duration {
	if comes {
		return testTimeout
	}
	return time.Second
}

// TestEndsOfLegacyPortsAreHandedOver checks that the client of an old WebSocket protocol is told when the last port has
// ended, even if other ports have ended before the hand-over.
func TestEndsOfLegacyPortsAreHandedOver(t *testing.T) {
	for name, drop := range map[string]func(*portforward.State){
		"complete": func(*portforward.State) {},
		"Legacy":   func(s *portforward.State) { s.Legacy = false },
		"OutputEnded": func(s *portforward.State) {
			for i := range s.Open {
				s.Open[i].OutputEnded = false
			}
		},
	} {
		t.Run(name, func(t *testing.T) {
			if err := legacyEndsAfter(t, drop, patience(name == "complete")); (err != nil) != (name != "complete") {
				t.Errorf("what is missed: %v", err)
			}
		})
	}
}

// legacyEndsAfter returns what is wrong with the end of a port-forward of two ports, one of which has ended before a
// hand-over.
func legacyEndsAfter(t *testing.T, drop func(*portforward.State), patience time.Duration) error {
	s := startCarried(t, Config{})
	listen := func(conn *net.TCPConn) {
		conn.CloseWrite()
		io.Copy(io.Discard, conn)
	}
	stop := make(chan struct{})
	stopTalking := sync.OnceFunc(func() { close(stop) })
	defer stopTalking()
	silent := pod(t, listen)
	talking := pod(t, func(conn *net.TCPConn) {
		<-stop
		listen(conn)
	})
	client := dialNumbered(t, s.portForwardURL(make(chan struct{}), int32(silent), int32(talking)), "v4.channel.k8s.io", false) //nolint:gosec // ports
	dropped := false
	eventually(t, "the end of one port", func() bool {
		s.upgradeForward(func(s *portforward.State) {
			if slices.ContainsFunc(s.Open, func(c portforward.ConnectionState) bool { return c.OutputEnded }) {
				dropped = true
				drop(s)
			}
		})
		return dropped
	})
	stopTalking()
	told := func() bool {
		client.mu.Lock()
		defer client.mu.Unlock()
		return websocket.IsCloseError(client.ended, websocket.CloseNormalClosure)
	}
	for deadline := time.Now().Add(patience); !told(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(deadline) {
			return errors.New("the client is not told that all ports have ended")
		}
	}
	client.end("Close 1000")
	eventually(t, "the session's end", func() bool { return len(s.started.Sessions.List()) == 0 })
	return nil
}

// TestLastWordsAreHandedOver checks that the client is told once why a connection has failed, by the program that serves it
// when the client reads again.
func TestLastWordsAreHandedOver(t *testing.T) {
	for kind, after := range map[string]func(t *testing.T, drop func(*portforward.State)) error{
		"SPDY": wordsAfter, "legacy": legacyWordsAfter,
	} {
		for name, drop := range map[string]func(*portforward.State){
			"complete": func(*portforward.State) {},
			"Unsaid": func(s *portforward.State) {
				for i := range s.Open {
					s.Open[i].Unsaid = ""
				}
			},
		} {
			t.Run(kind+"/"+name, func(t *testing.T) {
				if err := after(t, drop); (err != nil) != (name != "complete") {
					t.Errorf("what is missed: %v", err)
				}
			})
		}
	}
}

// flood is a port of a pod that sends more than its client reads, until stop is called.
func flood(t *testing.T) (port int, stop func()) {
	stopping := make(chan struct{})
	block := make([]byte, 64<<10)
	port = pod(t, func(conn *net.TCPConn) {
		for {
			select {
			case <-stopping:
				return
			default:
			}
			if _, err := conn.Write(block); err != nil {
				return
			}
		}
	})
	return port, sync.OnceFunc(func() { close(stopping) })
}

// unsaid hands over until the connection to a port has ended. It returns, and drops, what the client must still be told
// about the connection. That is empty if the client was told.
func (s *testServer) unsaid(port int, drop func(*portforward.State)) (words string) {
	s.t.Helper()
	eventually(s.t, "the end of a connection", func() bool {
		ended := true
		s.upgradeForward(func(s *portforward.State) {
			for _, c := range s.Open {
				if int(c.Port) == port {
					ended, words = c.Unsaid != "", c.Unsaid
				}
			}
			if words != "" {
				drop(s)
			}
		})
		return ended
	})
	return words
}

// wordsAfter returns what is wrong with what a client is told about refused connections if it reads only after a hand-over.
func wordsAfter(t *testing.T, drop func(*portforward.State)) error {
	s := startCarried(t, Config{PortForwards: forwardConfig{ReportRefused: true}})
	flooding, stop := flood(t)
	defer stop()
	u := s.portForwardURL(make(chan struct{}))
	c := dialForward(t, u, "SPDY")
	data, _ := c.openPair(fmt.Sprint(flooding), "flood")
	delete(c.streams, data) // it takes much memory
	refused := unusedPort(t)
	var failures []spdystreams.StreamId
	words := ""
	// The words about the first ones may still fit into the socket.
	eventually(t, "a client that takes nothing", func() bool {
		_, failure := c.openPair(fmt.Sprint(refused), fmt.Sprint(len(failures)))
		failures = append(failures, failure)
		words = s.unsaid(refused, drop)
		return words != ""
	})
	stop()
	for i, failure := range failures {
		if got := c.finished(failure); got != words {
			return fmt.Errorf("of refused connection %d was said %q instead of %q", i, got, words)
		}
	}
	return nil
}

// legacyWordsAfter is like wordsAfter, for ports that are named in the CRI request, and for resets.
func legacyWordsAfter(t *testing.T, drop func(*portforward.State)) error {
	s := startCarried(t, Config{})
	flooding, stop := flood(t)
	defer stop()
	ports := []int32{int32(flooding)} //nolint:gosec // a port
	var resets []func()
	for range 8 {
		now := make(chan struct{})
		reset := sync.OnceFunc(func() { close(now) })
		defer reset()
		resets = append(resets, reset)
		ports = append(ports, int32(pod(t, func(conn *net.TCPConn) { //nolint:gosec // as above
			<-now
			conn.SetLinger(0)
		})))
	}
	client := dialSilent(t, s.portForwardURL(make(chan struct{}), ports...), "v4.channel.k8s.io")
	// Until the socket is full: one look could be at a moment in which a busy machine moves nothing.
	for sent, same := int64(0), 0; same < 10; time.Sleep(50 * time.Millisecond) {
		before := sent
		if _, sent = s.started.Sessions.List()[0].Transferred(); sent > before || sent == 0 {
			same = 0
		}
		same++
	}
	words, channel := "", byte(0)
	for i, reset := range resets {
		reset()
		if words = s.unsaid(int(ports[i+1]), drop); words != "" {
			channel = byte(2*(i+1) + 1)
			break
		}
	}
	if words == "" {
		t.Fatal("the client's socket takes everything")
	}
	stop()
	client.reading.Go(client.read)
	const port = 2 // in bytes; the channel begins with them
	eventually(t, "the last words", func() bool { return len(client.on(channel)) > port })
	if got := client.on(channel)[port:]; got != words {
		return fmt.Errorf("%q was said instead of %q", got, words)
	}
	return nil
}
