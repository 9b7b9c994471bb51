package websocket

import (
	"context"
	"encoding/base64"
	"io"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"

	"github.com/gorilla/websocket"
)

func TestLegacyPortForward(t *testing.T) {
	for _, protocol := range []Protocol{ChannelUnnamed, ChannelV4, ChannelV4Base64} {
		t.Run(string(protocol), func(t *testing.T) {
			served := make(chan error, 1)
			s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				got, err := Negotiate(r, PortForward)
				if err != nil || got != protocol {
					t.Errorf("negotiated %q: %v", got, err)
				}
				c, ports, err := AcceptPortForward(w, r, got, []uint16{80, 8443}, Config{})
				if err != nil {
					t.Errorf("accept: %v", err)
					return
				}
				finished := make(chan struct{})
				go func() {
					defer close(finished)
					if len(ports) != 2 || ports[0].Port != 80 || ports[1].Port != 8443 {
						t.Errorf("ports %v", ports)
					}
					b := make([]byte, 100)
					n, _ := ports[1].Data.Read(b)
					ports[1].Data.Write(b[:n])
					io.WriteString(ports[0].Error, "refused")
					c.CloseAndWait(context.Background())
				}()
				served <- c.Serve(context.Background())
				<-finished
			}))
			defer s.Close()
			dialer := websocket.Dialer{}
			if protocol != ChannelUnnamed {
				dialer.Subprotocols = []string{string(protocol)}
			}
			client, _, err := dialer.Dial("ws"+strings.TrimPrefix(s.URL, "http"), nil)
			if err != nil {
				t.Fatal(err)
			}
			defer client.Close()
			encode := func(message string) string {
				if protocol.Base64() {
					return string('0'+message[0]) + base64.StdEncoding.EncodeToString([]byte(message[1:]))
				}
				return message
			}
			client.WriteMessage(websocket.BinaryMessage, []byte(encode("\x02hello")))
			for _, want := range []string{"\x00\x50\x00", "\x01\x50\x00", "\x02\xfb\x20", "\x03\xfb\x20", "\x02hello", "\x01refused"} {
				if _, got, err := client.ReadMessage(); err != nil || string(got) != encode(want) {
					t.Errorf("got %q, %v, want %q", got, err, encode(want))
				}
			}
			if _, _, err := client.ReadMessage(); !websocket.IsCloseError(err, CloseNormal) {
				t.Errorf("the end: %v", err)
			}
			if err := <-served; err != nil {
				t.Errorf("Serve: %v", err)
			}
		})
	}
}

func TestLegacyPortForwardNeedsPorts(t *testing.T) {
	for _, count := range []int{0, MaxPorts + 1} {
		w := httptest.NewRecorder()
		if _, _, err := AcceptPortForward(w, upgradeRequest(), ChannelV4, make([]uint16, count), Config{}); err == nil {
			t.Errorf("%d ports: accepted", count)
		}
		if w.Code != http.StatusBadRequest {
			t.Errorf("%d ports: status %d", count, w.Code)
		}
	}
}
