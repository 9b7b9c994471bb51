package websocket

import (
	"context"
	"errors"
	"io"
	"net"
	"net/http"
	"os"
	"sync"
	"time"

	"github.com/streamshim/streamshim/pkg/handover"
	"github.com/streamshim/streamshim/pkg/rescue"
	"github.com/streamshim/streamshim/pkg/streaming/internal/websocket/frames"
)

// TunnelConn is a byte stream in binary messages, whose boundaries mean nothing: the tunnel of
// KEP-4006, for a SPDY server to run on. It is a net.Conn: one goroutine may read while others
// write.
//
// Pings are answered, and the client's Close is noticed, only while somebody reads.
type TunnelConn struct {
	*conn
	closeOnce sync.Once
}

var _ net.Conn = (*TunnelConn)(nil)

// AcceptTunnel answers the handshake of a request for which Negotiate chose PortForwardTunnel. After
// an error the request has been answered. The caller closes the connection.
func AcceptTunnel(w http.ResponseWriter, r *http.Request) (*TunnelConn, error) {
	base, err := accept(w, r, PortForwardTunnel, 0)
	if err != nil {
		return nil, err
	}
	return &TunnelConn{conn: base}, nil
}

// Read reads bytes of the stream. It returns io.EOF after the client's Close with a normal code, and
// io.ErrUnexpectedEOF, wrapped, when the client went away without one. A read deadline that passes
// ends the reading side: further reads return the same error. While the connection is frozen the error is
// handover.ErrFrozen.
func (t *TunnelConn) Read(p []byte) (int, error) {
	if len(p) == 0 {
		return 0, nil
	}
	if err := t.ended(); err != nil {
		return 0, err
	}
	for {
		if t.frozen.Load() {
			return 0, handover.ErrFrozen
		}
		t.writeHeldUp()
		if !t.in.InMessage {
			kind, err := t.in.Next()
			if err == nil && kind != frames.OpBinary {
				err = &frames.Violation{Code: frames.CloseUnsupportedData, Reason: "a text message in the tunnel"}
			}
			if err != nil {
				return 0, t.failed(err)
			}
			t.received()
		}
		n, err := t.in.Read(p)
		if err != nil && err != io.EOF {
			return n, t.failed(err)
		}
		if n > 0 {
			t.active()
			return n, nil
		}
	}
}

// ended is the error of a Read after the end, nil before.
func (t *TunnelConn) ended() error {
	select {
	case <-t.done:
	default:
		return nil
	}
	if t.doneErr == ErrClientClosed {
		return io.EOF
	}
	return t.doneErr
}

func (t *TunnelConn) failed(err error) error {
	if t.stopped(err) {
		return handover.ErrFrozen
	}
	if errors.Is(err, os.ErrDeadlineExceeded) {
		t.finish(err)
		return err
	}
	t.readError(err, nil) //nolint:errcheck // called for what it notes
	return t.ended()
}

// Write sends p as one message, without copying it. The connection may be frozen meanwhile: then p is taken, or the error
// is handover.ErrFrozen.
func (t *TunnelConn) Write(p []byte) (int, error) {
	if len(p) == 0 {
		return 0, nil
	}
	if err := t.lock(false); err != nil {
		return 0, err
	}
	defer t.unlock()
	size := frames.PutHeader(t.headers[:], frames.OpBinary, len(p))
	t.vector[0], t.vector[1] = t.headers[:size], p
	if err := t.writeVector(2); err != nil {
		return 0, err
	}
	t.active()
	return len(p), nil
}

// CloseWrite sends Close with code 1000: nothing more comes from us. Reading goes on until the
// client closes. It waits at most 2 seconds for a write in progress.
func (t *TunnelConn) CloseWrite() error {
	ctx, cancel := context.WithTimeout(context.Background(), closeTimeout)
	defer cancel()
	return t.sendClose(ctx, CloseNormal, "")
}

// Close sends Close with code 1000, if it can within 2 seconds, and closes the connection. What the
// client has sent and nobody read then makes the kernel throw away what the client has not received
// (kubernetes#60140): to end in order call CloseWrite, read until the end, and then Close.
func (t *TunnelConn) Close() error {
	t.closeOnce.Do(func() {
		t.sendCloseWithin(closeTimeout, CloseNormal, "")
		if !t.frozen.Load() {
			t.finish(ErrClosed)
		}
		t.release()
	})
	return nil
}

// NetConn is the connection underneath, to ask it about its state; bytes must not be read from it
// or written to it.
func (t *TunnelConn) NetConn() net.Conn { return t.network }

// LastActivity is when bytes of the stream were last received or sent.
func (t *TunnelConn) LastActivity() time.Time { return time.Unix(0, t.lastActivity.Load()) }

// LastReceived is when anything was last received, Ping and Pong included.
func (t *TunnelConn) LastReceived() time.Time { return time.Unix(0, t.lastReceived.Load()) }

// LocalAddr is our address of the connection.
func (t *TunnelConn) LocalAddr() net.Addr { return t.network.LocalAddr() }

// RemoteAddr is the client's address.
func (t *TunnelConn) RemoteAddr() net.Addr { return t.network.RemoteAddr() }

// SetDeadline sets both deadlines.
func (t *TunnelConn) SetDeadline(at time.Time) error { return t.network.SetDeadline(at) }

// SetReadDeadline sets the read deadline, which can pass only once; see Read.
func (t *TunnelConn) SetReadDeadline(at time.Time) error { return t.network.SetReadDeadline(at) }

// SetWriteDeadline sets the write deadline. One that passes during a write cuts a frame, and all
// further writes fail.
func (t *TunnelConn) SetWriteDeadline(at time.Time) error { return t.network.SetWriteDeadline(at) }

// ReportPanics has somebody told of a panic in a goroutine of the tunnel's own, which ends the process otherwise. It is
// called before the tunnel is used; nil changes nothing.
func (t *TunnelConn) ReportPanics(to rescue.Report) { t.reportPanics(to) }
