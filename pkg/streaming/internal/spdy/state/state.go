// Package state defines the state of a frozen SPDY connection for a hand-over.
package state

import (
	"errors"
	"fmt"
	"net/http"

	"github.com/streamshim/streamshim/pkg/streaming/internal/failure"
	"github.com/streamshim/streamshim/pkg/streaming/internal/spdy/frames"
)

// Conn is the state of a frozen connection: all that is needed to continue on the same socket, in this program or in
// another. It has no receipts: those begin anew, and answers to earlier PINGs are ignored.
//
// It is part of a hand-over's state, so its fields must keep their names and meanings.
type Conn struct {
	Server bool // the peer opens odd streams
	Closed bool // this side has closed the connection: there is no socket

	// Input is what was read and not parsed yet. It may begin with the rest of a data frame's payload.
	Input     []byte
	Stream    uint32 // of that data frame; 0 if its payload is discarded
	Remaining int    // bytes of it that were not parsed yet
	Fin       bool   // the frame has FIN

	// Output is what must be written first: whole frames, except that the beginning of the first may have been sent.
	Output []byte

	LastPeerStream uint32 // the highest id that the peer has used
	OpenNext       uint32 // the id of the next stream of this side
	PingNext       uint32 // the id of the next PING of this side
	HeadersSent    bool   // the zlib stream of our direction has begun
	RefuseStreams  bool   // further streams of the peer are refused
	// History is the end of the peer's inflated headers, with the frames.Dictionary. It is empty before the first header
	// block.
	History []byte

	LastActivity, LastReceived int64 // Unix nanoseconds

	Gone     *failure.Failure // why the connection is over
	Ended    *failure.Failure // why no more frames are read
	Unwanted *failure.Failure // why nothing can be written any more

	Streams []Stream
}

// Stream is a stream of a Conn.
type Stream struct {
	ID             uint32
	Header         http.Header
	Received, Sent int64
	Unread         []byte           // received and not read
	ReadEnd        *failure.Failure // what follows the data
	WriteEnd       *failure.Failure
	ReadClosed     bool // CloseRead was called
	FinSent        bool // FIN is in Output or before
	Replied        bool // SYN_REPLY is in Output or before, or is not to be sent
	Opened         bool // by this side
	Accepted       bool // the peer has replied to it
}

// Check returns an error for a state that no connection can have.
func (s *Conn) Check() error {
	first := uint32(1)
	if s.Server {
		first = 2
	}
	switch {
	case s.Remaining < 0 || s.Remaining > frames.MaxLen:
		return fmt.Errorf("a data frame with %d bytes left", s.Remaining)
	case s.LastPeerStream > frames.MaxStreamID:
		return fmt.Errorf("stream id %d", s.LastPeerStream)
	case s.OpenNext < first || s.OpenNext > frames.MaxStreamID+2 || s.OpenNext%2 != first%2:
		return fmt.Errorf("next stream id %d", s.OpenNext)
	case s.PingNext < first || s.PingNext > frames.MaxStreamID+2 || s.PingNext%2 != first%2:
		return fmt.Errorf("next PING id %d", s.PingNext)
	case len(s.History) > frames.HistorySize:
		return fmt.Errorf("%d bytes of header text", len(s.History))
	case s.Closed && s.Gone == nil, s.Ended != nil && s.Gone == nil:
		return errors.New("an end without a reason")
	}
	seen := make(map[uint32]bool, len(s.Streams))
	for i := range s.Streams {
		stream := &s.Streams[i]
		ours := stream.ID%2 == first%2
		switch {
		case stream.ID == 0 || stream.ID > frames.MaxStreamID || seen[stream.ID]:
			return fmt.Errorf("stream %d is none, or is there twice", stream.ID)
		case ours && stream.ID >= s.OpenNext, !ours && stream.ID > s.LastPeerStream:
			return fmt.Errorf("stream %d was never opened", stream.ID)
		case ours != stream.Opened:
			return fmt.Errorf("stream %d was opened by the wrong side", stream.ID)
		case stream.Received < 0 || stream.Sent < 0:
			return fmt.Errorf("stream %d has moved less than nothing", stream.ID)
		}
		seen[stream.ID] = true
	}
	return nil
}
