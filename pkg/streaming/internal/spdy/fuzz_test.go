package spdy

import (
	"context"
	"io"
	"net"
	"net/http"
	"testing"
	"time"

	"github.com/streamshim/streamshim/pkg/streaming/internal/spdy/frames"
)

// recordedSession returns what a client sends: streams, data, half-closes, a reset, PING, SETTINGS.
func recordedSession() []byte {
	var b []byte
	data := func(id uint32, flags byte, payload string) {
		header := make([]byte, frames.HeaderLen)
		frames.PutDataHeader(header, id, flags, len(payload))
		b = append(append(b, header...), payload...)
	}
	b = frames.AppendEmptySettings(b)
	b = frames.AppendSynStream(b, 1, 0, frames.AppendHeaderBlock(nil, true, http.Header{"Streamtype": {"error"}}))
	b = frames.AppendSynStream(b, 3, 0, frames.AppendHeaderBlock(nil, false, http.Header{"Streamtype": {"stdin"}}))
	b = frames.AppendSynStream(b, 5, frames.FlagFin, frames.AppendHeaderBlock(nil, false, http.Header{"Streamtype": {"stdout"}}))
	data(1, frames.FlagFin, "")
	data(3, 0, "hello ")
	b = frames.AppendPing(b, 1)
	data(3, 0, "world")
	data(99, 0, "nobody")
	data(3, frames.FlagFin, "!")
	b = frames.AppendSynStream(b, 7, 0, frames.AppendHeaderBlock(nil, false, http.Header{"Streamtype": {"data"}, "Port": {"80"}}))
	data(7, 0, "lost")
	b = frames.AppendRstStream(b, 7, ResetCancel)
	data(7, 0, "late")
	b = append(b, 0x80, 3, 0, frames.TypeWindowUpdate, 0, 0, 0, 8, 0, 0, 0, 3, 0, 1, 0, 0)
	return frames.AppendGoAway(b, 0, frames.GoAwayOK)
}

// FuzzFrames feeds a connection arbitrary bytes. The connection and its streams must end by themselves.
func FuzzFrames(f *testing.F) {
	session := recordedSession()
	f.Add(session)
	f.Add(session[:100])
	f.Add(openRaw())
	f.Add(frames.AppendSynStream(openRaw(), 1, 0, nil))
	f.Add([]byte{0x80, 3, 0, 4, 0, 0, 0, 4, 0xff, 0xff, 0xff, 0xff})
	f.Add([]byte{0x80, 3, 0, 8, 0, 0xff, 0xff, 0xff})
	f.Add([]byte{0, 0, 0, 0, 0, 0, 0, 1, 0})
	f.Fuzz(func(t *testing.T, in []byte) {
		c := NewServer(&deadEnd{}, in, Config{
			StreamBuffer: 1, ConnBuffer: 1 << 20, Stall: time.Second,
			OnStream: func(s *Stream) {
				if s.ID()%4 == 3 {
					s.CloseRead()
				}
			},
		})
		c.Serve(context.Background())
		if c.Err() == nil {
			t.Error("no error after the end")
		}
		c.mu.Lock()
		streams := len(c.streams)
		c.mu.Unlock()
		if streams > c.cfg.MaxStreams {
			t.Errorf("%d streams", streams)
		}
		c.Close()
		if b := c.limits.Borrowed(); b != 0 {
			t.Errorf("%d bytes still borrowed", b)
		}
	})
}

// deadEnd is a connection whose peer has sent all that it had.
type deadEnd struct{ net.Conn }

func (*deadEnd) Read([]byte) (int, error)         { return 0, io.EOF }
func (*deadEnd) Write(p []byte) (int, error)      { return len(p), nil }
func (*deadEnd) Close() error                     { return nil }
func (*deadEnd) SetWriteDeadline(time.Time) error { return nil }
func (*deadEnd) SetReadDeadline(time.Time) error  { return nil }
