package websocket

import (
	"context"
	"errors"
	"net"
	"net/http"
	"net/http/httptest"
	"slices"
	"testing"
)

func TestSelect(t *testing.T) {
	tests := []struct {
		name   string
		kind   Kind
		offers []string
		want   Protocol
		status int // of the refusal
	}{
		{"exec, nothing offered", RemoteCommand, nil, ChannelUnnamed, 0},
		{"exec, v5", RemoteCommand, []string{"v5.channel.k8s.io"}, ChannelV5, 0},
		{"exec, ours first and not the client's", RemoteCommand, []string{"channel.k8s.io", "v4.channel.k8s.io", "v5.channel.k8s.io"}, ChannelV5, 0},
		{"exec, v4 before its base64", RemoteCommand, []string{"v4.base64.channel.k8s.io", "v4.channel.k8s.io"}, ChannelV4, 0},
		{"exec, v4 base64", RemoteCommand, []string{"v4.base64.channel.k8s.io"}, ChannelV4Base64, 0},
		{"exec, v1", RemoteCommand, []string{"channel.k8s.io"}, ChannelV1, 0},
		{"exec, v1 base64", RemoteCommand, []string{"base64.channel.k8s.io"}, ChannelV1Base64, 0},
		{"exec, unknown ones skipped", RemoteCommand, []string{"v6.channel.k8s.io", "channel.k8s.io"}, ChannelV1, 0},
		{"exec, only unknown ones", RemoteCommand, []string{"v6.channel.k8s.io", "chat"}, "", http.StatusForbidden},
		{"exec, case matters", RemoteCommand, []string{"V5.channel.k8s.io"}, "", http.StatusForbidden},
		{"exec does not tunnel", RemoteCommand, []string{"SPDY/3.1+portforward.k8s.io"}, "", http.StatusForbidden},
		{"port-forward, nothing offered", PortForward, nil, ChannelUnnamed, 0},
		{"port-forward, tunnel first", PortForward, []string{"v4.channel.k8s.io", "SPDY/3.1+portforward.k8s.io"}, PortForwardTunnel, 0},
		{"port-forward, v4", PortForward, []string{"v4.channel.k8s.io"}, ChannelV4, 0},
		{"port-forward, v4 base64", PortForward, []string{"v4.base64.channel.k8s.io"}, ChannelV4Base64, 0},
		{"port-forward has no v1", PortForward, []string{"channel.k8s.io"}, "", http.StatusForbidden},
		{"port-forward has no v5", PortForward, []string{"v5.channel.k8s.io"}, "", http.StatusForbidden},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			got, err := Select(test.kind, test.offers)
			checkRefusal(t, err, test.status)
			if got != test.want {
				t.Errorf("got %q, want %q", got, test.want)
			}
		})
	}
}

func TestOffers(t *testing.T) {
	tests := []struct {
		name   string
		lines  []string
		want   []string
		status int
	}{
		{"no header", nil, nil, 0},
		{"empty header", []string{""}, nil, 0},
		{"one", []string{"v5.channel.k8s.io"}, []string{"v5.channel.k8s.io"}, 0},
		{"list", []string{"a, b,c ,\td"}, []string{"a", "b", "c", "d"}, 0},
		{"several lines", []string{"a", "b, c"}, []string{"a", "b", "c"}, 0},
		{"empty elements", []string{",a,,b,"}, []string{"a", "b"}, 0},
		{"the tunnel's slash", []string{"SPDY/3.1+portforward.k8s.io"}, []string{"SPDY/3.1+portforward.k8s.io"}, 0},
		{"space inside", []string{"a b"}, nil, http.StatusBadRequest},
		{"quotes", []string{`"a"`}, nil, http.StatusBadRequest},
		{"not ASCII", []string{"ä"}, nil, http.StatusBadRequest},
		{"parameter", []string{"a;q=1"}, nil, http.StatusBadRequest},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			got, err := Offers(http.Header{"Sec-Websocket-Protocol": test.lines})
			checkRefusal(t, err, test.status)
			if !slices.Equal(got, test.want) {
				t.Errorf("got %q, want %q", got, test.want)
			}
		})
	}
}

func upgradeRequest() *http.Request {
	r := httptest.NewRequest(http.MethodGet, "http://127.0.0.1:1234/exec/token", nil)
	own := &net.TCPAddr{IP: net.IPv4(127, 0, 0, 1), Port: 1234}
	r = r.WithContext(context.WithValue(r.Context(), http.LocalAddrContextKey, own))
	r.Header.Set("Connection", "keep-alive, Upgrade")
	r.Header.Set("Upgrade", "WebSocket")
	r.Header.Set("Sec-WebSocket-Version", "13")
	r.Header.Set("Sec-WebSocket-Key", "AAAAAAAAAAAAAAAAAAAAAA==")
	return r
}

func TestNegotiate(t *testing.T) {
	tests := []struct {
		name   string
		change func(*http.Request)
		status int
	}{
		{"complete", func(r *http.Request) {}, 0},
		{"no Connection", func(r *http.Request) { r.Header.Del("Connection") }, http.StatusBadRequest},
		{"no Upgrade", func(r *http.Request) { r.Header.Del("Upgrade") }, http.StatusUpgradeRequired},
		{"SPDY", func(r *http.Request) { r.Header.Set("Upgrade", "SPDY/3.1") }, http.StatusUpgradeRequired},
		{"POST", func(r *http.Request) { r.Method = http.MethodPost }, http.StatusMethodNotAllowed},
		{"old version", func(r *http.Request) { r.Header.Set("Sec-WebSocket-Version", "8") }, http.StatusBadRequest},
		{"no key", func(r *http.Request) { r.Header.Del("Sec-WebSocket-Key") }, http.StatusBadRequest},
		{"short key", func(r *http.Request) { r.Header.Set("Sec-WebSocket-Key", "AAAA") }, http.StatusBadRequest},
		{"own origin", func(r *http.Request) { r.Header.Set("Origin", "http://127.0.0.1:1234") }, 0},
		{"foreign origin", func(r *http.Request) { r.Header.Set("Origin", "http://evil.example") }, http.StatusForbidden},
		{"other port's origin", func(r *http.Request) { r.Header.Set("Origin", "http://127.0.0.1") }, http.StatusForbidden},
		{"foreign origin, us as localhost", func(r *http.Request) {
			r.Host = "localhost:1234"
			r.Header.Set("Origin", "http://evil.example")
		}, http.StatusForbidden},
		{"a browser behind kubectl proxy", func(r *http.Request) { // Host is the name that the client used for the API server
			r.Host = "10.0.0.1:6443"
			r.Header.Set("Origin", "http://localhost:8001")
		}, 0},
		{"the same with everything on one machine", func(r *http.Request) {
			r.Host = "127.0.0.1:6443"
			r.Header.Set("Origin", "http://localhost:8001")
		}, 0},
		{"the API server by name alone", func(r *http.Request) {
			r.Host = "kubernetes.example"
			r.Header.Set("Origin", "https://console.example")
		}, 0},
		{"sandboxed origin", func(r *http.Request) { r.Header.Set("Origin", "null") }, http.StatusForbidden},
		{"malformed offer", func(r *http.Request) { r.Header.Set("Sec-WebSocket-Protocol", "a b") }, http.StatusBadRequest},
		{"unknown offer", func(r *http.Request) { r.Header.Set("Sec-WebSocket-Protocol", "chat") }, http.StatusForbidden},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			r := upgradeRequest()
			test.change(r)
			_, err := Negotiate(r, RemoteCommand)
			checkRefusal(t, err, test.status)
		})
	}
}

func TestIsUpgrade(t *testing.T) {
	if !IsUpgrade(upgradeRequest()) {
		t.Error("an upgrade request was not taken for one")
	}
	for _, header := range []string{"Connection", "Upgrade"} {
		r := upgradeRequest()
		r.Header.Del(header)
		if IsUpgrade(r) {
			t.Errorf("a request without %s was taken for an upgrade", header)
		}
	}
}

func checkRefusal(t *testing.T, err error, status int) {
	t.Helper()
	var refused *HandshakeError
	switch {
	case status == 0 && err != nil:
		t.Errorf("refused: %v", err)
	case status != 0 && !errors.As(err, &refused):
		t.Errorf("got error %v, want a refusal with status %d", err, status)
	case status != 0 && refused.StatusCode != status:
		t.Errorf("refused with status %d, want %d", refused.StatusCode, status)
	}
}
