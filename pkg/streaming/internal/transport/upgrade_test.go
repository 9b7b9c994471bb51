package transport

import (
	"errors"
	"net/http"
	"testing"
)

func TestNegotiate(t *testing.T) {
	tests := []struct {
		name    string
		offered []string // header lines
		want    string
		err     error
	}{
		{"client-go since 1.30", []string{"v5.channel.k8s.io", "v4.channel.k8s.io", "v3.channel.k8s.io", "v2.channel.k8s.io", "channel.k8s.io"}, "v4.channel.k8s.io", nil},
		{"one line", []string{"v5.channel.k8s.io, v4.channel.k8s.io"}, "v4.channel.k8s.io", nil},
		{"the client's order counts", []string{"v2.channel.k8s.io", "v4.channel.k8s.io"}, "v2.channel.k8s.io", nil},
		{"v1", []string{"channel.k8s.io"}, "channel.k8s.io", nil},
		{"empty version", []string{""}, "", nil},
		{"none", nil, "", ErrNoProtocol},
		{"unknown", []string{"v9.channel.k8s.io"}, "", ErrUnknownProtocol},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			h := http.Header{}
			for _, line := range tt.offered {
				h.Add(HeaderProtocolVersion, line)
			}
			got, err := Negotiate(h, []string{"v4.channel.k8s.io", "v3.channel.k8s.io", "v2.channel.k8s.io", "channel.k8s.io", ""})
			if !errors.Is(err, tt.err) || got != tt.want {
				t.Errorf("got %q, %v; want %q, %v", got, err, tt.want, tt.err)
			}
		})
	}
}

func TestIsSPDYUpgrade(t *testing.T) {
	tests := []struct {
		connection, upgrade string
		want                bool
	}{
		{"Upgrade", "SPDY/3.1", true},
		{"keep-alive, Upgrade", "spdy/3.1", true},
		{"Upgrade", "websocket", false},
		{"keep-alive", "SPDY/3.1", false},
		{"", "", false},
	}
	for _, tt := range tests {
		r := &http.Request{Header: http.Header{"Connection": {tt.connection}, "Upgrade": {tt.upgrade}}}
		if got := IsSPDYUpgrade(r); got != tt.want {
			t.Errorf("Connection %q, Upgrade %q: %v, want %v", tt.connection, tt.upgrade, got, tt.want)
		}
	}
}
