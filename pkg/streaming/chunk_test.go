package streaming

import (
	"context"
	"log/slog"
	"net"
	"sync/atomic"
	"testing"

	"golang.org/x/sys/unix"
	"k8s.io/client-go/tools/remotecommand"

	"github.com/streamshim/streamshim/internal/testutil/leak"
	"github.com/streamshim/streamshim/pkg/session"
	"github.com/streamshim/streamshim/pkg/workload"
)

// countingListener counts the writes to its connections.
type countingListener struct {
	net.Listener
	writes *atomic.Int64
}

func (l countingListener) Accept() (net.Conn, error) {
	conn, err := l.Listener.Accept()
	return countingConn{conn, l.writes}, err
}

type countingConn struct {
	net.Conn
	writes *atomic.Int64
}

func (c countingConn) Write(p []byte) (int, error) {
	c.writes.Add(1)
	return c.Conn.Write(p)
}

// TestOneWriteForAChunk checks that a chunk of output costs one read and one write, framing included. A write follows each
// read, so counting writes is enough.
func TestOneWriteForAChunk(t *testing.T) {
	const chunk = 200 << 10
	forEachTransport(t, func(t *testing.T, transport string) {
		leak.Check(t)
		listener, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		var writes, received atomic.Int64
		log := slog.New(slog.DiscardHandler)
		// A peer that may translate for a slow reader is asked for a receipt with a write for each half of a window
		// (package holdback). Those writes must not be counted here.
		s := newTestServer(t, ordinary(Config{Log: log, Sessions: session.NewRegistry(log), Commands: commandConfig{StatusWait: unlimited}}), listener.Addr())
		go func() { s.served <- s.Serve(countingListener{listener, &writes}) }()
		t.Cleanup(s.stop)

		process, err := newIdleProcess()
		if err != nil {
			t.Fatal(err)
		}
		output := process.stdout[1]
		if _, err := unix.FcntlInt(output.Fd(), unix.F_SETPIPE_SZ, 1<<20); err != nil {
			t.Fatal(err)
		}
		options := remotecommand.StreamOptions{Stdin: openStdin(t), Stdout: countingWriter{&received}}
		u := s.execURL(executorFunc(func(workload.Command) (remoteProcess, error) { return process, nil }), options, "anything")
		ctx, cancel := context.WithCancel(t.Context())
		ended := make(chan error, 1)
		go func() { ended <- stream(ctx, t, transport, u, options) }()

		sent := int64(0)
		cost := func() int64 {
			before := writes.Load()
			if _, err := output.Write(make([]byte, chunk)); err != nil {
				t.Fatal(err)
			}
			sent += chunk
			eventually(t, "the chunk arrives", func() bool { return received.Load() == sent })
			return writes.Load() - before
		}
		for range 10 { // buffers grow with what there is
			cost()
		}
		least := cost()
		for attempts := 0; least > 1 && attempts < 50; attempts++ { // PINGs are answered meanwhile
			least = min(least, cost())
		}
		if least != 1 {
			t.Errorf("%d writes for a chunk of %d bytes", least, chunk)
		}
		cancel()
		<-ended
	})
}

type countingWriter struct{ bytes *atomic.Int64 }

func (w countingWriter) Write(p []byte) (int, error) {
	w.bytes.Add(int64(len(p)))
	return len(p), nil
}
