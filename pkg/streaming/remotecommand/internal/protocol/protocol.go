// Package protocol describes the versions of the remotecommand protocol.
package protocol

import "io"

// Version is a version of the remotecommand protocol with its features. The names are those of
// k8s.io/apimachinery/pkg/util/remotecommand.
type Version struct {
	Name       string
	Resize     bool // v3: a stream of terminal sizes
	JSONStatus bool // v4: the error stream carries a status, also of success
}

// SPDY are the versions spoken over SPDY, the best first. v5 is v4 with a close signal that only WebSocket needs, and is
// never spoken over SPDY; clients that offer it offer v4.
var SPDY = []Version{
	{Name: "v4.channel.k8s.io", Resize: true, JSONStatus: true},
	{Name: "v3.channel.k8s.io", Resize: true},
	{Name: "v2.channel.k8s.io"},
	{Name: "channel.k8s.io"},
}

// Clients before 1.2 send no version or an empty one, and speak the first.
const (
	unversioned   = ""
	unversionedV1 = "channel.k8s.io"
)

// Names returns the names of SPDY's versions as clients send them, the best first.
func Names() []string {
	names := make([]string, 0, len(SPDY)+1)
	for _, v := range SPDY {
		names = append(names, v.Name)
	}
	return append(names, unversioned)
}

// ByName returns a version. An unknown version has no features.
func ByName(name string) Version {
	if name == unversioned {
		name = unversionedV1
	}
	for _, v := range SPDY {
		if v.Name == name {
			return v
		}
	}
	return Version{Name: name}
}

// PromiseStatus begins the error stream with a space, which JSON allows before the status. To clients with spdystream (kubectl,
// crictl, kubelet, API server) a broken connection, by FIN or by reset, is the end of all its streams, and an error stream
// that ends empty is a success. With the space, if this process is killed, they read something that is not a status, and
// report an error. Before v4 any byte means failure, so PromiseStatus does nothing.
func (v Version) PromiseStatus(failure io.Writer) {
	if v.JSONStatus {
		io.WriteString(failure, " ") //nolint:errcheck // a client that has gone is noticed elsewhere
	}
}
