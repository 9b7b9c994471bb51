// Package transport is what sessions know of their clients' connections, whether they speak SPDY or WebSocket.
package transport

import (
	"context"
	"errors"
	"time"

	"github.com/streamshim/streamshim/pkg/handover"
	"github.com/streamshim/streamshim/pkg/streaming/internal/spdy"
	"github.com/streamshim/streamshim/pkg/streaming/internal/websocket"
	"github.com/streamshim/streamshim/pkg/workload"
)

// Conn is a client's upgraded connection, whatever the transport.
type Conn interface {
	// LastActivity is when payload last moved in either direction.
	LastActivity() time.Time
	// Serve reads from the client until it is gone.
	Serve(ctx context.Context) error
	// Done is closed as soon as the client is known to be gone; Err then says why.
	Done() <-chan struct{}
	Err() error
	// Ping asks for an answer, which shows in LastReceived. It does not block.
	Ping() error
	// LastReceived is when the client last sent anything, pings included.
	LastReceived() time.Time
	// Close ends the connection at once and wakes everybody who waits for it. It does nothing to a frozen one.
	Close() error

	// Freeze ends all calls that wait on the connection and its streams, Serve too, with handover.ErrFrozen. It waits
	// for nobody, and further calls do nothing. Done is not closed by it.
	//
	// Calls on the streams then say exactly what they have moved. Write takes all of its bytes or none; ReadFrom has
	// sent all that it has read, also when the error is that its reader's deadline has passed; what Read and WriteTo have not
	// given away stays to be read. The end of a stream that has been read up to it comes as ever. CloseWrite, CloseRead and
	// Reset do what they do.
	Freeze()
	// Frozen is closed by Freeze.
	Frozen() <-chan struct{}
	// Portable says why the connection's state could not be handed over, nil when it can.
	Portable() error
	// State is what Resume needs to go on, for a frozen connection whose Serve and whose streams' calls have all returned.
	// The socket is duplicated into files, and our own descriptor closed. Nothing can be done with the connection any more,
	// also after an error, with which it is closed.
	State(files *handover.Files) (State, error)
	// Discard closes a frozen connection instead.
	Discard()
}

// LeftInOrder tells whether the client has gone by closing its connection, and not because something broke
// or went wrong.
func LeftInOrder(err error) bool {
	return errors.Is(err, spdy.ErrPeerClosed) || errors.Is(err, spdy.ErrGoAway) ||
		err == websocket.ErrClientClosed || errors.Is(err, websocket.ErrClientVanished)
}

// IsReset tells whether a stream ended because one side has reset it.
func IsReset(err error) bool {
	var reset *spdy.ResetError
	return errors.As(err, &reset)
}

// ResetByClient tells whether a stream ended because the client has reset it.
func ResetByClient(err error) bool {
	var reset *spdy.ResetError
	return errors.As(err, &reset) && reset.Remote
}

// AwaitClose waits for the client to close its connection. The reader goes on reading and answers
// pings meanwhile; closing first would make the client's kernel throw away what it has not delivered
// (kubernetes#60140). The watcher bounds the wait. It ends also when the connection is frozen.
func AwaitClose(ctx context.Context, c Conn) {
	select {
	case <-c.Done():
	case <-c.Frozen():
	case <-ctx.Done():
	}
}

// Channels is a connection of numbered channels.
type Channels struct{ *websocket.ChannelConn }

// Close implements Conn.
func (c Channels) Close() error {
	c.CloseNow()
	return nil
}

// Transferred is the payload that streams have moved; some may be nil.
func Transferred(streams ...workload.Stream) (received, sent int64) {
	for _, s := range streams {
		if s != nil {
			received += s.Received()
			sent += s.Sent()
		}
	}
	return received, sent
}

// Closed tells whether a channel was closed.
func Closed(c <-chan struct{}) bool {
	select {
	case <-c:
		return true
	default:
		return false
	}
}

// WaitFor reports whether the channel was closed within the limit.
func WaitFor(done <-chan struct{}, limit time.Duration) bool {
	select {
	case <-done:
		return true
	default:
	}
	timer := time.NewTimer(limit)
	defer timer.Stop()
	select {
	case <-done:
		return true
	case <-timer.C:
		return false
	}
}
