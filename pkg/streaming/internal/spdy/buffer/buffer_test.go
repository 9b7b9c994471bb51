package buffer

import (
	"bytes"
	"io"
	"math/rand/v2"
	"os"
	"testing"
	"testing/iotest"
	"time"

	"github.com/streamshim/streamshim/internal/testutil"
	"github.com/streamshim/streamshim/pkg/streaming/internal/socket"
)

func pattern(n int) []byte {
	p := make([]byte, n)
	for i := range p {
		p[i] = byte(i * 7 / 3)
	}
	return p
}

func TestQueueKeepsOrder(t *testing.T) {
	shared := &testutil.Room{}
	limits := &Limits{Stream: 64 << 10, Conn: 1 << 20, Room: shared}
	q := NewQueue(limits)
	random := rand.New(rand.NewPCG(1, 2))
	sent := pattern(8 << 20)
	var got []byte
	for rest := sent; len(rest) > 0 || !q.Empty(); {
		rest = rest[q.Append(rest[:min(len(rest), random.IntN(100_000))]):]
		switch {
		case q.Empty():
		case random.IntN(2) == 0:
			p := make([]byte, 1+random.IntN(100_000))
			got = append(got, p[:q.Read(p)]...)
		default:
			b := q.Take()
			n := random.IntN(b.Len() + 1)
			got = append(got, b.Payload()[:n]...)
			if b.Advance(n); b.Len() > 0 {
				q.PutBack(b)
			} else {
				b.Free()
			}
		}
	}
	if !bytes.Equal(got, sent) {
		t.Errorf("%d of %d bytes came out, or in another order", len(got), len(sent))
	}
	if limits.Borrowed() != 0 || shared.Held() != 0 || q.Held() != 0 {
		t.Errorf("an empty queue has borrowed %d, uses %d of the shared room and %d of its own", limits.Borrowed(), shared.Held(), q.Held())
	}
}

func TestQueueLimits(t *testing.T) {
	const own, conn = 64 << 10, 128 << 10
	shared := &testutil.Room{}
	limits := &Limits{Stream: own, Conn: conn, Room: shared}
	one, two := NewQueue(limits), NewQueue(limits)
	if n := one.Append(pattern(1 << 20)); n != own+conn || one.HasRoom() {
		t.Errorf("one stream holds %d bytes of %d, has room %v", n, own+conn, one.HasRoom())
	}
	if n := two.Append(pattern(1 << 20)); n != own || two.HasRoom() {
		t.Errorf("while another has borrowed all, a stream holds %d bytes, its own %d; has room %v", n, own, two.HasRoom())
	}
	two.Drop()
	shared.SetFull(true)
	if n := two.Append(pattern(100)); n != 100 || two.HasRoom() {
		t.Errorf("with no shared room an empty stream takes %d of 100 bytes, and has room for more %v", n, two.HasRoom())
	}
	two.AppendAll(pattern(1 << 20))
	if n := len(two.Bytes()); n != 100+1<<20 {
		t.Errorf("%d bytes are there of what has no limit", n)
	}
	one.Drop()
	two.Drop()
	if limits.Borrowed() != 0 || shared.Held() != 0 {
		t.Errorf("borrowed %d, shared %d with nothing held", limits.Borrowed(), shared.Held())
	}
}

// TestInputParks checks that an Input that waits for bytes holds no buffer and loses nothing of an incomplete frame.
func TestInputParks(t *testing.T) {
	peer, conn := testutil.TCPPair(t)
	for name, plain := range map[string]bool{"socket": false, "other": true} {
		t.Run(name, func(t *testing.T) {
			raw := socket.Raw(conn)
			if plain {
				raw = nil
			}
			var in Input
			in.Init(conn, raw, []byte("ab"))
			in.Park(in.Rest())
			read := func(want string, large bool) {
				t.Helper()
				got, err := in.Read(large)
				if err != nil || string(got) != want {
					t.Fatalf("got %q, %v; want %q", got, err, want)
				}
			}
			peer.Write([]byte("cd"))
			read("abcd", false)
			in.Keep([]byte("cd"), true)
			peer.Write([]byte("ef"))
			read("cdef", true)
			in.Keep([]byte("ef"), false)
			conn.SetReadDeadline(time.Now().Add(10 * time.Millisecond))
			if _, err := in.Read(false); err == nil {
				t.Error("there is something to read")
			}
			conn.SetReadDeadline(time.Time{})
			if in.buf != nil {
				t.Error("a buffer is held while nothing comes")
			}
			in.ParkKept()
			if string(in.Rest()) != "ef" {
				t.Errorf("%q is left", in.Rest())
			}
		})
	}
}

func TestSource(t *testing.T) {
	sent := pattern(3 << 20)
	pipe := func() io.Reader {
		read, write, err := os.Pipe()
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { read.Close() })
		go func() {
			write.Write(sent)
			write.Close()
		}()
		return read
	}
	for name, r := range map[string]io.Reader{
		"pipe": pipe(), "reader": bytes.NewReader(sent), "end with data": iotest.DataErrReader(bytes.NewReader(sent)),
	} {
		t.Run(name, func(t *testing.T) {
			source := NewSource(r)
			var got []byte
			for {
				b, err := source.Read()
				if b != nil {
					got = append(got, b.Payload()...)
					b.Free()
				}
				if err == io.EOF {
					break
				}
				if err != nil {
					t.Fatal(err)
				}
			}
			if !bytes.Equal(got, sent) {
				t.Errorf("%d of %d bytes came, or others", len(got), len(sent))
			}
		})
	}
}
