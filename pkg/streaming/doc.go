// Package streaming is the HTTP side of streamshim: it gives out one-time URLs for exec, attach and
// port-forward requests, and makes a session of the connection that redeems one.
//
// A request is put into the token cache by Server.Exec, Server.Attach or Server.PortForward. A
// client redeems the URL once, within a minute; the connection is upgraded to SPDY/3.1 or WebSocket and becomes a
// session. From then on the session owns the connection: net/http has let go of it, so Server keeps every
// session in a session.Registry and ends them itself at shutdown.
//
// The life of a session is told by package remotecommand for exec and attach, and by package portforward.
package streaming
