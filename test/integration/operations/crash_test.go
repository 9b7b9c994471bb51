package operations

import (
	"context"
	"io"
	"net/http"
	"net/url"
	"os/exec"
	"strings"
	"testing"
	"time"

	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/portforward"
	"k8s.io/client-go/tools/remotecommand"
	"k8s.io/client-go/transport/spdy"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/streamshim/streamshim/internal/testutil"
	"github.com/streamshim/streamshim/test/internal/node"
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
