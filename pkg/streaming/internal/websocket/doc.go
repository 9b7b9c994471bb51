// Package websocket is the WebSocket transport of the streaming server: the Kubernetes channel
// protocols v1 to v5 (exec, attach and the legacy port-forward) and the tunnel that carries a SPDY
// connection in binary messages (KEP-4006).
//
// # Who does what
//
// github.com/gorilla/websocket answers the handshake and reads: it parses frames, unmasks, joins
// fragments into messages, and refuses what RFC 6455 forbids. Frames from us are written here,
// because a server's frame is an unmasked payload behind 2 to 10 header bytes (RFC 6455 section
// 5.2), and writing it into headroom in front of the payload is what makes a message cost one
// write, no copy and no allocation:
//
//   - gorilla's WriteMessage copies the payload, or allocates twice for a vectored write; its write
//     lock cannot be waited for together with a context, and a Pong waits for it up to a second in
//     the read loop;
//   - coder/websocket writes what is larger than its 4 KiB buffer in two system calls, and sends
//     Pong and the answer to Close by itself, from the read loop, without a way to decide when.
//
// Measured on a 2-core VM over loopback, 32 KiB messages: gorilla with a small buffer 4.4 us and 2
// allocations, gorilla with a large buffer (which a session would hold) 4.3 us, coder 6.4 us, one
// plain write of header and payload 2.7 us.
//
// # Costs and limits
//
// A connection has no goroutine of its own: Serve runs in the caller's, and a Ping or Pong is written
// by a short-lived one, so that the read loop never waits for a client that does not read. An idle session
// holds the 4 KiB read buffer that net/http made for it and about 5 KiB more on the heap
// (BenchmarkIdle); payload buffers are taken from a pool when there are bytes to move and given back
// at once. Sending does not allocate; receiving costs gorilla's 8 bytes a message.
//
// What waits, and for how long:
//
//   - writers, for a client that does not read: until the connection ends, which is the caller's to
//     decide (CloseNow, or Close, which gives a stuck writer 2 seconds);
//   - the read loop, for a channel nobody reads: 100 ms for each further 64 KiB, and at the
//     connection's budget until there is room or the client is gone;
//   - the answer to a client's Close: 2 seconds; a client to be told of its violation: 500 ms.
package websocket
