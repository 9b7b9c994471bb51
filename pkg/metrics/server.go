package metrics

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"net/http/pprof"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus/promhttp"
)

const (
	readyTimeout  = 3 * time.Second
	readyAge      = time.Second // an answer of /readyz is used again for so long
	maxScrapes    = 4           // at one time
	headerTimeout = 5 * time.Second
	writeTimeout  = 2 * time.Minute // longer than a CPU profile
	maxHeader     = 16 << 10
)

// ServerConfig is what a Server needs.
type ServerConfig struct {
	Metrics *Metrics
	// Ready tells why CRI calls cannot be served; nil when they can.
	Ready func(context.Context) error
	// Profiling also serves /debug/pprof/. Profiles and goroutine dumps are for operators alone.
	Profiling bool
	Log       *slog.Logger
}

// Server serves /metrics, /healthz (the process answers) and /readyz (CRI calls are served).
type Server struct {
	http *http.Server
}

// NewServer makes a server that does not listen yet.
func NewServer(c ServerConfig) *Server {
	mux := http.NewServeMux()
	mux.Handle("GET /metrics", promhttp.HandlerFor(c.Metrics.registry, promhttp.HandlerOpts{
		MaxRequestsInFlight: maxScrapes,
		ErrorLog:            slog.NewLogLogger(c.Log.Handler(), slog.LevelWarn),
	}))
	mux.HandleFunc("GET /healthz", func(w http.ResponseWriter, _ *http.Request) { fmt.Fprintln(w, "ok") })
	mux.Handle("GET /readyz", &readiness{ready: c.Ready})
	if c.Profiling {
		mux.HandleFunc("GET /debug/pprof/", pprof.Index)
		mux.HandleFunc("GET /debug/pprof/profile", pprof.Profile)
		mux.HandleFunc("GET /debug/pprof/symbol", pprof.Symbol)
		mux.HandleFunc("GET /debug/pprof/trace", pprof.Trace)
	}
	return &Server{http: &http.Server{
		Handler: mux, ReadHeaderTimeout: headerTimeout, WriteTimeout: writeTimeout, MaxHeaderBytes: maxHeader,
		ErrorLog: slog.NewLogLogger(c.Log.Handler(), slog.LevelDebug),
	}}
}

// Serve serves the listener until Close, then returns nil. It closes the listener.
func (s *Server) Serve(listener net.Listener) error {
	if err := s.http.Serve(listener); err != nil && !errors.Is(err, http.ErrServerClosed) {
		return fmt.Errorf("serve metrics on %s: %w", listener.Addr(), err)
	}
	return nil
}

// Close ends the server and its connections.
func (s *Server) Close() error { return s.http.Close() }

// readiness asks at most once a second, however often it is asked.
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
