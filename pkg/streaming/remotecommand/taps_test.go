package remotecommand

import (
	"errors"
	"io"
	"log/slog"
	"os"
	"os/exec"
	"strconv"
	"testing"
	"time"

	"github.com/creack/pty"
	"golang.org/x/sys/unix"

	"github.com/streamshim/streamshim/internal/testutil"
	"github.com/streamshim/streamshim/pkg/session"
	"github.com/streamshim/streamshim/pkg/session/recording"
	"github.com/streamshim/streamshim/pkg/streaming/internal/spdy"
	"github.com/streamshim/streamshim/pkg/workload"
)

// BenchmarkTapPoint measures what listening costs a session. The output of a terminal and of a pipe is sent over a real
// connection in several ways: as it is, through a tap point that nobody uses, to a listener, and recorded on disk. The ways
// take turns, and the best time of each counts, so that the conditions are the same. A ratio of 1 costs nothing.
func BenchmarkTapPoint(b *testing.B) {
	for _, from := range []string{"terminal", "pipe"} {
		b.Run(from, func(b *testing.B) {
			const amount = 64 << 20
			best := make(map[string]time.Duration)
			for b.Loop() {
				for _, way := range []string{"plain", "tap-point", "listener", "recorded", "recorded-first"} {
					took := measureTap(b, from, way, amount)
					if best[way] == 0 || took < best[way] {
						best[way] = took
					}
				}
			}
			b.ReportMetric(amount/best["plain"].Seconds()/1e6, "plain-MB/s")
			for _, way := range []string{"tap-point", "listener", "recorded", "recorded-first"} {
				b.ReportMetric(best["plain"].Seconds()/best[way].Seconds(), way+"/plain")
			}
		})
	}
}

// measureTap returns how long it takes until the client has everything.
func measureTap(b *testing.B, from, way string, amount int64) time.Duration {
	source := produce(b, from, amount)
	defer source.Close()
	near, far := testutil.TCPPair(b)
	drained := make(chan struct{})
	server := spdy.NewServer(far, nil, spdy.Config{OnStream: func(s *spdy.Stream) {
		go func() {
			defer close(drained)
			s.WriteTo(io.Discard)
		}()
	}})
	client := spdy.NewClient(near, nil, spdy.Config{})
	go server.Serve(b.Context())
	go client.Serve(b.Context())
	defer server.Close()
	defer client.Close()
	stream, err := client.OpenStream(nil)
	if err != nil {
		b.Fatal(err)
	}
	var to workload.Stream = stream
	taps := &session.Taps{}
	if way != "plain" {
		to = tappedStream{Stream: stream, sent: func(p []byte) error { return taps.Output(session.Stdout, p) }}
	}
	done := make(chan struct{})
	if way == "recorded" || way == "recorded-first" {
		recorder := recording.New(recording.Config{
			Directory: b.TempDir(), Buffer: 1 << 20, NonTTY: true, Rules: []session.Selector{{}}, Deny: way == "recorded-first",
		}, nil, slog.New(slog.DiscardHandler))
		live, err := session.NewRegistry(slog.New(slog.DiscardHandler), recorder).Begin(b.Context(), session.Info{Kind: session.Exec, TTY: true})
		if err != nil {
			b.Fatal(err)
		}
		taps = &live.Taps
		defer func() {
			live.End(session.Outcome{})
			recorder.Close()
		}()
	}
	if way == "listener" {
		queue := session.NewTapQueue(1<<20, nil, false, nil)
		taps.Add(queue)
		go func() {
			defer close(done)
			for more := true; more; {
				<-queue.Ready()
				_, more = queue.Take()
			}
		}()
		defer func() { queue.Close(); <-done }()
	}
	began := time.Now()
	// A terminal ends with EIO.
	if n, err := to.ReadFrom(source); n != amount || (err != nil && !errors.Is(err, unix.EIO)) {
		b.Fatalf("%d bytes, %v", n, err)
	}
	stream.CloseWrite()
	<-drained
	return time.Since(began)
}

// produce starts a process that writes to a pipe or to a terminal.
func produce(b *testing.B, from string, amount int64) *os.File {
	cmd := exec.Command("sh", "-c", "head -c "+strconv.FormatInt(amount, 10)+" /dev/zero | tr '\\0' x")
	if from == "pipe" {
		read, write, err := os.Pipe()
		if err != nil {
			b.Fatal(err)
		}
		unix.FcntlInt(write.Fd(), unix.F_SETPIPE_SZ, 1<<20)
		cmd.Stdout = write
		if err := cmd.Start(); err != nil {
			b.Fatal(err)
		}
		write.Close()
		b.Cleanup(func() { cmd.Process.Kill(); cmd.Wait() })
		return read
	}
	master, err := pty.Start(cmd)
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { cmd.Process.Kill(); cmd.Wait() })
	// creack/pty leaves the master in blocking mode.
	fd, err := unix.FcntlInt(master.Fd(), unix.F_DUPFD_CLOEXEC, 0)
	master.Close()
	if err != nil {
		b.Fatal(err)
	}
	if err := unix.SetNonblock(fd, true); err != nil {
		b.Fatal(err)
	}
	return os.NewFile(uintptr(fd), "terminal")
}
