package spdy

import (
	"errors"

	"github.com/streamshim/streamshim/pkg/streaming/internal/spdy/frames"
)

// ConnectionError is a fault after which the connection cannot go on.
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
	// ErrClosed is the end of a connection that this side closed.
	ErrClosed = errors.New("spdy: connection closed")
	// ErrGoAway is the end of a connection whose peer said goodbye with GOAWAY.
	ErrGoAway = errors.New("spdy: peer closed the connection with GOAWAY")
	// ErrPeerClosed is the end of a connection whose peer closed it, with FIN, without GOAWAY.
	ErrPeerClosed = errors.New("spdy: peer closed the connection")
	// ErrPeerReset is the end of a connection that the peer's kernel has reset.
	ErrPeerReset = errors.New("spdy: peer reset the connection")
	// ErrWriteClosed is returned for writes after CloseWrite.
	ErrWriteClosed = errors.New("spdy: write after FIN")
	// ErrReadClosed is returned for reads after CloseRead.
	ErrReadClosed = errors.New("spdy: read after CloseRead")
	// ErrTooManyStreams is returned by OpenStream when Config.MaxStreams streams are open, or when
	// the stream ids of the connection are used up.
	ErrTooManyStreams = errors.New("spdy: too many streams")
)
