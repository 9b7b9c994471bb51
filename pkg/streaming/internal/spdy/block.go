package spdy

import (
	"time"

	"golang.org/x/sys/unix"

	"github.com/streamshim/streamshim/pkg/handover"
	"github.com/streamshim/streamshim/pkg/streaming/internal/socket"
)

// probeInterval is how often a connection that is not read tells the peer something. The end of a
// connection cannot arrive past data that does not fit the receive window, so a peer that was
// killed in the middle of sending would go unnoticed for as long as its data is not read. But its
// kernel answers anything sent to it with RST, and RST needs no window. The probe is an empty
// SETTINGS and not a PING: the client library answers PING under the lock that its stuck writer
// holds, and five of them stop all its streams.
//
// Only a server probes, since RST also throws away what the peer had still to deliver. A server closes
// right after its last byte, and its kernel delivers the rest for as long as nobody disturbs it. A client of
// these protocols that closes while it sends has most often died; but some finish an upload and go, and so
// the first probe comes when nothing has moved for probePatience.
const (
	probePatience = 5 * time.Second
	probeInterval = time.Second
)

// blocker is the wait of the read loop for room in a stream: until a reader makes room, the
// connection ends, or Config.Stall has passed.
type blocker struct {
	c *Conn

	waiter socket.Waiter      // whoever makes room wakes it
	ready  func(uintptr) bool // (*blocker).check, made once

	// Owned by the read loop.
	stream *Stream
}

func (k *blocker) init(c *Conn) {
	k.c = c
	k.ready = k.check
	k.waiter.Init(socket.Below(c.conn))
}

// wait returns when s has room or takes no more data, or with an error when this side has closed
// the connection.
func (k *blocker) wait(s *Stream) error {
	// What was read before may hold frames that are still to be answered.
	k.c.out.flush()
	k.stream = s
	began := time.Now()
	nextProbe := began.Add(probePatience)
	nextStall := began.Add(k.c.cfg.Stall)
	defer func() {
		k.waiter.End()
		k.stream = nil
	}()
	for {
		until := nextProbe
		if k.c.cfg.Stall > 0 && nextStall.Before(until) {
			until = nextStall
		}
		if err := k.waiter.Until(until, k.ready); err != nil {
			return err
		}
		if k.c.closing.Load() {
			return ErrClosed
		}
		if k.c.frozen.Load() {
			return handover.ErrFrozen
		}
		if s.hasRoom() {
			return nil
		}
		now := time.Now()
		if !now.Before(nextProbe) {
			nextProbe = now.Add(probeInterval)
			k.probe()
		}
		if k.c.cfg.Stall > 0 && !now.Before(nextStall) {
			if moved := s.lastMoved(); now.Sub(moved) < k.c.cfg.Stall {
				nextStall = moved.Add(k.c.cfg.Stall)
				continue
			}
			nextStall = now.Add(k.c.cfg.Stall)
			if k.c.cfg.OnStall != nil {
				k.c.cfg.OnStall()
			}
			k.c.stalledStream(s, now).reset(ResetFlowControlError, "its data was not read for too long") //nolint:errcheck // the stream has ended by then
			k.c.out.flush()
		}
	}
}

func (k *blocker) probe() {
	select {
	case <-k.c.done: // there is nothing to find out
	default:
		if k.c.peerOdd {
			k.c.out.probe()
		}
	}
}

// check runs when the wait begins and whenever something happens at the socket.
func (k *blocker) check(fd uintptr) bool {
	if end := peerEnd(fd); end != nil {
		// What it has sent is still delivered as room is made.
		k.c.markGone(end)
		k.c.out.fail(end) // nobody is there to read what a writer may be stuck with
	}
	return k.stream.hasRoom() || k.c.ending()
}

// ending says that the read loop is not to wait any more.
func (c *Conn) ending() bool { return c.closing.Load() || c.frozen.Load() }

// stalledStream picks the stream to be reset when s stands in the way: of those nobody has read for
// Config.Stall the one that holds most. It is s itself unless another has used up the common room.
func (c *Conn) stalledStream(s *Stream, now time.Time) *Stream {
	most := s.held()
	for _, other := range c.openStreams() {
		if held := other.held(); held > most && now.Sub(other.lastMoved()) >= c.cfg.Stall {
			s, most = other, held
		}
	}
	return s
}

// peerEnd says how the peer has ended the connection: ErrPeerClosed, ErrPeerReset, or nil while it has not.
func peerEnd(fd uintptr) error {
	if fd == socket.None {
		return nil
	}
	switch socket.PeerEnd(int(fd)) {
	case socket.Dead:
		// A reset behind a FIN, which what is sent to a closed socket is answered with, is called EPIPE.
		if socket.TakeError(int(fd)) == unix.ECONNRESET {
			return ErrPeerReset
		}
		return ErrPeerClosed
	case socket.Closed:
		return ErrPeerClosed
	}
	return nil
}
