package remotecommand

import "io"

// protocolVersion is a version of the remotecommand protocol over SPDY, and what it can do.
// The names are those of k8s.io/apimachinery/pkg/util/remotecommand.
type protocolVersion struct {
	name       string
	resize     bool // v3: a stream of terminal sizes
	jsonStatus bool // v4: the error stream carries a status, also of success
}

// protocols are the versions spoken over SPDY, the best first. v5 is v4 with a close
// signal that only WebSocket needs, and is never spoken over SPDY; clients that offer it offer v4.
var protocols = []protocolVersion{
	{name: "v4.channel.k8s.io", resize: true, jsonStatus: true},
	{name: "v3.channel.k8s.io", resize: true},
	{name: "v2.channel.k8s.io"},
	{name: "channel.k8s.io"},
}

// Clients before 1.2 send no version or an empty one, and speak the first.
const (
	unversioned   = ""
	unversionedV1 = "channel.k8s.io"
)

// ProtocolNames are the versions spoken over SPDY, the best first.
func ProtocolNames() []string {
	names := make([]string, 0, len(protocols)+1)
	for _, p := range protocols {
		names = append(names, p.name)
	}
	return append(names, unversioned)
}

func protocolByName(name string) protocolVersion {
	if name == unversioned {
		name = unversionedV1
	}
	for _, p := range protocols {
		if p.name == name {
			return p
		}
	}
	return protocolVersion{name: name}
}

// promiseStatus begins the error stream with a space, which JSON allows before the status. Clients of spdystream (kubectl,
// crictl, kubelet, API server) see a connection that breaks, by FIN or reset alike, as the end of all its streams, and an error
// stream that ends empty as success. So should this process be killed, they find something that is no status, and say so.
// Before v4 every byte is a failure, and nothing can be promised.
func (p protocolVersion) promiseStatus(failure io.Writer) {
	if p.jsonStatus {
		io.WriteString(failure, " ") //nolint:errcheck // a client that has gone is noticed elsewhere
	}
}
