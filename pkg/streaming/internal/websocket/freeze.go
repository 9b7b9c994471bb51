package websocket

import (
	"errors"
	"os"
	"time"

	"github.com/streamshim/streamshim/pkg/handover"
	"github.com/streamshim/streamshim/pkg/streaming/internal/websocket/frames"
)

// Freeze ends all calls that wait on the connection and its channels, including Serve, with handover.ErrFrozen; see State.
// It does not wait for them. Further calls do nothing. CloseNow and the end of Serve's context do not close a frozen
// connection.
//
// On the channels of a frozen connection, Write takes all of its bytes or none, ReadFrom sends what it has read, and
// CloseWrite, CloseRead and Reset work as before. Bytes that are not on the wire by then are in the state. Bytes that
// Read and WriteTo have not passed on can be read after Resume.
func (c *ChannelConn) Freeze() {
	c.conn.Freeze()
	c.inbound.Freeze()
}

// Freeze ends all calls that wait on the connection with handover.ErrFrozen; see State. It does not wait for them.
// Further calls do nothing.
func (c *conn) Freeze() {
	c.endMu.Lock()
	defer c.endMu.Unlock()
	if c.frozen.Load() {
		return
	}
	c.controlMu.Lock()
	c.frozen.Store(true) // with controlMu held, so that no control writer starts after this
	c.controlMu.Unlock()
	close(c.freezing)
	if !c.closed {
		c.network.SetDeadline(time.Unix(1, 0)) //nolint:errcheck // the socket is open
	}
}

// Frozen is closed by Freeze.
func (c *conn) Frozen() <-chan struct{} { return c.freezing }

// stopped reports whether a read, a write or a wait has ended because of Freeze.
func (c *conn) stopped(err error) bool {
	return c.frozen.Load() && (errors.Is(err, os.ErrDeadlineExceeded) || errors.Is(err, handover.ErrFrozen))
}

// beginClosing marks the connection as closed. It returns false for a frozen connection.
func (c *conn) beginClosing() bool {
	c.endMu.Lock()
	defer c.endMu.Unlock()
	if c.frozen.Load() {
		return false
	}
	c.closed = true
	return true
}

// closeSocket closes the socket. For a frozen connection it does nothing and returns false.
func (c *conn) closeSocket() bool {
	if !c.beginClosing() {
		return false
	}
	c.network.Close()
	return true
}

// Discard closes a frozen connection whose State is not wanted.
func (c *ChannelConn) Discard() {
	if c.frozen.Load() {
		c.conn.Discard()
		c.inbound.DiscardAll()
	}
}

// Discard closes a frozen connection whose State is not wanted.
func (c *conn) Discard() {
	if c.frozen.Load() {
		c.network.Close()
		c.writers.Wait()
	}
}

// endAgain completes the end of a connection that was frozen while it ended. Our Close may still be due.
func (c *ChannelConn) endAgain() error {
	c.network.SetWriteDeadline(time.Now().Add(closeTimeout))
	c.writeLock <- struct{}{}
	c.unlock()
	var violation *frames.Violation
	if errors.As(c.doneErr, &violation) {
		c.linger()
	}
	return c.served(c.doneErr)
}
