package spdy

import (
	"context"
	"io"
	"net"
	"net/http"
	"testing"
	"time"
)

// recordedSession is what a client sends: streams, data, half-closes, a reset, PING, SETTINGS.
func recordedSession() []byte {
	var b []byte
	data := func(id uint32, flags byte, payload string) {
		header := make([]byte, headerLen)
		putDataHeader(header, id, flags, len(payload))
		b = append(append(b, header...), payload...)
	}
	b = appendEmptySettings(b)
	b = appendSynStream(b, 1, 0, appendHeaderBlock(nil, true, http.Header{"Streamtype": {"error"}}))
	b = appendSynStream(b, 3, 0, appendHeaderBlock(nil, false, http.Header{"Streamtype": {"stdin"}}))
	b = appendSynStream(b, 5, flagFin, appendHeaderBlock(nil, false, http.Header{"Streamtype": {"stdout"}}))
	data(1, flagFin, "")
	data(3, 0, "hello ")
	b = appendPing(b, 1)
	data(3, 0, "world")
	data(99, 0, "nobody")
	data(3, flagFin, "!")
	b = appendSynStream(b, 7, 0, appendHeaderBlock(nil, false, http.Header{"Streamtype": {"data"}, "Port": {"80"}}))
	data(7, 0, "lost")
	b = appendRstStream(b, 7, ResetCancel)
	data(7, 0, "late")
	b = append(b, 0x80, 3, 0, typeWindowUpdate, 0, 0, 0, 8, 0, 0, 0, 3, 0, 1, 0, 0)
	return appendGoAway(b, 0, GoAwayOK)
}

// FuzzFrames feeds a connection with arbitrary bytes. It must end by itself, with every stream.
func FuzzFrames(f *testing.F) {
	session := recordedSession()
	f.Add(session)
	f.Add(session[:100])
	f.Add(openRaw())
	f.Add(appendSynStream(openRaw(), 1, 0, nil))
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
		if b := c.borrowed.Load(); b != 0 {
			t.Errorf("%d bytes still borrowed", b)
		}
	})
}

// deadEnd is a connection whose peer has sent all it had.
type deadEnd struct{ net.Conn }

func (*deadEnd) Read([]byte) (int, error)         { return 0, io.EOF }
func (*deadEnd) Write(p []byte) (int, error)      { return len(p), nil }
func (*deadEnd) Close() error                     { return nil }
func (*deadEnd) SetWriteDeadline(time.Time) error { return nil }
func (*deadEnd) SetReadDeadline(time.Time) error  { return nil }

// FuzzHeaderBlock feeds a header reader with two blocks in a row.
func FuzzHeaderBlock(f *testing.F) {
	f.Add(plainBlock(true, 1, "name", "value"), plainBlock(false, 2, "a", "1", "b", "2"))
	f.Add(plainBlock(true, 0), []byte{})
	f.Add(plainBlock(true, 0xffffffff), plainBlock(false, 1, "A", ""))
	f.Add([]byte{0x78, 0xf9, 0xe3, 0xc6, 0xa7, 0xc2, 0x62, 0x60, 0x60, 0x60, 0, 0, 0, 0, 0xff, 0xff}, []byte{0x02, 0x61, 0, 0, 0, 0, 0xff, 0xff})
	f.Fuzz(func(t *testing.T, first, second []byte) {
		r := takeHeaderReader()
		defer r.release()
		for _, block := range [][]byte{first, second} {
			header, err := r.read(block, testLimits)
			if err == nil && len(header) > testLimits.count {
				t.Errorf("%d headers", len(header))
			}
			if err != nil && header != nil {
				t.Error("headers and an error")
			}
			if r.input.left() > maxLeftover && err == nil {
				t.Errorf("%d bytes left over", r.input.left())
			}
		}
	})
}
