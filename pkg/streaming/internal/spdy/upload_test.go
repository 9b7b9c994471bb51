package spdy

import (
	"bytes"
	"errors"
	"io"
	"math/rand/v2"
	"os"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/streamshim/streamshim/internal/testutil"
	"github.com/streamshim/streamshim/pkg/streaming/internal/spdy/frames"
)

// destination is what WriteTo writes to, and where that can be read.
type destination struct {
	to   io.WriteCloser
	from io.ReadCloser
}

func destinations(t *testing.T) map[string]func() destination {
	return map[string]func() destination{
		"pipe": func() destination {
			read, write, err := os.Pipe()
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { read.Close(); write.Close() })
			return destination{to: write, from: read}
		},
		"socket": func() destination {
			to, from := testutil.TCPPair(t)
			to.SetWriteBuffer(128 << 10)
			from.SetReadBuffer(128 << 10)
			return destination{to: to, from: from}
		},
	}
}

// uploaded is a stream that receives large frames, and the end of its WriteTo.
type uploaded struct {
	peer   *rawPeer
	stream *Stream
	done   chan error
	n      int64 // written; valid once done has its error
}

// upload serves a stream whose payload goes to the destination. The destination is closed at the end.
func upload(t *testing.T, cfg Config, to io.WriteCloser) *uploaded {
	streams := make(chan *Stream, 8)
	cfg.OnStream = func(s *Stream) { streams <- s }
	peer, _ := newRawPeer(t, cfg)
	peer.open(1, "streamtype", "data")
	u := &uploaded{peer: peer, stream: testutil.Receive(t, "the stream", streams), done: make(chan error, 1)}
	goDo(t, func() {
		n, err := u.stream.WriteTo(to)
		u.n = n
		to.Close()
		u.done <- err
	})
	return u
}

// slowReader reads in bursts. The pauses between them are longer than the read loop waits.
type slowReader struct {
	r    io.Reader
	left int // of the burst
}

func (r *slowReader) Read(p []byte) (int, error) {
	if r.left <= 0 {
		time.Sleep(3 * directWait)
		r.left = 1 << 20
	}
	n, err := r.r.Read(p)
	r.left -= n
	return n, err
}

// TestUpload sends frames of all sizes and some PINGs to each kind of destination, with readers that keep up and readers
// that do not. Every byte must arrive in its place and be counted.
func TestUpload(t *testing.T) {
	testutil.Slow(t)
	for kind, open := range destinations(t) {
		for _, slow := range []bool{false, true} {
			t.Run(map[bool]string{false: "fast/", true: "slow/"}[slow]+kind, func(t *testing.T) {
				d := open()
				u := upload(t, Config{ConnBuffer: 1 << 20}, d.to)
				sent := pattern(24 << 20)
				goDo(t, func() {
					for p, id := sent, uint32(1); len(p) > 0; id += 2 {
						n := min(len(p), rand.IntN(100_000))
						if rand.IntN(3) == 0 {
							n = min(len(p), rand.IntN(100)) // also empty ones
						}
						flags := byte(0)
						if n == len(p) {
							flags = frames.FlagFin
						}
						u.peer.data(1, flags, p[:n])
						if rand.IntN(8) == 0 { // ends a gathering; the order must hold without it, too
							u.peer.send(ping(id))
						}
						p = p[n:]
					}
				})
				defer u.peer.Close()
				goDo(t, func() { io.Copy(io.Discard, u.peer) }) // the answers to the PINGs
				from := io.Reader(d.from)
				if slow {
					from = &slowReader{r: from}
				}
				got, err := io.ReadAll(from)
				if err != nil || !bytes.Equal(got, sent) {
					t.Errorf("%d of %d bytes arrived, equal %v, error %v", len(got), len(sent), bytes.Equal(got, sent), err)
				}
				if err := testutil.Receive(t, "WriteTo", u.done); err != nil || u.n != int64(len(sent)) {
					t.Errorf("WriteTo returned %d, %v", u.n, err)
				}
				if u.stream.Received() != int64(len(sent)) {
					t.Errorf("%d bytes received", u.stream.Received())
				}
			})
		}
	}
}

// TestUploadIsGathered checks that large frames are written together, for each kind of destination.
func TestUploadIsGathered(t *testing.T) {
	for kind, open := range destinations(t) {
		t.Run(kind, func(t *testing.T) {
			d := open()
			u := upload(t, Config{}, d.to)
			goDo(t, func() { io.Copy(io.Discard, d.from) })
			testutil.Eventually(t, "WriteTo waits", func() bool {
				u.stream.mu.Lock()
				defer u.stream.mu.Unlock()
				return u.stream.direct != nil
			})
			frame := pattern(64 << 10)
			for range 1000 {
				u.peer.data(1, 0, frame)
			}
			u.peer.data(1, frames.FlagFin, nil)
			if err := testutil.Receive(t, "WriteTo", u.done); err != nil {
				t.Fatal(err)
			}
			if cap(u.stream.conn.read.pieces) < 2 {
				t.Error("nothing was gathered")
			}
		})
	}
}

// TestUploadToFullDestination leaves the destination unread. The connection's other streams must go on. When the
// destination is read, the rest must arrive, even if nothing is sent after it.
func TestUploadToFullDestination(t *testing.T) {
	for kind, open := range destinations(t) {
		t.Run(kind, func(t *testing.T) {
			d := open()
			d.from.(interface{ SetReadDeadline(time.Time) error }).SetReadDeadline(time.Now().Add(testTimeout))
			streams := make(chan *Stream, 8)
			peer, _ := newRawPeer(t, Config{OnStream: func(s *Stream) { streams <- s }})
			peer.open(1, "streamtype", "data")
			stuck := testutil.Receive(t, "the stream", streams)
			goDo(t, func() {
				stuck.WriteTo(d.to)
				d.to.Close()
			})
			send := func(p []byte) {
				for ; len(p) > 0; p = p[min(len(p), 50_000):] {
					peer.data(1, 0, p[:min(len(p), 50_000)])
				}
			}
			// The first part makes the direct way the one in use when the destination is full.
			first, sent := pattern(1<<20), pattern(8<<20)
			for p := first; len(p) > 0; p = p[64<<10:] {
				send(p[:64<<10])
				if _, err := io.ReadFull(d.from, make([]byte, 64<<10)); err != nil {
					t.Fatal(err)
				}
			}
			send(sent)
			peer.open(3, "streamtype", "data")
			peer.data(3, frames.FlagFin, []byte("neighbour"))
			got, err := io.ReadAll(testutil.Receive(t, "the neighbour", streams))
			if err != nil || string(got) != "neighbour" {
				t.Fatalf("%q, %v", got, err)
			}
			arrived := make([]byte, len(sent))
			if _, err := io.ReadFull(d.from, arrived); err != nil || !bytes.Equal(arrived, sent) {
				t.Errorf("equal %v, %v", bytes.Equal(arrived, sent), err)
			}
			peer.data(1, frames.FlagFin, nil)
			if _, err := d.from.Read(make([]byte, 1)); err != io.EOF {
				t.Errorf("after the end: %v", err)
			}
		})
	}
}

// TestUploadToClosedDestination closes the reading end in the middle. WriteTo must return the error.
func TestUploadToClosedDestination(t *testing.T) {
	for kind, open := range destinations(t) {
		t.Run(kind, func(t *testing.T) {
			d := open()
			u := upload(t, Config{}, d.to)
			ended := make(chan struct{})
			goDo(t, func() {
				frame := pattern(64 << 10)
				for {
					select {
					case <-ended:
						return
					default:
						u.peer.data(1, 0, frame)
					}
				}
			})
			if _, err := io.CopyN(io.Discard, d.from, 4<<20); err != nil {
				t.Fatal(err)
			}
			d.from.Close()
			err := testutil.Receive(t, "WriteTo", u.done)
			if !errors.Is(err, unix.EPIPE) && !errors.Is(err, unix.ECONNRESET) {
				t.Errorf("WriteTo returned %v", err)
			}
			u.stream.CloseRead() // makes room for the sender's last frames
			close(ended)
		})
	}
}

// TestPingsBehindSlowUpload checks that PINGs are answered while a command reads its input slowly.
func TestPingsBehindSlowUpload(t *testing.T) {
	read, write, err := os.Pipe() // of 64 KiB
	if err != nil {
		t.Fatal(err)
	}
	defer read.Close()
	u := upload(t, Config{ConnBuffer: 1 << 20, Stall: -1}, write)
	u.peer.data(1, 0, make([]byte, 60<<10)) // WriteTo waits for more, so the read loop itself writes
	if _, err := io.ReadFull(read, make([]byte, 60<<10)); err != nil {
		t.Fatal(err)
	}
	var batch []byte
	const number, size = 6, 32 << 10
	for range number {
		header := make([]byte, frames.HeaderLen)
		frames.PutDataHeader(header, 1, 0, size)
		batch = append(append(batch, header...), make([]byte, size)...)
	}
	u.peer.send(append(batch, ping(7)...))
	taken := 0
	answered := make(chan struct{})
	goDo(t, func() {
		defer close(answered)
		for {
			if h, _ := u.peer.next(); h.Control && h.Kind == frames.TypePing {
				return
			}
		}
	})
	for drop := make([]byte, 4<<10); taken < number*size; {
		time.Sleep(directWait * 3 / 4)
		n, err := read.Read(drop)
		if err != nil {
			t.Fatal(err)
		}
		taken += n
		select {
		case <-answered:
			if taken > number*size/3 {
				t.Errorf("the ping was answered when %d of %d bytes had been taken", taken, number*size)
			}
			goDo(t, func() { io.Copy(io.Discard, read) })
			u.peer.data(1, frames.FlagFin, nil)
			testutil.Receive(t, "WriteTo", u.done)
			return
		default:
		}
	}
	t.Error("the ping was not answered before everything had been taken")
}
