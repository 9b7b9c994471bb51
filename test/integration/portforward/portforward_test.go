// Package streams tests the streaming server in its real place: the streamshim program in front of
// containerd, pods with network namespaces of their own, and stock client-go as the client.
package portforward

import (
	"crypto/rand"
	"crypto/sha256"
	"encoding/json"
	"fmt"
	"io"
	mathrand "math/rand/v2"
	"net"
	"net/http"
	"net/url"
	"os"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	"k8s.io/apimachinery/pkg/util/httpstream"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/portforward"
	"k8s.io/client-go/transport/spdy"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/streamshim/streamshim/test/internal/node"
)

// patience bounds what must happen; it is never waited for in a test that passes.
const patience = 2 * time.Minute

var transports = []string{"SPDY", "WebSocket"}

// testPod is a pod whose programs are played by the test itself, in the pod's network namespace.
type testPod struct {
	t       testing.TB
	node    *node.Node
	id      string
	address string
	netns   string // path; empty in a host-network pod
}

func newPod(t testing.TB, n *node.Node, spec node.PodSpec) *testPod {
	t.Helper()
	id, err := n.RunPod(t.Context(), spec)
	if err != nil {
		t.Fatal(err)
	}
	status, err := n.Upstream().PodSandboxStatus(t.Context(), &runtimeapi.PodSandboxStatusRequest{PodSandboxId: id, Verbose: true})
	if err != nil {
		t.Fatal(err)
	}
	var info struct{ Pid int }
	if err := json.Unmarshal([]byte(status.Info["info"]), &info); err != nil || info.Pid == 0 {
		t.Fatalf("the sandbox's pid: %v in %s", err, status.Info["info"])
	}
	p := &testPod{t: t, node: n, id: id, address: status.Status.Network.Ip}
	if !spec.HostNetwork {
		p.netns = fmt.Sprintf("/proc/%d/ns/net", info.Pid)
	}
	return p
}

// listen has a program of the pod listen on an address, a port of its own choice, and serve each
// connection. The port is returned.
func (p *testPod) listen(host string, serve func(*net.TCPConn)) int {
	p.t.Helper()
	listener, err := p.listenIn(net.JoinHostPort(host, "0"))
	if err != nil {
		p.t.Fatal(err)
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
	p.t.Cleanup(func() {
		listener.Close()
		connections.Wait()
	})
	return listener.Addr().(*net.TCPAddr).Port
}

// listenIn makes the socket on a thread that is in the pod's namespace meanwhile; the socket stays.
func (p *testPod) listenIn(address string) (net.Listener, error) {
	if p.netns == "" {
		return net.Listen("tcp", address)
	}
	pod, err := os.Open(p.netns)
	if err != nil {
		return nil, err
	}
	defer pod.Close()
	host, err := os.Open("/proc/self/ns/net")
	if err != nil {
		return nil, err
	}
	defer host.Close()
	runtime.LockOSThread()
	if err := unix.Setns(int(pod.Fd()), unix.CLONE_NEWNET); err != nil {
		runtime.UnlockOSThread()
		return nil, err
	}
	listener, err := net.Listen("tcp", address)
	if back := unix.Setns(int(host.Fd()), unix.CLONE_NEWNET); back != nil {
		return nil, back // and the thread stays locked, so that it ends with the goroutine
	}
	runtime.UnlockOSThread()
	return listener, err
}

// unusedPort is one on which nothing in the pod listens.
func (p *testPod) unusedPort() int {
	p.t.Helper()
	listener, err := p.listenIn("127.0.0.1:0")
	if err != nil {
		p.t.Fatal(err)
	}
	defer listener.Close()
	return listener.Addr().(*net.TCPAddr).Port
}

// forward is a running `kubectl port-forward`.
type forward struct {
	t     testing.TB
	local map[int]int // by the pod's port
	ended chan error
}

func (p *testPod) forward(transport string, ports ...int) *forward {
	p.t.Helper()
	request := &runtimeapi.PortForwardRequest{PodSandboxId: p.id}
	var arguments []string
	for _, port := range ports {
		request.Port = append(request.Port, int32(port)) //nolint:gosec // a port
		arguments = append(arguments, fmt.Sprintf("0:%d", port))
	}
	response, err := p.node.Runtime().PortForward(p.t.Context(), request)
	if err != nil {
		p.t.Fatal(err)
	}
	u, err := url.Parse(response.Url)
	if err != nil {
		p.t.Fatal(err)
	}
	config := &rest.Config{Host: u.Host}
	var dialer httpstream.Dialer
	if transport == "WebSocket" {
		dialer, err = portforward.NewSPDYOverWebsocketDialer(u, config)
	} else {
		var roundTripper http.RoundTripper
		var upgrader spdy.Upgrader
		roundTripper, upgrader, err = spdy.RoundTripperFor(config)
		dialer = spdy.NewDialer(upgrader, &http.Client{Transport: roundTripper}, http.MethodPost, u)
	}
	if err != nil {
		p.t.Fatal(err)
	}
	f := &forward{t: p.t, local: map[int]int{}, ended: make(chan error, 1)}
	stop, ready := make(chan struct{}), make(chan struct{})
	forwarder, err := portforward.New(dialer, arguments, stop, ready, io.Discard, io.Discard)
	if err != nil {
		p.t.Fatal(err)
	}
	go func() { f.ended <- forwarder.ForwardPorts() }()
	select {
	case <-ready:
	case err := <-f.ended:
		p.t.Fatalf("port-forward: %v", err)
	case <-time.After(patience):
		p.t.Fatal("the port-forward is not ready")
	}
	forwarded, err := forwarder.GetPorts()
	if err != nil {
		p.t.Fatal(err)
	}
	for _, port := range forwarded {
		f.local[int(port.Remote)] = int(port.Local)
	}
	p.t.Cleanup(func() {
		close(stop)
		select {
		case <-f.ended:
		case <-time.After(patience):
			p.t.Error("the port-forward does not end")
		}
	})
	return f
}

func (f *forward) dial(port int) (*net.TCPConn, error) {
	conn, err := net.Dial("tcp", fmt.Sprintf("127.0.0.1:%d", f.local[port]))
	if err != nil {
		return nil, err
	}
	conn.SetDeadline(time.Now().Add(2 * patience))
	return conn.(*net.TCPConn), nil
}

// talk sends a line and returns everything that comes back.
func (f *forward) talk(port int, line string) (string, error) {
	conn, err := f.dial(port)
	if err != nil {
		return "", err
	}
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

func (f *forward) mustAnswer(port int) {
	f.t.Helper()
	select {
	case err := <-f.ended:
		f.ended <- err
		f.t.Fatalf("the port-forward has ended: %v", err)
	default:
	}
	if got, err := f.talk(port, "abc"); got != "answer to abc" {
		f.t.Fatalf("port %d answered %q, %v", port, got, err)
	}
}

// TestPortForward is what users report of port-forward (known in other runtimes as kubernetes#74551,
// #111825, #8766, #99850, #72488, #59816), on real pods.
func TestPortForward(t *testing.T) {
	n := node.StartForTest(t, node.Config{Name: "forward", Streamshim: node.Binary(t)})
	for _, transport := range transports {
		p := newPod(t, n, node.PodSpec{Name: strings.ToLower(transport)})
		t.Run(transport, func(t *testing.T) {
			t.Parallel() // for the late answers
			testPortForward(t, p, transport)
		})
		t.Run(transport+"/host network", func(t *testing.T) {
			p := newPod(t, n, node.PodSpec{Name: "host-" + strings.ToLower(transport), HostNetwork: true})
			p.t = t
			port := p.listen("127.0.0.1", answer)
			p.forward(transport, port).mustAnswer(port)
		})
		t.Run(transport+"/pod deleted", func(t *testing.T) {
			p := newPod(t, n, node.PodSpec{Name: "deleted-" + strings.ToLower(transport)})
			p.t = t
			port := p.listen("127.0.0.1", func(c *net.TCPConn) { io.Copy(c, c) })
			f := p.forward(transport, port)
			conn, err := f.dial(port)
			if err != nil {
				t.Fatal(err)
			}
			defer conn.Close()
			io.WriteString(conn, "x")
			if _, err := io.ReadFull(conn, make([]byte, 1)); err != nil {
				t.Fatal(err)
			}
			removed := make(chan error, 1)
			go func() { removed <- n.RemovePod(t.Context(), p.id) }() // which is bounded
			select {
			case err := <-f.ended:
				f.ended <- err
			case <-time.After(patience):
				t.Error("the client was not released")
			}
			if err := <-removed; err != nil {
				t.Error(err)
			}
		})
	}
}

func testPortForward(t *testing.T, shared *testPod, transport string) {
	p := *shared
	p.t = t
	t.Run("neighbours of a reset and of a refused connection live", func(t *testing.T) {
		p := p
		p.t = t
		good, nobody := p.listen("127.0.0.1", answer), p.unusedPort()
		bad := p.listen("127.0.0.1", func(c *net.TCPConn) {
			io.ReadFull(c, make([]byte, 3))
			c.SetLinger(0)
		})
		f := p.forward(transport, good, bad, nobody)
		for range 3 {
			f.talk(bad, "abc") //nolint:errcheck // whatever the local program sees, the neighbour must live
			f.mustAnswer(good)
			if got, _ := f.talk(nobody, "abc"); got != "" {
				t.Errorf("a port without a listener answered %q", got)
			}
			f.mustAnswer(good)
		}
	})
	t.Run("listeners on ::1 and on the pod's own address", func(t *testing.T) {
		p := p
		p.t = t
		six, own := p.listen("::1", answer), p.listen(p.address, answer)
		f := p.forward(transport, six, own)
		f.mustAnswer(six)
		f.mustAnswer(own)
	})
	t.Run("late answer after FIN", func(t *testing.T) {
		t.Parallel()
		p := p
		p.t = t
		port := p.listen("127.0.0.1", func(c *net.TCPConn) {
			all, err := io.ReadAll(c)
			if err != nil {
				return
			}
			time.Sleep(65 * time.Second) // longer than any idle limit on the way that is known of
			fmt.Fprintf(c, "%d bytes %s", len(all), strings.Repeat("x", 1<<20))
		})
		conn, err := p.forward(transport, port).dial(port)
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		conn.Write(make([]byte, 1<<20))
		conn.CloseWrite()
		if got, err := io.ReadAll(conn); len(got) != len("1048576 bytes ")+1<<20 || err != nil {
			t.Errorf("an answer of %d bytes, %v", len(got), err)
		}
	})
	t.Run("upload of pieces of all sizes", func(t *testing.T) {
		t.Parallel()
		p := p
		p.t = t
		const size = 64 << 20
		port := p.listen("127.0.0.1", func(c *net.TCPConn) {
			sum := sha256.New()
			io.Copy(sum, c) //nolint:errcheck // the sum tells
			fmt.Fprintf(c, "%x", sum.Sum(nil))
		})
		conn, err := p.forward(transport, port).dial(port)
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		sum := sha256.New()
		for piece, sent := make([]byte, 64<<10), 0; sent < size; {
			rand.Read(piece) //nolint:errcheck // it never fails
			n := min(mathrand.IntN(len(piece))+1, size-sent)
			sum.Write(piece[:n])
			if _, err := conn.Write(piece[:n]); err != nil {
				t.Fatal(err)
			}
			sent += n
		}
		conn.CloseWrite()
		if got, err := io.ReadAll(conn); string(got) != fmt.Sprintf("%x", sum.Sum(nil)) || err != nil {
			t.Errorf("the pod got something else, of the sum %q, %v", got, err)
		}
	})
	t.Run("upload after the pod's EOF", func(t *testing.T) {
		t.Parallel()
		p := p
		p.t = t
		uploaded := make(chan int64, 1)
		port := p.listen("127.0.0.1", func(c *net.TCPConn) {
			// Not before the byte is there: a client-go that is told of the end drops what it has not sent.
			first, _ := io.ReadFull(c, make([]byte, 1)) //nolint:errcheck // counted
			io.WriteString(c, "enough")
			c.CloseWrite()
			n, _ := io.Copy(io.Discard, c) //nolint:errcheck // its end may be a reset
			uploaded <- int64(first) + n
		})
		conn, err := p.forward(transport, port).dial(port)
		if err != nil {
			t.Fatal(err)
		}
		conn.Write([]byte("x"))
		if got, err := io.ReadAll(conn); string(got) != "enough" || err != nil {
			t.Errorf("answer %q, %v", got, err)
		}
		conn.Close()
		select {
		case n := <-uploaded:
			if n != 1 {
				t.Errorf("the pod got %d bytes", n)
			}
		case <-time.After(patience):
			t.Error("the pod's connection does not end")
		}
	})
}

// usage is what a process holds.
type usage struct{ descriptors, threads, rssKiB int }

func usageOf(t testing.TB, pid int) usage {
	t.Helper()
	var u usage
	entries, err := os.ReadDir(fmt.Sprintf("/proc/%d/fd", pid))
	if err != nil {
		t.Fatal(err)
	}
	u.descriptors = len(entries)
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(status)) {
		name, value, _ := strings.Cut(line, ":")
		number, _ := strconv.Atoi(strings.TrimSuffix(strings.TrimSpace(value), " kB"))
		switch name {
		case "Threads":
			u.threads = number
		case "RssAnon":
			u.rssKiB = number
		}
	}
	return u
}

// TestTenThousandConnections leave nothing behind in streamshim: no descriptor, no thread, no memory
// that grows with their number.
func TestTenThousandConnections(t *testing.T) {
	const connections, atOnce = 10_000, 20
	n := node.StartForTest(t, node.Config{Name: "thousand", Streamshim: node.Binary(t)})
	p := newPod(t, n, node.PodSpec{})
	port := p.listen("127.0.0.1", answer)
	pid := n.PID("streamshim")
	for _, transport := range transports {
		t.Run(transport, func(t *testing.T) {
			p := *p
			p.t = t
			f := p.forward(transport, port)
			many := func(count int) {
				work := make(chan struct{})
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
				for range count {
					work <- struct{}{}
				}
				close(work)
				workers.Wait()
			}
			many(500) // what is made once is there now
			before := usageOf(t, pid)
			many(connections)
			deadline := time.Now().Add(patience)
			after := usageOf(t, pid)
			for ; after.descriptors > before.descriptors && time.Now().Before(deadline); after = usageOf(t, pid) {
				time.Sleep(100 * time.Millisecond)
			}
			t.Logf("before %+v, after %+v", before, after)
			if after.descriptors > before.descriptors || after.threads > before.threads+8 || after.rssKiB > before.rssKiB+8<<10 {
				t.Errorf("%d connections left something behind: before %+v, after %+v", connections, before, after)
			}
		})
	}
}
