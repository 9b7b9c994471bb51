package portforward

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"

	"github.com/streamshim/streamshim/internal/testutil/leak"
)

// name serves a connection with a word that tells who was reached.
func name(word string) func(*net.TCPConn) {
	return func(conn *net.TCPConn) {
		defer conn.Close()
		io.WriteString(conn, word)
	}
}

func TestDialReaches(t *testing.T) {
	for _, each := range []struct {
		name   string
		listen string // "" nowhere
		want   string // address reached; "" refused
	}{
		{"IPv4 loopback", "127.0.0.1:8080", "127.0.0.1"},
		{"IPv6 loopback only", "[::1]:8080", "::1"},
		{"every address", ":8080", "127.0.0.1"},
		{"the pod's IPv4 address only", "10.123.0.2:8080", "10.123.0.2"},
		{"the pod's IPv6 address only", "[fd00:123::2]:8080", "fd00:123::2"},
		{"nobody", "", ""},
	} {
		t.Run(each.name, func(t *testing.T) {
			leak.Check(t)
			pod := newSandbox(t)
			pod.addPodAddresses("10.123.0.2", "fd00:123::2")
			if each.listen != "" {
				pod.listen(each.listen, name("pod"))
			}
			conn, err := Dialer{}.Dial(t.Context(), pod.path, 8080)
			if each.want == "" {
				var refused *RefusedError
				if !errors.As(err, &refused) {
					t.Fatalf("error %v, want a RefusedError", err)
				}
				want := &RefusedError{Port: 8080, Tried: []netip.Addr{
					netip.MustParseAddr("127.0.0.1"), netip.MustParseAddr("::1"),
					netip.MustParseAddr("10.123.0.2"), netip.MustParseAddr("fd00:123::2"),
				}}
				if refused.Port != want.Port || !slices.Equal(refused.Tried, want.Tried) {
					t.Errorf("%v, want %v", refused, want)
				}
				if !errors.Is(err, unix.ECONNREFUSED) {
					t.Error("is no ECONNREFUSED")
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			defer conn.Close()
			if got := conn.RemoteAddr().(*net.TCPAddr).IP.String(); got != each.want {
				t.Errorf("reached %s, want %s", got, each.want)
			}
			if word, err := io.ReadAll(conn); string(word) != "pod" || err != nil {
				t.Errorf("read %q, %v", word, err)
			}
			checkOptions(t, conn)
		})
	}
}

func checkOptions(t *testing.T, conn *net.TCPConn) {
	t.Helper()
	raw, err := conn.SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	raw.Control(func(fd uintptr) {
		for _, option := range []struct {
			name                  string
			level, option, expect int
		}{
			{"TCP_NODELAY", unix.IPPROTO_TCP, unix.TCP_NODELAY, 1},
			{"SO_KEEPALIVE", unix.SOL_SOCKET, unix.SO_KEEPALIVE, 1},
			{"TCP_KEEPIDLE", unix.IPPROTO_TCP, unix.TCP_KEEPIDLE, 120},
		} {
			if got, err := unix.GetsockoptInt(int(fd), option.level, option.option); got != option.expect || err != nil {
				t.Errorf("%s is %d, %v, want %d", option.name, got, err, option.expect)
			}
		}
	})
}

func TestDialHostNetwork(t *testing.T) {
	for _, address := range []string{"127.0.0.1", "::1"} {
		t.Run(address, func(t *testing.T) {
			leak.Check(t)
			port := listenOnHost(t, net.JoinHostPort(address, "0"), name("host"))
			conn, err := Dialer{}.Dial(t.Context(), "", port)
			if err != nil {
				t.Fatal(err)
			}
			defer conn.Close()
			if word, err := io.ReadAll(conn); string(word) != "host" || err != nil {
				t.Errorf("read %q, %v", word, err)
			}
		})
	}
	t.Run("nobody, and no other addresses tried", func(t *testing.T) {
		leak.Check(t)
		listener, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		port := uint16(listener.Addr().(*net.TCPAddr).Port)
		listener.Close()
		_, err = Dialer{}.Dial(t.Context(), "", port)
		var refused *RefusedError
		if !errors.As(err, &refused) || !slices.Equal(refused.Tried, loopback) {
			t.Errorf("error %v, want a RefusedError for the loopback addresses", err)
		}
	})
}

// A pod may be without IPv6, and, for a moment, without a loopback interface that is up.
func TestDialWithoutIPv6(t *testing.T) {
	leak.Check(t)
	pod := newSandbox(t)
	pod.run(func() error { return os.WriteFile("/proc/sys/net/ipv6/conf/all/disable_ipv6", []byte("1"), 0) })
	_, err := Dialer{}.Dial(t.Context(), pod.path, 8080)
	if refused := (*RefusedError)(nil); !errors.As(err, &refused) {
		t.Errorf("error %v, want a RefusedError", err)
	}
}

func TestDialDoesNotConnectToItself(t *testing.T) {
	leak.Check(t)
	pod := newSandbox(t)
	// The kernel has but this port to pick for our end.
	pod.run(func() error { return os.WriteFile("/proc/sys/net/ipv4/ip_local_port_range", []byte("8080 8080"), 0) })
	conn, err := Dialer{}.Dial(t.Context(), pod.path, 8080)
	if refused := (*RefusedError)(nil); !errors.As(err, &refused) {
		t.Errorf("connection %v, error %v, want a RefusedError", conn, err)
	}
}

func TestDialTimesOut(t *testing.T) {
	for _, dialer := range []Dialer{{TryTimeout: 50 * time.Millisecond}, {TotalTimeout: 50 * time.Millisecond}} {
		t.Run(fmt.Sprintf("%+v", dialer), func(t *testing.T) {
			leak.Check(t)
			pod := newSandbox(t)
			port := pod.listenFull()
			_, err := dialer.Dial(t.Context(), pod.path, port)
			if !errors.Is(err, os.ErrDeadlineExceeded) {
				t.Errorf("error %v, want a timeout", err)
			}
		})
	}
}

func TestDialEndsWithItsContext(t *testing.T) {
	reason := errors.New("the reason")
	t.Run("before", func(t *testing.T) {
		leak.Check(t)
		pod := newSandbox(t)
		ctx, cancel := context.WithCancelCause(t.Context())
		cancel(reason)
		if _, err := (Dialer{}).Dial(ctx, pod.path, pod.listen(":0", name("pod"))); !errors.Is(err, reason) {
			t.Errorf("error %v, want the context's cause", err)
		}
	})
	t.Run("while connecting", func(t *testing.T) {
		leak.Check(t)
		pod := newSandbox(t)
		port := pod.listenFull()
		ctx, cancel := context.WithCancelCause(t.Context())
		done := make(chan error, 1)
		go func() {
			_, err := Dialer{TryTimeout: time.Hour, TotalTimeout: time.Hour}.Dial(ctx, pod.path, port)
			done <- err
		}()
		pod.waitForConnecting(port)
		cancel(reason)
		if err := within(t, "Dial", done); !errors.Is(err, reason) {
			t.Errorf("error %v, want the context's cause", err)
		}
	})
}

// waitForConnecting waits until a connection to the port has sent its SYN and has no answer.
func (s *sandbox) waitForConnecting(port uint16) {
	s.t.Helper()
	waitFor(s.t, "a connection in SYN-SENT", func() (found bool) {
		s.run(func() error {
			table, err := os.ReadFile(fmt.Sprintf("/proc/self/task/%d/net/tcp", unix.Gettid()))
			// local address, remote address, state 02
			found = slices.ContainsFunc(splitLines(table), func(fields []string) bool {
				return len(fields) > 3 && fields[2] == fmt.Sprintf("0100007F:%04X", port) && fields[3] == "02"
			})
			return err
		})
		return found
	})
}

func TestDialSandboxGone(t *testing.T) {
	t.Run("no path", func(t *testing.T) {
		leak.Check(t)
		_, err := Dialer{}.Dial(t.Context(), filepath.Join(t.TempDir(), "netns"), 80)
		if !errors.Is(err, ErrSandboxGone) {
			t.Errorf("error %v, want ErrSandboxGone", err)
		}
	})
	t.Run("unmounted, file still there", func(t *testing.T) {
		leak.Check(t)
		pod := newSandbox(t)
		if err := unix.Unmount(pod.path, unix.MNT_DETACH); err != nil {
			t.Fatal(err)
		}
		_, err := Dialer{}.Dial(t.Context(), pod.path, 80)
		if !errors.Is(err, ErrSandboxGone) {
			t.Errorf("error %v, want ErrSandboxGone", err)
		}
	})
	t.Run("process gone", func(t *testing.T) {
		leak.Check(t)
		_, err := Dialer{}.Dial(t.Context(), fmt.Sprintf("/proc/%d/ns/net", endedProcess(t)), 80)
		if !errors.Is(err, ErrSandboxGone) {
			t.Errorf("error %v, want ErrSandboxGone", err)
		}
	})
	t.Run("another kind of namespace", func(t *testing.T) {
		leak.Check(t)
		_, err := Dialer{}.Dial(t.Context(), "/proc/self/ns/uts", 80)
		if err == nil || errors.Is(err, ErrSandboxGone) {
			t.Errorf("error %v, want one that is not ErrSandboxGone", err)
		}
	})
}

// A thread that cannot be put back must not serve anybody else.
func TestThreadThatCannotLeaveTheNamespaceIsDestroyed(t *testing.T) {
	leak.Check(t)
	pod := newSandbox(t)
	stuck := errors.New("stuck")
	for range 20 {
		err := inNamespace(pod.ns, func(netns.NsHandle) error { return stuck }, func() error { return nil })
		if !errors.Is(err, stuck) {
			t.Errorf("error %v, want the one from leaving", err)
		}
	}
	// That all threads are in the host's namespace again is for leak.Check to find out.
}

func TestInNamespaceReportsTheWorksError(t *testing.T) {
	leak.Check(t)
	pod := newSandbox(t)
	failed := errors.New("failed")
	if err := inNamespace(pod.ns, netns.Set, func() error { return failed }); !errors.Is(err, failed) {
		t.Errorf("error %v, want the work's", err)
	}
}

func BenchmarkDial(b *testing.B) {
	pod := newSandbox(b)
	port := pod.listen(":0", func(conn *net.TCPConn) { conn.Close() })
	f := newForwarder(b, pod.path, Config{Watcher: newWatcher(b)})
	dial := func(b *testing.B) {
		conn, err := f.Dial(b.Context(), port)
		if err != nil {
			b.Error(err)
			return
		}
		conn.SetLinger(0) // so that the benchmark does not run out of ports
		conn.Close()
	}
	b.Run("one at a time", func(b *testing.B) {
		for b.Loop() {
			dial(b)
		}
	})
	b.Run("64 at a time", func(b *testing.B) {
		b.SetParallelism(32)
		b.RunParallel(func(pb *testing.PB) {
			for pb.Next() {
				dial(b)
			}
		})
	})
	b.Run("net.Dial on the host", func(b *testing.B) {
		port := listenOnHost(b, "127.0.0.1:0", func(conn *net.TCPConn) { conn.Close() })
		for b.Loop() {
			conn, err := net.DialTCP("tcp", nil, &net.TCPAddr{IP: net.IPv4(127, 0, 0, 1), Port: int(port)})
			if err != nil {
				b.Fatal(err)
			}
			conn.SetLinger(0)
			conn.Close()
		}
	})
	b.Run("the socket alone", func(b *testing.B) {
		for b.Loop() {
			fd, err := f.pod.socket(unix.AF_INET)
			if err != nil {
				b.Fatal(err)
			}
			unix.Close(fd)
		}
	})
}
