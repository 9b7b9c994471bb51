package main

import (
	"encoding/json"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path"
	"path/filepath"
	"strings"
	"testing"

	"github.com/streamshim/streamshim/internal/testutil"
)

func TestVersionAsJSON(t *testing.T) {
	out, err := run(t, "version", "--output", "json")
	var got map[string]string
	if err != nil || json.Unmarshal([]byte(out), &got) != nil || got["version"] != "devel" || got["go"] == "" || got["os"] != "linux" || got["arch"] == "" {
		t.Errorf("%q, %v", out, err)
	}
	if _, err := run(t, "version", "--output", "xml"); err == nil || !strings.Contains(err.Error(), "xml") {
		t.Error(err)
	}
}

func bundle(t *testing.T, args ...string) map[string]string {
	t.Helper()
	file := filepath.Join(t.TempDir(), "b.tar.gz")
	if out, err := run(t, append([]string{"support-bundle", "--output", file}, args...)...); err != nil || !strings.Contains(out, file) {
		t.Fatalf("%q, %v", out, err)
	}
	if info, err := os.Stat(file); err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("%v, %v", info, err)
	}
	archive, err := os.Open(file)
	if err != nil {
		t.Fatal(err)
	}
	defer archive.Close()
	files := map[string]string{}
	for name, content := range testutil.Unpack(t, archive) {
		files[path.Base(name)] = content
	}
	return files
}

// The bundle has what its README says, and nothing of what the configuration's rules name.
func TestSupportBundle(t *testing.T) {
	dir := t.TempDir()
	metrics := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		io.WriteString(w, "answer of "+r.URL.Path+"\n") //nolint:errcheck // seen below
	}))
	defer metrics.Close()
	config, log := filepath.Join(dir, "config.toml"), filepath.Join(dir, "log")
	for file, text := range map[string]string{
		config: "# a password in a comment: hunter2\nlog_level = 'debug'\nmetrics_address = '" + metrics.Listener.Addr().(*net.TCPAddr).String() + "'\n" +
			"[[deny]]\nnamespaces = ['acme-secret']\npod_labels = { 'tenant' = 'acme' }\nmessage = 'call acme at red-phone'\n" +
			"[[recording.rule]]\nnamespaces = ['acme-prod']\n",
		log: "the last line of the log\n",
	} {
		if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	files := bundle(t, "--config", config, "--log", log, "--state-dir", dir, "--upstream", "unix://"+filepath.Join(dir, "away.sock"))
	for name, want := range map[string]string{
		"README": "look through it", "version.json": `"version": "devel"`, "config.toml": "log_level = 'debug'",
		"check.txt": "away.sock", "metrics.txt": "answer of /metrics", "system.txt": "kernel: Linux", "log.txt": "the last line of the log",
	} {
		if !strings.Contains(files[name], want) {
			t.Errorf("%s lacks %q: %s", name, want, files[name])
		}
		if !strings.Contains(files["README"], name) && name != "README" {
			t.Errorf("the README does not name %s", name)
		}
	}
	if !strings.Contains(files["metrics.txt"], "answer of /readyz") {
		t.Errorf("metrics.txt: %s", files["metrics.txt"])
	}
	for name, text := range files {
		for _, secret := range []string{"hunter2", "acme", "red-phone", "tenant"} {
			if strings.Contains(text, secret) {
				t.Errorf("%s tells %q", name, secret)
			}
		}
	}
	if text, ok := files["errors.txt"]; ok {
		t.Errorf("errors: %s", text)
	}

	// A configuration with a mistake is told, and the rest is there.
	if err := os.WriteFile(config, []byte("log_level = 'loud'\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	files = bundle(t, "--config", config, "--log", filepath.Join(dir, "no log"))
	for _, want := range []string{"config.toml: ", "log_level", "log.txt: ", "--log names"} {
		if !strings.Contains(files["errors.txt"], want) {
			t.Errorf("errors.txt lacks %q: %s", want, files["errors.txt"])
		}
	}
	if !strings.Contains(files["check.txt"], "pidfd") {
		t.Errorf("check.txt: %s", files["check.txt"])
	}
}
