package wire

import (
	"bytes"
	"compress/zlib"
	"encoding/binary"
	"io"
	"net"
	"testing"
	"time"

	"github.com/streamshim/streamshim/internal/testutil"
)

// pair returns a client and the server's end of its connection.
func pair(t *testing.T) (*Conn, net.Conn) {
	t.Helper()
	client, server := testutil.TCPPair(t)
	if err := client.SetDeadline(time.Now().Add(time.Minute)); err != nil {
		t.Fatal(err)
	}
	return &Conn{Conn: client, next: 1}, server
}

func TestReadFrames(t *testing.T) {
	c, server := pair(t)
	var frames []byte
	frames = AppendData(frames, 1, false, []byte("hello"))
	frames = append(frames, 0x80, 3, 0, typePing, 0, 0, 0, 4, 0, 0, 0, 2) // the client answers it
	frames = append(frames, 0x80, 3, 0, typeSynReply, 0, 0, 0, 4, 0, 0, 0, 1)
	frames = AppendData(frames, 1, true, nil)
	frames = append(frames, 0x80, 3, 0, typeRstStream, 0, 0, 0, 8, 0, 0, 0, 3, 0, 0, 0, 5)
	frames = append(frames, 0x80, 3, 0, typeGoAway, 0, 0, 0, 8, 0, 0, 0, 3, 0, 0, 0, 0)
	go func() {
		for i := range frames {
			server.Write(frames[i : i+1])
		}
	}()
	var data []byte
	fin := false
	for !fin {
		e, err := c.Next()
		if err != nil || e.Stream != 1 {
			t.Fatalf("%+v, %v", e, err)
		}
		data, fin = append(data, e.Data...), e.Fin
	}
	if string(data) != "hello" {
		t.Errorf("data %q", data)
	}
	if e, err := c.Next(); err != nil || e.Stream != 3 || !e.Reset {
		t.Errorf("reset: %+v, %v", e, err)
	}
	if _, err := c.Next(); err != ErrGoAway {
		t.Errorf("GOAWAY: %v", err)
	}
	answer := make([]byte, 12)
	if _, err := io.ReadFull(server, answer); err != nil || answer[3] != typePing || answer[11] != 2 {
		t.Errorf("PING was answered with %v, %v", answer, err)
	}
}

// TestHeaderBlocks inflates what AppendStream makes with the standard library.
func TestHeaderBlocks(t *testing.T) {
	c := &Conn{next: 1}
	var packed bytes.Buffer
	for _, name := range []string{"error", "stdout"} {
		frame, _ := c.AppendStream(nil, "streamtype", name)
		if got := int(binary.BigEndian.Uint32(frame[4:])); got != len(frame)-HeaderLength {
			t.Fatalf("the frame says %d bytes and has %d", got, len(frame)-HeaderLength)
		}
		packed.Write(frame[HeaderLength+10:])
	}
	inflater, err := zlib.NewReader(&packed)
	if err != nil {
		t.Fatal(err)
	}
	want := "\x00\x00\x00\x01\x00\x00\x00\x0astreamtype\x00\x00\x00\x05error\x00\x00\x00\x01\x00\x00\x00\x0astreamtype\x00\x00\x00\x06stdout"
	got := make([]byte, len(want))
	if _, err := io.ReadFull(inflater, got); err != nil || string(got) != want {
		t.Errorf("got %q, %v", got, err)
	}
}
