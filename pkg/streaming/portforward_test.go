package streaming

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	"k8s.io/apimachinery/pkg/util/httpstream"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/portforward"
	"k8s.io/client-go/transport/spdy"

	"github.com/streamshim/streamshim/internal/testutil"
	podforward "github.com/streamshim/streamshim/pkg/portforward"
	"github.com/streamshim/streamshim/pkg/workload"
)

// podForwarder dials the host's loopback as if it were a pod's.
type podForwarder struct {
	*podforward.Forwarder
	gone <-chan struct{} // a test closes it to end the sandbox
}

func (f podForwarder) Forward(ctx context.Context, port uint16, stream workload.Stream) (sent, received int64, err error) {
	return f.Forwarder.Forward(ctx, port, stream)
}

func (f podForwarder) Gone() <-chan struct{} { return f.gone }

// pod is a program that listens. It calls serve for each connection.
func pod(t *testing.T, serve func(*net.TCPConn)) (port int) {
	t.Helper()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	var connections sync.WaitGroup
	connections.Go(func() {
		for {
			conn, err := listener.Accept()
			if err != nil {
				return
			}
			connections.Go(func() {
				defer conn.Close()
				serve(conn.(*net.TCPConn))
			})
		}
	})
	t.Cleanup(func() {
		listener.Close()
		connections.Wait()
	})
	return listener.Addr().(*net.TCPAddr).Port
}

// unusedPort returns a port on which nobody listens. It is taken until the test ends, so that nobody else can.
func unusedPort(t *testing.T) int {
	t.Helper()
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Close(fd) })
	if err := unix.Bind(fd, &unix.SockaddrInet4{Addr: [4]byte{127, 0, 0, 1}}); err != nil {
		t.Fatal(err)
	}
	address, err := unix.Getsockname(fd)
	if err != nil {
		t.Fatal(err)
	}
	return address.(*unix.SockaddrInet4).Port
}

// portForward is a running `kubectl port-forward`.
type portForward struct {
	t     *testing.T
	local map[int]int // by the pod's port
	ended chan error
	gone  chan struct{}
	stop  chan struct{}
}

func (s *testServer) portForward(t *testing.T, transport string, ports ...int) *portForward {
	t.Helper()
	return s.portForwardThrough(t, func(*url.URL) {}, transport, ports...)
}

// portForwardThrough is like portForward, over a network that changes the URL.
func (s *testServer) portForwardThrough(t *testing.T, network func(*url.URL), transport string, ports ...int) *portForward {
	t.Helper()
	f := &portForward{
		t: t, local: make(map[int]int), ended: make(chan error, 1),
		gone: make(chan struct{}), stop: make(chan struct{}),
	}
	u := s.portForwardURL(f.gone)
	network(u)
	config := &rest.Config{Host: u.Host}
	var dialer httpstream.Dialer
	if transport == "WebSocket" {
		d, err := portforward.NewSPDYOverWebsocketDialer(u, config)
		if err != nil {
			t.Fatal(err)
		}
		dialer = d
	} else {
		roundTripper, upgrader, err := spdy.RoundTripperFor(config)
		if err != nil {
			t.Fatal(err)
		}
		dialer = spdy.NewDialer(upgrader, &http.Client{Transport: roundTripper}, http.MethodPost, u)
	}
	var arguments []string
	for _, port := range ports {
		arguments = append(arguments, fmt.Sprintf("0:%d", port))
	}
	ready := make(chan struct{})
	forwarder, err := portforward.New(dialer, arguments, f.stop, ready, io.Discard, io.Discard)
	if err != nil {
		t.Fatal(err)
	}
	go func() { f.ended <- forwarder.ForwardPorts() }()
	select {
	case <-ready:
	case err := <-f.ended:
		t.Fatalf("port-forward: %v", err)
	}
	forwarded, err := forwarder.GetPorts()
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range forwarded {
		f.local[int(p.Remote)] = int(p.Local)
	}
	t.Cleanup(func() {
		close(f.stop)
		<-f.ended
	})
	return f
}

func (s *testServer) portForwardURL(gone chan struct{}, ports ...int32) *url.URL {
	s.t.Helper()
	return s.url(s.PortForward(s.podRequest(func() (forwarder, error) {
		f, err := podforward.NewForwarder("", podforward.Config{})
		return podForwarder{f, gone}, err
	}, ports...)))
}

// alive fails the test if kubectl's port-forward has ended.
func (f *portForward) alive() {
	f.t.Helper()
	select {
	case err := <-f.ended:
		f.ended <- err
		f.t.Fatalf("the port-forward has ended: %v", err)
	default:
	}
}

func (f *portForward) dial(port int) *net.TCPConn {
	f.t.Helper()
	conn, err := net.Dial("tcp", fmt.Sprintf("127.0.0.1:%d", f.local[port]))
	if err != nil {
		f.t.Fatal(err)
	}
	f.t.Cleanup(func() { conn.Close() })
	conn.SetDeadline(time.Now().Add(testTimeout))
	return conn.(*net.TCPConn)
}

// talk sends a line and returns all that it receives.
func (f *portForward) talk(port int, line string) (string, error) {
	f.t.Helper()
	conn := f.dial(port)
	defer conn.Close()
	if _, err := io.WriteString(conn, line); err != nil {
		return "", err
	}
	answer, err := io.ReadAll(conn)
	return string(answer), err
}

// answer serves one request and closes first.
func answer(conn *net.TCPConn) {
	request := make([]byte, 3)
	if _, err := io.ReadFull(conn, request); err == nil {
		fmt.Fprintf(conn, "answer to %s", request)
	}
}

func (f *portForward) mustAnswer(port int) {
	f.t.Helper()
	f.alive()
	if got, err := f.talk(port, "abc"); got != "answer to abc" {
		f.t.Fatalf("the neighbour answered %q, %v", got, err)
	}
}

// TestOneResetDoesNotEndPortForward checks that a connection that the pod resets does not end the port-forward
// (kubernetes#74551, #111825).
func TestOneResetDoesNotEndPortForward(t *testing.T) {
	forEachTransport(t, func(t *testing.T, transport string) {
		s := startServer(t, Config{})
		good := pod(t, answer)
		bad := pod(t, func(c *net.TCPConn) {
			io.ReadFull(c, make([]byte, 3))
			c.SetLinger(0)
		})
		f := s.portForward(t, transport, good, bad)
		for range 3 {
			f.talk(bad, "abc") //nolint:errcheck // whatever the local program sees, the neighbour must live
			f.mustAnswer(good)
		}
	})
}

// TestOneRefusedConnectionDoesNotEndPortForward checks the same for a connection to a port on which nobody listens
// (kubectl#1169).
func TestOneRefusedConnectionDoesNotEndPortForward(t *testing.T) {
	forEachTransport(t, func(t *testing.T, transport string) {
		s := startServer(t, Config{})
		good, nobody := pod(t, answer), unusedPort(t)
		f := s.portForward(t, transport, good, nobody)
		for range 3 {
			if got, _ := f.talk(nobody, "abc"); got != "" {
				t.Errorf("a port without a listener answered %q", got)
			}
			f.mustAnswer(good)
		}
	})
}

// TestRefusedConnectionIsReportedWhenAsked checks ReportRefused, the behaviour of other runtimes.
func TestRefusedConnectionIsReportedWhenAsked(t *testing.T) {
	s := startServer(t, Config{PortForwards: forwardConfig{ReportRefused: true}})
	nobody := unusedPort(t)
	f := s.portForward(t, "SPDY", nobody)
	f.talk(nobody, "abc") //nolint:errcheck // it is refused
	select {
	case err := <-f.ended:
		f.ended <- err
		if !errors.Is(err, portforward.ErrLostConnectionToPod) {
			t.Errorf("the port-forward ended with %v", err)
		}
	case <-time.After(testTimeout):
		t.Error("kubectl was not told")
	}
}

// TestHalfCloseDeliversLateAnswer checks that a client that ends its side gets what the pod answers afterwards
// (kubernetes#8766).
func TestHalfCloseDeliversLateAnswer(t *testing.T) {
	forEachTransport(t, func(t *testing.T, transport string) {
		s := startServer(t, Config{})
		port := pod(t, func(c *net.TCPConn) {
			all, err := io.ReadAll(c)
			if err != nil {
				return
			}
			time.Sleep(1500 * time.Millisecond) // longer than the second that other runtimes allow
			fmt.Fprintf(c, "%d bytes", len(all))
		})
		f := s.portForward(t, transport, port)
		conn := f.dial(port)
		conn.Write(make([]byte, 1<<20))
		conn.CloseWrite()
		if got, err := io.ReadAll(conn); string(got) != "1048576 bytes" {
			t.Errorf("answer %q, %v", got, err)
		}
	})
}

// TestPodClosesFirst checks that the end of the pod's side reaches the client even if the client has not ended its side.
// Only a raw client shows that an upload then goes on: client-go gives up its side.
func TestPodClosesFirst(t *testing.T) {
	forEachTransport(t, func(t *testing.T, transport string) {
		s := startServer(t, Config{})
		port := pod(t, func(c *net.TCPConn) {
			io.ReadFull(c, make([]byte, 1))
			io.WriteString(c, "enough")
			c.CloseWrite()
			io.Copy(io.Discard, c)
		})
		f := s.portForward(t, transport, port)
		soonest := time.Hour
		for attempts := 0; soonest > 500*time.Millisecond && attempts < 60; attempts++ { // a busy machine may delay some
			conn := f.dial(port)
			begin := time.Now()
			conn.Write([]byte("x"))
			if got, err := io.ReadAll(conn); string(got) != "enough" {
				t.Errorf("answer %q, %v", got, err)
			}
			soonest = min(soonest, time.Since(begin))
			conn.Close()
			f.alive()
		}
		t.Logf("the end came after %v", soonest)
		if soonest > 500*time.Millisecond { // other runtimes take a second (P4)
			t.Errorf("the end came after %v", soonest)
		}
	})
}

// TestStuckUploadDoesNotStopNeighbours checks that a connection whose pod does not read blocks only itself
// (kubernetes#78446).
func TestStuckUploadDoesNotStopNeighbours(t *testing.T) {
	forEachTransport(t, func(t *testing.T, transport string) {
		s := startServer(t, Config{})
		good := pod(t, answer)
		release := make(chan struct{})
		stuck := pod(t, func(*net.TCPConn) { <-release })
		t.Cleanup(func() { close(release) })
		f := s.portForward(t, transport, good, stuck)
		conn := f.dial(stuck)
		uploading := make(chan struct{})
		go func() {
			defer close(uploading)
			conn.Write(make([]byte, 8<<20))
		}()
		for range 20 {
			f.mustAnswer(good)
		}
		conn.Close()
		<-uploading
	})
}

// TestSandboxGoneEndsPortForward checks that the client is told and released at once when the sandbox ends
// (kubernetes#59816, kubectl#686).
func TestSandboxGoneEndsPortForward(t *testing.T) {
	forEachTransport(t, func(t *testing.T, transport string) {
		for _, open := range []bool{false, true} {
			s := startServer(t, Config{})
			port := pod(t, func(c *net.TCPConn) { io.Copy(io.Discard, c) })
			f := s.portForward(t, transport, port)
			if open {
				conn := f.dial(port)
				conn.Write([]byte("x"))
				eventually(t, "the connection", func() bool {
					sessions := s.config.Sessions.List()
					if len(sessions) != 1 || sessions[0].Connection() == nil { // it comes a moment after the upgrade
						return false
					}
					received, _ := sessions[0].Transferred() // it may have no connection yet
					return received == 1
				})
			}
			close(f.gone)
			select {
			case err := <-f.ended:
				f.ended <- err
				if !errors.Is(err, portforward.ErrLostConnectionToPod) {
					t.Errorf("the port-forward ended with %v", err)
				}
			case <-time.After(testTimeout):
				t.Fatal("the client was not released")
			}
		}
	})
}

// TestManyConnectionsLeaveNothing checks that many connections over one tunnel leave nothing behind.
func TestManyConnectionsLeaveNothing(t *testing.T) {
	testutil.Slow(t)
	const connections, atOnce = 500, 20 // test/integration/portforward tries ten thousand on a node
	forEachTransport(t, func(t *testing.T, transport string) {
		s := startServer(t, Config{})
		port := pod(t, answer)
		f := s.portForward(t, transport, port)
		work := make(chan int)
		var workers sync.WaitGroup
		for range atOnce {
			workers.Go(func() {
				for range work {
					if got, err := f.talk(port, "abc"); got != "answer to abc" {
						t.Errorf("answer %q, %v", got, err)
					}
				}
			})
		}
		for i := range connections {
			work <- i
		}
		close(work)
		workers.Wait()
		sessions := s.config.Sessions.List()
		if len(sessions) != 1 {
			t.Fatalf("%d sessions", len(sessions))
		}
		running := sessions[0].Connection().(*forwardSession)
		eventually(t, "the end of all connections", func() bool {
			return running.Connections() == 0
		})
	})
}

// TestLegacyWebSocketPortForward checks the port-forward of WebSocket clients: the port in the CRI request, two channels.
func TestLegacyWebSocketPortForward(t *testing.T) {
	s := startServer(t, Config{})
	port := pod(t, answer)
	u := s.portForwardURL(nil, int32(port)) //nolint:gosec // a port
	conn := dialWebSocket(t, u, "v4.channel.k8s.io")
	announced := []byte{byte(port), byte(port >> 8)}
	for _, channel := range []byte{0, 1} {
		if got := conn.read(); string(got) != string(append([]byte{channel}, announced...)) {
			t.Errorf("announcement %v", got)
		}
	}
	conn.write(append([]byte{0}, "abc"...))
	var got strings.Builder
	for message := conn.read(); message != nil; message = conn.read() {
		if message[0] != 0 {
			t.Errorf("channel %d: %q", message[0], message[1:])
		}
		got.Write(message[1:])
	}
	if got.String() != "answer to abc" {
		t.Errorf("answer %q", &got)
	}
}
