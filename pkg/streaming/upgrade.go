package streaming

import (
	"errors"
	"net/http"

	"github.com/streamshim/streamshim/pkg/session"
	"github.com/streamshim/streamshim/pkg/streaming/internal/status"
	"github.com/streamshim/streamshim/pkg/streaming/internal/transport"
	"github.com/streamshim/streamshim/pkg/streaming/internal/websocket"
	"github.com/streamshim/streamshim/pkg/streaming/portforward"
	"github.com/streamshim/streamshim/pkg/streaming/remotecommand"
)

var errNoUpgrade = errors.New("this URL serves connections that are upgraded to SPDY/3.1 or WebSocket; the request asks for neither")

// negotiateUpgrade returns the upgrade that the request asks for. It does not answer the request.
func negotiateUpgrade(r *http.Request, kind session.Kind) (transport.Upgrade, error) {
	switch {
	case transport.IsSPDYUpgrade(r):
		protocol, err := transport.Negotiate(r.Header, knownProtocols(kind))
		return transport.Upgrade{Protocol: protocol}, err
	case websocket.IsUpgrade(r):
		webSocketKind := websocket.RemoteCommand
		if kind == session.PortForward {
			webSocketKind = websocket.PortForward
		}
		protocol, err := websocket.Negotiate(r, webSocketKind)
		return transport.Upgrade{WebSocket: true, Protocol: string(protocol)}, err
	}
	return transport.Upgrade{}, errNoUpgrade
}

// knownProtocols returns the protocol versions that are spoken over SPDY.
func knownProtocols(kind session.Kind) []string {
	if kind == session.PortForward {
		return []string{portforward.Protocol}
	}
	return remotecommand.ProtocolNames()
}

func writeUpgradeError(w http.ResponseWriter, kind session.Kind, err error) {
	known := knownProtocols(kind)
	code := http.StatusBadRequest
	var handshake *websocket.HandshakeError
	switch {
	case errors.As(err, &handshake):
		code = handshake.StatusCode
	case errors.Is(err, transport.ErrUnknownProtocol):
		code = http.StatusForbidden
		for _, p := range known {
			w.Header().Add(transport.HeaderAcceptedVersions, p)
		}
	}
	status.WriteError(w, code, err.Error())
}
