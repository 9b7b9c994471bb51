package streaming

import (
	"bytes"
	"fmt"
	"io"
	"net"
	"strings"
	"testing"
	"time"

	"github.com/streamshim/streamshim/internal/testutil"
)

// podUpload is how an upload to a pod has ended.
type podUpload struct {
	data []byte
	err  error // nil for FIN
}

// uploadPod is a program that begins to read late, reads to the end, and then answers.
func uploadPod(t *testing.T, late time.Duration) (port int, uploads chan podUpload) {
	uploads = make(chan podUpload, 10)
	return pod(t, func(c *net.TCPConn) {
		c.SetReadDeadline(time.Now().Add(2 * testTimeout))
		time.Sleep(late)
		data, err := io.ReadAll(c)
		fmt.Fprintf(c, "got %d", len(data)) // the client may have gone
		uploads <- podUpload{data, err}
	}), uploads
}

// TestLegacyPortForwardUploads checks that a client of the legacy port-forward that sends and leaves in order has
// everything delivered, with FIN. If it breaks off, its connection is reset.
func TestLegacyPortForwardUploads(t *testing.T) {
	testutil.Slow(t)
	runTogether(t, func(t *testing.T) {
		for _, protocol := range []string{"", "v4.channel.k8s.io", "v4.base64.channel.k8s.io"} {
			for way, complete := range map[string]bool{
				"Close 1000": true, "Close": true, "FIN": true, "socket closed": true, "Close 1000, socket closed": true,
				"Close 1001": false, "Close 1011": false, "FIN inside a message": false, "RST": false,
			} {
				for _, size := range []int{1, 32_000, 3_200_000, 20 << 20} {
					if size > 4<<20 && (way != "Close 1000" || protocol != "v4.channel.k8s.io") {
						continue
					}
					t.Run(fmt.Sprintf("%s/%s/%d", protocol, way, size), func(t *testing.T) {
						t.Parallel()
						s, data := startServer(t, Config{}), randomBytes(size)
						port, uploads := uploadPod(t, 500*time.Millisecond)
						client := dialNumbered(t, s.portForwardURL(nil, int32(port)), protocol, false) //nolint:gosec // a port
						eventually(t, "the announcements", func() bool { return len(client.on(0)) == 2 && len(client.on(1)) == 2 })
						client.send(0, data)
						client.end(way)
						if way == "RST" { // it may be faster than the pod's port
							eventually(t, "the session's end", func() bool { return len(s.config.Sessions.List()) == 0 })
							select {
							case got := <-uploads:
								uploads <- got
							case <-time.After(5 * time.Second):
								return
							}
						}
						got := receive(t, uploads, "the end of the upload")
						if complete && (got.err != nil || !bytes.Equal(got.data, data)) {
							t.Errorf("%d bytes of %d arrived, or others: %v", len(got.data), size, got.err)
						}
						if !complete && got.err == nil {
							t.Errorf("the pod takes %d bytes for all of %d", len(got.data), size)
						}
						eventually(t, "the session's end", func() bool { return len(s.config.Sessions.List()) == 0 })
					})
				}
			}
		}
	})
}

// TestLegacyPortForwardTellsFailures checks that failures of a port are reported on its own error channel only.
func TestLegacyPortForwardTellsFailures(t *testing.T) {
	s := startServer(t, Config{})
	good, refused := pod(t, answer), unusedPort(t)
	broken := pod(t, func(c *net.TCPConn) {
		io.ReadFull(c, make([]byte, 3))
		c.SetLinger(0)
	})
	//nolint:gosec // ports
	client := dialNumbered(t, s.portForwardURL(nil, int32(refused), int32(good), int32(broken)), "v4.channel.k8s.io", false)
	client.send(4, []byte("abc"))
	eventually(t, "the messages", func() bool { return len(client.on(1)) > 2 && len(client.on(5)) > 2 })
	for channel, want := range map[byte]string{1: fmt.Sprintf("nobody listens on port %d", refused), 5: "reset by the pod"} {
		if got := client.on(channel)[2:]; !strings.Contains(got, want) {
			t.Errorf("channel %d says %q", channel, got)
		}
	}
	client.send(2, []byte("abc"))
	eventually(t, "the answer", func() bool { return strings.HasSuffix(client.on(2), "answer to abc") })
	if got := client.on(3); len(got) != 2 {
		t.Errorf("the good port's error channel says %q", got[2:])
	}
	// All three have ended.
	client.awaitClose()
	client.end("Close 1000")
}

// greetingPod is a pod that sends a greeting, ends its side, and reads an upload.
func greetingPod(t *testing.T) (port int, uploads <-chan podUpload) {
	t.Helper()
	came := make(chan podUpload, 1)
	return pod(t, func(c *net.TCPConn) {
		c.SetReadDeadline(time.Now().Add(testTimeout))
		io.WriteString(c, "hello")
		c.CloseWrite()
		data, err := io.ReadAll(c)
		came <- podUpload{data, err}
	}), came
}

// TestLegacyPortForwardPodEndsFirst checks that a pod that has ended its side still gets what its client sends before the
// client has seen that end.
func TestLegacyPortForwardPodEndsFirst(t *testing.T) {
	s := startServer(t, Config{})
	port, uploads := greetingPod(t)
	client := dialNumbered(t, s.portForwardURL(nil, int32(port)), "v4.channel.k8s.io", false) //nolint:gosec // a port
	client.awaitClose()
	client.send(0, []byte("late"))
	client.end("Close 1000")
	if got := receive(t, uploads, "the end of the upload"); string(got.data) != "late" || got.err != nil {
		t.Errorf("the pod got %q, %v", got.data, got.err)
	}
	if got := client.on(0); !strings.HasSuffix(got, "hello") {
		t.Errorf("the client got %q", got)
	}
}

// TestLegacyPortForwardEndsBehindClose checks a client that does not answer the Close, because it sees no frame until
// something else arrives. It gets FIN, which it sees. What it sends still arrives.
func TestLegacyPortForwardEndsBehindClose(t *testing.T) {
	s := startServer(t, Config{})
	port, uploads := greetingPod(t)
	client := dialNumbered(t, s.portForwardURL(nil, int32(port)), "v4.channel.k8s.io", false) //nolint:gosec // a port
	client.awaitClose()
	client.send(0, []byte("late, "))
	client.tcp.SetReadDeadline(time.Now().Add(testTimeout))
	if n, err := client.tcp.Read(make([]byte, 1)); n != 0 || err != io.EOF {
		t.Errorf("behind the Close came %d bytes, %v", n, err)
	}
	client.send(0, []byte("and later"))
	client.end("Close 1000")
	if got := receive(t, uploads, "the end of the upload"); string(got.data) != "late, and later" || got.err != nil {
		t.Errorf("the pod got %q, %v", got.data, got.err)
	}
}

// TestPortForwardUploadsOfAClientThatLeaves checks, over SPDY and the tunnel, that a connection with FIN before its client
// left is finished, and one without is reset.
func TestPortForwardUploadsOfAClientThatLeaves(t *testing.T) {
	testutil.Slow(t)
	runTogether(t, func(t *testing.T) {
		for _, transport := range []string{"SPDY", "tunnel"} {
			for _, way := range []string{"GOAWAY", "FIN", "socket closed", "RST"} {
				for _, size := range []int{1, 200_000, 3_200_000} {
					t.Run(fmt.Sprintf("%s/%s/%d", transport, way, size), func(t *testing.T) {
						t.Parallel()
						s, data := startServer(t, Config{}), randomBytes(size)
						port, uploads := uploadPod(t, time.Second)
						cutPort, cut := uploadPod(t, 0)
						u := s.portForwardURL(nil)
						client := dialForward(t, u, transport)
						stream, _ := client.openPair(itoa(port), "1")
						other, _ := client.openPair(itoa(cutPort), "2")
						client.until("the replies", func() bool { return client.streams[stream].replied && client.streams[other].replied })
						client.send(other, "no FIN", false)
						for rest := data; len(rest) > 0; {
							n := min(len(rest), 60_000)
							client.send(stream, string(rest[:n]), n == len(rest))
							rest = rest[n:]
						}
						client.end(way)
						eventually(t, "the session's end", func() bool { return len(s.config.Sessions.List()) == 0 })
						if way == "RST" { // it may be faster than the pod's ports
							return
						}
						if got := receive(t, cut, "the end of the cut upload"); got.err == nil {
							t.Errorf("the pod takes %q for everything", got.data)
						}
						if got := receive(t, uploads, "the end of the upload"); got.err != nil || !bytes.Equal(got.data, data) {
							t.Errorf("%d bytes of %d arrived, or others: %v", len(got.data), size, got.err)
						}
					})
				}
			}
		}
	})
}
