package cri

import (
	"bufio"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/streamshim/streamshim/test/internal/harness"
	"github.com/streamshim/streamshim/test/internal/node"
)

// TestContainerdRestart kills containerd during sessions and starts it again. The sessions must go on all the time, calls
// must fail with Unavailable while it is away, and streamshim must find it again by itself.
func TestContainerdRestart(t *testing.T) {
	n := harness.Shared.Node
	pod, known := runLab(t, n, node.PodSpec{Name: "known"}, node.ContainerSpec{})
	if _, err := n.Runtime().ExecSync(t.Context(), &runtimeapi.ExecSyncRequest{ContainerId: known, Cmd: []string{"true"}}); err != nil {
		t.Fatal(err)
	}
	before := takeFootprint(t, n, known)
	streamshim := n.PID("streamshim")

	for _, transport := range []string{"spdy", "websocket"} {
		t.Run(transport, func(t *testing.T) {
			_, fresh := runLab(t, n, node.PodSpec{Name: "fresh-" + transport}, node.ContainerSpec{}) // no earlier exec was in it
			shell := startInTerminal(t, n.Crictl("exec", "-r", transport, "-it", known, "sh"), 80, 24)
			cat := start(t, n.Crictl("exec", "-r", transport, "-i", known, "cat"))
			forward := start(t, n.Crictl("port-forward", "-r", transport, pod, ":80"))
			address := forward.forwardedTo(80)
			web := dialHTTP(t, address)

			rounds := 0
			alive := func(when string) {
				t.Helper()
				rounds++
				shell.write(fmt.Sprintf("echo round $((%d+1000))\n", rounds))
				shell.expect(fmt.Sprintf("round %d", rounds+1000)) // what the shell prints, not the terminal's echo
				line := fmt.Sprintf("line %d\n", rounds)
				cat.write(line)
				cat.expect(line)
				if err := web.get(); err != nil {
					t.Errorf("%s: the open connection through the port-forward: %v", when, err)
				}
				if err := dialHTTP(t, address).get(); err != nil {
					t.Errorf("%s: a new connection through the port-forward: %v", when, err)
				}
			}
			alive("before")

			if err := n.KillContainerd(); err != nil {
				t.Fatal(err)
			}
			alive("while containerd is away")
			for name, call := range map[string]func() error{
				"Version": func() error {
					_, err := n.Runtime().Version(t.Context(), &runtimeapi.VersionRequest{})
					return err
				},
				"ListContainers": func() error {
					_, err := n.Runtime().ListContainers(t.Context(), &runtimeapi.ListContainersRequest{})
					return err
				},
				"PortForward": func() error {
					_, err := n.Runtime().PortForward(t.Context(), &runtimeapi.PortForwardRequest{PodSandboxId: pod})
					return err
				},
				"Exec by a shortened ID": func() error {
					_, err := n.Runtime().Exec(t.Context(), &runtimeapi.ExecRequest{ContainerId: known[:12], Cmd: []string{"sh"}, Stdout: true})
					return err
				},
				"ExecSync in a container not used before": func() error {
					_, err := n.Runtime().ExecSync(t.Context(), &runtimeapi.ExecSyncRequest{ContainerId: fresh, Cmd: []string{"true"}})
					return err
				},
			} {
				start := time.Now()
				if err := call(); status.Code(err) != codes.Unavailable {
					t.Errorf("%s while containerd is away: %v, want Unavailable", name, err)
				}
				t.Logf("%s failed after %v", name, time.Since(start))
			}
			// A running container that is known needs no containerd, neither for a probe nor for an exec. crictl needs it,
			// because it asks for the Version first.
			result, err := n.Runtime().ExecSync(t.Context(), &runtimeapi.ExecSyncRequest{ContainerId: known, Cmd: []string{"echo", "still here"}})
			if err != nil || string(result.GetStdout()) != "still here\n" {
				t.Errorf("ExecSync while containerd is away: %v, %v", result, err)
			}
			if _, err := n.Runtime().Exec(t.Context(), &runtimeapi.ExecRequest{ContainerId: known, Cmd: []string{"true"}, Stdout: true}); err != nil {
				t.Errorf("Exec while containerd is away: %v", err)
			}

			if err := n.StartContainerd(t.Context()); err != nil {
				t.Fatal(err)
			}
			if _, err := n.Runtime().Version(t.Context(), &runtimeapi.VersionRequest{}); err != nil {
				t.Errorf("the first call after containerd's return: %v", err)
			}
			alive("after containerd's return")
			for _, container := range []string{known, fresh, known[:12]} {
				if stdout, stderr, code := run(t, n.Crictl("exec", "-r", transport, container, "echo", "new")); stdout != "new\n" || code != 0 {
					t.Errorf("exec in %s after containerd's return: %q, %q, %d", container, stdout, stderr, code)
				}
			}

			web.close()
			shell.write("exit 3\n")
			shell.expect("command terminated with exit code 3")
			shell.end(1)
			cat.stdin.Close()
			cat.end(0)
			forward.signal(os.Interrupt)
			forward.end(0)
			expectNothingLeft(t, n, before, known)
		})
	}
	if pid := n.PID("streamshim"); pid != streamshim {
		t.Errorf("streamshim is process %d now, it was %d", pid, streamshim)
	}
}

// httpConnection is one connection for any number of requests.
type httpConnection struct {
	conn   net.Conn
	reader *bufio.Reader
}

// dialHTTP connects. The connection is closed when the test ends, or earlier with close.
func dialHTTP(t *testing.T, address string) *httpConnection {
	t.Helper()
	conn, err := net.DialTimeout("tcp", address, waitTimeout)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	return &httpConnection{conn, bufio.NewReader(conn)}
}

// get asks for the page of the lab's server and checks it.
func (c *httpConnection) get() error {
	page, err := c.page()
	if err == nil && !strings.Contains(page, firstPage) {
		err = fmt.Errorf("the page is %q", page)
	}
	return err
}

func (c *httpConnection) page() (string, error) {
	if err := c.conn.SetDeadline(time.Now().Add(waitTimeout)); err != nil {
		return "", err
	}
	request, err := http.NewRequest(http.MethodGet, "http://pod/", nil)
	if err != nil {
		return "", err
	}
	if err := request.Write(c.conn); err != nil {
		return "", err
	}
	response, err := http.ReadResponse(c.reader, request)
	if err != nil {
		return "", err
	}
	defer response.Body.Close()
	text, err := io.ReadAll(response.Body)
	return string(text), err
}

func (c *httpConnection) close() { c.conn.Close() }
