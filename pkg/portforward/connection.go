package portforward

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"github.com/streamshim/streamshim/pkg/handover"
	"github.com/streamshim/streamshim/pkg/rescue"
	"github.com/streamshim/streamshim/pkg/workload"
)

// connection joins one TCP connection into a pod with one stream. Two goroutines run it, one per direction:
//
//	client's FIN               -> CloseWrite towards the pod, the download continues
//	pod's FIN                  -> CloseWrite on the stream at once, the upload continues
//	client leaves after FIN    -> the rest of the upload and the FIN are delivered, the download is discarded
//	client's reset             -> both directions end, reset towards the pod
//	pod's reset                -> what it sent before is delivered, then the stream is reset
//	pod's reset after its FIN  -> the download is complete and stays so, the rest of the upload is discarded
type connection struct {
	pod    *net.TCPConn
	stream workload.Stream

	freezing atomic.Bool
	received int64 // bytes to the client; valid when download has returned
	// uploaded is set when the copy towards the pod ended by itself; valid after uploadEnded. podFinished is its
	// counterpart for the other direction.
	uploaded bool
	// uploadFrozen and downloadFrozen say that a direction was stopped and is to continue.
	uploadFrozen, downloadFrozen bool

	clientFinished atomic.Bool // the client's FIN was sent to the pod
	podFinished    atomic.Bool // the pod's FIN was sent to the client

	// copyErr is the result of the copy towards the pod, valid once copied is closed.
	copied  chan struct{}
	endCopy func() // closes copied; may be called repeatedly
	sent    int64
	copyErr error

	idle halfClosedTimer
	late halfClosedTimer // runs after the client's reset
	left halfClosedTimer // runs after the client has left

	endOnce sync.Once
	err     error // why both directions were ended; valid after endOnce
}

func newConnection(pod *net.TCPConn, stream workload.Stream, halfClosedIdle time.Duration) *connection {
	c := &connection{pod: pod, stream: stream, copied: make(chan struct{})}
	c.endCopy = sync.OnceFunc(func() { close(c.copied) })
	c.idle = halfClosedTimer{limit: halfClosedIdle, progress: c.progress, expired: func() { c.abort(ErrHalfClosedIdle) }}
	c.late = halfClosedTimer{limit: resetGrace, progress: c.progress, expired: c.clientReset}
	c.left = halfClosedTimer{limit: leftGrace, progress: c.progress, expired: c.clientReset}
	for _, t := range []*halfClosedTimer{&c.idle, &c.late, &c.left} {
		t.panicked = c.panicked
	}
	return c
}

// leftGrace is how long a connection may make no progress after its client has left behind its FIN. The pod may be
// slow to read, and has nobody to answer.
const leftGrace = 30 * time.Second

// resetGrace is how long the pod may take nothing of what a client sent before its reset. Without it, a client
// that gives up on a pod that does not read would leave the connection behind for ever: both upload and download
// wait for the pod.
const resetGrace = 2 * time.Second

// clientReset ends both directions because the client reset the stream.
func (c *connection) clientReset() {
	if c.podFinished.Load() {
		c.abort(nil) // see upload
		return
	}
	c.abort(ErrResetByClient)
}

// forward moves bytes until both directions have ended, and releases the connection.
func (c *connection) forward(ctx context.Context) (sent, received int64, err error) {
	stop := context.AfterFunc(ctx, func() { rescue.Call(c.panicked, func() { c.abort(context.Cause(ctx)) }) })
	defer stop()
	c.stream.AfterReset(c.late.start)
	if s, ok := c.stream.(leaver); ok {
		defer s.AfterLeaving(c.left.start)()
	}

	uploadEnded := make(chan struct{})
	rescue.Go(rescue.Die, func() {
		defer close(uploadEnded)
		if !c.uploaded {
			rescue.Call(func(p *rescue.Panic) {
				c.panicked(p)
				c.endCopy()
			}, c.upload)
		}
	})
	if !c.podFinished.Load() {
		rescue.Call(c.panicked, c.download)
	}
	<-uploadEnded

	c.idle.stop()
	c.late.stop()
	c.left.stop()
	// After an abort this waits until the abort is done. An abort after this does nothing.
	frozen := false
	c.endOnce.Do(func() {
		if frozen = c.uploadFrozen || c.downloadFrozen; !frozen {
			c.pod.Close()
		}
	})
	if frozen {
		return c.sent, c.received, &FrozenError{connection: c}
	}
	return c.sent, c.received, c.err
}

// panicked aborts a connection whose goroutine has panicked.
func (c *connection) panicked(p *rescue.Panic) { c.abort(p) }

// isFrozen reports whether a copy ended only because the connection was frozen.
func (c *connection) isFrozen(err error) bool {
	return errors.Is(err, handover.ErrFrozen) || c.freezing.Load() && errors.Is(err, os.ErrDeadlineExceeded)
}

// upload moves the client's bytes to the pod.
func (c *connection) upload() {
	sent, err := c.stream.WriteTo(c.pod)
	c.sent += sent
	c.copyErr = err
	c.uploadFrozen = c.isFrozen(err)
	c.uploaded = !c.uploadFrozen
	c.endCopy()
	switch {
	case c.uploadFrozen:
	case c.copyErr == nil:
		c.clientFinished.Store(true)
		c.idle.start()
		// It fails only if the pod has reset the connection meanwhile, which download notices too.
		c.pod.CloseWrite()
	case c.podEnded():
		// The pod takes no more. What it sent before may still be on its way to the client, so leave it to
		// download to end the stream.
		c.stream.CloseRead()
	case c.podFinished.Load():
		// client-go resets every stream whose end it has seen. Pass it on as a reset all the same: a FIN would
		// make a truncated upload look complete.
		c.abort(nil)
	default:
		c.abort(fmt.Errorf("%w: %w", ErrResetByClient, c.copyErr))
	}
}

// download moves the pod's bytes to the client.
func (c *connection) download() {
	received, err := c.stream.ReadFrom(c.pod)
	c.received += received
	switch {
	case c.isFrozen(err):
		c.downloadFrozen = true
	case err == nil && c.finReceived():
		c.podFinished.Store(true) // before the FIN: on receiving it the client may reset
		c.idle.start()
		if err := c.stream.CloseWrite(); err != nil {
			c.abort(fmt.Errorf("%w: %w", ErrResetByClient, err))
		}
	case err == nil:
		c.abort(ErrResetByPod)
	case c.podEnded():
		c.abort(fmt.Errorf("%w: %w", ErrResetByPod, err))
	default:
		c.abort(fmt.Errorf("%w: %w", ErrResetByClient, err))
	}
}

// abort ends both directions at once. The pod goes first, because that never blocks.
func (c *connection) abort(reason error) {
	c.endOnce.Do(func() {
		c.err = reason
		c.pod.SetLinger(0) // makes Close send a reset
		c.pod.Close()
		c.stream.Reset() //nolint:errcheck // the stream ends either way
	})
}

// podEnded reports whether the connection to the pod is dead. After a failed copy it tells which side failed,
// without depending on how the stream passes errors on.
func (c *connection) podEnded() bool {
	info, err := c.tcpInfo()
	return err == nil && info.State == unix.BPF_TCP_CLOSE
}

// finReceived reports whether the pod's bytes ended with a FIN rather than a reset. The kernel reports a reset
// only once. If the upload's write got it, a read sees the same end as after a FIN, and taking that for a FIN
// would make a truncated download look complete.
func (c *connection) finReceived() bool {
	// The order matters: a connection may also be closed because the client's FIN was sent.
	if !c.podEnded() || c.clientFinished.Load() {
		return true
	}
	// It was a reset. The kernel reports EPIPE if it came after a FIN, else ECONNRESET.
	reset := c.socketError()
	if reset == nil { // the upload's write got it, so the upload is ending
		<-c.copied
		reset = c.copyErr
	}
	return errors.Is(reset, unix.EPIPE)
}

// progress returns a value that changes whenever bytes have moved. It uses the kernel's counters, because a copy
// in progress has none to read.
func (c *connection) progress() (progress, bool) {
	info, err := c.tcpInfo()
	if err != nil {
		return progress{}, false
	}
	return progress{acknowledged: info.Bytes_acked, taken: info.Bytes_received - uint64(c.unread())}, true
}

type progress struct {
	acknowledged uint64 // by the pod
	taken        uint64 // from the kernel, by us
}

func (c *connection) tcpInfo() (info *unix.TCPInfo, err error) {
	raw, err := c.pod.SyscallConn()
	if err != nil {
		return nil, err
	}
	var infoErr error
	if err := raw.Control(func(fd uintptr) {
		info, infoErr = unix.GetsockoptTCPInfo(int(fd), unix.IPPROTO_TCP, unix.TCP_INFO)
	}); err != nil {
		return nil, err
	}
	return info, infoErr
}

// socketError returns and clears the kernel's pending error.
func (c *connection) socketError() (reset error) {
	if raw, err := c.pod.SyscallConn(); err == nil {
		raw.Control(func(fd uintptr) { //nolint:errcheck // fails only on a closed connection, which has no error
			if code, err := unix.GetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_ERROR); err == nil && code != 0 {
				reset = unix.Errno(code)
			}
		})
	}
	return reset
}

// unread returns how many of the pod's bytes wait in the kernel.
func (c *connection) unread() (bytes int) {
	if raw, err := c.pod.SyscallConn(); err == nil {
		raw.Control(func(fd uintptr) { bytes, _ = unix.IoctlGetInt(int(fd), unix.SIOCINQ) }) //nolint:errcheck // fails only on a closed connection
	}
	return bytes
}

// halfClosedTimer calls expired once a connection has made no progress for limit, counted from the first start. It
// may be late by a quarter of limit.
type halfClosedTimer struct {
	limit    time.Duration
	progress func() (progress, bool) // false if the connection is closed
	expired  func()
	panicked rescue.Report

	mu      sync.Mutex
	timer   *time.Timer // nil until start
	stopped bool
	last    progress
	since   time.Time // when last was first seen
}

func (t *halfClosedTimer) start() {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.timer != nil || t.stopped {
		return
	}
	t.last, _ = t.progress()
	t.since = time.Now()
	t.timer = time.AfterFunc(t.limit/4, func() { rescue.Call(t.panicked, t.look) })
}

// state returns the timer's state, after stop.
func (t *halfClosedTimer) state() TimerState {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.timer == nil {
		return TimerState{}
	}
	return TimerState{Started: true, Still: time.Since(t.since), Acknowledged: t.last.acknowledged, Taken: t.last.taken}
}

// resume continues from another timer's state.
func (t *halfClosedTimer) resume(state TimerState) {
	if !state.Started {
		return
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	t.last = progress{acknowledged: state.Acknowledged, taken: state.Taken}
	t.since = time.Now().Add(-state.Still)
	t.timer = time.AfterFunc(t.limit/4, func() { rescue.Call(t.panicked, t.look) })
}

func (t *halfClosedTimer) look() {
	if t.isOver() {
		t.expired()
	}
}

// isOver reports whether there was no progress for the limit. Otherwise it has look called again.
func (t *halfClosedTimer) isOver() bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	now, open := t.progress()
	if !open || t.stopped {
		return false
	}
	if now != t.last {
		t.last, t.since = now, time.Now()
	}
	if time.Since(t.since) >= t.limit {
		return true
	}
	t.timer.Reset(t.limit / 4)
	return false
}

func (t *halfClosedTimer) stop() {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.stopped = true
	if t.timer != nil {
		t.timer.Stop()
	}
}
