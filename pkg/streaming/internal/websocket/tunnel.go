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

// TunnelConn is the tunnel of KEP-4006, on which a SPDY server runs: a byte stream in binary messages, whose boundaries
// have no meaning. It is a net.Conn. One goroutine may read while others write.
//
// It answers Pings and notices the client's Close only while somebody reads.
type TunnelConn struct {
	*conn
	closeOnce sync.Once
}

var _ net.Conn = (*TunnelConn)(nil)

// AcceptTunnel completes the handshake of a request for which Negotiate chose PortForwardTunnel. If it returns an error,
// it has answered the request. The caller closes the connection.
func AcceptTunnel(w http.ResponseWriter, r *http.Request) (*TunnelConn, error) {
	base, err := accept(w, r, PortForwardTunnel, 0)
	if err != nil {
		return nil, err
	}
	return &TunnelConn{conn: base}, nil
}

// Read reads bytes of the stream. It returns io.EOF after the client's Close with a normal code, and a wrapped
// io.ErrUnexpectedEOF when the client went away without one. After a read deadline has passed, all further reads return
// the same error. While the connection is frozen, the error is handover.ErrFrozen.
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

// ended returns the error of a Read after the end, and nil before.
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
	t.readError(err, nil) //nolint:errcheck // ended returns it
	return t.ended()
}

// Write sends p as one message, without copying it. If the connection is frozen meanwhile, Write takes all of p, or takes
// nothing and returns handover.ErrFrozen.
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

// CloseWrite sends Close with code 1000. Nothing can be written after it. Reading continues until the client closes. It
// waits at most 2 seconds for a write in progress.
func (t *TunnelConn) CloseWrite() error {
	ctx, cancel := context.WithTimeout(context.Background(), closeTimeout)
	defer cancel()
	return t.sendClose(ctx, CloseNormal, "")
}

// Close sends Close with code 1000, if it can within 2 seconds, and closes the connection. If data from the client is
// unread then, the kernel sends RST, and the client loses what it has not received yet (kubernetes#60140). For an
// orderly end, call CloseWrite, read until the end, and then call Close.
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

// NetConn returns the underlying connection, to query its state. The caller must not read from it or write to it.
func (t *TunnelConn) NetConn() net.Conn { return t.network }

// LastActivity returns when bytes of the stream were last received or sent.
func (t *TunnelConn) LastActivity() time.Time { return time.Unix(0, t.lastActivity.Load()) }

// LastReceived returns when anything was last received, Ping and Pong included.
func (t *TunnelConn) LastReceived() time.Time { return time.Unix(0, t.lastReceived.Load()) }

// LocalAddr returns our address of the connection.
func (t *TunnelConn) LocalAddr() net.Addr { return t.network.LocalAddr() }

// RemoteAddr returns the client's address.
func (t *TunnelConn) RemoteAddr() net.Addr { return t.network.RemoteAddr() }

// SetDeadline sets both deadlines.
func (t *TunnelConn) SetDeadline(at time.Time) error { return t.network.SetDeadline(at) }

// SetReadDeadline sets the read deadline. Once it has passed, reading has ended; see Read.
func (t *TunnelConn) SetReadDeadline(at time.Time) error { return t.network.SetReadDeadline(at) }

// SetWriteDeadline sets the write deadline. If it passes during a write, it cuts a frame, and all further writes fail.
func (t *TunnelConn) SetWriteDeadline(at time.Time) error { return t.network.SetWriteDeadline(at) }

// ReportPanics sets the function that is called after a panic in one of the tunnel's own goroutines. Without it, a panic
// ends the process. Call it before the tunnel is used. nil changes nothing.
func (t *TunnelConn) ReportPanics(to rescue.Report) { t.reportPanics(to) }
