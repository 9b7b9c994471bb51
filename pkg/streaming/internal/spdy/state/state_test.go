package state

import (
	"testing"

	"github.com/streamshim/streamshim/pkg/streaming/internal/failure"
	"github.com/streamshim/streamshim/pkg/streaming/internal/spdy/frames"
)

func TestCheck(t *testing.T) {
	gone := &failure.Failure{Text: "gone"}
	tests := []struct {
		name    string
		change  func(c *Conn)
		refused bool
	}{
		{"as it is", func(*Conn) {}, false},
		{"over", func(c *Conn) { c.Closed, c.Gone, c.Ended = true, gone, gone }, false},
		{"less than nothing is left of a frame", func(c *Conn) { c.Remaining = -1 }, true},
		{"more than a frame is left", func(c *Conn) { c.Remaining = frames.MaxLen + 1 }, true},
		{"the peer's id is too large", func(c *Conn) { c.LastPeerStream = frames.MaxStreamID + 1 }, true},
		{"our id is the peer's", func(c *Conn) { c.OpenNext = 5 }, true},
		{"our id is none", func(c *Conn) { c.OpenNext = 0 }, true},
		{"our ids are used up", func(c *Conn) { c.OpenNext = frames.MaxStreamID + 1 }, false},
		{"the PING is the peer's", func(c *Conn) { c.PingNext = 1 }, true},
		{"too much history", func(c *Conn) { c.History = make([]byte, frames.HistorySize+1) }, true},
		{"closed without a reason", func(c *Conn) { c.Closed = true }, true},
		{"ended without a reason", func(c *Conn) { c.Ended = gone }, true},
		{"a stream twice", func(c *Conn) { c.Streams = append(c.Streams, c.Streams[0]) }, true},
		{"stream 0", func(c *Conn) { c.Streams[0].ID = 0 }, true},
		{"a stream that the peer has not opened", func(c *Conn) { c.Streams[0].ID = 5 }, true},
		{"a stream that we have not opened", func(c *Conn) { c.Streams[1].ID = 4 }, true},
		{"a stream of the wrong side", func(c *Conn) { c.Streams[0].Opened = true }, true},
		{"a stream has received less than nothing", func(c *Conn) { c.Streams[0].Received = -1 }, true},
		{"a stream has sent less than nothing", func(c *Conn) { c.Streams[1].Sent = -1 }, true},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			c := Conn{
				Server: true, LastPeerStream: 3, OpenNext: 4, PingNext: 2,
				Streams: []Stream{{ID: 1, Received: 5}, {ID: 2, Opened: true}},
			}
			test.change(&c)
			if err := c.Check(); (err != nil) != test.refused {
				t.Errorf("refused %v, want %v: %v", err != nil, test.refused, err)
			}
		})
	}
}
