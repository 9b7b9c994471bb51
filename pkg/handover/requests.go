package handover

import (
	"context"
	"net"
	"net/http"
	"sync"
)

// Requests counts the requests that an HTTP server is serving, so that it can be quiesced and resumed. The zero value is
// ready for use.
type Requests struct {
	mu       sync.Mutex
	listener net.Listener
	underWay int
	ended    chan struct{} // closed when underWay becomes 0; nil when nobody waits
}

// Count wraps a handler and counts its requests.
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

// From sets the listener on which the requests arrive.
func (r *Requests) From(listener net.Listener) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.listener = listener
}

// Pause makes clients that connect from now on wait for Resume, or for another program that has the same socket. It does
// nothing when the listener cannot be paused.
func (r *Requests) Pause() {
	r.mu.Lock()
	listener, ok := r.listener.(interface{ Pause() })
	r.mu.Unlock()
	if ok {
		listener.Pause()
	}
}

// Wait waits until no request is under way or the context is done.
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
