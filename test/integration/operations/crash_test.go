package operations

import (
	"context"
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"os/exec"
	"strings"
	"testing"
	"time"

	"github.com/gorilla/websocket"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/portforward"
	"k8s.io/client-go/tools/remotecommand"
	"k8s.io/client-go/transport/spdy"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/streamshim/streamshim/internal/testutil"
	"github.com/streamshim/streamshim/test/internal/node"
	"github.com/streamshim/streamshim/test/internal/wire"
)

// cutClient is a client whose session ends with an error. The session has begun when its output has the text.
type cutClient struct {
	output *testutil.Buffer
	ready  string
	ended  chan error
}

// TestNoClientTakesAKillForSuccess checks that no client takes the end of streamshim by SIGKILL for a success. When a
// connection breaks, spdystream ends all its streams as if they had ended well. But then the error stream has a byte that
// is not a status.
func TestNoClientTakesAKillForSuccess(t *testing.T) {
	o := start(t, "crash", operatedConfig)
	pod, err := o.RunPod(t.Context(), node.PodSpec{Name: "ticks"})
	if err != nil {
		t.Fatal(err)
	}
	ticks, err := o.RunContainer(t.Context(), pod, node.ContainerSpec{Command: []string{"sh", "-c", "while :; do echo ready; sleep 0.2; done"}})
	if err != nil {
		t.Fatal(err)
	}
	command := []string{"sh", "-c", "echo ready; exec sleep 1000"}

	clients := map[string]*cutClient{}
	for _, transport := range []string{"spdy", "websocket"} {
		executor := spdyExecutor
		if transport == "websocket" {
			executor = webSocketExecutor
		}
		execution, err := o.Runtime().Exec(t.Context(), &runtimeapi.ExecRequest{ContainerId: ticks, Cmd: command, Stdout: true, Stderr: true})
		if err != nil {
			t.Fatal(err)
		}
		clients["client-go exec "+transport] = stream(t, executor, execution.Url)
		attachment, err := o.Runtime().Attach(t.Context(), &runtimeapi.AttachRequest{ContainerId: ticks, Stdout: true, Stderr: true})
		if err != nil {
			t.Fatal(err)
		}
		clients["client-go attach "+transport] = stream(t, executor, attachment.Url)
		clients["crictl exec "+transport] = o.crictl("ready", append([]string{"exec", "-r", transport, ticks}, command...)...)
		clients["crictl attach "+transport] = o.crictl("ready", "attach", "-r", transport, ticks)
		clients["crictl port-forward "+transport] = o.crictl("Forwarding from", "port-forward", "-r", transport, pod, "0:80")
	}
	clients["crictl exec -s"] = o.crictl("", "exec", "-s", ticks, "sleep", "1000")
	forward, err := o.Runtime().PortForward(t.Context(), &runtimeapi.PortForwardRequest{PodSandboxId: pod})
	if err != nil {
		t.Fatal(err)
	}
	clients["client-go port-forward spdy"] = forwardPorts(t, forward.Url)

	for name, c := range clients {
		testutil.Eventually(t, name+" is there", func() bool { return strings.Contains(c.output.String(), c.ready) })
	}
	if err := o.StopStreamshim(0); err != nil {
		t.Fatal(err)
	}
	for name, c := range clients {
		select {
		case err := <-c.ended:
			if err == nil {
				t.Errorf("%s takes the end of streamshim for success: %q", name, c.output)
			}
			t.Logf("%s: %v: %.200q", name, err, last(c.output.String()))
		case <-time.After(testutil.Patience):
			t.Errorf("%s does not end", name)
		}
	}
	if err := o.StartStreamshim(t.Context()); err != nil {
		t.Fatal(err)
	}
	// A complete session afterwards ends as usual: the byte is part of a status.
	again, err := o.Runtime().Exec(t.Context(), &runtimeapi.ExecRequest{ContainerId: ticks, Cmd: []string{"echo", "ready"}, Stdout: true, Stderr: true})
	if err != nil {
		t.Fatal(err)
	}
	if err := <-stream(t, spdyExecutor, again.Url).ended; err != nil {
		t.Errorf("a session after the kill: %v", err)
	}
}

// TestNoProtocolTakesAKillForSuccess checks the same for each protocol, as a client sees it that only reads the wire: over
// WebSocket there is no Close and no status, over SPDY the error stream has begun, and no stream and no connection ends in order.
func TestNoProtocolTakesAKillForSuccess(t *testing.T) {
	o := start(t, "wire", operatedConfig)
	pod, err := o.RunPod(t.Context(), node.PodSpec{Name: "ticks"})
	if err != nil {
		t.Fatal(err)
	}
	ticks, err := o.RunContainer(t.Context(), pod, node.ContainerSpec{Command: []string{"sh", "-c", "mkdir -p /srv; httpd -p 80 -h /srv; while :; do echo ready; sleep 0.2; done"}})
	if err != nil {
		t.Fatal(err)
	}
	testutil.Eventually(t, "the port is open", func() bool { // 0050 is 80
		return o.Crictl("exec", "-s", ticks, "grep", "-q", ":0050 ", "/proc/net/tcp", "/proc/net/tcp6").Run() == nil
	})
	execution := func(tty bool) string {
		response, err := o.Runtime().Exec(t.Context(), &runtimeapi.ExecRequest{ContainerId: ticks, Cmd: []string{"sh", "-c", "echo ready; exec sleep 1000"}, Stdout: true, Tty: tty})
		if err != nil {
			t.Fatal(err)
		}
		return response.Url
	}
	attachment := func() string {
		response, err := o.Runtime().Attach(t.Context(), &runtimeapi.AttachRequest{ContainerId: ticks, Stdout: true})
		if err != nil {
			t.Fatal(err)
		}
		return response.Url
	}
	ends := map[string]<-chan error{}
	for _, protocol := range []string{"", "channel.k8s.io", "base64.channel.k8s.io", "v4.channel.k8s.io", "v4.base64.channel.k8s.io", "v5.channel.k8s.io"} {
		ends["exec over WebSocket "+protocol] = cutWebSocket(t, execution(false), protocol, "ready")
		ends["exec -t over WebSocket "+protocol] = cutWebSocket(t, execution(true), protocol, "ready")
		ends["attach over WebSocket "+protocol] = cutWebSocket(t, attachment(), protocol, "ready")
	}
	for _, protocol := range []string{"v4.channel.k8s.io", "v4.base64.channel.k8s.io", "SPDY/3.1+portforward.k8s.io"} {
		response, err := o.Runtime().PortForward(t.Context(), &runtimeapi.PortForwardRequest{PodSandboxId: pod, Port: []int32{80}})
		if err != nil {
			t.Fatal(err)
		}
		ends["port-forward over WebSocket "+protocol] = cutWebSocket(t, response.Url, protocol, "")
	}
	// Clients of older protocols take any text on the error stream for a failure, and its end without text, which they make up when
	// the connection breaks, for success: nothing can be sent beforehand.
	ends["exec over SPDY"] = cutSPDY(t, execution(false), "v4.channel.k8s.io")
	ends["attach over SPDY"] = cutSPDY(t, attachment(), "v4.channel.k8s.io")
	if err := o.StopStreamshim(0); err != nil {
		t.Fatal(err)
	}
	for name, end := range ends {
		if err := testutil.Receive(t, name, end); err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
	if err := o.StartStreamshim(t.Context()); err != nil {
		t.Fatal(err)
	}
}

// cutWebSocket opens a session and waits for the text in its output. The channel gets why the end that follows could be taken for
// success, or nil.
func cutWebSocket(t *testing.T, address, protocol, ready string) <-chan error {
	t.Helper()
	dialer := websocket.Dialer{}
	if protocol != "" {
		dialer.Subprotocols = []string{protocol}
	}
	conn, response, err := dialer.DialContext(t.Context(), strings.Replace(address, "http", "ws", 1), nil)
	if err != nil {
		t.Fatalf("%q: %v", protocol, err)
	}
	response.Body.Close()
	t.Cleanup(func() { conn.Close() })
	if got := conn.Subprotocol(); got != protocol {
		t.Fatalf("protocol %q instead of %q", got, protocol)
	}
	output, failure := byte(1), byte(3)
	if strings.Contains(protocol, "base64") {
		output, failure = '1', '3'
		ready = strings.TrimRight(base64.StdEncoding.EncodeToString([]byte(ready)), "=")
		ready = ready[:len(ready)/4*4] // of what comes behind it the last digit may be another one
	}
	conn.SetReadDeadline(time.Now().Add(testutil.Patience))
	for seen := ""; ready != "" && !strings.Contains(seen, ready); {
		_, message, err := conn.ReadMessage()
		if err != nil {
			t.Fatalf("%q: %v after %q", protocol, err, seen)
		}
		if len(message) > 0 && message[0] == output {
			seen += string(message[1:])
		}
	}
	ended := make(chan error, 1)
	go func() {
		for {
			_, message, err := conn.ReadMessage()
			var closed *websocket.CloseError
			switch {
			case errors.As(err, &closed) && closed.Code != websocket.CloseAbnormalClosure:
				ended <- fmt.Errorf("it is closed: %w", err)
				return
			case err != nil:
				ended <- nil
				return
			case ready != "" && len(message) > 1 && message[0] == failure:
				ended <- fmt.Errorf("its status is %q", message[1:])
				return
			}
		}
	}()
	return ended
}

// cutSPDY is cutWebSocket over SPDY.
func cutSPDY(t *testing.T, address, protocol string) <-chan error {
	t.Helper()
	conn, err := wire.Upgrade(address, protocol)
	if err != nil {
		t.Fatalf("%s: %v", protocol, err)
	}
	t.Cleanup(func() { conn.Close() })
	conn.SetDeadline(time.Now().Add(testutil.Patience))
	frames, failure := conn.AppendStream(nil, "streamtype", "error")
	frames, stdout := conn.AppendStream(frames, "streamtype", "stdout")
	if err := conn.WriteFrames(frames); err != nil {
		t.Fatal(err)
	}
	begun, out := 0, ""
	read := func() error {
		event, err := conn.Next()
		switch {
		case err != nil:
			return err
		case event.Fin:
			return fmt.Errorf("%w: stream %d", errInOrder, event.Stream)
		case event.Stream == failure:
			begun += len(event.Data)
		case event.Stream == stdout:
			out += string(event.Data)
		}
		return nil
	}
	for !strings.Contains(out, "ready") {
		if err := read(); err != nil {
			t.Fatalf("%s: %v", protocol, err)
		}
	}
	ended := make(chan error, 1)
	go func() {
		for {
			err := read()
			switch {
			case err == nil:
				continue
			case errors.Is(err, errInOrder), errors.Is(err, wire.ErrGoAway):
				ended <- err
			case begun == 0:
				ended <- errors.New("the error stream has not begun, and its end, which clients make up, means success")
			default:
				ended <- nil
			}
			return
		}
	}()
	return ended
}

var errInOrder = errors.New("a stream has ended in order")

func last(text string) string {
	lines := strings.Split(strings.TrimSpace(text), "\n")
	return lines[len(lines)-1]
}

func spdyExecutor(u *url.URL) (remotecommand.Executor, error) {
	return remotecommand.NewSPDYExecutor(&rest.Config{Host: u.Host}, http.MethodPost, u)
}

func webSocketExecutor(u *url.URL) (remotecommand.Executor, error) {
	return remotecommand.NewWebSocketExecutor(&rest.Config{Host: u.Host}, http.MethodGet, u.String())
}

// stream runs a session with client-go.
func stream(t *testing.T, executor func(*url.URL) (remotecommand.Executor, error), address string) *cutClient {
	t.Helper()
	u, err := url.Parse(address)
	if err != nil {
		t.Fatal(err)
	}
	e, err := executor(u)
	if err != nil {
		t.Fatal(err)
	}
	c := &cutClient{output: &testutil.Buffer{}, ready: "ready", ended: make(chan error, 1)}
	go func() {
		c.ended <- e.StreamWithContext(context.WithoutCancel(t.Context()), remotecommand.StreamOptions{Stdout: c.output, Stderr: c.output})
	}()
	return c
}

// crictl runs a session with crictl.
func (o *operated) crictl(ready string, args ...string) *cutClient {
	o.t.Helper()
	template := o.Crictl(args...)
	command := exec.Command(template.Path, template.Args[1:]...)
	command.Env = template.Env
	c := &cutClient{output: &testutil.Buffer{}, ready: ready, ended: make(chan error, 1)}
	command.Stdout, command.Stderr = c.output, c.output
	if err := command.Start(); err != nil {
		o.t.Fatal(err)
	}
	o.t.Cleanup(func() { command.Process.Kill() }) //nolint:errcheck // it has ended, or does now
	go func() { c.ended <- command.Wait() }()
	return c
}

// forwardPorts forwards a port with client-go.
func forwardPorts(t *testing.T, address string) *cutClient {
	t.Helper()
	u, err := url.Parse(address)
	if err != nil {
		t.Fatal(err)
	}
	transport, upgrader, err := spdy.RoundTripperFor(&rest.Config{Host: u.Host})
	if err != nil {
		t.Fatal(err)
	}
	dialer := spdy.NewDialer(upgrader, &http.Client{Transport: transport}, http.MethodPost, u)
	stop := make(chan struct{})
	t.Cleanup(func() { close(stop) })
	c := &cutClient{output: &testutil.Buffer{}, ready: "Forwarding from", ended: make(chan error, 1)}
	forwarder, err := portforward.NewOnAddresses(dialer, []string{"127.0.0.1"}, []string{"0:80"}, stop, make(chan struct{}), io.Writer(c.output), c.output)
	if err != nil {
		t.Fatal(err)
	}
	go func() { c.ended <- forwarder.ForwardPorts() }()
	return c
}
