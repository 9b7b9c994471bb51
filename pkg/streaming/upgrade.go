package streaming

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"strings"
	"time"

	"github.com/streamshim/streamshim/pkg/session"
	"github.com/streamshim/streamshim/pkg/streaming/internal/websocket"
)

// connection is a client's upgraded connection, whatever the transport.
type connection interface {
	// LastActivity is when payload last moved in either direction.
	LastActivity() time.Time
	// Serve reads from the client until it is gone.
	Serve(ctx context.Context) error
	// Done is closed as soon as the client is known to be gone; Err then says why.
	Done() <-chan struct{}
	Err() error
	// LastReceived is when the client last sent anything, pings included.
	LastReceived() time.Time
	// Close ends the connection at once and wakes everybody who waits for it.
	Close() error
}

// upgrade is what a request asks its connection to become.
type upgrade struct {
	websocket bool
	protocol  string // version of the remotecommand or port-forward protocol
}

// name is the transport's.
func (u upgrade) name() string {
	if u.websocket {
		return "WebSocket"
	}
	return spdyUpgrade
}

// errNoUpgrade is a plain request.
var errNoUpgrade = errors.New("this URL serves connections that are upgraded to SPDY/3.1 or WebSocket; the request asks for neither")

// negotiateUpgrade finds out what the request asks for, without answering it.
func negotiateUpgrade(r *http.Request, kind session.Kind) (upgrade, error) {
	switch {
	case isSPDYUpgrade(r):
		protocol, err := negotiate(r.Header, knownProtocols(kind))
		return upgrade{protocol: protocol}, err
	case websocket.IsUpgrade(r):
		webSocketKind := websocket.RemoteCommand
		if kind == session.PortForward {
			webSocketKind = websocket.PortForward
		}
		protocol, err := websocket.Negotiate(r, webSocketKind)
		return upgrade{websocket: true, protocol: string(protocol)}, err
	}
	return upgrade{}, errNoUpgrade
}

// knownProtocols are the versions spoken over SPDY.
func knownProtocols(kind session.Kind) []string {
	if kind == session.PortForward {
		return []string{portForwardProtocol}
	}
	return remoteCommandProtocolNames()
}

func writeUpgradeError(w http.ResponseWriter, kind session.Kind, err error) {
	known := knownProtocols(kind)
	code := http.StatusBadRequest
	var handshake *websocket.HandshakeError
	switch {
	case errors.As(err, &handshake):
		code = handshake.StatusCode
	case errors.Is(err, errUnknownProtocol):
		code = http.StatusForbidden
		for _, p := range known {
			w.Header().Add(headerAcceptedVersions, p)
		}
	}
	writeError(w, code, err.Error())
}

// hijackSPDY answers the upgrade and takes the connection over from net/http.
func hijackSPDY(w http.ResponseWriter, protocol string) (conn net.Conn, buffered []byte, err error) {
	conn, rw, err := http.NewResponseController(w).Hijack()
	if err != nil {
		return nil, nil, fmt.Errorf("take the connection over: %w", err)
	}
	if n := rw.Reader.Buffered(); n > 0 {
		peeked, _ := rw.Reader.Peek(n) //nolint:errcheck // n bytes are there
		buffered = append([]byte(nil), peeked...)
	}
	var head strings.Builder
	head.WriteString("HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: " + spdyUpgrade + "\r\n")
	if protocol != unversionedRemoteCommand {
		head.WriteString(headerProtocolVersion + ": " + protocol + "\r\n")
	}
	head.WriteString("\r\n")
	conn.SetDeadline(time.Time{}) //nolint:errcheck // the write below fails on a dead connection
	if _, err := conn.Write([]byte(head.String())); err != nil {
		conn.Close() //nolint:errcheck // the client is gone
		return nil, nil, fmt.Errorf("answer the upgrade: %w", err)
	}
	return conn, buffered, nil
}
