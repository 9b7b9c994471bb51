// Package transport gives sessions one view of their clients' connections, whether they speak SPDY or WebSocket.
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
	// LastActivity returns when payload last moved in either direction.
	LastActivity() time.Time
	// Serve reads from the client until it is gone.
	Serve(ctx context.Context) error
	// Done is closed as soon as the client is known to be gone. Err then returns why.
	Done() <-chan struct{}
	Err() error
	// Ping asks for an answer, which shows in LastReceived. It does not block.
	Ping() error
	// LastReceived returns when the client last sent anything, pings included.
	LastReceived() time.Time
	// Close ends the connection at once and unblocks all calls that wait for it. It does nothing to a frozen one.
	Close() error

	// Freeze ends all calls that wait on the connection and its streams, including Serve, with handover.ErrFrozen. It
	// does not wait for them. Further calls do nothing. Done stays open.
	//
	// The stream calls then return exactly what they have moved. Write takes all of its bytes or none. ReadFrom has sent
	// all that it has read, also when it returns the error of its reader's deadline. Bytes that Read and WriteTo have
	// not passed on stay unread. A stream whose data was all read still returns its end. CloseWrite, CloseRead and Reset
	// work as before.
	Freeze()
	// Frozen is closed by Freeze.
	Frozen() <-chan struct{}
	// Portable returns why the connection cannot be handed over, or nil.
	Portable() error
	// State returns what Resume needs. The connection must be frozen, and Serve and all stream calls must have returned.
	// State duplicates the socket into files and closes its own descriptor. After that the connection cannot be used,
	// even if State returns an error, after which it is closed.
	State(files *handover.Files) (State, error)
	// Discard closes a frozen connection whose State is not wanted.
	Discard()
}

// LeftInOrder reports whether the client has closed its connection in order, as opposed to a failure.
func LeftInOrder(err error) bool {
	return errors.Is(err, spdy.ErrPeerClosed) || errors.Is(err, spdy.ErrGoAway) ||
		err == websocket.ErrClientClosed || errors.Is(err, websocket.ErrClientVanished)
}

// IsReset reports whether a stream ended because one side has reset it.
func IsReset(err error) bool {
	var reset *spdy.ResetError
	return errors.As(err, &reset)
}

// ResetByClient reports whether a stream ended because the client has reset it.
func ResetByClient(err error) bool {
	var reset *spdy.ResetError
	return errors.As(err, &reset) && reset.Remote
}

// AwaitClose waits for the client to close its connection, or until the connection is frozen. Meanwhile the read loop
// keeps reading and answers pings. If we closed first, the client's kernel would discard what it has not delivered yet
// (kubernetes#60140). lifetime.Watcher bounds the wait.
func AwaitClose(ctx context.Context, c Conn) {
	select {
	case <-c.Done():
	case <-c.Frozen():
	case <-ctx.Done():
	}
}

// Channels is a connection with numbered channels.
type Channels struct{ *websocket.ChannelConn }

// Close implements Conn.
func (c Channels) Close() error {
	c.CloseNow()
	return nil
}

// Transferred returns the payload bytes that streams have moved. Streams may be nil.
func Transferred(streams ...workload.Stream) (received, sent int64) {
	for _, s := range streams {
		if s != nil {
			received += s.Received()
			sent += s.Sent()
		}
	}
	return received, sent
}

// Closed reports whether a channel was closed.
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
