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

// Protocol is a WebSocket subprotocol, as in the Sec-WebSocket-Protocol header.
type Protocol string

const (
	// ChannelUnnamed is for a client that offers no subprotocol. It is framed like ChannelV1.
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

// Base64 reports whether messages are text: a digit for the channel and the payload in base64.
func (p Protocol) Base64() bool { return p == ChannelV1Base64 || p == ChannelV4Base64 }

// HalfClose reports whether the client can close one channel with the message [255, channel].
func (p Protocol) HalfClose() bool { return p == ChannelV5 }

// Tunnel reports whether the connection is to be accepted with AcceptTunnel and not as channels.
func (p Protocol) Tunnel() bool { return p == PortForwardTunnel }

// StatusVersion returns the format of the error channel: 4 is a JSON status, 1 is plain text that is only sent for a
// failure, 0 is for the tunnel, which has no error channel.
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

// Kind is the kind of a request.
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

// HandshakeError means that a request cannot become a WebSocket connection.
type HandshakeError struct {
	// StatusCode is the HTTP status to answer with.
	StatusCode int
	Reason     string
}

func (e *HandshakeError) Error() string { return "websocket handshake: " + e.Reason }

// Select returns the protocol to speak with a client that makes these offers, in our order of preference. Without
// offers it is ChannelUnnamed. If no offer is supported, the error is a *HandshakeError with status 403, as in the
// stock server.
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

// Offers returns the subprotocols in the Sec-WebSocket-Protocol header lines. For a name with characters that RFC 6455
// section 4.1 does not allow, the error is a *HandshakeError with status 400. A slash is accepted although it is such a
// character, because "SPDY/3.1+portforward.k8s.io" has one.
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

// IsUpgrade reports whether the request asks for WebSocket. Negotiate checks whether it can be served.
func IsUpgrade(r *http.Request) bool {
	return HasToken(r.Header, "Connection", "upgrade") && HasToken(r.Header, "Upgrade", "websocket")
}

// Negotiate checks everything that Accept needs of a request, and selects the protocol. It does not touch the
// connection, so that a request that it rejects, with a *HandshakeError, does not use its token up.
//
// It rejects a browser's request from a page of another origin with 403; see originAllowed.
func Negotiate(r *http.Request, kind Kind) (Protocol, error) {
	refuse := func(status int, reason string) (Protocol, error) {
		return "", &HandshakeError{StatusCode: status, Reason: reason}
	}
	switch {
	case !HasToken(r.Header, "Connection", "upgrade"):
		return refuse(http.StatusBadRequest, "no Connection: Upgrade header")
	case !HasToken(r.Header, "Upgrade", "websocket"):
		return refuse(http.StatusUpgradeRequired, "no Upgrade: websocket header")
	case r.Method != http.MethodGet:
		return refuse(http.StatusMethodNotAllowed, "the method is not GET")
	case !HasToken(r.Header, "Sec-WebSocket-Version", "13"):
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

// HasToken reports whether a comma-separated header has a token, whatever its case.
func HasToken(header http.Header, name, token string) bool {
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

// originAllowed reports whether the page that a request comes from may connect to us. Kubelet and API server forward the
// headers of their client, which may be a browser behind kubectl proxy. They have authorized it, so Origin does not
// matter. Host is then the API server's address. A browser that a page has directed here sends our address as Host, and
// the page's as Origin. It would also need a token. Against DNS rebinding, where Host is another name, the token is the
// only protection.
func originAllowed(r *http.Request) bool {
	origin := r.Header.Get("Origin")
	if origin == "" || !ownHost(r) {
		return true
	}
	u, err := url.Parse(origin)
	return err == nil && strings.EqualFold(u.Host, r.Host)
}

// ownHost reports whether a request's Host is the address at which it arrived, as an IP address or as localhost.
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
