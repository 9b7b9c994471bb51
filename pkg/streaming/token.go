package streaming

import (
	"container/list"
	"crypto/rand"
	"encoding/base64"
	"sync"
	"time"

	"github.com/streamshim/streamshim/pkg/session"
	"github.com/streamshim/streamshim/pkg/streaming/event"
)

const (
	tokenBytes = 32                     // 256 bits: a token cannot be guessed
	tokenTTL   = time.Minute            // from Insert to Consume
	maxTokens  = 1000                   // waiting at one time
	tokenChars = (tokenBytes*8 + 5) / 6 // base64url without padding
)

// tokenCache holds requests between the CRI call and the client's connection. A token is good for
// one use, for the kind of request it was made for, and for ttl.
type tokenCache struct {
	ttl time.Duration
	max int
	now func() time.Time
	// observe is told of each token's way, under mu.
	observe func(event.Event)

	mu       sync.Mutex
	requests map[string]*list.Element
	byAge    *list.List    // of *waitingRequest, oldest first
	emptied  chan struct{} // closed when no request waits any more; nil unless somebody waits for that
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

// holds tells whether consume would find the request now.
func (c *tokenCache) holds(kind session.Kind, token string) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.dropExpired(c.now())
	element, ok := c.requests[token]
	return ok && element.Value.(*waitingRequest).kind == kind
}

// consume returns the request and forgets it. A token of another kind is left as it is, so that a
// client's mistake in the path does not cost it the request.
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

// waiting is how many requests wait for their client.
func (c *tokenCache) waiting() int {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.dropExpired(c.now())
	return len(c.requests)
}

// empty returns a channel that is closed when no request waits any more. An expired one waits until it is seen.
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
