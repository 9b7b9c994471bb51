// Package websocket is the WebSocket transport of the streaming server: the Kubernetes channel
// protocols v1 to v5 (exec, attach and the legacy port-forward) and the tunnel that carries a SPDY
// connection in binary messages (KEP-4006).
//
// # Who does what
//
// Both directions are written here, without a library. Package frames is the wire format: its ReadState and
// the functions beside it are plain data and steps from one state to the next, without I/O; its Reader puts them on a
// bufio.Reader. Package inbox keeps what has come in until somebody reads it. Frames from us are an unmasked payload behind 2 to 10 header bytes (RFC 6455 section 5.2), and writing it
// into headroom in front of the payload is what makes a message cost one write, no copy and no allocation (frames/frame.go).
//
// Libraries were tried: gorilla's WriteMessage copies the payload or allocates, and a Pong waits in its read loop for the
// write lock; coder/websocket sends Pong and the answer to Close by itself, without a way to decide when, and needs two
// writes for what is larger than 4 KiB. Of gorilla alone for reading a third had to be undone again. It is the peer in the tests.
//
// # Costs and limits
//
// A connection has no goroutine of its own: Serve runs in the caller's, and a Ping or Pong is written
// by a short-lived one, so that the read loop never waits for a client that does not read. An idle session
// holds the 4 KiB read buffer that net/http made for it and about 5 KiB more on the heap
// (BenchmarkIdle); payload buffers are taken from a pool when there are bytes to move and given back
// at once. Neither direction allocates for a message.
//
// What waits, and for how long:
//
//   - writers, for a client that does not read: until the connection ends, which is the caller's to
//     decide (CloseNow, or Close, which gives a stuck writer 2 seconds);
//   - the read loop, for a channel nobody reads: 100 ms for each further 64 KiB, and at the
//     connection's budget until there is room or the client is gone;
//   - the answer to a client's Close: 2 seconds; a client to be told of its violation: 500 ms.
package websocket
