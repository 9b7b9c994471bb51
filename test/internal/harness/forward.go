package harness

import (
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"os"
	"runtime"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	"k8s.io/apimachinery/pkg/util/httpstream" //nolint:staticcheck // what client-go 0.37 takes and gives
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/portforward"
	"k8s.io/client-go/transport/spdy"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/streamshim/streamshim/internal/testutil"
	"github.com/streamshim/streamshim/test/internal/node"
)

// Pod is a pod whose programs the test itself plays, in the pod's network namespace.
type Pod struct {
	t       testing.TB
	runtime runtimeapi.RuntimeServiceClient
	ID      string
	Address string
	netns   string // path; empty for a pod with hostNetwork
}

// NewPod runs a pod for this test. With For another test can play its programs.
func NewPod(t testing.TB, n *node.Node, spec node.PodSpec) *Pod {
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
	p := &Pod{t: t, runtime: n.Runtime(), ID: id, Address: status.Status.Network.Ip}
	if !spec.HostNetwork {
		p.netns = fmt.Sprintf("/proc/%d/ns/net", info.Pid)
	}
	return p
}

// For returns the same pod for a subtest.
func (p *Pod) For(t testing.TB) *Pod {
	q := *p
	q.t = t
	return &q
}

// Through returns the same pod with its ports forwarded by another streamshim.
func (p *Pod) Through(shim *Streamshim) *Pod {
	q := *p
	q.runtime = shim.Runtime
	return &q
}

// Listen listens on an address in the pod, on any free port, and serves each connection. It returns the port.
func (p *Pod) Listen(host string, serve func(*net.TCPConn)) int {
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

// hostNetwork is this machine's network namespace. It is opened before any thread enters another one: /proc/self is the
// process's first thread, which may be in a pod later.
var hostNetwork, errHostNetwork = os.Open("/proc/self/ns/net")

// listenIn opens the socket on a thread that enters the pod's namespace for that time. The socket stays in the namespace.
func (p *Pod) listenIn(address string) (net.Listener, error) {
	if p.netns == "" {
		return net.Listen("tcp", address)
	}
	pod, err := os.Open(p.netns)
	if err != nil {
		return nil, err
	}
	defer pod.Close()
	if errHostNetwork != nil {
		return nil, errHostNetwork
	}
	runtime.LockOSThread()
	if err := unix.Setns(int(pod.Fd()), unix.CLONE_NEWNET); err != nil {
		runtime.UnlockOSThread()
		return nil, err
	}
	listener, err := net.Listen("tcp", address)
	if back := unix.Setns(int(hostNetwork.Fd()), unix.CLONE_NEWNET); back != nil {
		return nil, back // the thread stays locked, so it ends with the goroutine
	}
	runtime.UnlockOSThread()
	return listener, err
}

// UnusedPort returns a port on which nothing in the pod listens.
func (p *Pod) UnusedPort() int {
	p.t.Helper()
	listener, err := p.listenIn("127.0.0.1:0")
	if err != nil {
		p.t.Fatal(err)
	}
	defer listener.Close()
	return listener.Addr().(*net.TCPAddr).Port
}

// Forward is a running `kubectl port-forward` that ends with its test.
type Forward struct {
	t     testing.TB
	local map[int]int // by the pod's port
	Ended chan error  // how it ended, once
	stop  func()
}

// Forward forwards ports of the pod.
func (p *Pod) Forward(transport string, ports ...int) *Forward {
	p.t.Helper()
	return StartForward(p.t, p.runtime, p.ID, transport, ports...)
}

// StartForward forwards ports of a pod with stock client-go.
func StartForward(t testing.TB, streamshim runtimeapi.RuntimeServiceClient, pod, transport string, ports ...int) *Forward {
	t.Helper()
	request := &runtimeapi.PortForwardRequest{PodSandboxId: pod}
	var arguments []string
	for _, port := range ports {
		request.Port = append(request.Port, int32(port)) //nolint:gosec // a port
		arguments = append(arguments, fmt.Sprintf("0:%d", port))
	}
	response, err := streamshim.PortForward(t.Context(), request)
	if err != nil {
		t.Fatal(err)
	}
	u, err := url.Parse(response.Url)
	if err != nil {
		t.Fatal(err)
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
		t.Fatal(err)
	}
	stop, ready := make(chan struct{}), make(chan struct{})
	f := &Forward{t: t, local: map[int]int{}, Ended: make(chan error, 1), stop: sync.OnceFunc(func() { close(stop) })}
	forwarder, err := portforward.New(dialer, arguments, stop, ready, io.Discard, io.Discard)
	if err != nil {
		t.Fatal(err)
	}
	go func() { f.Ended <- forwarder.ForwardPorts() }()
	select {
	case <-ready:
	case err := <-f.Ended:
		t.Fatalf("port-forward: %v", err)
	case <-time.After(testutil.Patience):
		t.Fatal("the port-forward is not ready")
	}
	forwarded, err := forwarder.GetPorts()
	if err != nil {
		t.Fatal(err)
	}
	for _, port := range forwarded {
		f.local[int(port.Remote)] = int(port.Local)
	}
	t.Cleanup(f.Close)
	return f
}

// Close ends the port-forward and waits for its end.
func (f *Forward) Close() {
	f.t.Helper()
	f.stop()
	select {
	case err := <-f.Ended:
		f.Ended <- err
	case <-time.After(testutil.Patience):
		f.t.Error("the port-forward does not end")
	}
}

// Dial connects to a port of the pod.
func (f *Forward) Dial(port int) (*net.TCPConn, error) {
	conn, err := net.Dial("tcp", fmt.Sprintf("127.0.0.1:%d", f.local[port]))
	if err != nil {
		return nil, err
	}
	conn.SetDeadline(time.Now().Add(2 * testutil.Patience))
	return conn.(*net.TCPConn), nil
}

// Talk sends a line and returns all that it receives.
func (f *Forward) Talk(port int, line string) (string, error) {
	conn, err := f.Dial(port)
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

// Answer serves one request and closes first.
func Answer(conn *net.TCPConn) {
	request := make([]byte, 3)
	if _, err := io.ReadFull(conn, request); err == nil {
		fmt.Fprintf(conn, "answer to %s", request)
	}
}

// MustAnswer checks that Answer, which listens on a port of the pod, answers.
func (f *Forward) MustAnswer(port int) {
	f.t.Helper()
	select {
	case err := <-f.Ended:
		f.Ended <- err
		f.t.Fatalf("the port-forward has ended: %v", err)
	default:
	}
	if got, err := f.Talk(port, "abc"); got != "answer to abc" {
		f.t.Fatalf("port %d answered %q, %v", port, got, err)
	}
}
