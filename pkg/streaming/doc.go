// Package streaming is the HTTP side of streamshim: it gives out one-time URLs for exec, attach and
// port-forward requests and serves them, over SPDY/3.1 and WebSocket, in the remotecommand
// protocols v1 to v5 and the port-forward protocol.
//
// A request is put into the token cache by Server.Exec, Server.Attach or Server.PortForward. A
// client redeems the URL once, within a minute; the connection is upgraded and becomes a session.
// From then on the session owns the connection: net/http has let go of it, so Server keeps every
// session in a session.Registry and ends them itself at shutdown.
//
// The life of a session is told in one function each: runRemoteCommand for exec and attach,
// portForwardSession.run for port-forward. The order in which a remote command ends is part of
// the protocol: all output, FIN on stdout and stderr, the status and FIN on the error stream, and
// then the client closes the connection. Closing first would throw away what the client has not
// read yet (kubernetes#60140).
package streaming
