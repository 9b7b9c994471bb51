package ui

import (
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/streamshim/streamshim/internal/testutil"
	"github.com/streamshim/streamshim/internal/testutil/leak"
	"github.com/streamshim/streamshim/pkg/admin"
)

// fixture is a server of the page, in front of an admin socket that the test serves.
type fixture struct {
	*Server
	t      *testing.T
	admin  *http.ServeMux
	secret string // what the token was exchanged for
}

func newFixture(t *testing.T, metrics string) *fixture {
	t.Helper()
	return newFixtureWith(t, metrics, func(*Server) {})
}

func newFixtureWith(t *testing.T, metrics string, change func(*Server)) *fixture {
	t.Helper()
	leak.Check(t)
	path := filepath.Join(t.TempDir(), "admin.sock")
	listener, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	f := &fixture{t: t, admin: http.NewServeMux()}
	upstream := &httptest.Server{Listener: listener, Config: &http.Server{Handler: f.admin, ReadHeaderTimeout: time.Minute}}
	upstream.Start()
	client := admin.NewClient(path)
	f.Server, err = Listen(Config{Admin: client, Metrics: metrics, Log: slog.New(slog.DiscardHandler)}, "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	change(f.Server)
	ctx, cancel := context.WithCancel(context.Background())
	served := make(chan error, 1)
	go func() { served <- f.Serve(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-served; err != nil {
			t.Error(err)
		}
		client.Close()
		upstream.Close()
	})
	return f
}

// do sends one request on a connection of its own. It follows no redirect.
func (f *fixture) do(method, path string, body io.Reader, change func(*http.Request)) *http.Response {
	f.t.Helper()
	request, err := http.NewRequestWithContext(f.t.Context(), method, "http://"+f.listener.Addr().String()+path, body)
	if err != nil {
		f.t.Fatal(err)
	}
	request.Close = true
	if f.secret != "" {
		request.Header.Set("Authorization", "Bearer "+f.secret)
	}
	if change != nil {
		change(request)
	}
	response, err := http.DefaultTransport.RoundTrip(request)
	if err != nil {
		f.t.Fatal(err)
	}
	f.t.Cleanup(func() { response.Body.Close() })
	return response
}

// exchange sends a token as the page does.
func (f *fixture) exchange(token string) (status int, secret string) {
	f.t.Helper()
	response := f.do(http.MethodPost, "/api/sign-in", strings.NewReader(token), nil)
	var answer struct{ Secret string }
	if err := json.NewDecoder(response.Body).Decode(&answer); err != nil {
		f.t.Fatal(err)
	}
	return response.StatusCode, answer.Secret
}

func (f *fixture) signIn() {
	f.t.Helper()
	if _, f.secret = f.exchange(f.token); f.secret == "" {
		f.t.Fatal("the token signs nobody in")
	}
}

func (f *fixture) serveSessions() {
	f.admin.HandleFunc("GET /v1/sessions", func(w http.ResponseWriter, _ *http.Request) {
		json.NewEncoder(w).Encode(admin.SessionList{Sessions: []admin.Session{{ID: "3f6f", PodName: "web"}}})
	})
}

func TestOnlyLoopback(t *testing.T) {
	for _, address := range []string{"0.0.0.0:0", "[::]:0", ":0", "192.0.2.1:0", "nonsense"} {
		if _, err := Listen(Config{Log: slog.New(slog.DiscardHandler)}, address); err == nil {
			t.Errorf("%s was taken", address)
		}
	}
}

func TestTokenSignsOneBrowserIn(t *testing.T) {
	var log testutil.Buffer
	f := newFixtureWith(t, "", func(s *Server) { s.config.Log = slog.New(slog.NewTextHandler(&log, nil)) })
	f.serveSessions()
	token := f.token
	// The browser does not send what follows #.
	if want := "http://" + f.listener.Addr().String() + "/#token=" + token; f.URL() != want || len(token) < 26 {
		t.Errorf("the address is %s; want %s", f.URL(), want)
	}
	for _, wrong := range []string{"", "wrong", token[1:], token + "A", strings.Repeat("A", len(token))} {
		if status, secret := f.exchange(wrong); status != http.StatusUnauthorized || secret != "" {
			t.Errorf("the token %q: %d with %d characters", wrong, status, len(secret))
		}
	}
	status, secret := f.exchange(token)
	if status != http.StatusOK || len(secret) < 26 || secret == token {
		t.Errorf("%d; a secret of %d characters", status, len(secret))
	}
	f.secret = secret
	if response := f.do(http.MethodGet, "/api/sessions", nil, nil); response.StatusCode != http.StatusOK || len(response.Cookies()) != 0 {
		t.Errorf("with the secret: %s, %d cookies", response.Status, len(response.Cookies()))
	}
	if status, secret := f.exchange(token); status != http.StatusUnauthorized || secret != "" {
		t.Errorf("a second time: %d", status)
	}
	if said := log.String(); strings.Count(said, "signed in") != 1 || strings.Contains(said, token) || strings.Contains(said, secret) {
		t.Errorf("the log says %q", said)
	}
}

func TestNothingWithoutTheSecret(t *testing.T) {
	f := newFixture(t, "")
	f.admin.HandleFunc("/", func(_ http.ResponseWriter, r *http.Request) { t.Errorf("%s reached the admin socket", r.URL) })
	token := f.token
	f.signIn()
	good := f.secret
	f.secret = ""
	for name, header := range map[string]string{
		"nothing": "", "another secret": "Bearer " + good[1:], "no scheme": good, "another scheme": "Basic " + good, "the token": "Bearer " + token, "an empty one": "Bearer ",
	} {
		for _, request := range []string{"GET /api/sessions", "POST /api/sessions/x/end", "GET /api/sessions/x/watch", "GET /api/recordings", "GET /api/recordings/x", "GET /api/metrics"} {
			method, path, _ := strings.Cut(request, " ")
			response := f.do(method, path, nil, func(r *http.Request) { r.Header.Set("Authorization", header) })
			if response.StatusCode != http.StatusUnauthorized {
				t.Errorf("%s with %s: %s", request, name, response.Status)
			}
		}
	}
}

func TestForeignRequestsAreRefused(t *testing.T) {
	f := newFixture(t, "")
	f.serveSessions()
	f.signIn()
	own := f.listener.Addr().String()
	_, port, _ := net.SplitHostPort(own)
	for _, test := range []struct {
		name, path   string
		host         string
		header, text string
		want         int
	}{
		{"its own", "/api/sessions", own, "Origin", "http://" + own, 200},
		{"a tunnel with another port", "/api/sessions", "localhost:1234", "Origin", "http://localhost:1234", 200},
		{"IPv6", "/api/sessions", "[::1]:" + port, "", "", 200},
		{"DNS rebinding", "/api/sessions", "evil.example:" + port, "", "", 421},
		{"DNS rebinding of the page", "/", "evil.example", "", "", 421},
		{"a name that begins well", "/api/sessions", "127.0.0.1.evil.example", "", "", 421},
		{"another site's origin", "/api/sessions", own, "Origin", "https://evil.example", 403},
		{"no origin at all", "/api/sessions", own, "Origin", "null", 403},
		{"another port of this machine", "/api/sessions", own, "Origin", "http://127.0.0.1:1", 403},
		{"another site", "/api/sessions", own, "Sec-Fetch-Site", "cross-site", 403},
		{"the same site, another port", "/api/sessions", own, "Sec-Fetch-Site", "same-site", 403},
		{"a file for another site", "/page.js", own, "Sec-Fetch-Site", "cross-site", 403},
		{"typed", "/api/sessions", own, "Sec-Fetch-Site", "none", 200},
	} {
		t.Run(test.name, func(t *testing.T) {
			response := f.do(http.MethodGet, test.path, nil, func(r *http.Request) {
				r.Host = test.host
				if test.header != "" {
					r.Header.Set(test.header, test.text)
				}
			})
			if response.StatusCode != test.want {
				t.Errorf("%s; want %d", response.Status, test.want)
			}
		})
	}
	opened := f.do(http.MethodGet, "/", nil, func(r *http.Request) {
		r.Header.Set("Sec-Fetch-Site", "cross-site")
		r.Header.Set("Sec-Fetch-Mode", "navigate")
	})
	if opened.StatusCode != http.StatusOK {
		t.Errorf("opened by a link: %s", opened.Status)
	}
}

// TestHeaders checks that every answer, also an error, tells the browser what it may do.
func TestHeaders(t *testing.T) {
	f := newFixture(t, "")
	for _, path := range []string{"/", "/page.js", "/vendor/xterm.js", "/none", "/api/sessions", "/api/none"} {
		h := f.do(http.MethodGet, path, nil, nil).Header
		for _, part := range []string{"default-src 'none'", "script-src 'self' 'wasm-unsafe-eval';", "connect-src 'self';", "frame-ancestors 'none'", "base-uri 'none'", "form-action 'none'"} {
			if !strings.Contains(h.Get("Content-Security-Policy"), part) {
				t.Errorf("%s: no %s in %q", path, part, h.Get("Content-Security-Policy"))
			}
		}
		for name, want := range map[string]string{
			"X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer", "Cache-Control": "no-store",
			"Cross-Origin-Resource-Policy": "same-origin", "Cross-Origin-Opener-Policy": "same-origin", "X-Frame-Options": "DENY",
		} {
			if h.Get(name) != want && !(name == "Cache-Control" && strings.HasSuffix(path, "none")) { // net/http removes it from errors
				t.Errorf("%s: %s is %q; want %q", path, name, h.Get(name), want)
			}
		}
	}
}

func TestMethods(t *testing.T) {
	f := newFixture(t, "")
	f.admin.HandleFunc("/", func(_ http.ResponseWriter, r *http.Request) {
		t.Errorf("%s %s reached the admin socket", r.Method, r.URL)
	})
	f.signIn()
	for _, request := range []string{"POST /api/sessions", "GET /api/sessions/x/end", "HEAD /api/sessions/x/end", "DELETE /api/recordings/x", "POST /", "PUT /page.js", "OPTIONS /api/sessions"} {
		method, path, _ := strings.Cut(request, " ")
		if response := f.do(method, path, nil, nil); response.StatusCode != http.StatusMethodNotAllowed && response.StatusCode != http.StatusNotFound {
			t.Errorf("%s: %s", request, response.Status)
		}
	}
}

func TestEnd(t *testing.T) {
	f := newFixture(t, "")
	f.signIn()
	killed := make(chan string, 1)
	f.admin.HandleFunc("POST /v1/sessions/{id}/kill", func(w http.ResponseWriter, r *http.Request) {
		body, _ := io.ReadAll(r.Body)
		killed <- r.PathValue("id") + " " + string(body)
		w.WriteHeader(http.StatusNoContent)
	})
	if response := f.do(http.MethodPost, "/api/sessions/3f6f/end", nil, nil); response.StatusCode != http.StatusNoContent {
		t.Errorf("%s", response.Status)
	}
	if got := <-killed; got != "3f6f {}" {
		t.Errorf("streamshim was asked %q", got)
	}
}

// TestErrors checks that errors of the admin API keep their status, and that an admin socket which cannot be reached gives
// 502 with the reason.
func TestErrors(t *testing.T) {
	f := newFixture(t, "127.0.0.1:1")
	f.signIn()
	f.admin.HandleFunc("GET /v1/sessions/{id}/watch", func(w http.ResponseWriter, _ *http.Request) {
		w.WriteHeader(http.StatusConflict)
		io.WriteString(w, `{"error":"this session cannot be watched"}`)
	})
	for path, want := range map[string]struct {
		code int
		text string
	}{
		"/api/sessions/x/watch": {409, "cannot be watched"},
		"/api/metrics":          {502, "metrics of streamshim"},
	} {
		response := f.do(http.MethodGet, path, nil, nil)
		body, _ := io.ReadAll(response.Body)
		if response.StatusCode != want.code || !strings.Contains(string(body), want.text) {
			t.Errorf("%s: %s %s; want %d with %q", path, response.Status, body, want.code, want.text)
		}
	}
}

func TestMetrics(t *testing.T) {
	f := newFixture(t, "")
	f.signIn()
	if response := f.do(http.MethodGet, "/api/metrics", nil, nil); response.StatusCode != http.StatusNoContent {
		t.Errorf("without metrics: %s", response.Status)
	}
	served := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		for line := strings.Repeat("x", 1023) + "\n"; ; {
			if _, err := io.WriteString(w, line); err != nil {
				return
			}
		}
	}))
	defer served.Close()
	f.config.Metrics = strings.TrimPrefix(served.URL, "http://")
	body, err := io.ReadAll(f.do(http.MethodGet, "/api/metrics", nil, nil).Body)
	if err != nil || len(body) != maxMetrics {
		t.Errorf("endless metrics: %d bytes, %v; want %d", len(body), err, maxMetrics)
	}
	elsewhere := httptest.NewServer(http.RedirectHandler(served.URL, http.StatusFound))
	defer elsewhere.Close()
	f.config.Metrics = strings.TrimPrefix(elsewhere.URL, "http://")
	if response := f.do(http.MethodGet, "/api/metrics", nil, nil); response.StatusCode != http.StatusBadGateway {
		t.Errorf("metrics that lie elsewhere: %s", response.Status)
	}
}

// TestWatchIsSentAsItComes checks that output is sent at once, without waiting for more or for the end, and that names of
// watches are passed on in both directions.
func TestWatchIsSentAsItComes(t *testing.T) {
	f := newFixture(t, "")
	f.signIn()
	lines, gone := make(chan string), make(chan struct{})
	f.admin.HandleFunc("GET /v1/sessions/{id}/watch", func(w http.ResponseWriter, r *http.Request) {
		defer close(gone)
		w.Header().Set(admin.HeaderWatch, "behind "+r.Header.Get(admin.HeaderWatch))
		for {
			select {
			case line := <-lines:
				io.WriteString(w, line+"\n")
				w.(http.Flusher).Flush()
			case <-r.Context().Done():
				return
			}
		}
	})
	go func() { lines <- "first" }()
	response := f.do(http.MethodGet, "/api/sessions/3f6f/watch?before=another+one", nil, nil)
	if name := response.Header.Get(admin.HeaderWatch); name != "behind another one" {
		t.Errorf("the watch is named %q", name)
	}
	reader := bufio.NewReader(response.Body)
	for _, want := range []string{"first", "second", "third"} {
		if want != "first" {
			lines <- want
		}
		if line, err := reader.ReadString('\n'); err != nil || line != want+"\n" {
			t.Fatalf("%q, %v; want %q", line, err, want)
		}
	}
	response.Body.Close()
	testutil.Receive(t, "the watch ends with its reader", gone)
}

func TestStreamsAreBounded(t *testing.T) {
	f := newFixture(t, "")
	f.signIn()
	f.admin.HandleFunc("GET /v1/sessions/{id}/watch", func(w http.ResponseWriter, r *http.Request) {
		io.WriteString(w, "header\n")
		w.(http.Flusher).Flush()
		<-r.Context().Done()
	})
	for range maxStreams {
		if response := f.do(http.MethodGet, "/api/sessions/x/watch", nil, nil); response.StatusCode != http.StatusOK {
			t.Fatal(response.Status)
		}
	}
	response := f.do(http.MethodGet, "/api/sessions/x/watch", nil, nil)
	if response.StatusCode != http.StatusTooManyRequests {
		t.Errorf("one more: %s", response.Status)
	}
}

func TestConnectionsAreBounded(t *testing.T) {
	f := newFixture(t, "")
	for range maxConnections {
		conn, err := net.Dial("tcp", f.listener.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		// An answer shows that the connection was accepted.
		fmt.Fprintf(conn, "GET /none HTTP/1.1\r\nHost: localhost\r\n\r\n")
		if _, err := bufio.NewReader(conn).ReadString('\n'); err != nil {
			t.Fatal(err)
		}
	}
	conn, err := net.Dial("tcp", f.listener.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	fmt.Fprintf(conn, "GET /none HTTP/1.1\r\nHost: localhost\r\n\r\n")
	conn.SetReadDeadline(time.Now().Add(200 * time.Millisecond))
	if n, err := conn.Read(make([]byte, 1)); err == nil {
		t.Errorf("one more connection was served: %d bytes", n)
	}
}

func TestLargeRequestsAreRefused(t *testing.T) {
	f := newFixture(t, "")
	if status, _ := f.exchange(strings.Repeat("x", maxBody+1)); status != http.StatusBadRequest {
		t.Errorf("a large body: %d", status)
	}
	response := f.do(http.MethodGet, "/", nil, func(r *http.Request) { r.Header.Set("X-Large", strings.Repeat("x", 4*maxHeader)) })
	if response.StatusCode != http.StatusRequestHeaderFieldsTooLarge {
		t.Errorf("a large header: %s", response.Status)
	}
}

func TestRecordingsAreBounded(t *testing.T) {
	testutil.Slow(t)
	f := newFixture(t, "")
	f.signIn()
	f.admin.HandleFunc("GET /v1/recordings/{name}", func(w http.ResponseWriter, _ *http.Request) {
		for block := make([]byte, 1<<20); ; {
			if _, err := w.Write(block); err != nil {
				return
			}
		}
	})
	n, err := io.Copy(io.Discard, f.do(http.MethodGet, "/api/recordings/x.cast", nil, nil).Body)
	if err != nil || n != maxRecording {
		t.Errorf("%d bytes, %v; want %d", n, err, maxRecording)
	}
}

// TestPageIsSafe checks that text of containers is set only as text, and that the page loads nothing from elsewhere.
func TestPageIsSafe(t *testing.T) {
	for _, name := range []string{"index.html", "page.js", "style.css"} {
		text, err := os.ReadFile(filepath.Join("static", name))
		if err != nil {
			t.Fatal(err)
		}
		for _, pattern := range []string{`innerHTML`, `outerHTML`, `insertAdjacentHTML`, `document\.write\b`, `\beval\(`, `new Function`, `https?://[^w]`, `\son\w+=`, `<style`, `<script>`, `@import`} {
			if found := regexp.MustCompile(pattern).Find(text); found != nil {
				t.Errorf("%s has %q", name, found)
			}
		}
	}
}

// TestLibrariesHaveLicences checks that the licence of each library is beside it, and that NOTICE names the library with
// its version.
func TestLibrariesHaveLicences(t *testing.T) {
	notice, err := os.ReadFile("static/NOTICE")
	if err != nil {
		t.Fatal(err)
	}
	script, err := os.ReadFile("vendor.sh")
	if err != nil {
		t.Fatal(err)
	}
	for _, match := range regexp.MustCompile(`(?m)^unpack (\S+) (\S+) [0-9a-f]{64}$`).FindAllStringSubmatch(string(script), -1) {
		if !regexp.MustCompile(`(?m)^npm +` + regexp.QuoteMeta(match[1]) + ` +` + regexp.QuoteMeta(match[2]) + ` `).Match(notice) {
			t.Errorf("NOTICE does not name %s %s", match[1], match[2])
		}
	}
	files, err := filepath.Glob("static/vendor/*.js")
	if err != nil || len(files) != 2 {
		t.Fatalf("%d libraries, %v", len(files), err)
	}
	for _, file := range files {
		licence := strings.TrimSuffix(strings.TrimSuffix(file, ".js"), ".min") + ".LICENSE"
		if text, err := os.ReadFile(licence); err != nil || len(text) < 1000 {
			t.Errorf("%s has no licence: %d bytes, %v", file, len(text), err)
		}
	}
}
