package spdy

import (
	"time"

	"golang.org/x/sys/unix"

	"github.com/streamshim/streamshim/pkg/handover"
	"github.com/streamshim/streamshim/pkg/streaming/internal/socket"
)

// probeInterval is how often a connection that is not read is probed. FIN cannot arrive before data that does not fit the
// receive window. So without a probe a peer that was killed while it was sending would go unnoticed as long as its data is
// not read. But its kernel answers whatever is sent to it with RST, which needs no window. The probe is an empty SETTINGS and
// not a PING: the client library answers PING under the lock that its blocked writer holds, and five PINGs block all its
// streams.
//
// Only a server probes, because RST also discards what the peer's kernel has not delivered yet. A server as the peer closes
// right after its last byte, and its kernel delivers the rest as long as nothing is sent to it. A client of these protocols
// that closes while it sends has usually died. But some clients finish an upload and leave, so the first probe is sent when
// nothing has moved for probePatience.
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

// wait returns when s has room or accepts no more data. It returns an error when this side has closed the connection.
func (k *blocker) wait(s *Stream) error {
	// Answers to earlier frames may be queued.
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
	case <-k.c.done: // the end is known already
	default:
		if k.c.peerOdd {
			k.c.out.probe()
		}
	}
}

// check runs when the wait begins and whenever something happens at the socket.
func (k *blocker) check(fd uintptr) bool {
	if end := peerEnd(fd); end != nil {
		// What it has sent is still delivered when there is room.
		k.c.markGone(end)
		k.c.out.fail(end) // unblocks writers: nobody reads what they send
	}
	return k.stream.hasRoom() || k.c.ending()
}

// ending reports whether the read loop must not wait any more.
func (c *Conn) ending() bool { return c.closing.Load() || c.frozen.Load() }

// stalledStream returns the stream to reset when s blocks the connection: of those that were not read for Config.Stall, the one
// that holds the most. It is s itself unless another stream has used up the common room.
func (c *Conn) stalledStream(s *Stream, now time.Time) *Stream {
	most := s.held()
	for _, other := range c.openStreams() {
		if held := other.held(); held > most && now.Sub(other.lastMoved()) >= c.cfg.Stall {
			s, most = other, held
		}
	}
	return s
}

// peerEnd returns how the peer has ended the connection: ErrPeerClosed, ErrPeerReset, or nil while it has not.
func peerEnd(fd uintptr) error {
	if fd == socket.None {
		return nil
	}
	switch socket.PeerEnd(int(fd)) {
	case socket.Dead:
		// A closed socket answers data with a reset after its FIN. The error is then EPIPE, not ECONNRESET.
		if socket.TakeError(int(fd)) == unix.ECONNRESET {
			return ErrPeerReset
		}
		return ErrPeerClosed
	case socket.Closed:
		return ErrPeerClosed
	}
	return nil
}
