// Package portforward serves port-forward sessions: many connections into one pod over one client connection. The client
// speaks SPDY, SPDY tunnelled in WebSocket, or the WebSocket protocol of older clients. Start reading at Session.Run.
package portforward
