// Package protocol tells the versions of the remotecommand protocol apart.
package protocol

import "io"

// Version is a version of the remotecommand protocol, and what it can do. The names are those of
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

// Names are the names of SPDY's versions, the best first, as clients may send them.
func Names() []string {
	names := make([]string, 0, len(SPDY)+1)
	for _, v := range SPDY {
		names = append(names, v.Name)
	}
	return append(names, unversioned)
}

// ByName finds a version. One that is not known can do nothing.
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

// PromiseStatus begins the error stream with a space, which JSON allows before the status. Clients of spdystream (kubectl,
// crictl, kubelet, API server) see a connection that breaks, by FIN or reset alike, as the end of all its streams, and an error
// stream that ends empty as success. Should this process be killed, they find something that is no status, and say so.
// Before v4 every byte is a failure, and nothing can be promised.
func (v Version) PromiseStatus(failure io.Writer) {
	if v.JSONStatus {
		io.WriteString(failure, " ") //nolint:errcheck // a client that has gone is noticed elsewhere
	}
}
