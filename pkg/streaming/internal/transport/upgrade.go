package transport

import (
	"errors"
	"fmt"
	"net"
	"net/http"
	"strings"
	"time"

	"github.com/streamshim/streamshim/pkg/streaming/internal/websocket"
)

// Upgrade is what a request asks its connection to become.
type Upgrade struct {
	WebSocket bool
	Protocol  string // version of the remotecommand or port-forward protocol
}

// Name returns the name of the transport.
func (u Upgrade) Name() string {
	if u.WebSocket {
		return "WebSocket"
	}
	return SPDY
}

// HijackSPDY answers the upgrade and takes the connection over from net/http.
func HijackSPDY(w http.ResponseWriter, protocol string) (conn net.Conn, buffered []byte, err error) {
	conn, rw, err := http.NewResponseController(w).Hijack()
	if err != nil {
		return nil, nil, fmt.Errorf("take the connection over: %w", err)
	}
	if n := rw.Reader.Buffered(); n > 0 {
		peeked, _ := rw.Reader.Peek(n) //nolint:errcheck // n bytes are there
		buffered = append([]byte(nil), peeked...)
	}
	var head strings.Builder
	head.WriteString("HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: " + SPDY + "\r\n")
	if protocol != "" {
		head.WriteString(HeaderProtocolVersion + ": " + protocol + "\r\n")
	}
	head.WriteString("\r\n")
	conn.SetDeadline(time.Time{}) //nolint:errcheck // the write below fails on a dead connection
	if _, err := conn.Write([]byte(head.String())); err != nil {
		conn.Close() //nolint:errcheck // the client is gone
		return nil, nil, fmt.Errorf("answer the upgrade: %w", err)
	}
	return conn, buffered, nil
}

// Headers of an upgrade to SPDY and of its streams.
const (
	SPDY                   = "SPDY/3.1"
	HeaderProtocolVersion  = "X-Stream-Protocol-Version"
	HeaderAcceptedVersions = "X-Accepted-Stream-Protocol-Versions"
	HeaderStreamType       = "streamtype"
	HeaderPort             = "port"
	HeaderRequestID        = "requestid"
)

// Types of streams.
const (
	StreamError  = "error"
	StreamStdin  = "stdin"
	StreamStdout = "stdout"
	StreamStderr = "stderr"
	StreamResize = "resize"
	StreamData   = "data"
)

// IsSPDYUpgrade reports whether the request asks for SPDY/3.1.
func IsSPDYUpgrade(r *http.Request) bool {
	return websocket.HasToken(r.Header, "Connection", "upgrade") && websocket.HasToken(r.Header, "Upgrade", SPDY)
}

// CommaSeparated returns a header's values, whether sent in one line or several.
func CommaSeparated(h http.Header, name string) []string {
	var values []string
	for _, line := range h.Values(name) {
		for v := range strings.SplitSeq(line, ",") {
			values = append(values, strings.TrimSpace(v))
		}
	}
	return values
}

// ErrNoProtocol means that a request names no protocol version, ErrUnknownProtocol that it names only unknown ones. They
// are answered with 400 and 403, as in k8s.io/streaming's Handshake.
var (
	ErrNoProtocol      = errors.New("the header " + HeaderProtocolVersion + " is missing: it must list the protocol versions that the client speaks")
	ErrUnknownProtocol = errors.New("none of the protocol versions offered is spoken here")
)

// Negotiate picks the first of the client's protocols that is in known: the client's order is its
// preference.
func Negotiate(h http.Header, known []string) (string, error) {
	offered := CommaSeparated(h, HeaderProtocolVersion)
	if len(offered) == 0 {
		return "", ErrNoProtocol
	}
	for _, o := range offered {
		for _, k := range known {
			if o == k {
				return k, nil
			}
		}
	}
	return "", fmt.Errorf("%w: offered %q, known %q", ErrUnknownProtocol, offered, known)
}
