package handover

import (
	"context"
	"net"
	"net/http"
	"sync"
)

// Requests are those that an HTTP server serves, for a server that comes to a quiet point and goes on. The zero value is
// ready for use.
type Requests struct {
	underWay sync.WaitGroup

	mu       sync.Mutex
	listener net.Listener
}

// Count counts the requests of a handler.
func (r *Requests) Count(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, request *http.Request) {
		r.underWay.Add(1)
		defer r.underWay.Done()
		next.ServeHTTP(w, request)
	})
}

// From says where the requests come from.
func (r *Requests) From(listener net.Listener) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.listener = listener
}

// Pause has clients that connect from now on wait for Resume, or for another program that has the same socket. A listener
// that cannot be paused goes on.
func (r *Requests) Pause() {
	r.mu.Lock()
	listener, ok := r.listener.(interface{ Pause() })
	r.mu.Unlock()
	if ok {
		listener.Pause()
	}
}

// Wait waits for the requests under way until the context is done.
func (r *Requests) Wait(ctx context.Context) {
	ended := make(chan struct{})
	go func() { // until the last of them has ended, which the server bounds
		defer close(ended)
		r.underWay.Wait()
	}()
	select {
	case <-ended:
	case <-ctx.Done():
	}
}

// Resume ends a Pause.
func (r *Requests) Resume() {
	r.mu.Lock()
	defer r.mu.Unlock()
	if listener, ok := r.listener.(interface{ Resume() }); ok {
		listener.Resume()
	}
}
