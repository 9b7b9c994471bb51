// Package portforward is the life of a port-forward: many connections into one pod over one client connection, over
// SPDY, the tunnel of SPDY in WebSocket, and the WebSocket protocol of older clients. Session.Run tells it.
package portforward
