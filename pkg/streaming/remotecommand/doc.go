// Package remotecommand is the life of an exec or attach: a process, started here or served by the upstream, and
// the client's streams to it, in the remotecommand protocols v1 to v5 over SPDY and WebSocket.
//
// Session.Run tells it from the upgraded connection to the end. The order in which a command ends is part of
// the protocol: all output, FIN on stdout and stderr, the status and FIN on the error stream, and
// then the client closes the connection. Closing first would throw away what the client has not
// read yet (kubernetes#60140).
package remotecommand
