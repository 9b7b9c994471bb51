package streaming

import (
	"container/list"
	"net"
	"net/http"
	"sync"
)

// plainConnections bounds the connections that have not been upgraded to a session. Whoever shares the
// node's loopback can open them, pods with hostNetwork too. When there are too many the oldest is closed: a
// client with a token needs its connection as a plain one for a moment; only somebody who does not finish a
// request, or comes for nothing, has an old one.
type plainConnections struct {
	max int

	mu       sync.Mutex
	elements map[net.Conn]*list.Element
	byAge    *list.List // of net.Conn, oldest first
}

func newPlainConnections(limit int) *plainConnections {
	return &plainConnections{max: limit, elements: make(map[net.Conn]*list.Element), byAge: list.New()}
}

// changed is for http.Server.ConnState.
func (p *plainConnections) changed(c net.Conn, state http.ConnState) {
	p.mu.Lock()
	defer p.mu.Unlock()
	switch state {
	case http.StateNew:
		p.elements[c] = p.byAge.PushBack(c)
		if len(p.elements) > p.max {
			oldest := p.byAge.Front().Value.(net.Conn)
			p.remove(oldest)
			oldest.Close() //nolint:errcheck // net/http sees it
		}
	case http.StateHijacked, http.StateClosed:
		p.remove(c)
	}
}

func (p *plainConnections) remove(c net.Conn) {
	if e, ok := p.elements[c]; ok {
		p.byAge.Remove(e)
		delete(p.elements, c)
	}
}

func (p *plainConnections) count() int {
	p.mu.Lock()
	defer p.mu.Unlock()
	return len(p.elements)
}
