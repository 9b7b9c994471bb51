package streaming

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"hash"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"reflect"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	spdystreams "github.com/moby/spdystream/spdy"
	"golang.org/x/sys/unix"
	"k8s.io/client-go/tools/remotecommand"

	"github.com/streamshim/streamshim/internal/testutil"
	"github.com/streamshim/streamshim/pkg/handover"
	"github.com/streamshim/streamshim/pkg/session"
	"github.com/streamshim/streamshim/pkg/streaming/internal/lifetime"
	"github.com/streamshim/streamshim/pkg/streaming/portforward"
	"github.com/streamshim/streamshim/pkg/workload"
)

// upgrade hands everything over to another server with its own registry. change may change the state.
func (s *testServer) upgrade(change func(*State)) (carried, ended int) {
	s.t.Helper()
	files := handover.NewFiles()
	ctx, cancel := context.WithTimeout(context.Background(), testTimeout)
	defer cancel()
	encoded, err := s.Freeze(ctx, files)
	if err != nil {
		s.t.Fatal(err)
	}
	kept, err := s.KeepListener(files)
	if err != nil {
		s.t.Fatal(err)
	}
	var state State
	if err := handover.Decode(encoded, &state); err != nil {
		s.t.Fatal(err)
	}
	change(&state)
	if encoded, err = handover.Encode(state); err != nil {
		s.t.Fatal(err)
	}
	descriptors, err := files.Inherit()
	if err != nil {
		s.t.Fatal(err)
	}
	if files, err = handover.Inherited(descriptors); err != nil {
		s.t.Fatal(err)
	}
	s.stop() // as if the old program had ended
	<-s.served

	listener, err := files.TakeListener(kept)
	if err != nil {
		s.t.Fatal(err)
	}
	config := s.started
	config.Sessions = session.NewRegistry(config.Log)
	s.started = config
	s.Server = NewServer(config, listener.Addr())
	if carried, ended, err = s.Server.Resume(encoded, files); err != nil {
		s.t.Fatal(err)
	}
	files.Close()
	s.serve(listener)
	return carried, ended
}

// serve serves a listener that can be paused.
func (s *testServer) serve(listener net.Listener) {
	pausable, err := handover.NewListener(listener)
	if err != nil {
		s.t.Fatal(err)
	}
	server := s.Server
	go func() { s.served <- server.Serve(pausable) }()
	s.awaitListener(server)
}

// upgradeForward is like upgrade, with a change to the state of the only session, a port-forward. It does not call change
// if the port-forward has ended.
func (s *testServer) upgradeForward(change func(*portforward.State)) {
	s.t.Helper()
	s.upgrade(func(state *State) {
		if len(state.Sessions) == 0 {
			return
		}
		var forward portforward.State
		if err := handover.Decode(state.Sessions[0].State, &forward); err != nil {
			s.t.Fatal(err)
		}
		change(&forward)
		var err error
		if state.Sessions[0].State, err = handover.Encode(forward); err != nil {
			s.t.Fatal(err)
		}
	})
}

// thaw freezes the server and lets it continue.
func (s *testServer) thaw() {
	s.t.Helper()
	before := s.started.Sessions.List()
	s.handOver()
	for _, live := range before {
		if live.Context().Err() != nil {
			s.t.Errorf("a session was told to end: %v", context.Cause(live.Context()))
		}
	}
}

// startCarried is like startServer, with a listener that can be paused.
func startCarried(t *testing.T, config Config) *testServer {
	t.Helper()
	s := startServerOn(t, config, func(listener net.Listener) net.Listener {
		pausable, err := handover.NewListener(listener)
		if err != nil {
			t.Fatal(err)
		}
		return pausable
	})
	s.awaitListener(s.Server)
	return s
}

// awaitListener waits until a server uses a listener that can be paused.
func (s *testServer) awaitListener(server *Server) {
	s.t.Helper()
	eventually(s.t, "the listener in use", func() bool {
		_, ok := server.pausable()
		return ok
	})
}

// upgrades hands the server over at random moments, to another one or to itself.
func (s *testServer) upgrades(times int, longest time.Duration) {
	for range times {
		time.Sleep(rand.N(longest))
		if rand.IntN(3) == 0 {
			s.thaw()
		} else if carried, ended := s.upgrade(func(*State) {}); ended > 0 {
			s.t.Errorf("%d sessions were carried, %d ended", carried, ended)
		}
	}
}

// sums are the sums of what one end of a connection has sent and received.
type sums struct{ sent, received hash.Hash }

func newSums() sums { return sums{sha256.New(), sha256.New()} }

// pour sends random bytes in random pieces until stop is closed. It returns their number.
func (s sums) pour(w io.Writer, stop <-chan struct{}, pause bool) (int64, error) {
	var total int64
	piece := make([]byte, 8<<10)
	random := rand.NewChaCha8([32]byte{byte(rand.Uint32()), byte(rand.Uint32()), byte(rand.Uint32())})
	for {
		select {
		case <-stop:
			return total, nil
		default:
		}
		p := piece[:1+rand.IntN(len(piece)-1)]
		random.Read(p) //nolint:errcheck // never fails
		n, err := w.Write(p)
		s.sent.Write(p[:n])
		total += int64(n)
		if err != nil {
			return total, err
		}
		if pause {
			time.Sleep(rand.N(200 * time.Millisecond))
		}
	}
}

func (s sums) drain(r io.Reader, pause bool) (int64, error) {
	var total int64
	p := make([]byte, 32<<10)
	for {
		n, err := r.Read(p)
		s.received.Write(p[:n])
		total += int64(n)
		if errors.Is(err, io.EOF) {
			return total, nil
		}
		if err != nil {
			return total, err
		}
		if pause && rand.IntN(8) == 0 {
			time.Sleep(rand.N(5 * time.Millisecond))
		}
	}
}

// peer moves bytes both ways over one end of a connection until stop is closed, and returns the sums. With second it sends
// its FIN only after that of the other end, because client-go gives up an upload when the pod's answer has ended.
func peer(conn *net.TCPConn, stop <-chan struct{}, slow, second bool) (sums, error) {
	s := newSums()
	var both sync.WaitGroup
	var up, down error
	drained := make(chan struct{})
	both.Go(func() {
		if _, up = s.pour(conn, stop, slow); up == nil {
			if second {
				<-drained
			}
			up = conn.CloseWrite()
		}
	})
	both.Go(func() {
		defer close(drained)
		_, down = s.drain(conn, slow)
	})
	both.Wait()
	return s, errors.Join(up, down)
}

const carriedConnections = 50

// TestForwardedBytesSurviveHandOvers checks that fifty connections lose no byte in either direction, however often and
// whenever the server is handed over. Some are fast and some slow, and they are half-closed at different times.
func TestForwardedBytesSurviveHandOvers(t *testing.T) {
	forEachTransport(t, func(t *testing.T, transport string) {
		s := startCarried(t, Config{PortForwards: forwardConfig{Stall: unlimited}})
		podSums := make(chan sums, carriedConnections)
		podStop := make(chan struct{})
		port := pod(t, func(conn *net.TCPConn) {
			sums, err := peer(conn, podStop, rand.IntN(25) > 0, true)
			if err != nil {
				t.Errorf("the pod's end: %v", err)
			}
			podSums <- sums
		})
		f := s.portForward(t, transport, port)
		var clients sync.WaitGroup
		clientSums := make(chan sums, carriedConnections)
		stop := make(chan struct{})
		for i := range carriedConnections {
			conn := f.dial(port)
			conn.SetDeadline(time.Time{})
			stopping := stop
			if i%5 == 0 { // its FIN comes early, and the answer goes on
				stopping = make(chan struct{})
				time.AfterFunc(rand.N(500*time.Millisecond), func() { close(stopping) })
			}
			clients.Go(func() {
				sums, err := peer(conn, stopping, i%25 > 0, false)
				if err != nil {
					t.Errorf("the client's end: %v", err)
				}
				clientSums <- sums
			})
		}
		s.upgrades(handOvers(), 40*time.Millisecond)
		close(stop)
		s.upgrades(3, 20*time.Millisecond)
		close(podStop)
		s.upgrades(3, 20*time.Millisecond)
		clients.Wait()
		sent, received := map[string]int{}, map[string]int{}
		for range carriedConnections {
			c, p := <-clientSums, <-podSums
			sent[string(c.sent.Sum(nil))]++
			received[string(c.received.Sum(nil))]++
			sent[string(p.received.Sum(nil))]--
			received[string(p.sent.Sum(nil))]--
		}
		for _, of := range []map[string]int{sent, received} {
			for sum, n := range of {
				if n != 0 {
					t.Errorf("sum %x: %d more at one end", sum[:4], n)
				}
			}
		}
		f.alive()
		live := s.started.Sessions.List()
		if len(live) != 1 {
			t.Fatalf("%d sessions live", len(live))
		}
		if in, out := live[0].Transferred(); in == 0 || out == 0 {
			t.Errorf("counted: %d and %d bytes", in, out)
		}
	})
}

// handOvers is the number of hand-overs of a test.
func handOvers() int {
	if testing.Short() {
		return 10
	}
	return 30
}

// TestForwardedEndsSurviveHandOvers checks what is not a stream of bytes: resets by either side, refused ports, and
// connections that begin all the time.
func TestForwardedEndsSurviveHandOvers(t *testing.T) {
	forEachTransport(t, func(t *testing.T, transport string) {
		s := startCarried(t, Config{})
		answering := pod(t, answer)
		resetting := pod(t, func(conn *net.TCPConn) {
			conn.SetLinger(0)
			io.CopyN(io.Discard, conn, 3)
		})
		refused := unusedPort(t)
		f := s.portForward(t, transport, answering, resetting, refused)
		stop := make(chan struct{})
		var clients sync.WaitGroup
		var talked int
		clients.Go(func() {
			for {
				select {
				case <-stop:
					return
				default:
				}
				if got, err := f.talk(answering, "abc"); got != "answer to abc" {
					t.Errorf("answered %q, %v", got, err)
				}
				talked++
				if got, _ := f.talk(resetting, "abc"); got != "" {
					t.Errorf("a pod that resets answered %q", got)
				}
				if got, _ := f.talk(refused, "abc"); got != "" {
					t.Errorf("a port on which nobody listens answered %q", got)
				}
				abandoned := f.dial(answering) // the client resets it
				abandoned.SetLinger(0)
				abandoned.Close()
			}
		})
		s.upgrades(handOvers(), 30*time.Millisecond)
		close(stop)
		clients.Wait()
		if talked == 0 {
			t.Error("nothing was said")
		}
		f.mustAnswer(answering)
	})
}

// TestDialSurvivesHandOver checks a port that listens but does not accept yet: the dial that is in progress at the
// hand-over is repeated.
func TestDialSurvivesHandOver(t *testing.T) {
	s := startCarried(t, Config{})
	full, release := fullListener(t)
	f := s.portForward(t, "SPDY", full)
	conn := f.dial(full)
	if _, err := io.WriteString(conn, "hello"); err != nil {
		t.Fatal(err)
	}
	eventually(t, "a connection under way", func() bool { return s.forwarded() == 1 })
	s.upgrade(func(*State) {})
	s.upgrade(func(*State) {})
	release()
	conn.CloseWrite()
	if got, err := io.ReadAll(conn); string(got) != "hello" || err != nil {
		t.Errorf("echoed: %q, %v", got, err)
	}
}

// forwarded returns how many connections the only port-forward has.
func (s *testServer) forwarded() int {
	list := s.started.Sessions.List()
	if len(list) != 1 {
		return -1
	}
	forward, ok := list[0].Connection().(*forwardSession)
	if !ok {
		return -1
	}
	return forward.Connections()
}

// TestLegacyForwardSurvivesHandOvers checks the old WebSocket protocols: bytes both ways, the pod's end before the
// client's, and then the Close and the FIN.
func TestLegacyForwardSurvivesHandOvers(t *testing.T) {
	for _, protocol := range []string{"", "v4.channel.k8s.io", "v4.base64.channel.k8s.io"} {
		t.Run(protocol, func(t *testing.T) {
			s := startCarried(t, Config{})
			podStop := make(chan struct{})
			podSums := make(chan sums, 1)
			port := pod(t, func(conn *net.TCPConn) {
				sums, err := peer(conn, podStop, true, false)
				if err != nil {
					t.Errorf("the pod's end: %v", err)
				}
				podSums <- sums
			})
			refused := unusedPort(t)
			client := dialNumbered(t, s.portForwardURL(make(chan struct{}), int32(port), int32(refused)), protocol, false) //nolint:gosec // ports
			sent := sha256.New()
			send := func(n int) {
				for range n {
					data := randomBytes(1 + rand.IntN(100_000))
					sent.Write(data)
					client.send(0, data)
				}
			}
			handing := make(chan struct{})
			go func() {
				defer close(handing)
				s.upgrades(handOvers(), 30*time.Millisecond)
			}()
			for more := true; more; {
				send(1)
				select {
				case <-handing:
					more = false
				default:
				}
			}
			close(podStop)
			client.awaitClose()
			send(5)
			s.upgrade(func(*State) {})
			s.upgrade(func(*State) {})
			client.tcp.SetReadDeadline(time.Now().Add(testTimeout))
			if n, err := client.tcp.Read(make([]byte, 1)); n != 0 || err != io.EOF {
				t.Errorf("behind the Close came %d bytes, %v", n, err)
			}
			s.upgrade(func(*State) {})
			send(5)
			client.end("Close 1000")
			theirs := receive(t, podSums, "the pod's end")
			if got := client.on(0); len(got) <= 2 || sum([]byte(got[2:])) != fmt.Sprintf("%x", theirs.sent.Sum(nil)) {
				t.Errorf("other bytes have come from the pod than it has sent, or none: %d", len(got))
			}
			if string(sent.Sum(nil)) != string(theirs.received.Sum(nil)) {
				t.Error("other bytes have come to the pod than were sent")
			}
			if got := client.on(3); strings.Count(got, "nobody listens") != 1 {
				t.Errorf("the refused port says %q", got)
			}
			eventually(t, "the session's end", func() bool { return len(s.started.Sessions.List()) == 0 })
		})
	}
}

// TestURLsSurviveHandOvers checks that tokens stay good for as long as they would have been, that their requests complete,
// and that connections that come during a hand-over wait in the listener's queue.
func TestURLsSurviveHandOvers(t *testing.T) {
	s := startCarried(t, Config{})
	port := pod(t, answer)
	u := s.portForwardURL(make(chan struct{}))
	command := &commandRequest{
		Container: workload.Container{
			Target: workload.Target{ContainerID: "c", PodName: "p"}, PodLabels: map[string]string{"a": "b"}, RuntimeType: "t", Runtime: "r", Root: "/root",
			InitPid: 7, InitStartTime: 8, StdinOnce: true,
		},
		Command: workload.Command{Args: []string{"sh"}, Env: []string{"A=b"}, Stdin: true, Stdout: true, Stderr: true, TTY: true, Size: workload.Size{Width: 1, Height: 2}},
		Trace:   map[string]string{"traceparent": "x"}, Call: []byte("call"),
	}
	exec := s.url(s.Exec(command))
	before := s.tokens.state()
	for range 5 {
		s.upgrade(func(*State) {})
	}
	if n := s.WaitingTokens(); n != 2 {
		t.Fatalf("%d URLs wait", n)
	}
	after := s.tokens.state()
	for i := range before {
		if lost := before[i].Left - after[i].Left; lost < 0 || lost > 30*time.Second {
			t.Errorf("token %d has lost %v", i, lost)
		}
		before[i].Left, after[i].Left = 0, 0
	}
	if !reflect.DeepEqual(before, after) {
		t.Errorf("requests were\n%+v\nand are\n%+v", before, after)
	}
	if request, ok := s.tokens.consume(session.Exec, strings.TrimPrefix(exec.Path, "/exec/")); !ok || !reflect.DeepEqual(request, command) {
		t.Errorf("the exec's request is %+v", request)
	}

	// A client that connects while the server stands still is served afterwards.
	files := handover.NewFiles()
	defer files.Close()
	state, err := s.Freeze(t.Context(), files)
	if err != nil {
		t.Fatal(err)
	}
	answered := make(chan *rawClient, 1)
	go func() {
		answered <- dialForward(t, u, "SPDY")
	}()
	select {
	case <-answered:
		t.Fatal("a frozen server has answered")
	case <-time.After(50 * time.Millisecond):
	}
	if _, _, err := s.Server.Resume(state, files); err != nil {
		t.Fatal(err)
	}
	c := receive(t, answered, "an answer")
	data, _ := c.openPair(fmt.Sprint(port), "1")
	c.send(data, "abc", true)
	if got := c.finished(data); got != "answer to abc" {
		t.Errorf("answered %q", got)
	}
}

// TestHalfAPairSurvivesHandOvers checks that a half pair waits for the other half for the rest of its time.
func TestHalfAPairSurvivesHandOvers(t *testing.T) {
	const creation = time.Hour // not over on any machine
	s := startCarried(t, Config{PortForwards: forwardConfig{StreamCreation: creation}})
	port := fmt.Sprint(pod(t, answer))
	u := s.portForwardURL(make(chan struct{}))
	c := dialForward(t, u, "SPDY")
	failure := c.open(headerStreamType, streamTypeError, headerPort, port, headerRequestID, "1")
	lonely := c.open(headerStreamType, streamTypeError, headerPort, port, headerRequestID, "2")
	eventually(t, "two halves", func() bool { return s.forwarded() == 2 })
	for range 3 {
		s.upgrade(func(*State) {})
	}
	data := c.open(headerStreamType, streamTypeData, headerPort, port, headerRequestID, "1")
	c.send(data, "abc", true)
	if got := c.finished(data); got != "answer to abc" {
		t.Errorf("answered %q", got)
	}
	if got := c.finished(failure); got != "" {
		t.Errorf("the error stream says %q", got)
	}
	s.upgradeForward(func(forward *portforward.State) {
		waiting := half(forward, "2")
		if waiting.Left <= creation/2 || waiting.Left >= creation {
			t.Errorf("%v are left of %v", waiting.Left, creation)
		}
		waiting.Left = 10 * time.Millisecond
	})
	if c.finished(lonely); c.streams[lonely].reset == 0 {
		t.Error("half a pair is still there")
	}
}

// TestSessionThatIsNotCarriedEndsAlone checks that a session which cannot be taken over ends alone. Its client is told or
// loses its connection. The others go on.
func TestSessionThatIsNotCarriedEndsAlone(t *testing.T) {
	for name, damage := range map[string]func(*SessionState){
		"session":   func(state *SessionState) { state.Live = []byte("nonsense") },
		"kind":      func(state *SessionState) { state.Kind = session.Exec },
		"of a kind": func(state *SessionState) { state.Kind = "dream" },
		"forward":   func(state *SessionState) { state.State = []byte("nonsense") },
	} {
		t.Run(name, func(t *testing.T) {
			s := startCarried(t, Config{})
			port := pod(t, answer)
			spoilt, sound := s.portForward(t, "SPDY", port), s.portForward(t, "WebSocket", port)
			damaged := false
			carried, ended := s.upgrade(func(state *State) {
				for i := range state.Sessions {
					var live session.State
					if err := handover.Decode(state.Sessions[i].Live, &live); err != nil {
						t.Fatal(err)
					}
					if strings.HasPrefix(live.Info.Protocol, "SPDY") {
						damage(&state.Sessions[i])
						damaged = true
					}
				}
				encoded, err := handover.Encode(state)
				if err != nil {
					t.Fatal(err)
				}
				if carried, refused, err := CheckState(encoded); carried != 1 || len(refused) != 1 || err != nil {
					t.Errorf("checked: %d carried, %q, %v", carried, refused, err)
				}
			})
			if !damaged || carried != 1 || ended != 1 {
				t.Errorf("damaged: %v, %d carried, %d ended", damaged, carried, ended)
			}
			sound.mustAnswer(port)
			if err := receive(t, spoilt.ended, "the end of the other one"); err == nil {
				t.Error("its client takes the end for one in order")
			}
			spoilt.ended <- nil
		})
	}
}

// TestUncarriedSessionsAreTold checks that a session which another program cannot carry is told so by the program that has
// it. The others go on.
func TestUncarriedSessionsAreTold(t *testing.T) {
	s := startCarried(t, Config{})
	port := pod(t, answer)
	sound := s.portForward(t, "WebSocket", port)
	u := s.portForwardURL(make(chan struct{}))
	c := dialForward(t, u, "SPDY")
	data, failure := c.openPair(fmt.Sprint(pod(t, func(c *net.TCPConn) { io.Copy(c, c) })), "1")
	c.send(data, "abc", false)
	c.until("the echo", func() bool { return string(c.streams[data].data) == "abc" }) // only a complete pair is told
	var options remotecommand.StreamOptions
	var out syncBuffer
	options.Stdin, options.Stdout = openStdin(t), &out
	commandEnded := make(chan error, 1)
	commandURL := s.execURL(&hostExecutor{t: t}, options, "sh", "-c", "echo ready; cat")
	go func() { commandEnded <- stream(t.Context(), t, "SPDY", commandURL, options) }()
	eventually(t, "the command", func() bool { return out.String() == "ready\n" })
	s.handOver() // as if another program had refused them
	list := s.started.Sessions.List()
	reasons := map[string]string{"nobody": "no"}
	for _, live := range list[1:] {
		reasons[live.ID] = "it is not known there"
	}
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		s.EndUncarried(t.Context(), reasons)
	}()
	const want = "it cannot be carried over: it is not known there"
	if got := c.finished(failure); !strings.Contains(got, want) {
		t.Errorf("the error stream says %q", got)
	}
	c.conn.Close()
	if err := receive(t, commandEnded, "the command's end"); err == nil || !strings.Contains(err.Error(), want) {
		t.Errorf("the command ended with %v", err)
	}
	receive(t, ended, "the end of both")
	if left := s.started.Sessions.List(); len(left) != 1 || left[0].ID != list[0].ID {
		t.Errorf("%d sessions are left", len(left))
	}
	sound.mustAnswer(port)
}

// TestFreezeInVain checks that all goes on as before if the sessions cannot be frozen in time.
func TestFreezeInVain(t *testing.T) {
	s := startCarried(t, Config{})
	port := pod(t, answer)
	f := s.portForward(t, "SPDY", port)
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	s.pass() // a caller that is still inside
	if _, err := s.Freeze(ctx, handover.NewFiles()); err == nil {
		t.Error("it was frozen")
	}
	s.letGo()
	f.mustAnswer(port)
	if u := s.portForwardURL(make(chan struct{})); u == nil {
		t.Error("no URL is given out")
	}
}

// TestTermsSurviveHandOvers checks that a session keeps the limits that it began with.
func TestTermsSurviveHandOvers(t *testing.T) {
	testutil.DropEachField(t, func(t *testing.T, change func(*SessionState)) error {
		s := startCarried(t, Config{Settings: Settings{
			IdleTimeout: map[session.Kind]time.Duration{session.PortForward: time.Hour}, MaxLifetime: map[session.Kind]time.Duration{session.PortForward: 2 * time.Hour},
			Bandwidth: 1 << 20,
		}})
		port := pod(t, answer)
		f := s.portForward(t, "SPDY", port)
		s.started.Settings = Settings{}
		var network handover.Descriptor
		var id string
		_, ended := s.upgrade(func(state *State) {
			change(&state.Sessions[0])
			network, id = state.Sessions[0].Network, state.Sessions[0].ID
		})
		if ended != 0 {
			return errors.New("the session has ended")
		}
		f.mustAnswer(port)
		for _, each := range s.all() {
			if each.terms.Limits != (lifetime.Limits{Idle: time.Hour, Max: 2 * time.Hour, Warning: time.Minute}) || each.terms.Bandwidth != 1<<20 {
				return fmt.Errorf("terms %+v", each.terms)
			}
		}
		if list := s.started.Sessions.List(); len(list) != 1 || list[0].ID != id {
			return errors.New("whoever cannot read the rest does not know which session it is")
		}
		if network == 0 {
			return errors.New("its connection cannot be closed when the rest cannot be read")
		}
		return nil
	})
}

// TestStateOfAPortForward checks what a port-forward has besides its connections.
func TestStateOfAPortForward(t *testing.T) {
	all := func(*portforward.State) {}
	runTogether(t, func(t *testing.T) {
		for name, drop := range map[string]func(*portforward.State){
			"complete": all, "Version": func(s *portforward.State) { s.Version = 0 }, "Forwarder": func(s *portforward.State) { s.Forwarder = nil },
			"Open": func(s *portforward.State) { s.Open = nil }, "Waiting": func(s *portforward.State) { s.Waiting = nil },
			"Received": func(s *portforward.State) { s.Received = 0 }, "Sent": func(s *portforward.State) { s.Sent = 0 },
			"Port": func(s *portforward.State) { s.Open[0].Port = 0 }, "Data": func(s *portforward.State) { s.Open[0].Data = 0 },
			"Failure": func(s *portforward.State) { s.Open[0].Failure = 0 }, "Pod": func(s *portforward.State) { s.Open[0].Pod = nil },
			"waiting Port": func(s *portforward.State) { half(s, "3").Port = 0 }, "waiting ID": func(s *portforward.State) { half(s, "3").ID = "" },
			"waiting Failure": func(s *portforward.State) { half(s, "3").Failure = 0 }, "waiting Left": func(s *portforward.State) { half(s, "3").Left = 0 },
			"waiting Data": func(s *portforward.State) { half(s, "4").Data = 0 },
		} {
			t.Run(name, func(t *testing.T) {
				t.Parallel()
				patience := time.Second // for what must not come
				if name == "complete" {
					patience = testTimeout
				}
				if err := forwardAfter(t, drop, patience); (err != nil) != (name != "complete") {
					t.Errorf("what is missed: %v", err)
				}
			})
		}
	})
}

// half returns the half pair with this id.
func half(s *portforward.State, id string) *portforward.WaitingState {
	return &s.Waiting[slices.IndexFunc(s.Waiting, func(w portforward.WaitingState) bool { return w.ID == id })]
}

// TestEndOfAPortForwardIsHandedOver checks that a port-forward that is ending when it is handed over gives its client the
// rest of the time, not the whole time again.
func TestEndOfAPortForwardIsHandedOver(t *testing.T) {
	for name, drop := range map[string]func(*portforward.State){
		"complete":  func(*portforward.State) {},
		"EndReason": func(s *portforward.State) { s.EndReason = "" },
		"Told":      func(s *portforward.State) { s.Told = false },
		"Grace":     func(s *portforward.State) { s.Grace = 0 },
	} {
		t.Run(name, func(t *testing.T) {
			if err := endingForwardAfter(t, drop); (err != nil) != (name != "complete") {
				t.Errorf("what is missed: %v", err)
			}
		})
	}
}

// endingForwardAfter returns what is wrong with a port-forward that was told to end before a hand-over. Its client does not
// close.
func endingForwardAfter(t *testing.T, drop func(*portforward.State)) error {
	const grace = time.Hour // instead of two seconds, so that it is not over on a busy machine
	s := startCarried(t, Config{})
	port := pod(t, func(c *net.TCPConn) { io.Copy(c, c) })
	u := s.portForwardURL(make(chan struct{}))
	c := dialForward(t, u, "SPDY")
	data, failure := c.openPair(fmt.Sprint(port), "1")
	c.send(data, "abc", false)
	c.until("the echo", func() bool { return string(c.streams[data].data) == "abc" }) // only a complete pair is told
	s.started.Sessions.List()[0].Stop(&session.EndError{Reason: "test", Message: "the test says so"})
	if got := c.finished(failure); got != "the test says so" {
		t.Errorf("the error stream says %q", got)
	}
	asked := false
	s.upgradeForward(func(s *portforward.State) {
		asked = s.EndReason == "the test says so" && s.Told && s.Grace > 0
		s.Grace = grace
		drop(s)
	})
	if !asked {
		t.Skip("the two seconds were over") // on a very busy machine
	}
	err := errors.New("the session has ended")
	s.upgradeForward(func(s *portforward.State) {
		err = nil
		if s.EndReason != "the test says so" || !s.Told || s.Grace <= grace/2 || s.Grace > grace {
			err = fmt.Errorf("%q, told: %v, %v are left", s.EndReason, s.Told, s.Grace)
		}
	})
	return err
}

// forwardAfter returns what is wrong with a port-forward after a hand-over. patience is how long it waits for the streams.
func forwardAfter(t *testing.T, drop func(*portforward.State), patience time.Duration) error {
	s := startCarried(t, Config{})
	answering, echo := fmt.Sprint(pod(t, answer)), fmt.Sprint(pod(t, func(c *net.TCPConn) { io.Copy(c, c) }))
	u := s.portForwardURL(make(chan struct{}))
	c := dialForward(t, u, "SPDY")
	over, _ := c.openPair(answering, "1")
	c.send(over, "abc", true)
	c.finished(over)
	open, failure := c.openPair(echo, "2")
	c.send(open, "one, ", false)
	c.until("the echo", func() bool { return string(c.streams[open].data) == "one, " })
	eventually(t, "one connection", func() bool { return s.forwarded() == 1 })
	half := c.open(headerStreamType, streamTypeError, headerPort, answering, headerRequestID, "3")
	c.send(half, "", true)
	early := c.open(headerStreamType, streamTypeData, headerPort, answering, headerRequestID, "4")
	c.send(early, "abc", true)
	eventually(t, "one connection and two halves", func() bool { return s.forwarded() == 3 })
	received, sent := s.started.Sessions.List()[0].Transferred()
	s.upgradeForward(drop)
	list := s.started.Sessions.List()
	if len(list) != 1 || list[0].Context().Err() != nil {
		return errors.New("the session does not go on")
	}
	if r, w := list[0].Transferred(); r != received || w != sent {
		return fmt.Errorf("it has moved %d and %d bytes, and had %d and %d", r, w, received, sent)
	}
	data := c.open(headerStreamType, streamTypeData, headerPort, answering, headerRequestID, "3")
	c.send(data, "abc", true)
	late := c.open(headerStreamType, streamTypeError, headerPort, answering, headerRequestID, "4")
	c.send(late, "", true)
	c.send(open, "two", true)
	ended := func(id spdystreams.StreamId) bool { return c.streams[id].fin || c.streams[id].reset != 0 }
	c.conn.SetReadDeadline(time.Now().Add(patience)) //nolint:errcheck // a real connection
	for !ended(data) || !ended(open) || !ended(failure) || !ended(early) {
		if !c.read() {
			return fmt.Errorf("streams do not end: %w", c.ended)
		}
	}
	if got := string(c.streams[open].data); got != "one, two" {
		return fmt.Errorf("the open connection has %q", got)
	}
	if got := string(c.streams[data].data); got != "answer to abc" {
		return fmt.Errorf("the half pair has %q", got)
	}
	if got := string(c.streams[early].data); got != "answer to abc" {
		return fmt.Errorf("the other half pair has %q", got)
	}
	return nil
}

func FuzzServerState(f *testing.F) {
	encoded, err := handover.Encode(State{Version: stateVersion, Sessions: []SessionState{{Kind: session.PortForward, Live: []byte{0xa0}, State: []byte{0xa0}}}})
	if err != nil {
		f.Fatal(err)
	}
	f.Add(encoded)
	f.Fuzz(func(_ *testing.T, encoded []byte) { CheckState(encoded) }) //nolint:errcheck // it must not panic
}

// fullListener returns a port whose queue is full. A connection to it hangs until release is called, and then echoes.
func fullListener(t *testing.T) (port int, release func()) {
	t.Helper()
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(unix.Bind(fd, &unix.SockaddrInet4{Addr: [4]byte{127, 0, 0, 1}}), unix.Listen(fd, 0)); err != nil {
		t.Fatal(err)
	}
	file := os.NewFile(uintptr(fd), "listener")
	listener, err := net.FileListener(file)
	file.Close()
	if err != nil {
		t.Fatal(err)
	}
	address := listener.Addr().String()
	var fillers []net.Conn
	for {
		conn, err := net.DialTimeout("tcp", address, 200*time.Millisecond)
		if err != nil {
			break
		}
		fillers = append(fillers, conn)
	}
	var serving sync.WaitGroup
	t.Cleanup(func() {
		listener.Close()
		serving.Wait()
	})
	return listener.Addr().(*net.TCPAddr).Port, func() {
		for _, filler := range fillers {
			filler.Close()
		}
		serving.Go(func() {
			for {
				conn, err := listener.Accept()
				if err != nil {
					return
				}
				serving.Go(func() {
					defer conn.Close()
					io.Copy(conn, conn)
				})
			}
		})
	}
}
