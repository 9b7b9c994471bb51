package main

import (
	"context"
	"encoding/binary"
	"fmt"
	"io"
	"math"
	"net"
	"strconv"
	"time"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/streamshim/streamshim/test/internal/node"
	"github.com/streamshim/streamshim/test/internal/wire"
)

// What the server in the pod does with a connection; its first byte says which.
const (
	modeAnswer = 'a' // reads the request and answers with as many bytes, then closes
	modeSource = 's' // eight bytes say how much it is to send
	modeSink   = 'k' // eight bytes say how much it is to read before it answers one byte and closes
	modeHold   = 'h' // answers one byte and keeps the connection until the client closes it
)

// requestSize is a short connection's request and answer.
const requestSize = 64

// podServer answers inside a pod's network namespace. It is a part of this program, so that no
// server's CPU time contains it.
type podServer struct {
	listener net.Listener
	port     uint16
}

// servePod listens on the loopback address of a process's network namespace.
func servePod(pid int) (*podServer, error) {
	var listener net.Listener
	err := node.InNetworkNamespace(pid, func() (err error) {
		listener, err = net.Listen("tcp4", "127.0.0.1:0")
		return err
	})
	if err != nil {
		return nil, err
	}
	s := &podServer{listener, uint16(listener.Addr().(*net.TCPAddr).Port)}
	go func() {
		for {
			conn, err := listener.Accept()
			if err != nil {
				return // closed
			}
			go func() {
				defer conn.Close()  //nolint:errcheck // nothing depends on it
				_ = servePort(conn) // a client that sees too little fails the run
			}()
		}
	}()
	return s, nil
}

func servePort(conn net.Conn) error {
	request := make([]byte, requestSize)
	if _, err := io.ReadFull(conn, request); err != nil {
		return err
	}
	switch request[0] {
	case modeAnswer:
		_, err := conn.Write(request)
		return err
	case modeSource:
		chunk := make([]byte, wire.ReadBuffer)
		for left := binary.BigEndian.Uint64(request[1:]); left > 0; {
			n, err := conn.Write(chunk[:min(left, wire.ReadBuffer)])
			if err != nil {
				return err
			}
			left -= uint64(n)
		}
		return nil
	case modeSink:
		// Not until the client's FIN: containerd ends the connection then, and the answer is lost.
		chunk := make([]byte, wire.ReadBuffer)
		for left := binary.BigEndian.Uint64(request[1:]); left > 0; {
			n, err := conn.Read(chunk)
			if err != nil {
				return err
			}
			left -= uint64(n)
		}
		_, err := conn.Write(request[:1])
		return err
	case modeHold:
		if _, err := conn.Write(request[:1]); err != nil {
			return err
		}
		_, err := io.Copy(io.Discard, conn)
		return err
	}
	return fmt.Errorf("mode %q", request[0])
}

// podRequest is the first requestSize bytes of a connection.
func podRequest(mode byte, amount int64) []byte {
	request := make([]byte, requestSize)
	request[0] = mode
	binary.BigEndian.PutUint64(request[1:], uint64(amount))
	return request
}

// tunnel is a port-forward session.
type tunnel struct {
	*wire.Conn
	port     string
	requests int
}

func openTunnel(ctx context.Context, client runtimeapi.RuntimeServiceClient, sandbox string, port uint16) (*tunnel, error) {
	response, err := client.PortForward(ctx, &runtimeapi.PortForwardRequest{PodSandboxId: sandbox, Port: []int32{int32(port)}})
	if err != nil {
		return nil, err
	}
	conn, err := wire.Upgrade(response.Url, "portforward.k8s.io")
	if err != nil {
		return nil, err
	}
	if err := conn.SetDeadline(time.Now().Add(wire.SessionTimeout)); err != nil {
		return nil, err
	}
	return &tunnel{Conn: conn, port: strconv.Itoa(int(port))}, nil
}

// connect opens a connection through the tunnel as kubectl does, an error stream whose other half is
// closed at once and a data stream, and sends the request, all with one write.
func (t *tunnel) connect(request []byte, fin bool) (data, failure uint32, err error) {
	t.requests++
	id := strconv.Itoa(t.requests)
	var frames []byte
	frames, failure = t.AppendStream(frames, "streamtype", "error", "port", t.port, "requestid", id)
	frames = wire.AppendDataHeader(frames, failure, true, 0)
	frames, data = t.AppendStream(frames, "streamtype", "data", "port", t.port, "requestid", id)
	frames = wire.AppendData(frames, data, fin, request)
	return data, failure, t.WriteFrames(frames)
}

// untilEnd is more than any connection brings.
const untilEnd = math.MaxInt64

// await reads until so many bytes have come, or both streams of a connection have ended, and says how
// many came.
func (t *tunnel) await(data, failure uint32, amount int64) (received int64, err error) {
	for open := 2; open > 0 && received < amount; {
		e, err := t.Next()
		if err != nil {
			return received, err
		}
		if e.Reset {
			return received, fmt.Errorf("stream %d was reset", e.Stream)
		}
		switch {
		case e.Stream == failure && len(e.Data) > 0:
			return received, fmt.Errorf("the port-forward failed: %s", e.Data)
		case e.Stream == data:
			received += int64(len(e.Data))
		}
		if e.Fin {
			open--
		}
	}
	return received, nil
}
