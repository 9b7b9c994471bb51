package harness

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"net/url"
	"testing"
	"time"

	"k8s.io/apimachinery/pkg/util/proxy"
	apiserverproxy "k8s.io/apiserver/pkg/util/proxy"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/remotecommand"
	utilexec "k8s.io/client-go/util/exec"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/streamshim/streamshim/internal/testutil"
)

// Transports are the two protocols between clients and server: SPDY/3.1 with protocol v4, and WebSocket with v5.
var Transports = []string{"SPDY", "WebSocket"}

// ForEachTransport runs a test over each of Transports, in parallel.
func ForEachTransport(t *testing.T, f func(t *testing.T, transport string)) {
	for _, transport := range Transports {
		t.Run(transport, func(t *testing.T) {
			t.Parallel()
			f(t, transport)
		})
	}
}

// ExecURL asks for the URL of a command with the streams in the options.
func (s *Streamshim) ExecURL(t *testing.T, container string, options remotecommand.StreamOptions, args ...string) *url.URL {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), testutil.Patience)
	defer cancel()
	response, err := s.Runtime.Exec(ctx, &runtimeapi.ExecRequest{
		ContainerId: container, Cmd: args, Tty: options.Tty,
		Stdin: options.Stdin != nil, Stdout: options.Stdout != nil, Stderr: options.Stderr != nil,
	})
	if err != nil {
		t.Fatal(err)
	}
	return parseURL(t, response.Url)
}

// AttachURL asks for the URL of an attach with the streams in the options.
func (s *Streamshim) AttachURL(t *testing.T, container string, options remotecommand.StreamOptions) *url.URL {
	t.Helper()
	response, err := s.Runtime.Attach(t.Context(), &runtimeapi.AttachRequest{
		ContainerId: container, Tty: options.Tty,
		Stdin: options.Stdin != nil, Stdout: options.Stdout != nil, Stderr: options.Stderr != nil,
	})
	if err != nil {
		t.Fatal(err)
	}
	return parseURL(t, response.Url)
}

func parseURL(t *testing.T, raw string) *url.URL {
	t.Helper()
	u, err := url.Parse(raw)
	if err != nil {
		t.Fatal(err)
	}
	return u
}

// Stream serves the URL with stock client-go, which sends a ping every 5 s. It returns even if client-go does not:
// client-go cannot return while one of its writes is blocked.
func Stream(ctx context.Context, transport, u string, options remotecommand.StreamOptions) error {
	if g, ok := options.Stdout.(*Gate); ok {
		defer g.leave()
	}
	target, err := url.Parse(u)
	if err != nil {
		return err
	}
	config := &rest.Config{Host: target.Host}
	var executor remotecommand.Executor
	if transport == "WebSocket" {
		executor, err = remotecommand.NewWebSocketExecutor(config, http.MethodGet, u)
	} else {
		executor, err = remotecommand.NewSPDYExecutor(config, http.MethodPost, target)
	}
	if err != nil {
		return err
	}
	bounded, cancel := context.WithTimeout(ctx, sessionTimeout)
	defer cancel()
	ended := make(chan error, 1)
	go func() { ended <- executor.StreamWithContext(bounded, options) }()
	select {
	case err = <-ended:
	case <-bounded.Done():
		select {
		case err = <-ended:
		case <-time.After(10 * time.Second):
			err = fmt.Errorf("client-go is stuck: %w", bounded.Err())
		}
	}
	if bounded.Err() != nil && ctx.Err() == nil {
		return fmt.Errorf("the %s session of %s did not end within %v: %w", transport, u, sessionTimeout, err)
	}
	return err
}

// Exec runs a command to its end, as kubectl does.
func (s *Streamshim) Exec(t *testing.T, transport, container string, options remotecommand.StreamOptions, args ...string) error {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), testutil.Patience)
	defer cancel()
	return Stream(ctx, transport, s.ExecURL(t, container, options, args...).String(), options)
}

// Begin runs a session in the background. Cancelling it closes the connection in order.
func Begin(t *testing.T, transport string, u *url.URL, options remotecommand.StreamOptions) (result <-chan error, cancel context.CancelFunc) {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- Stream(ctx, transport, u.String(), options) }()
	t.Cleanup(cancel)
	return ended, cancel
}

// AwaitEnd returns the result of a session that is about to end.
func AwaitEnd(t *testing.T, ended <-chan error) error {
	t.Helper()
	select {
	case err := <-ended:
		return err
	case <-time.After(testutil.Patience):
		t.Fatalf("the session did not end within %v", testutil.Patience)
		panic("unreachable")
	}
}

// ExitCode returns the exit code that kubectl would have.
func ExitCode(t *testing.T, err error) int {
	t.Helper()
	if err == nil {
		return 0
	}
	var exit utilexec.CodeExitError
	if !errors.As(err, &exit) {
		t.Fatalf("no exit code: %v", err)
	}
	return exit.Code
}

// ThroughProxies puts upgrade proxies before the URL. One proxy is like the kubelet. Two are like kubelet and API server,
// the latter of which translates WebSocket to SPDY.
func ThroughProxies(t *testing.T, target *url.URL, hops int, transport string, options remotecommand.StreamOptions) *url.URL {
	for i := range hops {
		upstream := *target
		translates := i == 1 && transport == "WebSocket"
		server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			if translates {
				apiserverproxy.NewStreamTranslatorHandler(&upstream, nil, 0, apiserverproxy.Options{
					Stdin: options.Stdin != nil, Stdout: options.Stdout != nil, Stderr: options.Stderr != nil, Tty: options.Tty,
				}).ServeHTTP(w, r)
				return
			}
			proxy.NewUpgradeAwareHandler(&upstream, nil, false, true, proxyError{}).ServeHTTP(w, r)
		}))
		t.Cleanup(func() {
			closed := make(chan struct{})
			go func() {
				defer close(closed)
				server.Close() // waits for its connections
			}()
			select {
			case <-closed:
			case <-time.After(testutil.Patience):
				t.Errorf("a proxy to %s still has connections after %v", upstream.Host, testutil.Patience)
			}
		})
		u := parseURL(t, server.URL)
		u.Path = "/exec"
		target = u
	}
	return target
}

type proxyError struct{}

func (proxyError) Error(w http.ResponseWriter, _ *http.Request, err error) {
	http.Error(w, err.Error(), http.StatusBadGateway)
}

// Gate is a writer that accepts nothing until it is opened. It makes a client that does not read.
type Gate struct {
	io.Writer
	opened, left chan struct{}
}

// NewGate returns a closed gate before a writer.
func NewGate(w io.Writer) *Gate {
	return &Gate{Writer: w, opened: make(chan struct{}), left: make(chan struct{})}
}

func (g *Gate) Write(p []byte) (int, error) {
	select {
	case <-g.opened:
		return g.Writer.Write(p)
	case <-g.left:
		return 0, errors.New("the client has left")
	}
}

// Open lets all data through.
func (g *Gate) Open() { close(g.opened) }

// leave unblocks what waits in the gate once the session is over. Otherwise it would be in every dump of goroutines.
func (g *Gate) leave() { close(g.left) }

// Flood is a stdin that never ends.
type Flood struct{}

func (Flood) Read(p []byte) (int, error) { return len(p), nil }

// OpenStdin returns a stdin that has no input until the test ends.
func OpenStdin(t *testing.T) io.Reader {
	r, w := io.Pipe()
	t.Cleanup(func() { w.Close() })
	return r
}

// ExitCodeOf is like ExitCode, for use in goroutines. It returns -1 if there is no exit code.
func ExitCodeOf(err error) int {
	var exit utilexec.CodeExitError
	switch {
	case err == nil:
		return 0
	case errors.As(err, &exit):
		return exit.Code
	}
	return -1
}

// Sizes passes terminal sizes to client-go.
type Sizes chan remotecommand.TerminalSize

// Next implements remotecommand.TerminalSizeQueue.
func (s Sizes) Next() *remotecommand.TerminalSize {
	size, ok := <-s
	if !ok {
		return nil
	}
	return &size
}
