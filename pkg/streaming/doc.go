// Package streaming is the HTTP side of streamshim. It issues one-time URLs for exec, attach and port-forward
// requests, and turns the connection that redeems a URL into a session.
//
// Server.Exec, Server.Attach and Server.PortForward put a request into the token cache. A client redeems the URL
// once, within a minute. The connection is then upgraded to SPDY/3.1 or WebSocket and becomes a session. From then on
// the session owns the connection, not net/http. So Server keeps every session in a session.Registry and ends them
// itself at shutdown.
//
// Package remotecommand serves exec and attach sessions, package portforward serves port-forward sessions.
package streaming
