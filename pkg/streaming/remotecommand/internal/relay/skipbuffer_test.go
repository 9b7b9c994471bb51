package relay

import (
	"bytes"
	"fmt"
	"io"
	"strings"
	"testing"

	"github.com/streamshim/streamshim/pkg/streaming/buffers"
)

// TestSkipBuffer checks, for any order of writes and reads, that a skipBuffer holds no more than its limit and never blocks
// its writer. What it returns and what it reports as skipped must add up to what was written.
func TestSkipBuffer(t *testing.T) {
	b := newSkipBuffer(1000, false, (*buffers.Pool)(nil).Share())
	write := func(s string) {
		t.Helper()
		if n, err := b.Write([]byte(s)); n != len(s) || err != nil {
			t.Fatalf("write: %d, %v", n, err)
		}
		if b.data.Len() > 1000 {
			t.Fatalf("%d bytes are held", b.data.Len())
		}
	}
	read := func(want string) {
		t.Helper()
		got := make([]byte, len(want))
		if _, err := io.ReadFull(b, got); err != nil || string(got) != want {
			t.Fatalf("read %q, %v; want %q", got, err, want)
		}
	}
	gap := func(bytes int) string {
		return fmt.Sprintf("\n[streamshim: %d bytes skipped because the client reads too slowly]\n", bytes)
	}
	write(strings.Repeat("a", 990))
	write("0123456789too much")
	write("also too much")
	read(strings.Repeat("a", 400))
	write("half of it is not free yet")
	read(strings.Repeat("a", 100))
	write("now it is")
	read(strings.Repeat("a", 490) + "0123456789" + gap(len("too much")+len("also too much")+len("half of it is not free yet")) + "now it is")

	write(strings.Repeat("b", 1500))
	read(strings.Repeat("b", 500))
	write(strings.Repeat("c", 2000)) // the line, and more than fits beside it
	write("d")
	fits := 500 - len(gap(500))
	read(strings.Repeat("b", 500) + gap(500) + strings.Repeat("c", fits))
	b.end()
	read(gap(2000 - fits + len("d")))
	if n, err := b.Read(make([]byte, 1)); n != 0 || err != io.EOF {
		t.Errorf("after the end: %d, %v", n, err)
	}
	if _, err := b.Write([]byte("x")); err == nil {
		t.Error("written after the end")
	}
}

// TestAttachWithoutRoom checks that a slow attached client misses output earlier if there is no room, and that none of it
// counts afterwards.
func TestAttachWithoutRoom(t *testing.T) {
	pool := buffers.New(1000)
	share := pool.Share()
	b := newSkipBuffer(1<<20, false, share)
	for range 10 {
		b.Write(make([]byte, 600))
	}
	b.end()
	if used := pool.Used(); used < 1000 || used > 1500 {
		t.Errorf("%d bytes are buffered", used)
	}
	text, err := io.ReadAll(b)
	if err != nil || !bytes.Contains(text, []byte("4800 bytes skipped")) {
		t.Errorf("%d bytes, %v: %q", len(text), err, text[max(0, len(text)-100):])
	}
	if used := pool.Used(); used != 0 {
		t.Errorf("%d bytes are buffered after all is read", used)
	}
	share.Take(10)
	share.Close()
	share.Return(5)
	if used := pool.Used(); used != 0 {
		t.Errorf("%d bytes are buffered after the end", used)
	}
}
