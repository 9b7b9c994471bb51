// Package portforward tests port-forwards on a real node: the streamshim program in front of containerd, pods with their
// own network namespaces, and stock client-go as the client.
package portforward

import (
	"crypto/rand"
	"crypto/sha256"
	"fmt"
	"io"
	mathrand "math/rand/v2"
	"net"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/streamshim/streamshim/internal/testutil"
	"github.com/streamshim/streamshim/test/internal/harness"
	"github.com/streamshim/streamshim/test/internal/node"
)

// TestPortForward checks what users report of port-forward, on real pods. In other runtimes it is known as
// kubernetes#74551, #111825, #8766, #99850, #72488 and #59816.
func TestPortForward(t *testing.T) {
	t.Parallel() // because of the late answers
	n := harness.Shared.Node
	for _, transport := range harness.Transports {
		p := harness.NewPod(t, n, node.PodSpec{Name: strings.ToLower(transport)})
		t.Run(transport, func(t *testing.T) {
			t.Parallel()
			testPortForward(t, p, transport)
		})
		t.Run(transport+"/host network", func(t *testing.T) {
			p := harness.NewPod(t, n, node.PodSpec{Name: "host-" + strings.ToLower(transport), HostNetwork: true})
			port := p.Listen("127.0.0.1", harness.Answer)
			p.Forward(transport, port).MustAnswer(port)
		})
		t.Run(transport+"/pod deleted", func(t *testing.T) {
			p := harness.NewPod(t, n, node.PodSpec{Name: "deleted-" + strings.ToLower(transport)})
			port := p.Listen("127.0.0.1", func(c *net.TCPConn) { io.Copy(c, c) })
			f := p.Forward(transport, port)
			conn, err := f.Dial(port)
			if err != nil {
				t.Fatal(err)
			}
			defer conn.Close()
			io.WriteString(conn, "x")
			if _, err := io.ReadFull(conn, make([]byte, 1)); err != nil {
				t.Fatal(err)
			}
			removed := make(chan error, 1)
			go func() { removed <- n.RemovePod(t.Context(), p.ID) }() // RemovePod bounds its own time
			select {
			case err := <-f.Ended:
				f.Ended <- err
			case <-time.After(testutil.Patience):
				t.Error("the client was not released")
			}
			if err := <-removed; err != nil {
				t.Error(err)
			}
		})
	}
}

func testPortForward(t *testing.T, shared *harness.Pod, transport string) {
	p := shared.For(t)
	t.Run("neighbours of a reset and of a refused connection live", func(t *testing.T) {
		p := p.For(t)
		good, nobody := p.Listen("127.0.0.1", harness.Answer), p.UnusedPort()
		bad := p.Listen("127.0.0.1", func(c *net.TCPConn) {
			io.ReadFull(c, make([]byte, 3))
			c.SetLinger(0)
		})
		f := p.Forward(transport, good, bad, nobody)
		for range 3 {
			f.Talk(bad, "abc") //nolint:errcheck // whatever the local program sees, the neighbour must live
			f.MustAnswer(good)
			if got, _ := f.Talk(nobody, "abc"); got != "" {
				t.Errorf("a port without a listener answered %q", got)
			}
			f.MustAnswer(good)
		}
	})
	t.Run("listeners on ::1 and on the pod's own address", func(t *testing.T) {
		p := p.For(t)
		six, own := p.Listen("::1", harness.Answer), p.Listen(p.Address, harness.Answer)
		f := p.Forward(transport, six, own)
		f.MustAnswer(six)
		f.MustAnswer(own)
	})
	t.Run("late answer after FIN", func(t *testing.T) {
		t.Parallel()
		p := p.For(t)
		port := p.Listen("127.0.0.1", func(c *net.TCPConn) {
			all, err := io.ReadAll(c)
			if err != nil {
				return
			}
			time.Sleep(65 * time.Second) // longer than any known idle limit on the way
			fmt.Fprintf(c, "%d bytes %s", len(all), strings.Repeat("x", 1<<20))
		})
		conn, err := p.Forward(transport, port).Dial(port)
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
		p := p.For(t)
		const size = 64 << 20
		port := p.Listen("127.0.0.1", func(c *net.TCPConn) {
			sum := sha256.New()
			io.Copy(sum, c) //nolint:errcheck // the sum tells
			fmt.Fprintf(c, "%x", sum.Sum(nil))
		})
		conn, err := p.Forward(transport, port).Dial(port)
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
		p := p.For(t)
		uploaded := make(chan int64, 1)
		port := p.Listen("127.0.0.1", func(c *net.TCPConn) {
			// Not before the byte has arrived: client-go drops what it has not sent when it is told of the end.
			first, _ := io.ReadFull(c, make([]byte, 1)) //nolint:errcheck // counted
			io.WriteString(c, "enough")
			c.CloseWrite()
			n, _ := io.Copy(io.Discard, c) //nolint:errcheck // its end may be a reset
			uploaded <- int64(first) + n
		})
		conn, err := p.Forward(transport, port).Dial(port)
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
		case <-time.After(testutil.Patience):
			t.Error("the pod's connection does not end")
		}
	})
}

// TestTenThousandConnectionsLeaveNothing checks that ten thousand connections leave nothing in streamshim: no descriptor,
// no thread, no memory that grows with their number.
func TestTenThousandConnectionsLeaveNothing(t *testing.T) {
	t.Parallel()
	const connections, atOnce = 10_000, 20
	shim := harness.StartStreamshim(t, "") // no other test uses it
	p := harness.NewPod(t, harness.Shared.Node, node.PodSpec{Name: "thousands"}).Through(shim)
	port := p.Listen("127.0.0.1", harness.Answer)
	pid := shim.PID()
	for _, transport := range harness.Transports {
		t.Run(transport, func(t *testing.T) {
			p := p.For(t)
			f := p.Forward(transport, port)
			many := func(count int) {
				work := make(chan struct{})
				var workers sync.WaitGroup
				for range atOnce {
					workers.Go(func() {
						for range work {
							if got, err := f.Talk(port, "abc"); got != "answer to abc" {
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
			many(500) // after this, what is made once exists
			before := harness.UsageOf(t, pid)
			many(connections)
			deadline := time.Now().Add(testutil.Patience)
			after := harness.UsageOf(t, pid)
			for ; after.Descriptors > before.Descriptors && time.Now().Before(deadline); after = harness.UsageOf(t, pid) {
				time.Sleep(100 * time.Millisecond)
			}
			t.Logf("before %+v, after %+v", before, after)
			if after.Descriptors > before.Descriptors || after.Threads > before.Threads+8 || after.RSSKiB > before.RSSKiB+8<<10 {
				t.Errorf("%d connections left something behind: before %+v, after %+v", connections, before, after)
			}
		})
	}
}
