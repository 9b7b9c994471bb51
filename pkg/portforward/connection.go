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

// connection joins one TCP connection into a pod with one stream. Two goroutines run it, one for
// each direction:
//
//	client's FIN              -> CloseWrite towards the pod, the answer goes on
//	pod's FIN                 -> CloseWrite on the stream at once, the upload goes on
//	client leaves behind FIN  -> the rest of the upload and the FIN are delivered, the answer is thrown away
//	client's reset            -> both ended, reset towards the pod
//	pod's reset               -> what it sent before is delivered, then the stream is reset
//	pod's reset after its FIN -> the answer is complete and stays so; the rest of the upload is discarded
type connection struct {
	pod    *net.TCPConn
	stream workload.Stream

	freezing atomic.Bool
	received int64 // to the client; valid when download has returned
	// uploaded says that the copy towards the pod has come to an end of its own; valid once uploadEnded. What has ended of the
	// other direction is podFinished.
	uploaded bool
	// uploadFrozen and downloadFrozen say that a direction stands still and is to go on.
	uploadFrozen, downloadFrozen bool

	clientFinished atomic.Bool // the pod was sent the client's FIN
	podFinished    atomic.Bool // the client was sent the pod's FIN

	// The result of the copy towards the pod, valid once copied is closed.
	copied  chan struct{}
	sent    int64
	copyErr error

	idle halfClosedTimer
	late halfClosedTimer // after the client's reset
	left halfClosedTimer // after the client has left

	endOnce sync.Once
	err     error // why both directions were ended; valid after endOnce
}

func newConnection(pod *net.TCPConn, stream workload.Stream, halfClosedIdle time.Duration) *connection {
	c := &connection{pod: pod, stream: stream, copied: make(chan struct{})}
	c.idle = halfClosedTimer{limit: halfClosedIdle, progress: c.progress, expired: func() { c.abort(ErrHalfClosedIdle) }}
	c.late = halfClosedTimer{limit: resetGrace, progress: c.progress, expired: c.clientReset}
	c.left = halfClosedTimer{limit: leftGrace, progress: c.progress, expired: c.clientReset}
	return c
}

// leftGrace is how long a connection may move nothing whose client has left behind the end of its input: the
// pod may be slow to take it, and has nobody to answer.
const leftGrace = 30 * time.Second

// resetGrace is how long the pod may take nothing of what a client has sent before its reset. Without
// it a client that gives up a connection whose pod does not read would leave it behind for ever: the
// upload waits for the pod, and the download too.
const resetGrace = 2 * time.Second

// clientReset ends both directions because the client has.
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
			rescue.Call(c.panicked, c.upload)
		}
	})
	if !c.podFinished.Load() {
		c.download()
	}
	<-uploadEnded

	c.idle.stop()
	c.late.stop()
	c.left.stop()
	// After an abort this only waits for it to be through; after this an abort does nothing.
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

// panicked ends a connection one of whose goroutines has panicked.
func (c *connection) panicked(p *rescue.Panic) { c.abort(p) }

// isFrozen tells whether a copy has ended for no other reason than that the connection was frozen.
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
	close(c.copied)
	switch {
	case c.uploadFrozen:
	case c.copyErr == nil:
		c.clientFinished.Store(true)
		c.idle.start()
		// It fails only when the pod has reset the connection meanwhile, which download meets too.
		c.pod.CloseWrite()
	case c.podEnded():
		// The pod takes no more. What it has sent before may still be on its way to the client, so
		// it is for download to end the stream.
		c.stream.CloseRead()
	case c.podFinished.Load():
		// client-go resets every stream whose end it has seen. To the pod it is a reset still: a
		// FIN would make an upload that was cut off look complete.
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
		c.podFinished.Store(true) // before the FIN, whose receipt may make the client reset
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

// abort ends both directions at once, the pod first, because that never blocks.
func (c *connection) abort(reason error) {
	c.endOnce.Do(func() {
		c.err = reason
		c.pod.SetLinger(0) // makes Close send a reset
		c.pod.Close()
		c.stream.Reset() //nolint:errcheck // the stream ends either way
	})
}

// podEnded reports whether the connection to the pod is dead. Asked after a copy has failed it says
// on which side, without depending on how the stream passes errors on.
func (c *connection) podEnded() bool {
	info, err := c.tcpInfo()
	return err == nil && info.State == unix.BPF_TCP_CLOSE
}

// finReceived reports whether the end of the pod's bytes was a FIN. It may have been a reset: the
// kernel tells a reset just once, and when it was told to the upload's write, a read finds the same
// end that a FIN makes. To take that for a FIN would make an answer that was cut off look complete.
func (c *connection) finReceived() bool {
	// The order matters: having sent the client's FIN is a reason for the connection to be over.
	if !c.podEnded() || c.clientFinished.Load() {
		return true
	}
	// A reset, then. The kernel calls it EPIPE when it came after a FIN, else ECONNRESET.
	reset := c.socketError()
	if reset == nil { // told to the upload's write, so that the upload is at its end
		<-c.copied
		reset = c.copyErr
	}
	return errors.Is(reset, unix.EPIPE)
}

// progress is a value that changes whenever bytes have moved. The kernel's counters serve, because
// a copy under way has none to look at.
func (c *connection) progress() (progress, bool) {
	info, err := c.tcpInfo()
	if err != nil {
		return progress{}, false
	}
	return progress{acknowledged: info.Bytes_acked, taken: info.Bytes_received - uint64(c.unread())}, true
}

type progress struct {
	acknowledged uint64 // by the pod
	taken        uint64 // from the kernel, having come from the pod
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

// socketError takes the error that the kernel has not told anybody yet.
func (c *connection) socketError() (reset error) {
	if raw, err := c.pod.SyscallConn(); err == nil {
		raw.Control(func(fd uintptr) { //nolint:errcheck // fails on a closed connection, of which nothing is to be learnt
			if code, err := unix.GetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_ERROR); err == nil && code != 0 {
				reset = unix.Errno(code)
			}
		})
	}
	return reset
}

// unread is how many of the pod's bytes wait in the kernel.
func (c *connection) unread() (bytes int) {
	if raw, err := c.pod.SyscallConn(); err == nil {
		raw.Control(func(fd uintptr) { bytes, _ = unix.IoctlGetInt(int(fd), unix.SIOCINQ) }) //nolint:errcheck // as above
	}
	return bytes
}

// halfClosedTimer calls expired when a connection has made no progress for limit, to a quarter of
// that exact, counted from the first call of start.
type halfClosedTimer struct {
	limit    time.Duration
	progress func() (progress, bool) // false when the connection is closed
	expired  func()

	mu      sync.Mutex
	timer   *time.Timer // nil before start
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
	t.timer = time.AfterFunc(t.limit/4, t.look)
}

// state is where it stands, after stop.
func (t *halfClosedTimer) state() TimerState {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.timer == nil {
		return TimerState{}
	}
	return TimerState{Started: true, Still: time.Since(t.since), Acknowledged: t.last.acknowledged, Taken: t.last.taken}
}

// resume starts it where another one stood.
func (t *halfClosedTimer) resume(state TimerState) {
	if !state.Started {
		return
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	t.last = progress{acknowledged: state.Acknowledged, taken: state.Taken}
	t.since = time.Now().Add(-state.Still)
	t.timer = time.AfterFunc(t.limit/4, t.look)
}

func (t *halfClosedTimer) look() {
	t.mu.Lock()
	now, open := t.progress()
	if !open || t.stopped {
		t.mu.Unlock()
		return
	}
	if now != t.last {
		t.last, t.since = now, time.Now()
	}
	idle := time.Since(t.since) >= t.limit
	if !idle {
		t.timer.Reset(t.limit / 4)
	}
	t.mu.Unlock()
	if idle {
		t.expired()
	}
}

func (t *halfClosedTimer) stop() {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.stopped = true
	if t.timer != nil {
		t.timer.Stop()
	}
}
