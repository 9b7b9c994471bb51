package handover

import (
	"context"
	"net/http"
	"net/http/httptest"
	"sync"
	"testing"
	"time"
)

// Wait returns when no request is under way, also while others come and go, and when its context ends.
func TestRequestsUnderWay(t *testing.T) {
	var requests Requests
	inside, leave := make(chan struct{}), make(chan struct{})
	handler := requests.Count(http.HandlerFunc(func(http.ResponseWriter, *http.Request) { inside <- struct{}{}; <-leave }))
	requests.Wait(t.Context()) // nothing is under way
	var served sync.WaitGroup
	for range 2 {
		served.Go(func() { handler.ServeHTTP(httptest.NewRecorder(), httptest.NewRequest(http.MethodGet, "/", nil)) })
		<-inside
	}
	ctx, cancel := context.WithTimeout(t.Context(), time.Millisecond)
	defer cancel()
	if requests.Wait(ctx); ctx.Err() == nil {
		t.Error("requests are under way, and Wait has returned")
	}
	var waited sync.WaitGroup
	for range 3 {
		waited.Go(func() { requests.Wait(t.Context()) })
	}
	leave <- struct{}{}
	leave <- struct{}{}
	waited.Wait()
	served.Wait()
	requests.Wait(t.Context())
}

// Requests on connections that are open come while Wait looks.
func TestRequestsComeWhileOneWaits(t *testing.T) {
	var requests Requests
	handler := requests.Count(http.HandlerFunc(func(http.ResponseWriter, *http.Request) {}))
	var running sync.WaitGroup
	for range 4 {
		running.Go(func() {
			for range 1000 {
				handler.ServeHTTP(nil, nil)
				requests.Wait(t.Context())
			}
		})
	}
	running.Wait()
}
