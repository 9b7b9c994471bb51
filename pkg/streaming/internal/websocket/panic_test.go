package websocket

import (
	"io"
	"net"
	"sync/atomic"
	"testing"

	"github.com/streamshim/streamshim/internal/testutil"
	"github.com/streamshim/streamshim/pkg/rescue"
)

// faultyNetwork panics at a write, once it is told to.
type faultyNetwork struct {
	net.Conn
	faulty atomic.Bool
}

func (n *faultyNetwork) Write(p []byte) (int, error) {
	if n.faulty.Swap(false) {
		panic("a fault of the test in Write")
	}
	return n.Conn.Write(p)
}

// TestPanicLeavesNoLock checks that a panic while a control frame is written leaves no lock, for which the end of the session
// would wait.
func TestPanicLeavesNoLock(t *testing.T) {
	ours, theirs := testutil.TCPPair(t)
	go io.Copy(io.Discard, theirs)
	network := &faultyNetwork{Conn: ours}
	c := carry(t, network, ChannelV5)
	panicked := make(chan *rescue.Panic, 1)
	c.reportPanics(func(p *rescue.Panic) { panicked <- p })
	network.faulty.Store(true)
	if err := c.Ping(); err != nil {
		t.Fatal(err)
	}
	testutil.Receive(t, "the panic", panicked)
	written := make(chan error, 1)
	go func() {
		_, err := c.Channel(1).Write([]byte("x"))
		written <- err
	}()
	if err := testutil.Receive(t, "a write", written); err != nil {
		t.Error(err)
	}
	c.CloseNow()
	testutil.Receive(t, "the end", c.served)
}
