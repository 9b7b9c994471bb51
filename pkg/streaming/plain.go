package streaming

import (
	"container/list"
	"net"
	"net/http"
	"sync"
)

// plainConnections bounds the connections that were not upgraded to a session. Whoever shares the node's loopback
// can open them, including pods with hostNetwork. When there are too many, the oldest is closed: a client with a
// token upgrades its connection within moments, so an old plain connection is idle or incomplete.
type plainConnections struct {
	max int

	mu       sync.Mutex
	elements map[net.Conn]*list.Element
	byAge    *list.List            // of net.Conn, oldest first
	busy     map[net.Conn]struct{} // those with a request that is being read or answered
	idle     chan struct{}         // closed when busy becomes empty; nil unless somebody waits for that
}

func newPlainConnections(limit int) *plainConnections {
	return &plainConnections{max: limit, elements: make(map[net.Conn]*list.Element), byAge: list.New(), busy: make(map[net.Conn]struct{})}
}

// changed implements http.Server.ConnState.
func (p *plainConnections) changed(c net.Conn, state http.ConnState) {
	p.mu.Lock()
	defer p.mu.Unlock()
	switch state {
	case http.StateNew, http.StateActive:
		p.busy[c] = struct{}{}
	default:
		delete(p.busy, c)
		if len(p.busy) == 0 && p.idle != nil {
			close(p.idle)
			p.idle = nil
		}
	}
	switch state {
	case http.StateNew:
		p.elements[c] = p.byAge.PushBack(c)
		if len(p.elements) > p.max {
			oldest := p.byAge.Front().Value.(net.Conn)
			p.remove(oldest)
			oldest.Close() //nolint:errcheck // net/http notices
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

// quiet returns a channel that is closed when no request is being read or answered. There is at most one waiter.
func (p *plainConnections) quiet() <-chan struct{} {
	p.mu.Lock()
	defer p.mu.Unlock()
	idle := make(chan struct{})
	if len(p.busy) == 0 {
		close(idle)
	} else {
		p.idle = idle
	}
	return idle
}
