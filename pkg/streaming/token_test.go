package streaming

import (
	"errors"
	"maps"
	"regexp"
	"testing"
	"time"

	"github.com/streamshim/streamshim/pkg/session"
	"github.com/streamshim/streamshim/pkg/streaming/event"
)

func TestTokenIsGoodForOneUse(t *testing.T) {
	c := newTokenCache(func(event.Event) {})
	request := &commandRequest{}
	token, err := c.insert(session.Exec, request)
	if err != nil {
		t.Fatal(err)
	}
	if !regexp.MustCompile(`^[A-Za-z0-9_-]{43}$`).MatchString(token) {
		t.Errorf("token %q is not 256 bits in base64url", token)
	}
	if got, ok := c.consume(session.Exec, token); !ok || got != request {
		t.Fatalf("first use: %v, %v", got, ok)
	}
	if _, ok := c.consume(session.Exec, token); ok {
		t.Error("the token was good for a second use")
	}
}

func TestTokenIsBoundToItsKind(t *testing.T) {
	c := newTokenCache(func(event.Event) {})
	token, err := c.insert(session.Attach, &commandRequest{})
	if err != nil {
		t.Fatal(err)
	}
	for _, kind := range []session.Kind{session.Exec, session.PortForward} {
		if _, ok := c.consume(kind, token); ok || c.holds(kind, token) {
			t.Errorf("an attach token was good for %s", kind)
		}
	}
	if _, ok := c.consume(session.Attach, token); !ok {
		t.Error("the wrong path used the token up")
	}
}

func TestTokenExpires(t *testing.T) {
	now := time.Unix(1000, 0)
	c := newTokenCache(func(event.Event) {})
	c.now = func() time.Time { return now }
	token, err := c.insert(session.Exec, &commandRequest{})
	if err != nil {
		t.Fatal(err)
	}
	now = now.Add(tokenTTL - time.Nanosecond)
	if !c.holds(session.Exec, token) {
		t.Error("the token expired too early")
	}
	now = now.Add(time.Nanosecond)
	if _, ok := c.consume(session.Exec, token); ok {
		t.Error("the token did not expire")
	}
	if len(c.requests) != 0 || c.byAge.Len() != 0 {
		t.Error("an expired request is still held")
	}
}

func TestTokensAreLimited(t *testing.T) {
	now := time.Unix(1000, 0)
	c := newTokenCache(func(event.Event) {})
	c.now = func() time.Time { return now }
	for i := range maxTokens {
		now = now.Add(time.Millisecond)
		if _, err := c.insert(session.Exec, &commandRequest{}); err != nil {
			t.Fatalf("token %d: %v", i, err)
		}
	}
	if _, err := c.insert(session.Exec, &commandRequest{}); !errors.Is(err, ErrTooManyRequests) {
		t.Fatalf("one token too many: %v", err)
	}
	now = time.Unix(1000, 0).Add(time.Millisecond + tokenTTL) // the first has expired, the others have not
	if _, err := c.insert(session.Exec, &commandRequest{}); err != nil {
		t.Errorf("after the oldest expired: %v", err)
	}
	if _, err := c.insert(session.Exec, &commandRequest{}); !errors.Is(err, ErrTooManyRequests) {
		t.Errorf("two for one that expired: %v", err)
	}
}

// TestTokensAreCounted checks that what happens to each token is counted once.
func TestTokensAreCounted(t *testing.T) {
	seen := map[event.Event]int{}
	now := time.Unix(1000, 0)
	c := newTokenCache(func(e event.Event) { seen[e]++ })
	c.now = func() time.Time { return now }
	c.max = 2
	for range 3 { // the third is refused
		c.insert(session.Exec, &commandRequest{}) //nolint:errcheck // counted below
	}
	if n := c.waiting(); n != 2 {
		t.Errorf("%d wait, want 2", n)
	}
	token := c.byAge.Front().Value.(*waitingRequest).token
	c.consume(session.Exec, token)
	c.consume(session.Exec, token)
	now = now.Add(tokenTTL)
	if n := c.waiting(); n != 0 {
		t.Errorf("%d wait, want none", n)
	}
	want := map[event.Event]int{event.TokenIssued: 2, event.TokenRefused: 1, event.TokenRedeemed: 1, event.TokenExpired: 1}
	if !maps.Equal(seen, want) {
		t.Errorf("told %v, want %v", seen, want)
	}
}
