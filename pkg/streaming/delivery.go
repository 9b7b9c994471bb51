package streaming

import (
	"context"
	"net"
	"net/http"
	"strings"
	"time"
)

// A kubelet or an API server that translates WebSocket for its client closes the client's connection
// as soon as it has our status. What the client has not read by then is still on its way through the
// buffers of both, and the client's next ping, which meets a closed socket, makes the kernel throw it
// away (kubernetes#60140). awaitClose cannot help: the one whose close it awaits is the translator.
// So for a translator the status waits until the client has probably read everything.

const (
	// backlogOfSlowReader is how much must be left to send, when the output ends, for the client to
	// count as slow.
	backlogOfSlowReader = 256 << 10
	// mostOnTheWay is what the sockets between us and the client may hold beyond our own: two
	// connections, each with what Linux lets a sender and a receiver buffer by default. It is more than
	// the 11 MB that were seen, because too long a wait costs less than one too short.
	mostOnTheWay = 16 << 20
	// mostDelay bounds the wait. It is not longer than what a reader of 60 kB/s needs.
	mostDelay = 5 * time.Minute

	backlogInterval = 20 * time.Millisecond
)

// translated tells whether a request comes from a translator. Requests of clients pass proxies
// unchanged and say what the client is; a translator makes its own.
func translated(r *http.Request) bool {
	return strings.HasPrefix(r.UserAgent(), "Go-http-client/")
}

// awaitDelivery waits until what was sent has probably reached a slow client behind a translator, or
// until the connection or the context ends. A client that keeps up is not waited for: nothing of what
// it was sent is left in our socket when the output ends. Otherwise the speed at which the rest of it
// leaves is the client's own, because everything behind our socket is full; that many bytes per
// second is also how it will take what is behind.
func awaitDelivery(ctx context.Context, c connection, network net.Conn, sent int64) (delay time.Duration) {
	backlog := unacknowledged(network)
	if backlog < backlogOfSlowReader {
		return 0
	}
	began := time.Now()
	look := time.NewTicker(backlogInterval)
	defer look.Stop()
	for unacknowledged(network) > 0 {
		select {
		case <-look.C:
		case <-c.Done():
			return time.Since(began)
		case <-ctx.Done():
			return time.Since(began)
		}
	}
	perByte := float64(time.Since(began)) / float64(backlog)
	rest := time.NewTimer(min(time.Duration(perByte*float64(min(sent, mostOnTheWay))), mostDelay))
	defer rest.Stop()
	select {
	case <-rest.C:
	case <-c.Done():
	case <-ctx.Done():
	}
	return time.Since(began)
}
