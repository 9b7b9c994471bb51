package websocket

import (
	"encoding/base64"
	"fmt"
	"net"
	"net/http"
	"net/url"
	"slices"
	"strings"
)

// Protocol is a WebSocket subprotocol, as in the Sec-WebSocket-Protocol header. The empty one
// stands for a client that named none, and is framed like ChannelV1.
type Protocol string

const (
	// ChannelUnnamed is what a client speaks that offers no subprotocol: ChannelV1.
	ChannelUnnamed Protocol = ""
	// ChannelV1 sends each message as one channel byte and payload; errors are plain text.
	ChannelV1 Protocol = "channel.k8s.io"
	// ChannelV1Base64 sends each message as one digit and the payload in base64.
	ChannelV1Base64 Protocol = "base64.channel.k8s.io"
	// ChannelV4 is ChannelV1 with a JSON status on the error channel.
	ChannelV4 Protocol = "v4.channel.k8s.io"
	// ChannelV4Base64 is ChannelV1Base64 with a JSON status on the error channel.
	ChannelV4Base64 Protocol = "v4.base64.channel.k8s.io"
	// ChannelV5 is ChannelV4 with a message that half-closes a channel (KEP-4006).
	ChannelV5 Protocol = "v5.channel.k8s.io"
	// PortForwardTunnel carries a SPDY/3.1 connection, on which portforward.k8s.io is spoken, as a
	// byte stream in binary messages (KEP-4006).
	PortForwardTunnel Protocol = "SPDY/3.1+portforward.k8s.io"
)

// Base64 says that messages are text: a digit for the channel and the payload in base64.
func (p Protocol) Base64() bool { return p == ChannelV1Base64 || p == ChannelV4Base64 }

// HalfClose says that the client can close one channel with the message [255, channel].
func (p Protocol) HalfClose() bool { return p == ChannelV5 }

// Tunnel says that the connection is to be accepted with AcceptTunnel and not as channels.
func (p Protocol) Tunnel() bool { return p == PortForwardTunnel }

// StatusVersion is the version of what is written to the error channel: 4 (a JSON status) or 1
// (plain text, only when something failed). Zero for the tunnel, which has no error channel.
func (p Protocol) StatusVersion() int {
	switch p {
	case ChannelV5, ChannelV4, ChannelV4Base64:
		return 4
	case PortForwardTunnel:
		return 0
	default:
		return 1
	}
}

// Kind is what a request wants to do with the connection.
type Kind int

const (
	// RemoteCommand is exec and attach.
	RemoteCommand Kind = iota
	// PortForward is port-forward.
	PortForward
)

// supported lists the protocols of each kind, best first.
var supported = map[Kind][]Protocol{
	RemoteCommand: {ChannelV5, ChannelV4, ChannelV4Base64, ChannelV1, ChannelV1Base64},
	PortForward:   {PortForwardTunnel, ChannelV4, ChannelV4Base64},
}

// HandshakeError is a request that cannot become a WebSocket connection.
type HandshakeError struct {
	// StatusCode is the HTTP status to answer with.
	StatusCode int
	Reason     string
}

func (e *HandshakeError) Error() string { return "websocket handshake: " + e.Reason }

// Select returns the protocol to speak with a client that offers these, our preference first. No
// offers at all are ChannelUnnamed. The error is a *HandshakeError with status 403, as the stock
// server answers, when nothing is in common.
func Select(kind Kind, offers []string) (Protocol, error) {
	if len(offers) == 0 {
		return ChannelUnnamed, nil
	}
	for _, protocol := range supported[kind] {
		if slices.Contains(offers, string(protocol)) {
			return protocol, nil
		}
	}
	return "", &HandshakeError{
		StatusCode: http.StatusForbidden,
		Reason:     fmt.Sprintf("none of the offered subprotocols %q is supported; supported are %q", offers, supported[kind]),
	}
}

// Offers returns the subprotocols named in the request's Sec-WebSocket-Protocol header lines. The
// error is a *HandshakeError with status 400 for names with characters that RFC 6455 section 4.1
// does not allow; the slash of "SPDY/3.1+portforward.k8s.io", which is such a character, is taken.
func Offers(header http.Header) ([]string, error) {
	var offers []string
	for _, line := range header.Values("Sec-WebSocket-Protocol") {
		for element := range strings.SplitSeq(line, ",") {
			name := strings.Trim(element, " \t")
			if name == "" {
				continue // RFC 9110 section 5.6.1: empty list elements are ignored
			}
			if strings.ContainsFunc(name, func(r rune) bool {
				return r <= ' ' || r > '~' || strings.ContainsRune(`()<>@;:\"[]?={}`, r)
			}) {
				return nil, &HandshakeError{
					StatusCode: http.StatusBadRequest,
					Reason:     fmt.Sprintf("malformed subprotocol name %q in Sec-WebSocket-Protocol", name),
				}
			}
			offers = append(offers, name)
		}
	}
	return offers, nil
}

// IsUpgrade says that the request asks for WebSocket, rightly or not. Negotiate says whether it can
// be given one.
func IsUpgrade(r *http.Request) bool {
	return hasToken(r.Header, "Connection", "upgrade") && hasToken(r.Header, "Upgrade", "websocket")
}

// Negotiate checks everything that Accept needs of a request and chooses the protocol, without
// touching the connection: what it refuses (a *HandshakeError) can be answered before the request's
// token is spent.
//
// A browser that a foreign page has sent here is refused with 403; see originAllowed.
func Negotiate(r *http.Request, kind Kind) (Protocol, error) {
	refuse := func(status int, reason string) (Protocol, error) {
		return "", &HandshakeError{StatusCode: status, Reason: reason}
	}
	switch {
	case !hasToken(r.Header, "Connection", "upgrade"):
		return refuse(http.StatusBadRequest, "no Connection: Upgrade header")
	case !hasToken(r.Header, "Upgrade", "websocket"):
		return refuse(http.StatusUpgradeRequired, "no Upgrade: websocket header")
	case r.Method != http.MethodGet:
		return refuse(http.StatusMethodNotAllowed, "the method is not GET")
	case !hasToken(r.Header, "Sec-WebSocket-Version", "13"):
		return refuse(http.StatusBadRequest, "Sec-WebSocket-Version is not 13")
	case !validKey(r.Header.Get("Sec-WebSocket-Key")):
		return refuse(http.StatusBadRequest, "Sec-WebSocket-Key is not the base64 of 16 bytes")
	case !originAllowed(r):
		return refuse(http.StatusForbidden, "the Origin header names another host")
	}
	offers, err := Offers(r.Header)
	if err != nil {
		return "", err
	}
	return Select(kind, offers)
}

// hasToken looks for a token in a comma-separated header, case-insensitively.
func hasToken(header http.Header, name, token string) bool {
	for _, line := range header.Values(name) {
		for element := range strings.SplitSeq(line, ",") {
			if strings.EqualFold(strings.Trim(element, " \t"), token) {
				return true
			}
		}
	}
	return false
}

func validKey(key string) bool {
	decoded, err := base64.StdEncoding.DecodeString(key)
	return err == nil && len(decoded) == 16
}

// originAllowed tells a page that may connect to us from one that may not. Kubelet and API server hand on
// what their client has sent, a browser behind kubectl proxy among them, and have allowed it: then Host is the
// API server's address, and Origin is no business of ours. A browser that was sent here itself names our
// address as Host and the page's as Origin. It would need a token all the same, which alone keeps out one
// that takes us for somebody else (DNS rebinding).
func originAllowed(r *http.Request) bool {
	origin := r.Header.Get("Origin")
	if origin == "" || !ownHost(r) {
		return true
	}
	u, err := url.Parse(origin)
	return err == nil && strings.EqualFold(u.Host, r.Host)
}

// ownHost tells whether a request's Host is the address at which it came in, by number or as localhost.
func ownHost(r *http.Request) bool {
	local, ok := r.Context().Value(http.LocalAddrContextKey).(net.Addr)
	if !ok {
		return true
	}
	_, ownPort, _ := net.SplitHostPort(local.String()) //nolint:errcheck // a listener's address has a port
	host, port, err := net.SplitHostPort(r.Host)
	if err != nil || port != ownPort {
		return false
	}
	ip := net.ParseIP(host)
	return strings.EqualFold(host, "localhost") || (ip != nil && ip.IsLoopback())
}
