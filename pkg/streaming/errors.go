package streaming

import "errors"

// Errors of Server.Exec, Server.Attach and Server.PortForward.
var (
	// ErrTooManyRequests: as many tokens as allowed wait to be redeemed. They expire by themselves.
	ErrTooManyRequests = errors.New("too many streaming requests wait for their client; try again in a minute")
	// ErrShuttingDown: the server takes no new requests.
	ErrShuttingDown = errors.New("streamshim is shutting down")
	// ErrNotListening: the listener for streams has failed and is not open again yet.
	ErrNotListening = errors.New("streamshim's listener for streams has failed and is being opened again, try again")
)
