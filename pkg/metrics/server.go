package metrics

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"net/http/pprof"
	"strings"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus/promhttp"
	"golang.org/x/net/netutil"

	"github.com/streamshim/streamshim/pkg/handover"
)

const (
	readyTimeout  = 3 * time.Second
	readyAge      = time.Second // how long an answer of /readyz is reused
	maxScrapes    = 4           // at one time
	headerTimeout = 5 * time.Second
	writeTimeout  = 2 * time.Minute // longer than a CPU profile
	idleTimeout   = 2 * time.Minute // of a connection between scrapes
	maxHeader     = 16 << 10
	maxClients    = 64 // connections; more wait to be accepted
)

// ServerConfig configures a Server.
type ServerConfig struct {
	Metrics *Metrics
	// Ready returns why CRI calls cannot be served, or nil.
	Ready func(context.Context) error
	// Profiling also serves /debug/pprof/. Profiles and goroutine dumps are for operators only.
	Profiling bool
	Log       *slog.Logger
}

// Server serves /metrics, /healthz (the process answers) and /readyz (CRI calls are served).
type Server struct {
	http     *http.Server
	requests handover.Requests
}

// NewServer returns a server. The caller calls Serve.
func NewServer(c ServerConfig) *Server {
	mux := http.NewServeMux()
	mux.Handle("GET /metrics", promhttp.HandlerFor(c.Metrics.registry, promhttp.HandlerOpts{
		MaxRequestsInFlight: maxScrapes,
		ErrorLog:            slog.NewLogLogger(c.Log.Handler(), slog.LevelWarn),
	}))
	mux.HandleFunc("GET /healthz", func(w http.ResponseWriter, _ *http.Request) { fmt.Fprintln(w, "ok") })
	mux.Handle("GET /readyz", &readiness{ready: c.Ready})
	if c.Profiling {
		mux.HandleFunc("GET /debug/pprof/", onlyLocalNames(pprof.Index))
		mux.HandleFunc("GET /debug/pprof/profile", onlyLocalNames(pprof.Profile))
		mux.HandleFunc("GET /debug/pprof/symbol", onlyLocalNames(pprof.Symbol))
		mux.HandleFunc("GET /debug/pprof/trace", onlyLocalNames(pprof.Trace))
	}
	s := &Server{}
	s.http = &http.Server{
		Handler: s.requests.Count(mux), ReadHeaderTimeout: headerTimeout, WriteTimeout: writeTimeout, IdleTimeout: idleTimeout, MaxHeaderBytes: maxHeader,
		ErrorLog: slog.NewLogLogger(c.Log.Handler(), slog.LevelDebug),
	}
	return s
}

// Quiesce stops accepting connections and waits for requests until the context is done. Requests end at the latest after
// writeTimeout. New connections wait for Resume, or for another program that has the same socket.
func (s *Server) Quiesce(ctx context.Context) {
	s.requests.Pause()
	s.requests.Wait(ctx)
}

// Resume serves again after Quiesce.
func (s *Server) Resume() { s.requests.Resume() }

// onlyLocalNames rejects requests whose Host is neither a loopback address nor localhost, and requests from web pages. An
// attacker's name could otherwise direct a browser on the node to a loopback address (DNS rebinding).
func onlyLocalNames(handle http.HandlerFunc) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		host := r.Host
		if name, _, err := net.SplitHostPort(host); err == nil {
			host = name
		}
		host = strings.Trim(host, "[]")
		if ip := net.ParseIP(host); host != "localhost" && (ip == nil || !ip.IsLoopback()) {
			http.Error(w, "profiles are served by a loopback address or the name localhost only", http.StatusForbidden)
			return
		}
		if r.Header.Get("Origin") != "" {
			http.Error(w, "profiles are not served to web pages", http.StatusForbidden)
			return
		}
		handle(w, r)
	}
}

// Serve serves the listener until Close, then returns nil. It closes the listener.
func (s *Server) Serve(listener net.Listener) error {
	s.requests.From(listener)
	if err := s.http.Serve(netutil.LimitListener(listener, maxClients)); err != nil && !errors.Is(err, http.ErrServerClosed) {
		return fmt.Errorf("serve metrics on %s: %w", listener.Addr(), err)
	}
	return nil
}

// Close ends the server and its connections.
func (s *Server) Close() error { return s.http.Close() }

// readiness serves /readyz. It calls ready at most once a second.
type readiness struct {
	ready func(context.Context) error

	mu   sync.Mutex
	last time.Time
	err  error
}

func (r *readiness) ServeHTTP(w http.ResponseWriter, _ *http.Request) {
	if err := r.ask(); err != nil {
		http.Error(w, err.Error(), http.StatusServiceUnavailable)
		return
	}
	fmt.Fprintln(w, "ok")
}

func (r *readiness) ask() error {
	r.mu.Lock()
	defer r.mu.Unlock()
	if time.Since(r.last) < readyAge {
		return r.err
	}
	ctx, cancel := context.WithTimeout(context.Background(), readyTimeout)
	defer cancel()
	r.err = r.ready(ctx)
	r.last = time.Now()
	return r.err
}
