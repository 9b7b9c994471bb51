package spdy

import (
	"errors"

	"github.com/streamshim/streamshim/pkg/streaming/internal/spdy/frames"
)

// ConnectionError is a fault that ends the connection.
type ConnectionError = frames.ConnectionError

// ResetError is the end of one stream by RST_STREAM, from the peer or from this side.
type ResetError = frames.ResetError

// ResetStatus is the reason in a RST_STREAM frame.
type ResetStatus = frames.ResetStatus

// The reset reasons that this package sends. A peer may send others.
const (
	ResetProtocolError       = frames.ResetProtocolError
	ResetInvalidStream       = frames.ResetInvalidStream
	ResetRefusedStream       = frames.ResetRefusedStream
	ResetCancel              = frames.ResetCancel
	ResetFlowControlError    = frames.ResetFlowControlError
	ResetStreamAlreadyClosed = frames.ResetStreamAlreadyClosed
)

var (
	// ErrClosed means that this side has closed the connection.
	ErrClosed = errors.New("spdy: connection closed")
	// ErrGoAway means that the peer has sent GOAWAY.
	ErrGoAway = errors.New("spdy: peer closed the connection with GOAWAY")
	// ErrPeerClosed means that the peer has sent FIN without GOAWAY.
	ErrPeerClosed = errors.New("spdy: peer closed the connection")
	// ErrPeerReset means that the peer's kernel has reset the connection.
	ErrPeerReset = errors.New("spdy: peer reset the connection")
	// ErrWriteClosed is returned for writes after CloseWrite.
	ErrWriteClosed = errors.New("spdy: write after FIN")
	// ErrReadClosed is returned for reads after CloseRead.
	ErrReadClosed = errors.New("spdy: read after CloseRead")
	// ErrTooManyStreams is returned by OpenStream when Config.MaxStreams streams are open, or when
	// the stream ids of the connection are used up.
	ErrTooManyStreams = errors.New("spdy: too many streams")
)
