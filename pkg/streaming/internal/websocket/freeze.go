package websocket

import (
	"errors"
	"os"
	"time"

	"github.com/streamshim/streamshim/pkg/handover"
	"github.com/streamshim/streamshim/pkg/streaming/internal/websocket/frames"
)

// Freeze ends all calls that wait on the connection and its channels, Serve too, with handover.ErrFrozen; see
// State. It waits for nobody, and further calls do nothing. A frozen connection is not closed by CloseNow and not by Serve's
// context.
//
// Of calls on a frozen connection's channels, Write takes all of its bytes or none, ReadFrom sends what it has
// read before, and CloseWrite, CloseRead and Reset do what they do; what is not on the wire then is in the state. What
// Read and WriteTo have not given away is there to be read after Resume.
func (c *ChannelConn) Freeze() {
	c.conn.Freeze()
	c.inbound.Freeze()
}

// Freeze ends all calls that wait on the connection with handover.ErrFrozen; see State. It waits for nobody, and further
// calls do nothing.
func (c *conn) Freeze() {
	c.endMu.Lock()
	defer c.endMu.Unlock()
	if c.frozen.Load() {
		return
	}
	c.controlMu.Lock()
	c.frozen.Store(true) // with the lock: no control writer is started any more
	c.controlMu.Unlock()
	close(c.freezing)
	if !c.closed {
		c.network.SetDeadline(time.Unix(1, 0)) //nolint:errcheck // the socket is open
	}
}

// Frozen is closed by Freeze.
func (c *conn) Frozen() <-chan struct{} { return c.freezing }

// stopped says whether a read, a write or a wait has ended because of Freeze.
func (c *conn) stopped(err error) bool {
	return c.frozen.Load() && (errors.Is(err, os.ErrDeadlineExceeded) || errors.Is(err, handover.ErrFrozen))
}

// beginClosing fails on a frozen connection.
func (c *conn) beginClosing() bool {
	c.endMu.Lock()
	defer c.endMu.Unlock()
	if c.frozen.Load() {
		return false
	}
	c.closed = true
	return true
}

// closeSocket does nothing, and says so, on a frozen connection.
func (c *conn) closeSocket() bool {
	if !c.beginClosing() {
		return false
	}
	c.network.Close()
	return true
}

// Discard gives a frozen connection up: without State it is closed.
func (c *ChannelConn) Discard() {
	if c.frozen.Load() {
		c.conn.Discard()
		c.inbound.DiscardAll()
	}
}

// Discard gives a frozen connection up: without State it is closed.
func (c *conn) Discard() {
	if c.frozen.Load() {
		c.network.Close()
		c.writers.Wait()
	}
}

// endAgain is the rest of the end of a connection that was frozen while it ended: the client may be owed our Close.
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
