package spdy

import (
	"fmt"
	"io"
	"net/http"
	"os"
	"testing"

	"github.com/moby/spdystream"
	"golang.org/x/sys/unix"

	"github.com/streamshim/streamshim/internal/testutil"
	"github.com/streamshim/streamshim/pkg/streaming/internal/spdy/frames"
)

// Each benchmark runs the same transfer with this package and with spdystream. The other end is always a plain socket, so
// only one implementation is measured.

var benchSizes = []int{4 << 10, 32 << 10, 256 << 10}

func benchBoth(b *testing.B, ours, theirs func(b *testing.B, size int)) {
	for _, size := range benchSizes {
		b.Run(fmt.Sprintf("%dKiB/streamshim", size>>10), func(b *testing.B) { ours(b, size) })
		b.Run(fmt.Sprintf("%dKiB/spdystream", size>>10), func(b *testing.B) { theirs(b, size) })
	}
}

// openRaw returns the SYN_STREAM of stream 1.
func openRaw() []byte {
	return frames.AppendSynStream(nil, 1, 0, frames.AppendHeaderBlock(nil, true, http.Header{}))
}

// drain reads until the connection ends.
func drain(r io.Reader) {
	buf := make([]byte, 1<<20)
	for {
		if _, err := r.Read(buf); err != nil {
			return
		}
	}
}

// flood sends n data frames on stream 1, with FIN at the end.
func flood(w io.Writer, n, size int) {
	frame := make([]byte, frames.HeaderLen+size)
	frames.PutDataHeader(frame, 1, 0, size)
	batch := frame
	per := max(1, 256<<10/len(frame))
	for range per - 1 {
		batch = append(batch, frame...)
	}
	for ; n > 0; n -= per {
		if _, err := w.Write(batch[:min(n, per)*len(frame)]); err != nil {
			return
		}
	}
	frames.PutDataHeader(frame, 1, frames.FlagFin, 0)
	w.Write(frame[:frames.HeaderLen])
}

func BenchmarkSend(b *testing.B) {
	benchBoth(b, func(b *testing.B, size int) {
		a, peer := testutil.TCPPair(b)
		goDo(b, func() { drain(peer) })
		streams := make(chan *Stream, 1)
		serve(b, NewServer(a, nil, Config{OnStream: func(s *Stream) { streams <- s }}))
		peer.Write(openRaw())
		s := <-streams
		p := make([]byte, size)
		b.SetBytes(int64(size))
		b.ReportAllocs()
		for b.Loop() {
			if _, err := s.Write(p); err != nil {
				b.Fatal(err)
			}
		}
	}, func(b *testing.B, size int) {
		a, peer := testutil.TCPPair(b)
		goDo(b, func() { drain(peer) })
		streams := make(chan *spdystream.Stream, 1)
		mobyConn(b, a, true, func(s *spdystream.Stream) { s.SendReply(http.Header{}, false); streams <- s })
		peer.Write(openRaw())
		s := <-streams
		p := make([]byte, size)
		b.SetBytes(int64(size))
		b.ReportAllocs()
		for b.Loop() {
			if _, err := s.Write(p); err != nil {
				b.Fatal(err)
			}
		}
	})
}

// BenchmarkReceive measures the way from the socket to a writer that costs nothing.
func BenchmarkReceive(b *testing.B) {
	benchBoth(b, func(b *testing.B, size int) {
		a, peer := testutil.TCPPair(b)
		streams := make(chan *Stream, 1)
		serve(b, NewServer(a, nil, Config{OnStream: func(s *Stream) { streams <- s }}))
		peer.Write(openRaw())
		s := <-streams
		b.SetBytes(int64(size))
		b.ReportAllocs()
		b.ResetTimer()
		n := b.N
		goDo(b, func() { flood(peer, n, size) })
		if got, err := s.WriteTo(nowhere{}); err != nil || got != int64(n)*int64(size) {
			b.Fatal(got, err)
		}
	}, func(b *testing.B, size int) {
		a, peer := testutil.TCPPair(b)
		streams := make(chan *spdystream.Stream, 1)
		mobyConn(b, a, true, func(s *spdystream.Stream) { s.SendReply(http.Header{}, false); streams <- s })
		peer.Write(openRaw())
		s := <-streams
		b.SetBytes(int64(size))
		b.ReportAllocs()
		b.ResetTimer()
		n := b.N
		goDo(b, func() { flood(peer, n, size) })
		// spdystream ends its streams without waiting for their readers, so count.
		got, want := int64(0), int64(n)*int64(size)
		buf := make([]byte, 64<<10)
		for got < want {
			m, err := s.Read(buf)
			if err != nil {
				break
			}
			got += int64(m)
		}
	})
}

// BenchmarkUpload measures the way from the socket to a pipe that is read, as the stdin of a command is.
func BenchmarkUpload(b *testing.B) {
	const size = 32 << 10 // of a frame, as kubectl sends them
	a, peer := testutil.TCPPair(b)
	streams := make(chan *Stream, 1)
	serve(b, NewServer(a, nil, Config{OnStream: func(s *Stream) { streams <- s }}))
	peer.Write(openRaw())
	s := <-streams
	r, w, err := os.Pipe()
	if err != nil {
		b.Fatal(err)
	}
	defer r.Close()
	defer w.Close()
	goDo(b, func() { io.Copy(struct{ io.Writer }{nowhere{}}, r) })
	b.SetBytes(size)
	b.ReportAllocs()
	b.ResetTimer()
	n := b.N
	goDo(b, func() { flood(peer, n, size) })
	if got, err := s.WriteTo(w); err != nil || got != int64(n)*size {
		b.Fatal(got, err)
	}
}

type nowhere struct{}

func (nowhere) Write(p []byte) (int, error) { return len(p), nil }

// BenchmarkPipeToPeer measures the way of a command's output: a pipe of 1 MiB, sent as fast as possible.
func BenchmarkPipeToPeer(b *testing.B) {
	const size = 64 << 10
	fill := func(b *testing.B, n int) *os.File {
		r, w, err := os.Pipe()
		if err != nil {
			b.Fatal(err)
		}
		unixSetPipeSize(w)
		goDo(b, func() {
			defer w.Close()
			p := make([]byte, size)
			for range n {
				if _, err := w.Write(p); err != nil {
					return
				}
			}
		})
		b.Cleanup(func() { r.Close() })
		return r
	}
	b.Run("streamshim", func(b *testing.B) {
		a, peer := testutil.TCPPair(b)
		goDo(b, func() { drain(peer) })
		streams := make(chan *Stream, 1)
		serve(b, NewServer(a, nil, Config{OnStream: func(s *Stream) { streams <- s }}))
		peer.Write(openRaw())
		s := <-streams
		b.SetBytes(size)
		b.ReportAllocs()
		b.ResetTimer()
		if _, err := io.Copy(s, fill(b, b.N)); err != nil {
			b.Fatal(err)
		}
	})
	b.Run("spdystream", func(b *testing.B) {
		a, peer := testutil.TCPPair(b)
		goDo(b, func() { drain(peer) })
		streams := make(chan *spdystream.Stream, 1)
		mobyConn(b, a, true, func(s *spdystream.Stream) { s.SendReply(http.Header{}, false); streams <- s })
		peer.Write(openRaw())
		s := <-streams
		b.SetBytes(size)
		b.ReportAllocs()
		b.ResetTimer()
		if _, err := io.Copy(struct{ io.Writer }{s}, struct{ io.Reader }{fill(b, b.N)}); err != nil {
			b.Fatal(err)
		}
	})
}

func unixSetPipeSize(f *os.File) {
	raw, err := f.SyscallConn()
	if err != nil {
		return
	}
	raw.Control(func(fd uintptr) { unix.FcntlInt(fd, unix.F_SETPIPE_SZ, 1<<20) })
}
