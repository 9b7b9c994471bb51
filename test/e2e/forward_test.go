package e2e

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"regexp"
	"strconv"
	"strings"
	"time"

	"github.com/streamshim/streamshim/internal/testutil"
)

// forwarding is a running kubectl port-forward.
type forwarding struct {
	command *exec.Cmd
	output  testutil.Buffer
	address map[int]string // where it listens, by the pod's port
	ended   chan struct{}
}

// forward starts a port-forward and waits until it listens. End it with close.
func (t *target) forward(ctx context.Context, pod string, ports ...int) (*forwarding, error) {
	args := []string{"port-forward", "--address", t.node.Address, pod}
	for _, port := range ports {
		args = append(args, fmt.Sprintf(":%d", port))
	}
	f := &forwarding{command: t.kubectl(ctx, args...), address: map[int]string{}, ended: make(chan struct{})}
	f.command.Stdout, f.command.Stderr = &f.output, &f.output
	if err := f.command.Start(); err != nil {
		return nil, err
	}
	go func() {
		defer close(f.ended)
		_ = f.command.Wait() // killed, or it tells why in its output
	}()
	err := within(ctx, 30*time.Second, func(ctx context.Context) error {
		return until(ctx, func() error {
			for _, match := range regexp.MustCompile(`Forwarding from (\S+) -> (\d+)\n`).FindAllStringSubmatch(f.output.String(), -1) {
				port, err := strconv.Atoi(match[2])
				if err != nil {
					return err
				}
				f.address[port] = match[1]
			}
			if len(f.address) == len(ports) {
				return nil
			}
			if !f.alive() {
				return fatal{errors.New("it ended")}
			}
			return errors.New("it does not listen")
		})
	})
	if err != nil {
		f.close()
		return nil, fmt.Errorf("port-forward: %w: %s", err, f.output.String())
	}
	return f, nil
}

func (f *forwarding) alive() bool {
	select {
	case <-f.ended:
		return false
	default:
		return true
	}
}

func (f *forwarding) close() {
	_ = f.command.Process.Kill() // no more than a no-op when it has ended
	<-f.ended
}

// page gets a page from one of the pod's servers over a connection of its own.
func (f *forwarding) page(ctx context.Context, port int, path string) (string, error) {
	ctx, cancel := context.WithTimeout(ctx, 8*time.Second)
	defer cancel()
	request, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+f.address[port]+path, nil)
	if err != nil {
		return "", err
	}
	request.Close = true
	response, err := http.DefaultClient.Do(request)
	if err != nil {
		return "", err
	}
	defer func() { _ = response.Body.Close() }()
	text, err := io.ReadAll(response.Body)
	return strings.TrimSpace(string(text)), err
}

// expectPage is nil when kubectl lives and the port answers.
func (f *forwarding) expectPage(ctx context.Context, port int, want string) error {
	got, err := f.page(ctx, port, "/page")
	switch {
	case !f.alive():
		lines := strings.Split(strings.TrimSpace(f.output.String()), "\n")
		return fmt.Errorf("kubectl ended: %s", lines[len(lines)-1])
	case err != nil:
		return fmt.Errorf("port %d does not answer: %w", port, cause(err))
	case got != want:
		return fmt.Errorf("port %d answered %q", port, got)
	}
	return nil
}

// cause leaves out addresses, which differ from run to run.
func cause(err error) error {
	for inner := errors.Unwrap(err); inner != nil; inner = errors.Unwrap(err) {
		err = inner
	}
	return err
}

func checkForward(ctx context.Context, t *target) (string, error) {
	f, err := t.forward(ctx, t.pod, 8080, 8081)
	if err != nil {
		return "", err
	}
	defer f.close()
	for range 5 {
		if err := f.expectPage(ctx, 8080, "first"); err != nil {
			return "", err
		}
		if err := f.expectPage(ctx, 8081, "second"); err != nil {
			return "", err
		}
	}
	return "both answer", nil
}

// checkForwardRefused is kubernetes#74551 and many more.
func checkForwardRefused(ctx context.Context, t *target) (string, error) {
	return t.forwardBad(ctx, 9999)
}

// checkForwardReset connects to a port whose server closes without reading, which resets.
func checkForwardReset(ctx context.Context, t *target) (string, error) {
	return t.forwardBad(ctx, 9001)
}

// forwardBad makes connections to a bad port and looks at the good one beside it.
func (t *target) forwardBad(ctx context.Context, bad int) (string, error) {
	f, err := t.forward(ctx, t.pod, 8080, bad)
	if err != nil {
		return "", err
	}
	defer f.close()
	if err := f.expectPage(ctx, 8080, "first"); err != nil {
		return "", err
	}
	for range 3 {
		if err := useBadPort(ctx, f.address[bad]); err != nil && f.alive() {
			return "", err
		}
		if err := f.expectPage(ctx, 8080, "first"); err != nil {
			return "", err
		}
	}
	return "kubectl lives, the other port answers", nil
}

// useBadPort sends to a port until the connection ends.
func useBadPort(ctx context.Context, address string) error {
	connection, err := (&net.Dialer{}).DialContext(ctx, "tcp", address)
	if err != nil {
		return err
	}
	defer func() { _ = connection.Close() }()
	if err := connection.SetDeadline(time.Now().Add(15 * time.Second)); err != nil {
		return err
	}
	_, err = connection.Write(make([]byte, 64<<10))
	if err == nil {
		_, err = io.Copy(io.Discard, connection)
	}
	if timeout, ok := errors.AsType[net.Error](err); ok && timeout.Timeout() {
		return errors.New("the connection to the bad port stays open")
	}
	return nil // any other end is an end
}

// checkForwardStalledPod sends to a server in the pod that does not read, and looks at the one
// beside it.
func checkForwardStalledPod(ctx context.Context, t *target) (string, error) {
	// streamshim gives a stream that is not read 30 s before it resets it.
	return t.forwardStalled(ctx, 9002, 50*time.Second, func(connection net.Conn) error {
		// More than all buffers on the way take, which is some 60 MB: a write runs into the deadline.
		if err := connection.SetWriteDeadline(time.Now().Add(2 * time.Second)); err != nil {
			return err
		}
		_, err := io.CopyN(connection, zeros{}, 1<<30)
		if errors.Is(err, os.ErrDeadlineExceeded) {
			return nil
		}
		return fmt.Errorf("writing to a server that does not read ended with %v", err) //nolint:errorlint // may be nil
	})
}

// checkForwardStalledClient asks for much and does not read it. kubectl itself then reads nothing of
// its other connections, because its SPDY library has no flow control, whatever the node does.
func checkForwardStalledClient(ctx context.Context, t *target) (string, error) {
	text, err := t.forwardStalled(ctx, 8080, 10*time.Second, func(connection net.Conn) error {
		if _, err := io.WriteString(connection, "GET /big HTTP/1.0\r\n\r\n"); err != nil {
			return err
		}
		_, err := io.ReadFull(connection, make([]byte, 1<<10))
		return err
	})
	if err != nil {
		err = beyondNode{err}
	}
	return text, err
}

// forwardStalled makes a connection stall and looks whether another one answers within the limit, and
// goes on to answer.
func (t *target) forwardStalled(ctx context.Context, port int, limit time.Duration, stall func(net.Conn) error) (string, error) {
	f, err := t.forward(ctx, t.pod, port, 8081)
	if err != nil {
		return "", err
	}
	defer f.close()
	stalled, err := (&net.Dialer{}).DialContext(ctx, "tcp", f.address[port])
	if err != nil {
		return "", err
	}
	defer func() { _ = stalled.Close() }()
	if err := stall(stalled); err != nil {
		return "", fmt.Errorf("the stalled connection: %w", err)
	}
	start := time.Now()
	err = within(ctx, limit, func(ctx context.Context) error {
		return until(ctx, func() error {
			err := f.expectPage(ctx, 8081, "second")
			if err != nil && !f.alive() {
				return fatal{err}
			}
			return err
		})
	})
	held := time.Since(start)
	if err != nil {
		return "", fmt.Errorf("for %d s: %w", int(held.Seconds()), err)
	}
	for range 20 {
		if err := f.expectPage(ctx, 8081, "second"); err != nil {
			return "", err
		}
	}
	return fmt.Sprintf("the other port answers, held up for %d s", int(held.Seconds())), nil
}

type zeros struct{}

func (zeros) Read(p []byte) (int, error) {
	clear(p)
	return len(p), nil
}
