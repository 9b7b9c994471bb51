// Package ui serves a page for operators of one node: live sessions, what their terminals show, recordings, and some
// figures. It is a client of the admin API and can do no more than that API allows.
//
// Only the browser tab that first opens the page's address may use it. The address has a one-time token in its fragment,
// which browsers do not send. The page exchanges the token for a secret, which stays in the tab and goes with each of its
// requests. A cookie would not do: a browser sends it to every port of the host, so any user of the machine could read it
// with a server of their own (RFC 6265, section 8.5). The server refuses requests with a foreign Host (DNS rebinding),
// Origin or site. The page may load only what this server serves (Content-Security-Policy).
package ui

import (
	"context"
	"crypto/rand"
	"crypto/subtle"
	"embed"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"net"
	"net/http"
	"strings"
	"sync"
	"time"

	"golang.org/x/net/netutil"

	"github.com/streamshim/streamshim/pkg/admin"
)

//go:embed static
var static embed.FS

// Limits of one server.
const (
	readHeaderTimeout = 10 * time.Second
	readTimeout       = 10 * time.Second // of a whole request
	writeTimeout      = 30 * time.Second // for a browser to accept what was sent
	idleTimeout       = 2 * time.Minute
	shutdownTimeout   = 2 * time.Second
	answerTimeout     = 10 * time.Second // for the admin socket and the metrics to answer, also during a hand-over
	maxConnections    = 64               // further ones wait
	maxStreams        = 16               // terminals and recordings that are sent at once
	maxHeader         = 16 << 10         // bytes
	maxBody           = 4 << 10          // bytes
	maxMetrics        = 4 << 20          // bytes
	maxRecording      = 64 << 20         // bytes; longer recordings are cut
	chunk             = 32 << 10
)

// policy allows the page to load only its own files. xterm.js writes style elements. The player's terminal is WebAssembly.
const policy = "default-src 'none'; script-src 'self' 'wasm-unsafe-eval'; style-src 'self' 'unsafe-inline'; img-src 'self' data:; " +
	"font-src 'self' data:; connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"

// Config is what a Server needs.
type Config struct {
	Admin *admin.Client
	// Metrics is the HOST:PORT where streamshim serves its metrics, or empty if it serves none.
	Metrics string
	Log     *slog.Logger
}

// Server serves the page on one loopback address.
type Server struct {
	config   Config
	listener net.Listener
	http     *http.Server
	metrics  *http.Client
	streams  chan struct{} // an element for each stream that is being sent
	url      string
	secret   string // what the token is exchanged for

	mu    sync.Mutex
	token string // empty once it is used
}

// Listen opens the address, a HOST:PORT of this machine only. Port 0 is any free port. Serve closes it.
func Listen(config Config, address string) (*Server, error) {
	resolved, err := net.ResolveTCPAddr("tcp", address)
	if err != nil {
		return nil, fmt.Errorf("address %q: %w", address, err)
	}
	if !resolved.IP.IsLoopback() {
		return nil, fmt.Errorf("%s is not a loopback address: whoever can reach the page could try to see terminals; use ssh -L or kubectl port-forward from elsewhere", address)
	}
	listener, err := net.ListenTCP("tcp", resolved)
	if err != nil {
		return nil, fmt.Errorf("serve the page: %w", err)
	}
	pages, err := fs.Sub(static, "static")
	if err != nil {
		return nil, err // cannot happen: the files are embedded
	}
	s := &Server{
		config: config, listener: listener, streams: make(chan struct{}, maxStreams), secret: rand.Text(), token: rand.Text(),
		// The server at that address is not trusted: it cannot redirect this program.
		metrics: &http.Client{
			Transport:     &http.Transport{},
			CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
		},
	}
	s.url = "http://" + listener.Addr().String() + "/#token=" + s.token
	mux := http.NewServeMux()
	mux.Handle("GET /", http.FileServerFS(pages)) // needs no secret: the page has nothing before it has signed in
	mux.HandleFunc("POST /api/sign-in", answer(s.signIn))
	for pattern, handle := range map[string]handler{
		"GET /api/sessions":            s.listSessions,
		"POST /api/sessions/{id}/end":  s.endSession,
		"GET /api/sessions/{id}/watch": s.watchSession,
		"GET /api/recordings":          s.listRecordings,
		"GET /api/recordings/{name}":   s.sendRecording,
		"GET /api/metrics":             s.sendMetrics,
	} {
		mux.HandleFunc(pattern, answer(s.signedIn(handle)))
	}
	s.http = &http.Server{
		Handler: guard(mux), ReadHeaderTimeout: readHeaderTimeout, ReadTimeout: readTimeout, WriteTimeout: writeTimeout,
		IdleTimeout: idleTimeout, MaxHeaderBytes: maxHeader,
		ErrorLog: slog.NewLogLogger(config.Log.Handler(), slog.LevelDebug),
	}
	return s, nil
}

// URL returns the page's address with the token.
func (s *Server) URL() string { return s.url }

// Serve serves until the context ends.
func (s *Server) Serve(ctx context.Context) error {
	// Ends the streams with the context.
	s.http.BaseContext = func(net.Listener) context.Context { return ctx }
	served := make(chan error, 1)
	go func() { served <- s.http.Serve(netutil.LimitListener(s.listener, maxConnections)) }()
	select {
	case err := <-served:
		return err
	case <-ctx.Done():
	}
	shutdown, cancel := context.WithTimeout(context.Background(), shutdownTimeout)
	defer cancel()
	defer s.metrics.CloseIdleConnections()
	if err := s.http.Shutdown(shutdown); err != nil {
		s.http.Close() //nolint:errcheck // the process ends
	}
	<-served //nolint:errcheck // that it was shut down
	return nil
}

// guard refuses requests of other pages, and tells the browser what this page may do. It does not compare the port: a
// tunnel (ssh -L) may have another one.
func guard(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		h := w.Header()
		h.Set("Content-Security-Policy", policy)
		h.Set("X-Content-Type-Options", "nosniff")
		h.Set("X-Frame-Options", "DENY")
		h.Set("Referrer-Policy", "no-referrer")
		h.Set("Cross-Origin-Resource-Policy", "same-origin")
		h.Set("Cross-Origin-Opener-Policy", "same-origin")
		h.Set("Cache-Control", "no-store")
		if !local(r.Host) {
			http.Error(w, "this page has the host name localhost or a loopback address", http.StatusMisdirectedRequest)
			return
		}
		if origin := r.Header.Get("Origin"); origin != "" && origin != "http://"+r.Host {
			http.Error(w, "the request comes from another page", http.StatusForbidden)
			return
		}
		// A link of another site, for example in a terminal in the browser, may open this page but do nothing else.
		opened := r.URL.Path == "/" && r.Header.Get("Sec-Fetch-Mode") == "navigate"
		if site := r.Header.Get("Sec-Fetch-Site"); site != "" && site != "same-origin" && site != "none" && !opened {
			http.Error(w, "the request comes from another site", http.StatusForbidden)
			return
		}
		r.Body = http.MaxBytesReader(w, r.Body, maxBody)
		next.ServeHTTP(w, r)
	})
}

// local reports whether a Host header names this machine.
func local(hostPort string) bool {
	host, _, err := net.SplitHostPort(hostPort)
	if err != nil {
		host = hostPort
	}
	ip := net.ParseIP(strings.Trim(host, "[]"))
	return host == "localhost" || ip != nil && ip.IsLoopback()
}

type handler func(http.ResponseWriter, *http.Request) error

// answer sends the error of a handler: errors of the admin API unchanged, others as 502.
func answer(handle handler) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		err := handle(w, r)
		if err == nil {
			return
		}
		if known := (*admin.Error)(nil); !errors.As(err, &known) {
			err = &admin.Error{Code: http.StatusBadGateway, Message: err.Error()}
		}
		admin.WriteError(w, err)
	}
}

var errNotSignedIn = &admin.Error{Code: http.StatusUnauthorized, Message: "The page's address works once: run \"streamshim ui\" again for a new one."}

// signIn exchanges the token, which is the request's body, for the secret.
func (s *Server) signIn(w http.ResponseWriter, r *http.Request) error {
	token, err := io.ReadAll(r.Body)
	if err != nil {
		return &admin.Error{Code: http.StatusBadRequest, Message: "read the token: " + err.Error()}
	}
	if !s.redeem(token) {
		return errNotSignedIn
	}
	s.config.Log.Info("a browser has signed in", "client", r.RemoteAddr)
	return admin.WriteJSON(w, struct {
		Secret string `json:"secret"`
	}{s.secret})
}

// redeem reports whether the token is right and not used yet.
func (s *Server) redeem(token []byte) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.token == "" || subtle.ConstantTimeCompare(token, []byte(s.token)) != 1 {
		return false
	}
	s.token = ""
	return true
}

// signedIn calls handle only for requests with the secret.
func (s *Server) signedIn(handle handler) handler {
	return func(w http.ResponseWriter, r *http.Request) error {
		secret, ok := strings.CutPrefix(r.Header.Get("Authorization"), "Bearer ")
		if !ok || subtle.ConstantTimeCompare([]byte(secret), []byte(s.secret)) != 1 {
			return errNotSignedIn
		}
		return handle(w, r)
	}
}

func (s *Server) listSessions(w http.ResponseWriter, r *http.Request) error {
	ctx, cancel := context.WithTimeout(r.Context(), answerTimeout)
	defer cancel()
	sessions, err := s.config.Admin.List(ctx)
	if err != nil {
		return err
	}
	return admin.WriteJSON(w, admin.SessionList{Sessions: sessions})
}

func (s *Server) endSession(w http.ResponseWriter, r *http.Request) error {
	ctx, cancel := context.WithTimeout(r.Context(), answerTimeout)
	defer cancel()
	if err := s.config.Admin.Kill(ctx, r.PathValue("id"), admin.KillRequest{}); err != nil {
		return err
	}
	w.WriteHeader(http.StatusNoContent)
	return nil
}

// watchSession sends a watch of a session. A page that goes on watching behind a hand-over names the one before.
func (s *Server) watchSession(w http.ResponseWriter, r *http.Request) error {
	return s.stream(w, func() (io.ReadCloser, error) {
		watch, err := s.config.Admin.WatchAgain(r.Context(), r.PathValue("id"), r.URL.Query().Get("before"))
		if err != nil {
			return nil, err
		}
		w.Header().Set(admin.HeaderWatch, watch.Name())
		return watch, nil
	})
}

func (s *Server) listRecordings(w http.ResponseWriter, r *http.Request) error {
	ctx, cancel := context.WithTimeout(r.Context(), answerTimeout)
	defer cancel()
	recordings, err := s.config.Admin.Recordings(ctx)
	if err != nil {
		return err
	}
	return admin.WriteJSON(w, admin.RecordingList{Recordings: recordings})
}

func (s *Server) sendRecording(w http.ResponseWriter, r *http.Request) error {
	return s.stream(w, func() (io.ReadCloser, error) {
		cast, err := s.config.Admin.Recording(r.Context(), r.PathValue("name"))
		if err != nil {
			return nil, err
		}
		return struct {
			io.Reader
			io.Closer
		}{io.LimitReader(cast, maxRecording), cast}, nil
	})
}

// stream sends what it reads at once. A browser that does not read blocks only its own stream, for writeTimeout. streamshim
// skips output that its watcher does not keep up with.
func (s *Server) stream(w http.ResponseWriter, open func() (io.ReadCloser, error)) error {
	select {
	case s.streams <- struct{}{}:
		defer func() { <-s.streams }()
	default:
		return &admin.Error{Code: http.StatusTooManyRequests, Message: fmt.Sprintf("%d terminals and recordings are open already; close one", maxStreams)}
	}
	from, err := open()
	if err != nil {
		return err
	}
	defer from.Close() //nolint:errcheck // it was read
	w.Header().Set("Content-Type", "application/x-asciicast")
	out, buffer := http.NewResponseController(w), make([]byte, chunk)
	for {
		n, err := from.Read(buffer)
		if n > 0 {
			out.SetWriteDeadline(time.Now().Add(writeTimeout)) //nolint:errcheck // TCP has them
			if _, err := w.Write(buffer[:n]); err != nil {
				return nil //nolint:nilerr // the page has gone
			}
			out.Flush() //nolint:errcheck // as above
		}
		if err != nil {
			return nil //nolint:nilerr // its end
		}
	}
}

// sendMetrics passes streamshim's metrics on. It answers 204 if streamshim serves none.
func (s *Server) sendMetrics(w http.ResponseWriter, r *http.Request) error {
	if s.config.Metrics == "" {
		w.WriteHeader(http.StatusNoContent)
		return nil
	}
	ctx, cancel := context.WithTimeout(r.Context(), answerTimeout)
	defer cancel()
	request, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+s.config.Metrics+"/metrics", http.NoBody)
	if err != nil {
		return err
	}
	response, err := s.metrics.Do(request)
	if err != nil {
		return fmt.Errorf("metrics of streamshim: %w", err)
	}
	defer response.Body.Close() //nolint:errcheck // it was read
	if response.StatusCode != http.StatusOK {
		return fmt.Errorf("metrics of streamshim at %s: %s", s.config.Metrics, response.Status)
	}
	w.Header().Set("Content-Type", "text/plain; charset=utf-8")
	io.Copy(w, io.LimitReader(response.Body, maxMetrics)) //nolint:errcheck // the page has gone
	return nil
}
