package streaming

import "errors"

// Errors of Server.Exec, Server.Attach and Server.PortForward.
var (
	// ErrTooManyRequests means that the limit of unredeemed tokens is reached. They expire by themselves.
	ErrTooManyRequests = errors.New("too many streaming requests wait for their client; try again in a minute")
	// ErrShuttingDown means that the server accepts no more requests.
	ErrShuttingDown = errors.New("streamshim is shutting down")
	// ErrNotListening means that the listener for streams has failed and is not open again yet.
	ErrNotListening = errors.New("streamshim's listener for streams has failed and is being opened again, try again")
)
