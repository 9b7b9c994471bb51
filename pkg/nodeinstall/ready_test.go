package nodeinstall

import (
	"encoding/base64"
	"encoding/pem"
	"fmt"
	"net/http"
	"net/http/httptest"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// A status from before the restart says nothing.
func TestNodeReady(t *testing.T) {
	restart := time.Date(2026, 11, 27, 12, 0, 0, 500e6, time.UTC)
	for _, test := range []struct {
		status, heartbeat string
		want              bool
		says              string
	}{
		{"True", "2026-11-27T12:00:03Z", true, ""},
		{"True", "2026-11-27T12:00:00Z", true, ""}, // the API has no fractions
		{"True", "2026-11-27T11:59:59Z", false, "since its restart"},
		{"False", "2026-11-27T12:00:03Z", false, "runtime is down"},
		{"Unknown", "2026-11-27T12:00:03Z", false, "runtime is down"},
	} {
		text := fmt.Sprintf(`{"status":{"conditions":[{"type":"DiskPressure","status":"False"},
			{"type":"Ready","status":%q,"reason":"R","message":"runtime is down","lastHeartbeatTime":%q}]}}`, test.status, test.heartbeat)
		got, reason, err := nodeReady([]byte(text), restart)
		if err != nil || got != test.want || !strings.Contains(reason, test.says) {
			t.Errorf("%+v: %v, %q, %v", test, got, reason, err)
		}
	}
	if got, _, err := nodeReady([]byte(`{}`), restart); got || err != nil {
		t.Errorf("a node without conditions: %v, %v", got, err)
	}
}

func TestAPI(t *testing.T) {
	server := httptest.NewTLSServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.Header.Get("Authorization") != "Bearer secret" || r.URL.Path != "/api/v1/nodes/n1" {
			http.Error(w, "no", http.StatusForbidden)
			return
		}
		fmt.Fprint(w, `{"status":{"conditions":[{"type":"Ready","status":"True","lastHeartbeatTime":"2026-11-27T12:00:00Z"}]}}`)
	}))
	defer server.Close()
	ca := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: server.Certificate().Raw})
	dir := t.TempDir()
	write(t, filepath.Join(dir, "token"), "secret\n")
	write(t, filepath.Join(dir, "ca.crt"), string(ca))
	config := fmt.Sprintf(`
current-context: here
contexts: [{name: other, context: {cluster: x, user: y}}, {name: here, context: {cluster: c, user: u}}]
clusters: [{name: c, cluster: {server: %q, certificate-authority-data: %s}}]
users: [{name: u, user: {tokenFile: token}}]
`, server.URL, base64.StdEncoding.EncodeToString(ca))
	write(t, filepath.Join(dir, "kubeconfig"), config)
	write(t, filepath.Join(dir, "exec"), strings.Replace(config, "tokenFile: token", "exec: {command: aws}", 1))
	account, err := ServiceAccount(dir, server.URL, "n1")
	if err != nil {
		t.Fatal(err)
	}
	kubeconfig, err := Kubeconfig(filepath.Join(dir, "kubeconfig"), "n1")
	if err != nil {
		t.Fatal(err)
	}
	for _, api := range []*API{account, kubeconfig} {
		if ready, reason, err := api.Ready(t.Context(), time.Time{}); !ready || err != nil {
			t.Errorf("%v, %q, %v", ready, reason, err)
		}
	}
	write(t, filepath.Join(dir, "token"), "renewed\n")
	if _, _, err := account.Ready(t.Context(), time.Time{}); err == nil || !strings.Contains(err.Error(), "403") {
		t.Errorf("another token: %v", err)
	}
	if _, err := Kubeconfig(filepath.Join(dir, "exec"), "n1"); err == nil || !strings.Contains(err.Error(), "--kubeconfig") {
		t.Errorf("a kubeconfig with a program: %v", err)
	}
}
