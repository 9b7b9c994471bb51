// Package remotecommand serves exec and attach sessions: a process, started here or served by the upstream, and the
// client's streams to it, in the remotecommand protocols v1 to v5 over SPDY and WebSocket.
//
// Start reading at Session.Run. The order in which a command ends is part of the protocol: all output, FIN on stdout and
// stderr, the status and FIN on the error stream, and then the client closes the connection. If the server closed first,
// the client would lose what it has not read yet (kubernetes#60140).
package remotecommand
