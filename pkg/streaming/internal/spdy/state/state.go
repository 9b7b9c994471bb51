// Package state is a frozen SPDY connection as it is written down for a hand-over.
package state

import (
	"errors"
	"fmt"
	"net/http"

	"github.com/streamshim/streamshim/pkg/streaming/internal/failure"
	"github.com/streamshim/streamshim/pkg/streaming/internal/spdy/frames"
)

// Conn is a frozen connection: all that is needed to go on with it on the same socket, in this program or in
// another. Receipts are not in it: they begin anew, and answers to PINGs from before are ignored.
//
// It is written to a hand-over's state, so its fields keep their names and meanings.
type Conn struct {
	Server bool // the peer opens odd streams
	Closed bool // this side has closed the connection: there is no socket

	// Input is what was read and not understood yet. Before it may come the rest of a data frame's payload.
	Input     []byte
	Stream    uint32 // of that data frame; 0: its payload is dropped
	Remaining int    // bytes of it that are still to come
	Fin       bool   // it has FIN

	// Output is what is to be written first: whole frames, but perhaps for the beginning of the first.
	Output []byte

	LastPeerStream uint32 // the highest id that the peer has used
	OpenNext       uint32 // the id of our next stream
	PingNext       uint32 // and of our next PING
	HeadersSent    bool   // the zlib stream of our direction has begun
	RefuseStreams  bool   // no more streams of the peer are accepted
	// History is the end of what was inflated of the peer's headers, the frames.Dictionary included. Empty: the first
	// header block is still to come.
	History []byte

	LastActivity, LastReceived int64 // Unix nanoseconds

	Gone     *failure.Failure // why the connection is over
	Ended    *failure.Failure // why no frame is read any more
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
	Accepted       bool // of those, the peer has replied
}

// Check refuses what no connection can be in.
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
