package streaming

import (
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"strings"

	"github.com/streamshim/streamshim/pkg/workload"
)

// remoteCommandProtocol is a version of the remotecommand protocol over SPDY, and what it can do.
// The names are those of k8s.io/apimachinery/pkg/util/remotecommand.
type remoteCommandProtocol struct {
	name       string
	resize     bool // v3: a stream of terminal sizes
	jsonStatus bool // v4: the error stream carries a status, also of success
}

// remoteCommandProtocols are the versions spoken over SPDY, the best first. v5 is v4 with a close
// signal that only WebSocket needs, and is never spoken over SPDY; clients that offer it offer v4.
var remoteCommandProtocols = []remoteCommandProtocol{
	{name: "v4.channel.k8s.io", resize: true, jsonStatus: true},
	{name: "v3.channel.k8s.io", resize: true},
	{name: "v2.channel.k8s.io"},
	{name: "channel.k8s.io"},
}

// portForwardProtocol is the only version of the port-forward protocol over SPDY.
const portForwardProtocol = "portforward.k8s.io"

// Headers of an upgrade to SPDY and of its streams.
const (
	spdyUpgrade                = "SPDY/3.1"
	headerProtocolVersion      = "X-Stream-Protocol-Version"
	headerAcceptedVersions     = "X-Accepted-Stream-Protocol-Versions"
	headerStreamType           = "streamtype"
	headerPort                 = "port"
	headerRequestID            = "requestid"
	streamTypeError            = "error"
	streamTypeStdin            = "stdin"
	streamTypeStdout           = "stdout"
	streamTypeStderr           = "stderr"
	streamTypeResize           = "resize"
	streamTypeData             = "data"
	maxTerminalSizeMessage     = 1024 // bytes of one JSON terminal size; real ones have about 25
	unversionedRemoteCommand   = ""   // clients before 1.2 send no version or an empty one
	unversionedRemoteCommandV1 = "channel.k8s.io"
)

// isSPDYUpgrade tells whether the request asks for SPDY/3.1.
func isSPDYUpgrade(r *http.Request) bool {
	return headerHasToken(r.Header, "Connection", "upgrade") && headerHasToken(r.Header, "Upgrade", spdyUpgrade)
}

func headerHasToken(h http.Header, name, token string) bool {
	for _, v := range commaSeparated(h, name) {
		if strings.EqualFold(v, token) {
			return true
		}
	}
	return false
}

// commaSeparated are a header's values, whether sent in one line or several.
func commaSeparated(h http.Header, name string) []string {
	var values []string
	for _, line := range h.Values(name) {
		for v := range strings.SplitSeq(line, ",") {
			values = append(values, strings.TrimSpace(v))
		}
	}
	return values
}

// errNoProtocol is a request that names no protocol version, errUnknownProtocol one that names only
// unknown ones. HTTP answers are 400 and 403, as k8s.io/streaming's Handshake gives them.
var (
	errNoProtocol      = errors.New("the header " + headerProtocolVersion + " is missing: it must list the protocol versions that the client speaks")
	errUnknownProtocol = errors.New("none of the protocol versions offered is spoken here")
)

// negotiate picks the first of the client's protocols that is in known: the client's order is its
// preference.
func negotiate(h http.Header, known []string) (string, error) {
	offered := commaSeparated(h, headerProtocolVersion)
	if len(offered) == 0 {
		return "", errNoProtocol
	}
	for _, o := range offered {
		for _, k := range known {
			if o == k {
				return k, nil
			}
		}
	}
	return "", fmt.Errorf("%w: offered %q, known %q", errUnknownProtocol, offered, known)
}

func remoteCommandProtocolNames() []string {
	names := make([]string, 0, len(remoteCommandProtocols)+1)
	for _, p := range remoteCommandProtocols {
		names = append(names, p.name)
	}
	return append(names, unversionedRemoteCommand)
}

func remoteCommandProtocolByName(name string) remoteCommandProtocol {
	if name == unversionedRemoteCommand {
		name = unversionedRemoteCommandV1
	}
	for _, p := range remoteCommandProtocols {
		if p.name == name {
			return p
		}
	}
	return remoteCommandProtocol{name: name}
}

// terminalSizes takes terminal sizes, each a JSON object with Width and Height, out of a byte stream that may split and join them in any
// way.
type terminalSizes struct {
	pending []byte
}

var errTerminalSize = errors.New("the resize stream carries something else than terminal sizes")

// feed adds bytes and returns the sizes that are complete now. The stream is of no more use after
// an error.
func (t *terminalSizes) feed(b []byte) ([]workload.Size, error) {
	var sizes []workload.Size
	for _, c := range b {
		if len(t.pending) == 0 && c != '{' {
			if c == ' ' || c == '\n' || c == '\r' || c == '\t' {
				continue
			}
			return sizes, errTerminalSize
		}
		if len(t.pending) == maxTerminalSizeMessage {
			return sizes, errTerminalSize
		}
		t.pending = append(t.pending, c)
		if c != '}' {
			continue
		}
		var size workload.Size
		if err := json.Unmarshal(t.pending, &size); err != nil {
			return sizes, fmt.Errorf("%w: %w", errTerminalSize, err)
		}
		t.pending = t.pending[:0]
		sizes = append(sizes, size)
	}
	return sizes, nil
}
