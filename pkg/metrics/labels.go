package metrics

import (
	"errors"
	"slices"
	"strings"

	"github.com/streamshim/streamshim/pkg/session"
)

// other replaces each value that is not in a label's set.
const other = "other"

// The sets of values of the labels. A value outside its set is counted as "other".
var (
	protocols = []string{
		"SPDY/3.1", // a client that names no version
		"SPDY/3.1 channel.k8s.io", "SPDY/3.1 v2.channel.k8s.io", "SPDY/3.1 v3.channel.k8s.io", "SPDY/3.1 v4.channel.k8s.io",
		"SPDY/3.1 portforward.k8s.io",
		"WebSocket", "WebSocket channel.k8s.io", "WebSocket base64.channel.k8s.io",
		"WebSocket v4.channel.k8s.io", "WebSocket v4.base64.channel.k8s.io", "WebSocket v5.channel.k8s.io",
		"WebSocket SPDY/3.1+portforward.k8s.io",
	}
	reasons = []string{
		"exited", "client-gone", "container-exited", "sandbox-gone", "idle-timeout", "max-lifetime", "shutdown",
		"operator", "recording-failed", "not-carried", "panic", "no-streams", "start-failed", "refused", "stopped",
	}
	refusals = []string{string(session.Denied), string(session.TooMany), string(session.Unavailable)}
	codes    = []string{ // google.golang.org/grpc/codes
		"OK", "Canceled", "Unknown", "InvalidArgument", "DeadlineExceeded", "NotFound", "AlreadyExists",
		"PermissionDenied", "ResourceExhausted", "FailedPrecondition", "Aborted", "OutOfRange", "Unimplemented",
		"Internal", "Unavailable", "DataLoss", "Unauthenticated",
	}
	results = []string{resultOK, resultFailed, resultGone, resultEnded, resultError}
)

// How a session ended.
const (
	resultOK     = "ok"     // the command exited with 0, or the client closed its attach or port-forward
	resultFailed = "failed" // the command exited with something else
	resultGone   = "gone"   // the client went away while its command ran
	resultEnded  = "ended"  // a limit, an operator, a shutdown or the end of the container ended it
	resultError  = "error"  // an error ended it
)

func oneOf(set []string, value string) string {
	if slices.Contains(set, value) {
		return value
	}
	return other
}

func kindLabel(k session.Kind) string {
	switch k {
	case session.Exec, session.Attach, session.PortForward, session.ExecSync:
		return string(k)
	}
	return other
}

func protocolLabel(p string) string { return oneOf(protocols, p) }
func reasonLabel(r string) string   { return oneOf(reasons, r) }
func codeLabel(c string) string     { return oneOf(codes, c) }

func refusalLabel(err error) string {
	var refused *session.RefusedError
	if errors.As(err, &refused) {
		return oneOf(refusals, string(refused.Refusal))
	}
	return other
}

func resultLabel(kind session.Kind, o session.Outcome) string {
	switch o.Reason {
	case "exited":
		if o.ExitCode > 0 {
			return resultFailed
		}
		return resultOK
	case "client-gone":
		if kind != session.Exec {
			return resultOK // attach and port-forward end so
		}
		return resultGone
	case "start-failed":
		if o.ExitCode > 0 { // the command was not found or not executable
			return resultFailed
		}
		return resultError
	case "container-exited", "sandbox-gone", "idle-timeout", "max-lifetime", "shutdown", "operator":
		return resultEnded
	}
	return resultError
}

// The results of an ExecSync.
const (
	syncTimeout  = "timeout"
	syncCanceled = "canceled"
)

var syncResults = []string{resultOK, resultFailed, syncTimeout, syncCanceled, resultError}

func syncResult(o session.Outcome) string {
	switch {
	case o.Reason == "timeout":
		return syncTimeout
	case o.Reason == "client-gone":
		return syncCanceled
	case o.Err != nil:
		return resultError
	case o.ExitCode == 0:
		return resultOK
	}
	return resultFailed
}

// methodLabel shortens "/runtime.v1.RuntimeService/Exec" to "RuntimeService/Exec".
func methodLabel(full string) string {
	service, method, _ := strings.Cut(strings.TrimPrefix(full, "/"), "/")
	return service[strings.LastIndex(service, ".")+1:] + "/" + method
}
