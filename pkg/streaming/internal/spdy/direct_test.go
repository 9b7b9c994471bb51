package spdy

import (
	"bytes"
	"errors"
	"io"
	"os"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/streamshim/streamshim/internal/testutil"
)

// TestWriteToPipe sends more than a pipe and all buffers hold to a pipe that is read in pieces. What the read loop has
// written itself and what was buffered must arrive in order and be counted.
func TestWriteToPipe(t *testing.T) {
	streams := make(chan *Stream, 1)
	client, _ := mobyClient(t, Config{ConnBuffer: 256 << 10, OnStream: func(s *Stream) { streams <- s }})
	theirs := mobyOpen(t, client, headers("streamtype", "data"))
	s := testutil.Receive(t, "the stream", streams)
	read, write, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer read.Close()
	type result struct {
		n   int64
		err error
	}
	done := make(chan result, 1)
	go func() {
		n, err := s.WriteTo(write)
		write.Close()
		done <- result{n, err}
	}()
	sent := pattern(8 << 20)
	go func() {
		for p := sent; len(p) > 0; {
			n := min(len(p), 30_000)
			if _, err := theirs.Write(p[:n]); err != nil {
				return
			}
			p = p[n:]
		}
		theirs.Close()
	}()
	got, err := io.ReadAll(read)
	if err != nil || !bytes.Equal(got, sent) {
		t.Errorf("%d of %d bytes arrived, equal %v, error %v", len(got), len(sent), bytes.Equal(got, sent), err)
	}
	if r := testutil.Receive(t, "WriteTo", done); r.err != nil || r.n != int64(len(sent)) {
		t.Errorf("WriteTo returned %d, %v", r.n, r.err)
	}
}

// TestWriteToDirectly sends data while WriteTo waits, so that the read loop writes it, and then closes the pipe. WriteTo
// must return the error of that write, not the error of a second one.
func TestWriteToDirectly(t *testing.T) {
	streams := make(chan *Stream, 1)
	client, _ := mobyClient(t, Config{OnStream: func(s *Stream) { streams <- s }})
	theirs := mobyOpen(t, client, headers("streamtype", "data"))
	s := testutil.Receive(t, "the stream", streams)
	read, write, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer write.Close()
	type result struct {
		n   int64
		err error
	}
	done := make(chan result, 1)
	go func() {
		n, err := s.WriteTo(write)
		done <- result{n, err}
	}()
	testutil.Eventually(t, "WriteTo waits", func() bool {
		s.mu.Lock()
		defer s.mu.Unlock()
		return s.direct != nil
	})
	theirs.Write([]byte("hello"))
	got := make([]byte, 5)
	if _, err := io.ReadFull(read, got); err != nil || string(got) != "hello" {
		t.Fatalf("got %q, %v", got, err)
	}
	s.mu.Lock()
	directed := s.directed
	s.mu.Unlock()
	if directed != 5 {
		t.Errorf("%d bytes were written directly, want 5", directed)
	}
	read.Close()
	theirs.Write([]byte("lost"))
	if r := testutil.Receive(t, "WriteTo", done); !errors.Is(r.err, unix.EPIPE) || r.n != 5 {
		t.Errorf("WriteTo returned %d, %v; want 5 and a broken pipe", r.n, r.err)
	}
}
