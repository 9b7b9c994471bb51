package streaming

import (
	"github.com/streamshim/streamshim/pkg/streaming/internal/transport"
	"github.com/streamshim/streamshim/pkg/streaming/portforward"
	"github.com/streamshim/streamshim/pkg/streaming/remotecommand"
)

// Names for the two kinds of sessions: client-go has packages with the names of ours.
type (
	commandConfig  = remotecommand.Config
	commandWaits   = remotecommand.Waits
	commandRequest = remotecommand.Request
	remoteProcess  = remotecommand.Process

	forwardConfig  = portforward.Config
	forwardRequest = portforward.Request
	forwardSession = portforward.Session
	forwarder      = portforward.Forwarder
)

var errSandboxGone = portforward.ErrSandboxGone

const (
	portForwardProtocol = portforward.Protocol

	headerProtocolVersion  = transport.HeaderProtocolVersion
	headerAcceptedVersions = transport.HeaderAcceptedVersions
	headerStreamType       = transport.HeaderStreamType
	headerPort             = transport.HeaderPort
	headerRequestID        = transport.HeaderRequestID

	streamTypeError  = transport.StreamError
	streamTypeStdin  = transport.StreamStdin
	streamTypeStdout = transport.StreamStdout
	streamTypeStderr = transport.StreamStderr
	streamTypeResize = transport.StreamResize
	streamTypeData   = transport.StreamData
)
