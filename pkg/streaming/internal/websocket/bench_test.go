package websocket

import (
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"runtime"
	"strings"
	"sync"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/streamshim/streamshim/pkg/streaming/internal/websocket/frames"
)

// benchmarkConn runs run with a served connection and its raw client.
func benchmarkConn(b *testing.B, protocol Protocol, run func(c *ChannelConn, client *net.TCPConn)) {
	b.Helper()
	accepted := make(chan *ChannelConn, 1)
	s := newTestServer(b, execConfig(), func(c *ChannelConn) {
		accepted <- c
		<-c.Done()
	})
	client := s.dialRaw(b, protocol)
	run(<-accepted, client)
	client.Close()
	s.waitEnded(b)
}

func drain(client *net.TCPConn) {
	buffer := make([]byte, 1<<20)
	for {
		if _, err := client.Read(buffer); err != nil {
			return
		}
	}
}

// BenchmarkWrite writes from the caller's memory, with one system call.
func BenchmarkWrite(b *testing.B) {
	for _, protocol := range []Protocol{ChannelV5, ChannelV4Base64} {
		for _, size := range []int{16, 4 << 10, 32 << 10, 256 << 10} {
			b.Run(fmt.Sprintf("%s/%d", protocol, size), func(b *testing.B) {
				benchmarkConn(b, protocol, func(c *ChannelConn, client *net.TCPConn) {
					go drain(client)
					payload := make([]byte, size)
					b.SetBytes(int64(size))
					b.ReportAllocs()
					b.ResetTimer()
					for range b.N {
						if _, err := c.Channel(Stdout).Write(payload); err != nil {
							b.Fatal(err)
						}
					}
					b.StopTimer()
				})
			})
		}
	}
}

// BenchmarkReadFromPipe moves what a process writes to its stdout, 64 KiB at a time.
func BenchmarkReadFromPipe(b *testing.B) {
	for _, protocol := range []Protocol{ChannelV5, ChannelV4Base64} {
		b.Run(string(protocol), func(b *testing.B) {
			benchmarkConn(b, protocol, func(c *ChannelConn, client *net.TCPConn) {
				go drain(client)
				r, w, err := os.Pipe()
				if err != nil {
					b.Fatal(err)
				}
				growPipe(w)
				payload := make([]byte, 64<<10)
				b.SetBytes(int64(len(payload)))
				b.ReportAllocs()
				b.ResetTimer()
				go func() {
					for range b.N {
						w.Write(payload)
					}
					w.Close()
				}()
				if _, err := c.Channel(Stdout).ReadFrom(r); err != nil {
					b.Fatal(err)
				}
				b.StopTimer()
				r.Close()
			})
		})
	}
}

// BenchmarkReceive receives stdin in messages of this size.
func BenchmarkReceive(b *testing.B) {
	for _, protocol := range []Protocol{ChannelV5, ChannelV4Base64} {
		for _, size := range []int{16, 4 << 10, 32 << 10} {
			b.Run(fmt.Sprintf("%s/%d", protocol, size), func(b *testing.B) {
				benchmarkConn(b, protocol, func(c *ChannelConn, client *net.TCPConn) {
					message := clientFrame(frames.OpBinary, true, "\x00"+strings.Repeat("x", size))
					if protocol.Base64() {
						message = clientFrame(frames.OpText, true, "0"+strings.Repeat("eHh4", size/3))
						size = size / 3 * 3
					}
					burst := max(1, 64<<10/len(message))
					messages := []byte(strings.Repeat(string(message), burst))
					b.SetBytes(int64(size))
					b.ReportAllocs()
					b.ResetTimer()
					go func() {
						for n := b.N; n > 0; n -= burst {
							client.Write(messages[:min(n, burst)*len(message)])
						}
					}()
					target := int64(b.N) * int64(size)
					if n, err := c.Channel(Stdin).WriteTo(&untilCount{target}); err != errEnough {
						b.Fatalf("%d bytes: %v", n, err)
					}
					b.StopTimer()
				})
			})
		}
	}
}

var errEnough = io.ErrNoProgress

// untilCount fails with errEnough after that many bytes.
type untilCount struct{ left int64 }

func (u *untilCount) Write(p []byte) (int, error) {
	u.left -= int64(len(p))
	if u.left <= 0 {
		return len(p), errEnough
	}
	return len(p), nil
}

// BenchmarkIdle reports what an idle session holds. Serve waits for the client, and a goroutine waits for output of a
// process. The "hijacked" numbers are those of net/http's part of a connection, measured with a handler that hijacks and
// does nothing.
func BenchmarkIdle(b *testing.B) {
	const count = 300
	measure := func(name string, handler http.HandlerFunc, wait func()) {
		s := httptest.NewServer(handler)
		clients := make([]net.Conn, count)
		heapBefore, stackBefore := heapInUse()
		for i := range clients {
			client, err := net.Dial("tcp", s.Listener.Addr().String())
			if err != nil {
				b.Fatal(err)
			}
			fmt.Fprintf(client, rawHandshake, s.Listener.Addr(), ChannelV5)
			clients[i] = client
		}
		wait()
		heap, stack := heapInUse()
		b.ReportMetric((heap-heapBefore)/count, "heap-bytes/"+name)
		b.ReportMetric((stack-stackBefore)/count, "stack-bytes/"+name)
		for _, client := range clients {
			client.Close()
		}
		s.Close()
	}
	for range b.N {
		var arrived, left sync.WaitGroup
		arrived.Add(count)
		left.Add(count)
		measure("hijacked", func(w http.ResponseWriter, r *http.Request) {
			defer left.Done()
			c, _, err := http.NewResponseController(w).Hijack()
			if err != nil {
				b.Error(err)
				return
			}
			defer c.Close()
			arrived.Done()
			io.ReadFull(c, make([]byte, 1))
		}, arrived.Wait)
		left.Wait()

		arrived.Add(count)
		left.Add(count)
		measure("session", func(w http.ResponseWriter, r *http.Request) {
			defer left.Done()
			c, err := Accept(w, r, ChannelV5, execConfig())
			if err != nil {
				b.Error(err)
				return
			}
			out, process, err := os.Pipe()
			if err != nil {
				b.Error(err)
				return
			}
			defer process.Close()
			var copiers sync.WaitGroup
			copiers.Go(func() { c.Channel(Stdout).ReadFrom(out) })
			arrived.Done()
			c.Serve(context.Background())
			out.Close()
			copiers.Wait()
		}, arrived.Wait)
		left.Wait()
	}
}

func heapInUse() (heap, stack float64) {
	var stats runtime.MemStats
	for range 3 {
		runtime.GC()
	}
	runtime.ReadMemStats(&stats)
	return float64(stats.HeapAlloc), float64(stats.StackInuse)
}

func growPipe(f *os.File) {
	// The streaming server enlarges its pipes in the same way.
	if raw, err := f.SyscallConn(); err == nil {
		raw.Control(func(fd uintptr) { unix.FcntlInt(fd, unix.F_SETPIPE_SZ, 1<<20) })
	}
}
