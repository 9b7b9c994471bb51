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
	mu       sync.Mutex
	listener net.Listener
	underWay int
	ended    chan struct{} // closed when none is under way; nil when nobody waits
}

// Count counts the requests of a handler.
func (r *Requests) Count(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, request *http.Request) {
		r.count(1)
		defer r.count(-1)
		next.ServeHTTP(w, request)
	})
}

func (r *Requests) count(change int) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.underWay += change
	if r.underWay == 0 && r.ended != nil {
		close(r.ended)
		r.ended = nil
	}
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
	r.mu.Lock()
	if r.underWay == 0 {
		r.mu.Unlock()
		return
	}
	if r.ended == nil {
		r.ended = make(chan struct{})
	}
	ended := r.ended
	r.mu.Unlock()
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
