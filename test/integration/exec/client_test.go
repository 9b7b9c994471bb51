package exec

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"os/exec"
	"strings"
	"sync"
	"testing"
	"time"

	"k8s.io/apimachinery/pkg/util/proxy"
	apiserverproxy "k8s.io/apiserver/pkg/util/proxy"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/remotecommand"
	utilexec "k8s.io/client-go/util/exec"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// transports are the two ways in which clients speak to the server: SPDY/3.1 with protocol v4, and
// WebSocket with v5.
var transports = []string{"SPDY", "WebSocket"}

func forEachTransport(t *testing.T, f func(t *testing.T, transport string)) {
	for _, transport := range transports {
		t.Run(transport, func(t *testing.T) {
			t.Parallel()
			f(t, transport)
		})
	}
}

// execURL asks for the URL of a command with the streams that the options have.
func (s *streamshim) execURL(t *testing.T, container string, options remotecommand.StreamOptions, args ...string) *url.URL {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), testTimeout)
	defer cancel()
	response, err := s.runtime.Exec(ctx, &runtimeapi.ExecRequest{
		ContainerId: container, Cmd: args, Tty: options.Tty,
		Stdin: options.Stdin != nil, Stdout: options.Stdout != nil, Stderr: options.Stderr != nil,
	})
	if err != nil {
		t.Fatal(err)
	}
	return parseURL(t, response.Url)
}

func (s *streamshim) attachURL(t *testing.T, container string, options remotecommand.StreamOptions) *url.URL {
	t.Helper()
	response, err := s.runtime.Attach(t.Context(), &runtimeapi.AttachRequest{
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

// stream serves the URL with stock client-go, which sends pings every 5 s. It always returns, if need be
// without client-go, which cannot leave while one of its writes is stuck.
func stream(ctx context.Context, transport, u string, options remotecommand.StreamOptions) error {
	if g, ok := options.Stdout.(*gate); ok {
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

// exec runs a command to its end, as kubectl would.
func (s *streamshim) exec(t *testing.T, transport, container string, options remotecommand.StreamOptions, args ...string) error {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), testTimeout)
	defer cancel()
	return stream(ctx, transport, s.execURL(t, container, options, args...).String(), options)
}

// begin runs a session in the background. Cancelling ends it as a client does that closes politely.
func begin(t *testing.T, transport string, u *url.URL, options remotecommand.StreamOptions) (result <-chan error, cancel context.CancelFunc) {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- stream(ctx, transport, u.String(), options) }()
	t.Cleanup(cancel)
	return ended, cancel
}

// awaitEnd returns what the client of a session that is due to end was told.
func awaitEnd(t *testing.T, ended <-chan error) error {
	t.Helper()
	select {
	case err := <-ended:
		return err
	case <-time.After(testTimeout):
		t.Fatalf("the session did not end within %v", testTimeout)
		panic("unreachable")
	}
}

// exitCode is what kubectl would exit with.
func exitCode(t *testing.T, err error) int {
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

// throughProxies puts upgrade proxies before the URL: one as the kubelet is, two as kubelet and API
// server are, of which the latter translates WebSocket to SPDY.
func throughProxies(t *testing.T, target *url.URL, hops int, transport string, options remotecommand.StreamOptions) *url.URL {
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
			case <-time.After(testTimeout):
				t.Errorf("a proxy to %s still has connections after %v", upstream.Host, testTimeout)
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

// gate is a writer that takes nothing until it is opened: a client that does not read.
type gate struct {
	io.Writer
	opened, left chan struct{}
}

func newGate(w io.Writer) *gate {
	return &gate{Writer: w, opened: make(chan struct{}), left: make(chan struct{})}
}

func (g *gate) Write(p []byte) (int, error) {
	select {
	case <-g.opened:
		return g.Writer.Write(p)
	case <-g.left:
		return 0, errors.New("the client has left")
	}
}

func (g *gate) open() { close(g.opened) }

// leave ends what is stuck in the gate once the session is over; it would be in every dump of goroutines.
func (g *gate) leave() { close(g.left) }

// flood is a stdin that never ends.
type flood struct{}

func (flood) Read(p []byte) (int, error) { return len(p), nil }

// openStdin is a stdin on which nothing comes until the test ends.
func openStdin(t *testing.T) io.Reader {
	r, w := io.Pipe()
	t.Cleanup(func() { w.Close() })
	return r
}

// buffer is a bytes.Buffer for several goroutines.
type buffer struct {
	mu   sync.Mutex
	text strings.Builder
}

func (b *buffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.text.Write(p)
}

func (b *buffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.text.String()
}

// clientVariable makes this test binary a client of several sessions, to be killed.
const clientVariable = "STREAMSHIM_SYMPTOMS_CLIENT"

// clientSession is one session of a client.
type clientSession struct {
	Transport, URL string
	TTY            bool
	Stdin          string // "", "open" or "flood"
	Blocked        bool   // reads no output
}

func (c clientSession) options() remotecommand.StreamOptions {
	options := remotecommand.StreamOptions{Stdout: io.Discard, Tty: c.TTY}
	if !c.TTY {
		options.Stderr = io.Discard
	}
	if c.Blocked {
		options.Stdout = newGate(io.Discard)
	}
	switch c.Stdin {
	case "open":
		options.Stdin, _ = io.Pipe()
	case "flood":
		options.Stdin = flood{}
	}
	return options
}

func clientMain() int {
	var sessions []clientSession
	if err := json.Unmarshal([]byte(os.Getenv(clientVariable)), &sessions); err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 2
	}
	for _, s := range sessions {
		go func() {
			if err := stream(context.Background(), s.Transport, s.URL, s.options()); err != nil {
				fmt.Fprintf(os.Stderr, "%+v: %v\n", s, err)
			}
		}()
	}
	time.Sleep(time.Hour) // it is to be killed
	return 0
}

// startClient runs sessions in a process of their own, which the caller may kill and else is killed
// when the test ends.
func startClient(t *testing.T, sessions []clientSession) *os.Process {
	t.Helper()
	text, err := json.Marshal(sessions)
	if err != nil {
		t.Fatal(err)
	}
	command := exec.Command(os.Args[0])
	command.Env = append(os.Environ(), clientVariable+"="+string(text))
	command.Stderr = os.Stderr
	if err := command.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		command.Process.Kill() //nolint:errcheck // it may be dead
		command.Wait()         //nolint:errcheck // as above
	})
	return command.Process
}

// exitCodeOf is exitCode for goroutines: -1 when there is none.
func exitCodeOf(err error) int {
	var exit utilexec.CodeExitError
	switch {
	case err == nil:
		return 0
	case errors.As(err, &exit):
		return exit.Code
	}
	return -1
}
