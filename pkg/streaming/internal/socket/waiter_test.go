package socket

import (
	"net"
	"testing"
	"time"

	"github.com/streamshim/streamshim/internal/testutil"
)

const testTimeout = 2 * time.Minute

// wait waits in a goroutine whose condition is never true. It returns when that goroutine waits.
func wait(t *testing.T, w *Waiter) (returned <-chan error) {
	t.Helper()
	done, asked := make(chan error, 1), make(chan struct{}, 100)
	go func() {
		done <- w.Until(time.Now().Add(testTimeout), func(uintptr) bool { asked <- struct{}{}; return false })
	}()
	<-asked
	return done
}

func TestWaiter(t *testing.T) {
	for name, with := range map[string]bool{"socket": true, "no socket": false} {
		t.Run(name, func(t *testing.T) {
			var w Waiter
			ours, peer := testutil.TCPPair(t)
			if with {
				w.Init(ours)
			} else {
				w.Init(nil)
			}
			w.Wake() // nobody waits
			returns := func(what string, returned <-chan error) {
				t.Helper()
				select {
				case err := <-returned:
					if err != nil {
						t.Errorf("%s: %v", what, err)
					}
				case <-time.After(testTimeout / 2):
					t.Fatalf("%s does not end the wait", what)
				}
				if !w.Waiting() {
					t.Error("the wait is over before its End")
				}
			}
			returned := wait(t, &w)
			w.Wake()
			returns("Wake", returned)
			w.End()
			if w.Waiting() {
				t.Error("somebody waits after End")
			}
			if with { // the deadline is gone
				peer.Write([]byte("a"))
				if n, err := ours.Read(make([]byte, 1)); n != 1 {
					t.Errorf("reading after End: %v", err)
				}
			}
			if err := w.Until(time.Now().Add(time.Millisecond), func(uintptr) bool { return false }); err != nil {
				t.Error(err)
			}
			returned = wait(t, &w)
			w.Interrupt()
			returns("Interrupt", returned)
			w.End()
			if with {
				if _, err := ours.Read(make([]byte, 1)); err == nil {
					t.Error("a read after Interrupt waits")
				}
				ours.Close()
				if err := w.Until(time.Now().Add(testTimeout), func(uintptr) bool { return false }); err == nil {
					t.Error("no error from a closed socket")
				}
			}
		})
	}
}

// TestPeerEnd checks that the end of a connection is seen behind bytes that nobody reads.
func TestPeerEnd(t *testing.T) {
	tests := []struct {
		name string
		end  func(peer *net.TCPConn)
		want End
	}{
		{"open", func(*net.TCPConn) {}, Open},
		{"half-closed", func(peer *net.TCPConn) { peer.CloseWrite() }, Closed},
		{"reset", func(peer *net.TCPConn) { peer.SetLinger(0); peer.Close() }, Dead},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			ours, peer := testutil.TCPPair(t)
			peer.Write([]byte("unread"))
			test.end(peer)
			var got End
			var w Waiter
			w.Init(ours)
			until := time.Now().Add(testTimeout)
			if test.want == Open {
				until = time.Now().Add(20 * time.Millisecond)
			}
			err := w.Until(until, func(fd uintptr) bool {
				got = PeerEnd(int(fd))
				return got != Open
			})
			if err != nil || got != test.want {
				t.Errorf("got %d, %v; want %d", got, err, test.want)
			}
		})
	}
}
