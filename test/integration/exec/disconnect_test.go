package exec

import (
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"os"
	"os/exec"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/moby/spdystream"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"k8s.io/client-go/tools/remotecommand"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/streamshim/streamshim/internal/testutil"
	"github.com/streamshim/streamshim/test/internal/harness"
	"github.com/streamshim/streamshim/test/internal/node"
)

// left is a command whose client leaves, and the least number of its processes.
type left struct {
	name, script string
	processes    int
	stdin        string // see clientSession
	blocked      bool
}

// leftBehind are commands that stay behind in different ways. One way is missing: a daemon, a process in its own session
// whose parent has ended and that holds none of the command's streams. Nothing in /proc leads from the command to it
// (docs/behaviour.md).
var leftBehind = []left{
	{name: "silent", script: "sleep 1000; :", processes: 2},
	{name: "silent-stdin", script: "sleep 1000; :", processes: 2, stdin: "open"},
	{name: "shell", script: "cat", processes: 1, stdin: "open"},
	{name: "chatty", script: "while :; do echo chatter; sleep 0.05; done", processes: 1},
	{name: "blocked-reader", script: "yes", processes: 1, blocked: true},
	{name: "blocked-stdin", script: "sleep 1000; :", processes: 2, stdin: "flood"},
	{name: "ignores-hup", script: "trap '' HUP; while :; do sleep 10; done", processes: 2},
	{name: "ignores-hup-and-term", script: "trap '' HUP TERM INT; while :; do sleep 10; done", processes: 2},
	{name: "family", script: "sleep 1000 & (sleep 1000 & sleep 1000) & setsid sh -c 'trap \"\" HUP; sleep 1000; :' & sleep 1000; :", processes: 6},
}

// begun is a session whose client will leave.
type begun struct {
	mark    string
	session clientSession
}

// leaveBehind starts all commands, with and without a terminal, over each protocol. through may put something between
// client and server.
func leaveBehind(t *testing.T, shim *harness.Streamshim, through func(*url.URL) *url.URL, run func([]clientSession)) []begun {
	t.Helper()
	container := harness.RunContainer(t, node.ContainerSpec{})
	var all []begun
	var sessions []clientSession
	for _, transport := range harness.Transports {
		for _, tty := range []bool{false, true} {
			for _, l := range leftBehind {
				mark := harness.Unique(fmt.Sprintf("%s/%s/tty=%v/%s", t.Name(), transport, tty, l.name))
				s := clientSession{Transport: transport, TTY: tty, Stdin: l.stdin, Blocked: l.blocked}
				u := shim.ExecURL(t, container, s.options(), harness.Marked(mark, l.script)...)
				if through != nil {
					u = through(u)
				}
				s.URL = u.String()
				all = append(all, begun{mark, s})
				sessions = append(sessions, s)
			}
		}
	}
	run(sessions)
	for i, b := range all {
		harness.AwaitMarked(t, b.mark, leftBehind[i%len(leftBehind)].processes)
	}
	return all
}

func expectNoneLeft(t *testing.T, all []begun, limit time.Duration) {
	t.Helper()
	begin, slowest, last := time.Now(), time.Duration(0), ""
	for _, b := range all {
		harness.AwaitNone(t, b.mark, max(limit-time.Since(begin), 0))
		if took := time.Since(begin); took > slowest {
			slowest, last = took, b.mark
		}
	}
	t.Logf("the last processes were gone after %v (%s or one before it)", slowest, last)
}

// goneLimit is the 20 s after which nothing may be left of a process whose client has left, and a margin for a busy
// machine.
const goneLimit = 20*time.Second + 20*time.Second

// TestNoProcessStaysAfterClientIsKilled checks that no process stays when its client is killed (kubernetes#89031, E2).
func TestNoProcessStaysAfterClientIsKilled(t *testing.T) {
	t.Parallel()
	var client *os.Process
	all := leaveBehind(t, harness.Shared.Shim, nil, func(sessions []clientSession) { client = startClient(t, sessions) })
	if err := client.Kill(); err != nil {
		t.Fatal(err)
	}
	expectNoneLeft(t, all, goneLimit)
}

// TestNoProcessStaysAfterClientLeaves checks the same for a client that leaves in order: with SPDY's GOAWAY or WebSocket's
// Close.
func TestNoProcessStaysAfterClientLeaves(t *testing.T) {
	t.Parallel()
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	var running sync.WaitGroup
	all := leaveBehind(t, harness.Shared.Shim, nil, func(sessions []clientSession) {
		for i, s := range sessions {
			if s.Stdin == "flood" && s.Transport == "SPDY" {
				// Stock client-go cannot return while one of its writes is blocked. It can only be killed.
				client := startClient(t, sessions[i:i+1])
				context.AfterFunc(ctx, func() { client.Kill() }) //nolint:errcheck // then the test fails
				continue
			}
			running.Go(func() { harness.Stream(ctx, s.Transport, s.URL, s.options()) }) //nolint:errcheck // cancelled
		}
	})
	cancel()
	expectNoneLeft(t, all, goneLimit)
}

// TestNoProcessStaysAfterCrictlIsKilled checks the same for crictl.
func TestNoProcessStaysAfterCrictlIsKilled(t *testing.T) {
	t.Parallel()
	container := harness.RunContainer(t, node.ContainerSpec{})
	for _, transport := range []string{"spdy", "websocket"} {
		t.Run(transport, func(t *testing.T) {
			t.Parallel()
			mark := harness.Unique(t.Name())
			command := harness.Shared.Shim.Crictl(t, append([]string{"exec", "--transport", transport, "-i", container}, harness.Marked(mark, "sleep 1000; :")...)...)
			command.Stdin = harness.OpenStdin(t)
			if err := command.Start(); err != nil {
				t.Fatal(err)
			}
			harness.AwaitMarked(t, mark, 2)
			command.Process.Kill() //nolint:errcheck // Wait tells
			command.Process.Wait() //nolint:errcheck // killed
			t.Logf("gone after %v", harness.AwaitNone(t, mark, goneLimit))
		})
	}
}

// TestNoProcessStaysAfterStreamsAreReset checks the same for a client that resets its streams and leaves the connection
// open, as a proxy may.
func TestNoProcessStaysAfterStreamsAreReset(t *testing.T) {
	t.Parallel()
	container := harness.RunContainer(t, node.ContainerSpec{})
	for _, l := range leftBehind {
		t.Run(l.name, func(t *testing.T) {
			t.Parallel()
			mark := harness.Unique(t.Name())
			u := harness.Shared.Shim.ExecURL(t, container, remotecommand.StreamOptions{Stdin: harness.Flood{}, Stdout: io.Discard, Stderr: io.Discard}, harness.Marked(mark, l.script)...)
			network, err := net.Dial("tcp", u.Host)
			if err != nil {
				t.Fatal(err)
			}
			defer network.Close()
			network.SetDeadline(time.Now().Add(testutil.Patience + goneLimit)) //nolint:errcheck // then it hangs if it hangs
			fmt.Fprintf(network, "POST %s HTTP/1.1\r\nHost: %s\r\nConnection: Upgrade\r\nUpgrade: SPDY/3.1\r\nX-Stream-Protocol-Version: v4.channel.k8s.io\r\n\r\n", u.Path, u.Host)
			answer := make([]byte, 0, 1024)
			for one := make([]byte, 1); len(answer) < 4 || string(answer[len(answer)-4:]) != "\r\n\r\n"; answer = append(answer, one[0]) {
				if _, err := network.Read(one); err != nil {
					t.Fatal(err)
				}
			}
			conn, err := spdystream.NewConnection(network, false)
			if err != nil {
				t.Fatal(err)
			}
			go conn.Serve(spdystream.NoOpStreamHandler)
			var streams []*spdystream.Stream
			for _, name := range []string{"error", "stdin", "stdout", "stderr"} {
				s, err := conn.CreateStream(http.Header{"Streamtype": {name}}, nil, false)
				if err != nil {
					t.Fatal(err)
				}
				go io.Copy(io.Discard, s) //nolint:errcheck // ends with the reset
				streams = append(streams, s)
			}
			harness.AwaitMarked(t, mark, l.processes)
			for _, s := range slices.Backward(streams) { // last the error stream, which ends the session
				if err := s.Reset(); err != nil {
					t.Error(err)
				}
			}
			t.Logf("gone after %v", harness.AwaitNone(t, mark, goneLimit))
		})
	}
}

// TestNoProcessStaysAfterNetworkIsGone checks the same for a network that fails without another packet. By default that is
// noticed in less than 60 s.
func TestNoProcessStaysAfterNetworkIsGone(t *testing.T) {
	t.Parallel()
	const address = "127.83.77.9" // the clients' side; only this test uses it
	rules := [][]string{
		{"INPUT", "-i", "lo", "-s", address, "-j", "DROP"},
		{"INPUT", "-i", "lo", "-d", address, "-j", "DROP"},
	}
	iptables := func(verb string, rule []string) error {
		if output, err := exec.Command("iptables", append([]string{"-w", "60", verb}, rule...)...).CombinedOutput(); err != nil {
			return fmt.Errorf("iptables %s: %w: %s", verb, err, output)
		}
		return nil
	}
	for _, rule := range rules {
		for iptables("-C", rule) == nil { // those of a run that was killed
			if err := iptables("-D", rule); err != nil {
				t.Fatal(err)
			}
		}
	}
	var relays sync.WaitGroup
	t.Cleanup(relays.Wait)
	ctx, cancel := context.WithCancel(context.Background())
	t.Cleanup(cancel)
	through := func(u *url.URL) *url.URL {
		listener, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { listener.Close() })
		server := u.Host
		relays.Go(func() {
			client, err := listener.Accept()
			if err != nil {
				return
			}
			dialer := net.Dialer{LocalAddr: &net.TCPAddr{IP: net.ParseIP(address)}}
			network, err := dialer.DialContext(ctx, "tcp", server)
			if err != nil {
				client.Close()
				return
			}
			context.AfterFunc(ctx, func() { network.Close(); client.Close() })
			relays.Go(func() { io.Copy(network, client) }) //nolint:errcheck // ends with the test
			relays.Go(func() { io.Copy(client, network) }) //nolint:errcheck // as above
		})
		cut := *u
		cut.Host = listener.Addr().String()
		return &cut
	}
	all := leaveBehind(t, harness.Shared.Shim, through, func(sessions []clientSession) {
		for _, s := range sessions {
			go harness.Stream(ctx, s.Transport, s.URL, s.options()) //nolint:errcheck // cancelled
		}
	})
	for _, rule := range rules {
		if err := iptables("-I", rule); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() {
			if err := iptables("-D", rule); err != nil {
				t.Error(err)
			}
		})
	}
	expectNoneLeft(t, all, 60*time.Second+goneLimit)
}

// The end of stdin is not a disconnect: see also TestEndOfStdin.

// TestOnDisconnect checks that on_disconnect = "keep" keeps processes and "kill" kills them at once.
func TestOnDisconnect(t *testing.T) {
	t.Parallel()
	for _, policy := range []string{"keep", "kill"} {
		t.Run(policy, func(t *testing.T) {
			t.Parallel()
			configuration := fmt.Sprintf("[exec]\non_disconnect = %q\n", policy)
			if policy == "kill" { // it must act long before these
				configuration += "term_after = \"90s\"\nkill_after = \"180s\"\n"
			}
			shim := harness.StartStreamshim(t, configuration)
			ctx, cancel := context.WithCancel(context.Background())
			defer cancel()
			container := harness.RunContainer(t, node.ContainerSpec{})
			var marks []string
			for _, transport := range harness.Transports {
				for _, tty := range []bool{false, true} {
					mark := harness.Unique(t.Name())
					marks = append(marks, mark)
					s := clientSession{Transport: transport, TTY: tty}
					// It writes all the time, and goes on after the reader of its terminal or pipe has left.
					u := shim.ExecURL(t, container, s.options(), harness.Marked(mark, "trap 'echo $? > /tmp/end' EXIT; trap '' HUP TERM; n=0; while :; do echo $n; n=$((n+1)); echo $n > /tmp/"+mark[len(mark)-3:]+"; sleep 0.1; done")...)
					go harness.Stream(ctx, s.Transport, u.String(), s.options()) //nolint:errcheck // cancelled
				}
			}
			for _, mark := range marks {
				harness.AwaitMarked(t, mark, 1)
			}
			cancel()
			if policy == "kill" {
				for _, mark := range marks {
					t.Logf("%s: killed after %v", mark, harness.AwaitNone(t, mark, goneLimit))
				}
				return
			}
			// Longer than hang-up, TERM and KILL would take.
			time.Sleep(14 * time.Second)
			for _, mark := range marks {
				before := shim.MustSync(t, container, "cat /tmp/"+mark[len(mark)-3:])
				testutil.Eventually(t, mark+" goes on", func() bool {
					return shim.MustSync(t, container, "cat /tmp/"+mark[len(mark)-3:]) != before
				})
			}
		})
	}
}

// TestProbeTimeoutLeavesNoProcess checks that no child survives a probe that timed out (containerd#4594, S2), and that the
// probe is answered in time although a child keeps the pipe open (containerd#9568, S1).
func TestProbeTimeoutLeavesNoProcess(t *testing.T) {
	t.Parallel()
	container := harness.RunContainer(t, node.ContainerSpec{})
	for _, l := range leftBehind {
		t.Run(l.name, func(t *testing.T) {
			t.Parallel()
			mark := harness.Unique(t.Name())
			begin := time.Now()
			// "shell" ends by itself, because a probe's stdin is empty.
			_, err := harness.Shared.Shim.ExecSync(t.Context(), container, 3*time.Second, harness.Marked(mark, "trap '' PIPE; "+l.script+"; sleep 1000; :")...)
			took := time.Since(begin)
			if status.Code(err) != codes.DeadlineExceeded {
				t.Errorf("%v, want DeadlineExceeded", err)
			}
			t.Logf("answered after %v, for a timeout of 3 s", took)
			if took < 2900*time.Millisecond || took > 20*time.Second {
				t.Errorf("answered after %v", took)
			}
			t.Logf("nothing left %v later", harness.AwaitNone(t, mark, goneLimit))
		})
	}
}

// TestProbeDoesNotWaitForItsChild checks that a probe whose background child keeps the pipe open answers with its own exit
// code.
func TestProbeDoesNotWaitForItsChild(t *testing.T) {
	t.Parallel()
	container := harness.RunContainer(t, node.ContainerSpec{})
	begin := time.Now()
	response, err := harness.Shared.Shim.ExecSync(t.Context(), container, 60*time.Second, "sh", "-c", "sleep 300 & echo healthy; exit 7")
	if err != nil || response.ExitCode != 7 || string(response.Stdout) != "healthy\n" {
		t.Errorf("%v, %v", response, err)
	}
	if took := time.Since(begin); took > 20*time.Second {
		t.Errorf("answered after %v", took)
	}
}

// TestProbeOutputIsBounded checks that a probe's output cannot fill memory or break the answer (CVE-2022-1708, S3).
func TestProbeOutputIsBounded(t *testing.T) {
	t.Parallel()
	container := harness.RunContainer(t, node.ContainerSpec{})
	response, err := harness.Shared.Shim.Runtime.ExecSync(t.Context(), &runtimeapi.ExecSyncRequest{
		ContainerId: container, Cmd: []string{"sh", "-c", "head -c 40000000 /dev/zero; head -c 9000000 /dev/zero >&2; exit 3"},
	}, grpc.MaxCallRecvMsgSize(16<<20)) // as the kubelet sets it
	if err == nil {
		t.Logf("%d bytes of stdout, %d of stderr", len(response.Stdout), len(response.Stderr))
	}
	if err != nil || response.ExitCode != 3 || len(response.Stdout) < 4<<20 || len(response.Stdout)+len(response.Stderr) >= 16<<20 {
		t.Errorf("%d bytes, exit code %d, %v", len(response.GetStdout()), response.GetExitCode(), err)
	}
}
