package e2e

import (
	"context"
	"net"
	"net/url"
	"sync"
	"time"
)

// roundTrip is how far away from the API server a user may be.
const roundTrip = 200 * time.Millisecond

// farAway gives the flags with which kubectl reaches the API server by way of a network that takes roundTrip.
// The returned function ends it.
func farAway(ctx context.Context, t *target) (flags []string, end func(), err error) {
	server, err := t.must(ctx, "config", "view", "-o", "jsonpath={.clusters[0].cluster.server}")
	if err != nil {
		return nil, nil, err
	}
	u, err := url.Parse(server)
	if err != nil {
		return nil, nil, err
	}
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return nil, nil, err
	}
	var connections sync.WaitGroup
	connections.Go(func() {
		for {
			near, err := listener.Accept()
			if err != nil {
				return
			}
			connections.Go(func() { carrySlowly(near, u.Host) })
		}
	})
	return []string{"--server=https://" + listener.Addr().String(), "--tls-server-name=" + u.Hostname()}, func() {
		listener.Close() //nolint:errcheck // it only listened
		connections.Wait()
	}, nil
}

func carrySlowly(near net.Conn, server string) {
	defer near.Close() //nolint:errcheck // both ways have ended
	far, err := net.Dial("tcp", server)
	if err != nil {
		return
	}
	defer far.Close() //nolint:errcheck // as above
	var ways sync.WaitGroup
	for _, way := range [][2]net.Conn{{near, far}, {far, near}} {
		ways.Go(func() { delay(way[1], way[0]) })
	}
	ways.Wait()
}

// delay copies with half a round trip between reading and writing.
func delay(to, from net.Conn) {
	type piece struct {
		data []byte
		due  time.Time
	}
	onTheWay := make(chan piece, 1024) // what a network holds; a full one slows the sender down
	go func() {
		defer close(onTheWay)
		for {
			buffer := make([]byte, 16<<10)
			n, err := from.Read(buffer)
			if n > 0 {
				onTheWay <- piece{buffer[:n], time.Now().Add(roundTrip / 2)}
			}
			if err != nil {
				return
			}
		}
	}()
	for p := range onTheWay {
		time.Sleep(time.Until(p.due)) // the network itself
		if _, err := to.Write(p.data); err != nil {
			from.Close() //nolint:errcheck // ends the reading
		}
	}
	if tcp, ok := to.(*net.TCPConn); ok {
		tcp.CloseWrite() //nolint:errcheck // the other side may have gone
	}
}
