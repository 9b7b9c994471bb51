package streaming

import (
	"container/list"
	"crypto/rand"
	"encoding/base64"
	"sync"
	"time"

	"github.com/streamshim/streamshim/pkg/session"
	"github.com/streamshim/streamshim/pkg/streaming/event"
	"github.com/streamshim/streamshim/pkg/streaming/portforward"
	"github.com/streamshim/streamshim/pkg/streaming/remotecommand"
)

const (
	tokenBytes = 32          // 256 bits: a token cannot be guessed
	tokenTTL   = time.Minute // from insert to consume
	maxTokens  = 1000        // waiting at one time
)

// tokenCache holds requests between the CRI call and the client's connection. A token is valid for
// one use, for its kind of request, and for ttl.
type tokenCache struct {
	ttl time.Duration
	max int
	now func() time.Time
	// observe is called for each token that is issued, redeemed, refused or expired, with mu held.
	observe func(event.Event)

	mu       sync.Mutex
	requests map[string]*list.Element
	byAge    *list.List    // of *waitingRequest, oldest first
	emptied  chan struct{} // closed when the cache becomes empty; nil unless somebody waits for that
}

type waitingRequest struct {
	token   string
	kind    session.Kind
	request any // *remotecommand.Request or *portforward.Request
	expires time.Time
}

func newTokenCache(observe func(event.Event)) *tokenCache {
	return &tokenCache{
		ttl: tokenTTL, max: maxTokens, now: time.Now, observe: observe,
		requests: make(map[string]*list.Element), byAge: list.New(),
	}
}

// insert keeps the request and returns its token, or ErrTooManyRequests.
func (c *tokenCache) insert(kind session.Kind, request any) (string, error) {
	var random [tokenBytes]byte
	rand.Read(random[:]) //nolint:errcheck // never fails, see crypto/rand
	token := base64.RawURLEncoding.EncodeToString(random[:])
	c.mu.Lock()
	defer c.mu.Unlock()
	now := c.now()
	c.dropExpired(now)
	if len(c.requests) >= c.max {
		c.observe(event.TokenRefused)
		return "", ErrTooManyRequests
	}
	c.observe(event.TokenIssued)
	c.requests[token] = c.byAge.PushBack(&waitingRequest{token, kind, request, now.Add(c.ttl)})
	return token, nil
}

// holds reports whether consume would find the request now.
func (c *tokenCache) holds(kind session.Kind, token string) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.dropExpired(c.now())
	element, ok := c.requests[token]
	return ok && element.Value.(*waitingRequest).kind == kind
}

// consume removes the request and returns it. A token of another kind stays valid, so that a wrong path does not
// cost the client its request.
func (c *tokenCache) consume(kind session.Kind, token string) (any, bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.dropExpired(c.now())
	element, ok := c.requests[token]
	if !ok || element.Value.(*waitingRequest).kind != kind {
		return nil, false
	}
	c.remove(element)
	c.observe(event.TokenRedeemed)
	return element.Value.(*waitingRequest).request, true
}

func (c *tokenCache) dropExpired(now time.Time) {
	for e := c.byAge.Front(); e != nil && !e.Value.(*waitingRequest).expires.After(now); e = c.byAge.Front() {
		c.remove(e)
		c.observe(event.TokenExpired)
	}
}

// waiting returns how many requests wait for their client.
func (c *tokenCache) waiting() int {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.dropExpired(c.now())
	return len(c.requests)
}

// empty returns a channel that is closed when the cache becomes empty. An expired request counts until the cache is
// used next. There is at most one waiter.
func (c *tokenCache) empty() <-chan struct{} {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.dropExpired(c.now())
	emptied := make(chan struct{})
	if len(c.requests) == 0 {
		close(emptied)
	} else {
		c.emptied = emptied
	}
	return emptied
}

func (c *tokenCache) remove(e *list.Element) {
	c.byAge.Remove(e)
	delete(c.requests, e.Value.(*waitingRequest).token)
	if len(c.requests) == 0 && c.emptied != nil {
		close(c.emptied)
		c.emptied = nil
	}
}

// state returns the requests that wait now.
func (c *tokenCache) state() []TokenState {
	c.mu.Lock()
	defer c.mu.Unlock()
	now := c.now()
	c.dropExpired(now)
	states := make([]TokenState, 0, c.byAge.Len())
	for e := c.byAge.Front(); e != nil; e = e.Next() {
		waiting := e.Value.(*waitingRequest)
		state := TokenState{Token: waiting.token, Kind: waiting.kind, Left: waiting.expires.Sub(now)}
		switch request := waiting.request.(type) {
		case *remotecommand.Request:
			state.Command = request
		case *portforward.Request:
			state.Forward = request
		}
		states = append(states, state)
	}
	return states
}

// restore adds the requests of another cache's state. Requests that wait here already stay.
func (c *tokenCache) restore(states []TokenState) {
	c.mu.Lock()
	defer c.mu.Unlock()
	now := c.now()
	for _, state := range states {
		request, ok := state.request()
		if !ok || c.requests[state.Token] != nil {
			continue
		}
		waiting := &waitingRequest{state.Token, state.Kind, request, now.Add(min(state.Left, c.ttl))}
		// Keep byAge in the order of expiry.
		after := c.byAge.Back()
		for after != nil && after.Value.(*waitingRequest).expires.After(waiting.expires) {
			after = after.Prev()
		}
		if after == nil {
			c.requests[state.Token] = c.byAge.PushFront(waiting)
		} else {
			c.requests[state.Token] = c.byAge.InsertAfter(waiting, after)
		}
	}
}

// request returns the request that fits the kind, or false if there is none.
func (t TokenState) request() (any, bool) {
	if t.Kind == session.PortForward {
		return t.Forward, t.Forward != nil
	}
	return t.Command, t.Command != nil && (t.Kind == session.Exec || t.Kind == session.Attach)
}
