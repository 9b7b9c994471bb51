package spdy

import (
	"errors"
	"os"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/streamshim/streamshim/pkg/handover"
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

// aLongTimeAgo as a deadline ends a wait at once.
var aLongTimeAgo = time.Unix(1, 0)

// blocker is the wait of the read loop for room in a stream: until a reader makes room, the
// connection ends, or Config.Stall has passed.
type blocker struct {
	c *Conn

	blocked atomic.Bool // whoever makes room calls kick

	mu    sync.Mutex         // orders kick against the end of the wait
	kicks chan struct{}      // where there is no socket to wait on
	raw   syscall.RawConn    // of c.waitConn, nil without
	ready func(uintptr) bool // (*blocker).check, made once

	// Owned by the read loop.
	stream *Stream
}

func (k *blocker) init(c *Conn) {
	k.c = c
	k.kicks = make(chan struct{}, 1)
	k.ready = k.check
	if c.waitConn != nil {
		k.raw, _ = c.waitConn.SyscallConn()
	}
}

// kick makes the waiting read loop look again.
func (k *blocker) kick() {
	if !k.blocked.Load() {
		return
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	if !k.blocked.Load() {
		return
	}
	if k.raw != nil {
		k.c.waitConn.SetReadDeadline(aLongTimeAgo) //nolint:errcheck // a connection without deadlines is closed already
		return
	}
	select {
	case k.kicks <- struct{}{}:
	default:
	}
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
	defer k.stop()
	for {
		until := nextProbe
		if k.c.cfg.Stall > 0 && nextStall.Before(until) {
			until = nextStall
		}
		if err := k.waitUntil(until); err != nil {
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

// waitUntil waits for a kick, the end of the connection or the time; it may also return early.
func (k *blocker) waitUntil(until time.Time) error {
	if k.raw == nil {
		k.blocked.Store(true)
		if k.stream.hasRoom() || k.c.ending() {
			return nil
		}
		timer := time.NewTimer(time.Until(until))
		defer timer.Stop()
		select {
		case <-k.kicks:
		case <-timer.C:
		}
		return nil
	}
	k.mu.Lock()
	var err error
	if !k.c.frozen.Load() { // else the deadline has passed
		err = k.c.waitConn.SetReadDeadline(until)
	}
	k.blocked.Store(true)
	k.mu.Unlock()
	if err == nil {
		err = k.raw.Read(k.ready)
	}
	if err != nil && !errors.Is(err, os.ErrDeadlineExceeded) {
		return err
	}
	return nil
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

func (k *blocker) stop() {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.blocked.Store(false)
	if k.raw != nil && !k.c.frozen.Load() {
		k.c.waitConn.SetReadDeadline(time.Time{}) //nolint:errcheck // as above
	}
	k.stream = nil
}

// stalledStream picks the stream to be reset when s stands in the way: of those nobody has read for
// Config.Stall the one that holds most. It is s itself unless another has used up the common room.
func (c *Conn) stalledStream(s *Stream, now time.Time) *Stream {
	c.mu.Lock()
	streams := make([]*Stream, 0, len(c.streams))
	for _, other := range c.streams {
		streams = append(streams, other)
	}
	c.mu.Unlock()

	most := s.held()
	for _, other := range streams {
		if held := other.held(); held > most && now.Sub(other.lastMoved()) >= c.cfg.Stall {
			s, most = other, held
		}
	}
	return s
}
