// Package websocket is the WebSocket transport of the streaming server: the Kubernetes channel
// protocols v1 to v5 (exec, attach and the legacy port-forward) and the tunnel that carries a SPDY
// connection in binary messages (KEP-4006).
//
// # Structure
//
// Both directions are implemented here, without a library. Package frames is the wire format. Its ReadState is plain
// data, with steps from one state to the next and no I/O; its Reader applies them to a bufio.Reader. Package inbox keeps
// received payload until somebody reads it.
//
// A frame to the client is an unmasked payload behind a header of 2 to 10 bytes (RFC 6455 section 5.2). The header is
// written into headroom in front of the payload. So a message costs one write, no copy and no allocation
// (frames/frame.go).
//
// Libraries were tried. gorilla's WriteMessage copies the payload or allocates, and its read loop waits for the write
// lock to send a Pong. With gorilla for reading only, a third of it had to be undone. coder/websocket sends Pong and the
// answer to Close by itself, at a time that the caller cannot choose, and needs two writes for more than 4 KiB. Gorilla
// is the peer in the tests.
//
// # Costs and limits
//
// A connection has no goroutine of its own. Serve runs in the caller's, and a short-lived goroutine writes a Ping or
// Pong, so that the read loop never waits for a client that does not read. An idle session holds net/http's 4 KiB read
// buffer and about 5 KiB more on the heap (BenchmarkIdle). Payload buffers are taken from a pool when there are bytes to
// move, and returned at once. Neither direction allocates for a message.
//
// What waits, and for how long:
//
//   - writers wait for a client that does not read until the connection ends. The caller decides when: CloseNow, or
//     Close, which gives a blocked writer 2 seconds;
//   - the read loop waits for a channel that nobody reads for 100 ms for each further 64 KiB, and at the connection's
//     budget until there is room or the client is gone;
//   - the answer to a client's Close may take 2 seconds, and a client that violated the protocol has 500 ms to read
//     its Close.
package websocket
