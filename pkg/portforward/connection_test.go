package portforward

import (
	"bytes"
	"context"
	"errors"
	"io"
	"net"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"golang.org/x/sys/unix"

	"github.com/streamshim/streamshim/internal/testutil"
	"github.com/streamshim/streamshim/internal/testutil/leak"
)

// forwardTo forwards a new stream to a pod's listener served by serve.
func forwardTo(t *testing.T, ctx context.Context, config Config, serve func(*net.TCPConn)) (*tcpStream, *net.TCPConn, chan outcome) {
	t.Helper()
	return forwardWith(t, ctx, nil, config, serve)
}

// forwardWith is forwardTo with a change to the stream before it is handed over.
func forwardWith(t *testing.T, ctx context.Context, change func(*tcpStream), config Config, serve func(*net.TCPConn)) (*tcpStream, *net.TCPConn, chan outcome) {
	t.Helper()
	pod := newSandbox(t)
	port := pod.listen("127.0.0.1:0", serve)
	f := newForwarder(t, pod.path, config)
	return start(t, func(stream *tcpStream) (int64, int64, error) {
		if change != nil {
			change(stream)
		}
		return f.Forward(ctx, port, stream)
	})
}

func pattern(size int) []byte {
	p := make([]byte, size)
	for i := range p {
		p[i] = byte(i * 7 >> 3)
	}
	return p
}

// reset closes a connection with a reset.
func reset(conn *net.TCPConn) {
	conn.SetLinger(0)
	conn.Close()
}

func checkOutcome(t *testing.T, done chan outcome, sent, received int64, err error) {
	t.Helper()
	got := within(t, "Forward", done)
	if !errors.Is(got.err, err) || (err == nil) != (got.err == nil) {
		t.Errorf("error %v, want %v", got.err, err)
	}
	if sent >= 0 && got.sent != sent || received >= 0 && got.received != received {
		t.Errorf("sent %d and received %d, want %d and %d", got.sent, got.received, sent, received)
	}
}

// A client sends, shuts down its side and waits for the answer, however long that takes.
func TestHalfCloseDeliversLateAnswer(t *testing.T) {
	leak.Check(t)
	question, answer := pattern(3<<20), pattern(5<<20)
	stream, client, done := forwardTo(t, t.Context(), Config{}, func(conn *net.TCPConn) {
		defer conn.Close()
		got, err := io.ReadAll(conn)
		if !bytes.Equal(got, question) || err != nil {
			t.Errorf("the pod read %d bytes, %v", len(got), err)
		}
		time.Sleep(1500 * time.Millisecond) // both runtimes cut the answer off after 1 s
		conn.Write(answer)
	})
	client.Write(question)
	client.CloseWrite()
	got, err := io.ReadAll(client)
	if !bytes.Equal(got, answer) || err != nil {
		t.Errorf("the client read %d bytes, %v, want %d", len(got), err, len(answer))
	}
	checkOutcome(t, done, int64(len(question)), int64(len(answer)), nil)
	if is(stream.wasReset) {
		t.Error("the stream was reset")
	}
}

// The pod ends its side first: the client sees that at once, and what it goes on sending arrives.
func TestUploadGoesOnAfterPodHasFinished(t *testing.T) {
	leak.Check(t)
	upload := pattern(3 << 20)
	uploaded := make(chan []byte, 1)
	stream, client, done := forwardTo(t, t.Context(), Config{}, func(conn *net.TCPConn) {
		defer conn.Close()
		io.WriteString(conn, "answer")
		conn.CloseWrite()
		got, err := io.ReadAll(conn)
		if err != nil {
			t.Error(err)
		}
		uploaded <- got
	})
	if got, err := io.ReadAll(client); string(got) != "answer" || err != nil {
		t.Errorf("the client read %q, %v", got, err)
	}
	time.Sleep(1500 * time.Millisecond) // both runtimes close after 1 s
	client.Write(upload)
	client.CloseWrite()
	if got := within(t, "upload", uploaded); !bytes.Equal(got, upload) {
		t.Errorf("the pod read %d bytes, want %d", len(got), len(upload))
	}
	checkOutcome(t, done, int64(len(upload)), 6, nil)
	if is(stream.wasReset) {
		t.Error("the stream was reset")
	}
}

// The pod has closed for good and resets what the client goes on sending. The client has the whole
// answer and is not told a reset, which could cost it the part that it has not read yet.
func TestAnswerStaysWholeWhenPodRefusesUploadAfterIt(t *testing.T) {
	leak.Check(t)
	stream, client, done := forwardTo(t, t.Context(), Config{}, func(conn *net.TCPConn) {
		io.WriteString(conn, "answer")
		conn.Close()
	})
	if got, err := io.ReadAll(client); string(got) != "answer" || err != nil {
		t.Errorf("the client read %q, %v", got, err)
	}
	waitFor(t, "end of the upload", func() bool {
		client.Write([]byte("more"))
		return is(stream.readClosed)
	})
	checkOutcome(t, done, -1, 6, nil)
	if is(stream.wasReset) {
		t.Error("the stream was reset")
	}
}

// client-go resets a stream as soon as it has seen its end. That is no error, but the pod must not
// take it for the end of the upload.
func TestResetByClientAfterThePodsEnd(t *testing.T) {
	leak.Check(t)
	podSaw := make(chan error, 1)
	_, client, done := forwardTo(t, t.Context(), Config{}, func(conn *net.TCPConn) {
		defer conn.Close()
		io.WriteString(conn, "answer")
		conn.CloseWrite()
		_, err := io.ReadAll(conn)
		podSaw <- err
	})
	io.ReadAll(client)
	reset(client)
	if err := within(t, "the pod's end", podSaw); !errors.Is(err, unix.ECONNRESET) {
		t.Errorf("the pod saw %v, want a reset", err)
	}
	checkOutcome(t, done, 0, 6, nil)
}

func TestResetByPod(t *testing.T) {
	leak.Check(t)
	pod := newSandbox(t)
	resetting := pod.listen("127.0.0.1:0", func(conn *net.TCPConn) {
		io.ReadFull(conn, make([]byte, 4))
		io.WriteString(conn, "part")
		io.ReadFull(conn, make([]byte, 4))
		reset(conn)
	})
	echoing := pod.listen("127.0.0.1:0", echo)
	f := newForwarder(t, pod.path, Config{})
	forward := func(port uint16) func(*tcpStream) (int64, int64, error) {
		return func(stream *tcpStream) (int64, int64, error) { return f.Forward(t.Context(), port, stream) }
	}
	_, other, otherDone := start(t, forward(echoing))
	stream, client, done := start(t, forward(resetting))

	io.WriteString(client, "ping")
	if _, err := io.ReadFull(client, make([]byte, 4)); err != nil {
		t.Error(err)
	}
	io.WriteString(client, "ping")
	if _, err := io.ReadAll(client); !errors.Is(err, unix.ECONNRESET) {
		t.Errorf("the client saw %v, want a reset", err)
	}
	checkOutcome(t, done, 8, 4, ErrResetByPod)
	if !is(stream.wasReset) {
		t.Error("the stream was not reset")
	}

	// Only that connection (kubernetes#74551).
	io.WriteString(other, "still here")
	other.CloseWrite()
	if got, err := io.ReadAll(other); string(got) != "still here" || err != nil {
		t.Errorf("the other connection gave %q, %v", got, err)
	}
	checkOutcome(t, otherDone, 10, 10, nil)
}

// The kernel tells a reset once. When the upload's write is told, the download's read finds a mere
// end, which must not become a FIN for a client whose answer was cut off.
func TestResetToldToTheUploadIsStillAReset(t *testing.T) {
	leak.Check(t)
	stream, client, done := forwardWith(t, t.Context(), holdDownload, Config{}, func(conn *net.TCPConn) {
		io.WriteString(conn, "cut o")
		io.ReadFull(conn, make([]byte, 4))
		reset(conn)
	})
	waitFor(t, "upload to meet the reset", func() bool {
		client.Write([]byte("more"))
		return is(stream.readClosed)
	})
	close(stream.hold)
	if _, err := io.ReadAll(client); !errors.Is(err, unix.ECONNRESET) {
		t.Errorf("the client saw %v, want a reset", err)
	}
	checkOutcome(t, done, -1, 5, ErrResetByPod)
}

// A reset that comes after the pod's FIN, before the client could be given all of the answer, takes
// nothing from it. This is a server that closes while the upload still runs, with a slow client.
func TestResetAfterThePodsEndTakesNothingFromTheAnswer(t *testing.T) {
	for _, uploading := range []bool{false, true} {
		t.Run(map[bool]string{false: "upload silent", true: "upload running"}[uploading], func(t *testing.T) {
			leak.Check(t)
			answered := make(chan struct{})
			var stream *tcpStream
			stream, client, done := forwardWith(t, t.Context(), holdDownload, Config{}, func(conn *net.TCPConn) {
				defer close(answered)
				io.WriteString(conn, "whole answer")
				conn.CloseWrite()
				if _, err := io.ReadFull(conn, make([]byte, 4)); err != nil {
					t.Error(err)
				}
				reset(conn)
			})
			io.WriteString(client, "ping")
			within(t, "the pod's reset", answered)
			if uploading {
				waitFor(t, "upload to meet the reset", func() bool {
					client.Write([]byte("more"))
					return is(stream.readClosed)
				})
			}
			close(stream.hold)
			if got, err := io.ReadAll(client); string(got) != "whole answer" || err != nil {
				t.Errorf("the client read %q, %v", got, err)
			}
			client.CloseWrite()
			checkOutcome(t, done, -1, 12, nil)
			if is(stream.wasReset) {
				t.Error("the stream was reset")
			}
		})
	}
}

func holdDownload(stream *tcpStream) { stream.hold = make(chan struct{}) }

func TestResetByClient(t *testing.T) {
	leak.Check(t)
	podSaw := make(chan error, 1)
	stream, client, done := forwardTo(t, t.Context(), Config{}, func(conn *net.TCPConn) {
		defer conn.Close()
		io.WriteString(conn, "hello")
		_, err := io.ReadAll(conn)
		podSaw <- err
	})
	io.ReadFull(client, make([]byte, 5))
	reset(client)
	if err := within(t, "the pod's end", podSaw); !errors.Is(err, unix.ECONNRESET) {
		t.Errorf("the pod saw %v, want a reset", err)
	}
	checkOutcome(t, done, 0, 5, ErrResetByClient)
	if !is(stream.wasReset) {
		t.Error("the stream was not reset")
	}
}

// A pod that never reads holds the client back, and nothing else; its forward ends at once with the context.
func TestNeverReadingPod(t *testing.T) {
	leak.Check(t)
	reason := errors.New("the reason")
	ctx, cancel := context.WithCancelCause(t.Context())
	ended, podSaw := make(chan struct{}), make(chan error, 1)
	stream, client, done := forwardTo(t, ctx, Config{}, func(conn *net.TCPConn) {
		defer conn.Close()
		<-ended
		_, err := io.Copy(io.Discard, conn)
		podSaw <- err
	})
	// Full is what takes nothing for a while, the buffers of two connections being in between.
	var uploaded int
	for chunk := make([]byte, 1<<20); ; {
		client.SetWriteDeadline(time.Now().Add(500 * time.Millisecond))
		n, err := client.Write(chunk)
		uploaded += n
		if err != nil {
			break
		}
		if uploaded > 256<<20 {
			t.Fatal("the client was never held back")
		}
	}
	cancel(reason)
	checkOutcome(t, done, -1, 0, reason)
	if !is(stream.wasReset) {
		t.Error("the stream was not reset")
	}
	close(ended)
	if err := within(t, "the pod's end", podSaw); !errors.Is(err, unix.ECONNRESET) {
		t.Errorf("the pod saw %v, want a reset", err)
	}
}

func TestContextEndsForward(t *testing.T) {
	reason := errors.New("the reason")
	t.Run("before the dial", func(t *testing.T) {
		leak.Check(t)
		ctx, cancel := context.WithCancelCause(t.Context())
		cancel(reason)
		stream, _, done := forwardTo(t, ctx, Config{}, echo)
		checkOutcome(t, done, 0, 0, reason)
		if !is(stream.wasReset) {
			t.Error("the stream was not reset")
		}
	})
	t.Run("during the dial", func(t *testing.T) {
		leak.Check(t)
		pod := newSandbox(t)
		port := pod.listenFull()
		f := newForwarder(t, pod.path, Config{Dialer: Dialer{TryTimeout: time.Hour, TotalTimeout: time.Hour}})
		ctx, cancel := context.WithCancelCause(t.Context())
		stream, _, done := start(t, func(s *tcpStream) (int64, int64, error) { return f.Forward(ctx, port, s) })
		pod.waitForConnecting(port)
		cancel(reason)
		checkOutcome(t, done, 0, 0, reason)
		if !is(stream.wasReset) {
			t.Error("the stream was not reset")
		}
	})
	for _, half := range []string{"open", "client finished", "pod finished"} {
		t.Run(half, func(t *testing.T) {
			leak.Check(t)
			ctx, cancel := context.WithCancelCause(t.Context())
			podSaw, podReady := make(chan error, 1), make(chan struct{})
			stream, client, done := forwardTo(t, ctx, Config{}, func(conn *net.TCPConn) {
				defer conn.Close()
				if half == "pod finished" {
					conn.CloseWrite()
				}
				io.ReadFull(conn, make([]byte, 4))
				if half == "client finished" {
					io.ReadAll(conn)
				}
				close(podReady)
				// After the client's FIN only a write meets the reset.
				var err error
				for err == nil && half == "client finished" {
					_, err = conn.Write(make([]byte, 64<<10))
				}
				if err == nil {
					_, err = io.ReadAll(conn)
				}
				podSaw <- err
			})
			io.WriteString(client, "ping")
			if half == "client finished" {
				client.CloseWrite()
			}
			within(t, "the pod", podReady)
			cancel(reason)
			checkOutcome(t, done, 4, -1, reason)
			if !is(stream.wasReset) {
				t.Error("the stream was not reset")
			}
			if err := within(t, "the pod's end", podSaw); !errors.Is(err, unix.ECONNRESET) && !errors.Is(err, unix.EPIPE) {
				t.Errorf("the pod saw %v, want a reset", err)
			}
		})
	}
}

func TestHalfClosedIdleConnectionEnds(t *testing.T) {
	for _, half := range []string{"client finished", "pod finished"} {
		t.Run(half, func(t *testing.T) {
			leak.Check(t)
			release := make(chan struct{})
			stream, client, done := forwardTo(t, t.Context(), Config{HalfClosedIdle: 200 * time.Millisecond}, func(conn *net.TCPConn) {
				defer conn.Close()
				if half == "pod finished" {
					conn.CloseWrite()
				}
				<-release
			})
			if half == "client finished" {
				client.CloseWrite()
			}
			checkOutcome(t, done, 0, 0, ErrHalfClosedIdle)
			if !is(stream.wasReset) {
				t.Error("the stream was not reset")
			}
			close(release)
		})
	}
}

func TestHalfClosedConnectionThatMovesBytesGoesOn(t *testing.T) {
	testutil.Slow(t)
	leak.Check(t)
	const limit, pause, pieces = 4 * time.Second, 250 * time.Millisecond, 24 // 6 s in all
	_, client, done := forwardTo(t, t.Context(), Config{HalfClosedIdle: limit}, func(conn *net.TCPConn) {
		defer conn.Close()
		io.ReadAll(conn)
		for range pieces {
			io.WriteString(conn, "x")
			time.Sleep(pause)
		}
	})
	client.CloseWrite()
	if got, err := io.ReadAll(client); len(got) != pieces || err != nil {
		t.Errorf("the client read %d bytes, %v, want %d", len(got), err, pieces)
	}
	checkOutcome(t, done, 0, pieces, nil)
}

func TestHalfClosedTimer(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var taken atomic.Uint64
		expired := make(chan time.Time, 1)
		timer := halfClosedTimer{
			limit:    time.Hour,
			progress: func() (progress, bool) { return progress{taken: taken.Load()}, true },
			expired:  func() { expired <- time.Now() },
		}
		timer.start()
		for range 10 { // a byte each 50 minutes
			time.Sleep(50 * time.Minute)
			taken.Add(1)
		}
		last := time.Now()
		idle := (<-expired).Sub(last)
		if idle < time.Hour || idle > time.Hour+15*time.Minute {
			t.Errorf("expired %v after the last byte, want 1h to 1h15m", idle)
		}
		timer.stop()
	})
}

func echo(conn *net.TCPConn) {
	defer conn.Close()
	io.Copy(conn, conn)
}
