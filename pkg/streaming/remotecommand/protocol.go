package remotecommand

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
