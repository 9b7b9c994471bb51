package daemon

import (
	"cmp"
	"fmt"
	"net"
	"os"

	"github.com/streamshim/streamshim/pkg/admin"
	"github.com/streamshim/streamshim/pkg/endpoint"
	"github.com/streamshim/streamshim/pkg/handover"
)

// The parts of a state.
const (
	processPart = "process" // processState
	criPart     = "cri"     // cri.State
	execPart    = "exec"    // execproc.Runner.Freeze
	streamsPart = "streams" // streaming.Server.Freeze
	auditPart   = "audit"   // audit.Log.Freeze
)

// processState is what the parts themselves do not know: sockets, and the hand-over itself.
type processState struct {
	CRI, Admin       socketState
	Streams, Metrics addressState
	StateDir         string
	Lock             handover.Descriptor // of the state directory
	Upstream         string
	Handover         admin.Handover // which this is
	Totals           handoverTotals
}

// socketState is a Unix socket that is listened on.
type socketState struct {
	Descriptor handover.Descriptor
	Place      endpoint.Place
}

// addressState is a TCP address that is listened on. Address is what was configured, which may have no port.
type addressState struct {
	Descriptor handover.Descriptor
	Address    string
}

// predecessor is the program that has handed over to this one; nil when there is none.
type predecessor struct {
	state *handover.State
	files *handover.Files
	own   processState
}

// received is what was handed over to this program, nil when nothing was.
func received() (*predecessor, error) {
	state, files, err := handover.Received()
	if state == nil || err != nil {
		return nil, err
	}
	p := &predecessor{state: state, files: files}
	if err := state.Get(processPart, &p.own); err != nil {
		files.Close()
		return nil, err
	}
	return p, nil
}

// close closes what nobody has taken.
func (p *predecessor) close() {
	if p != nil {
		p.files.Close()
	}
}

// part is a part of the state as it is, nil without a predecessor.
func (p *predecessor) part(name string) []byte {
	if p == nil {
		return nil
	}
	return p.state.Parts[name]
}

// foundUpstream is the runtime's socket for a configuration that does not name it: that of the predecessor, as the runtime
// may be restarting, or the one that is found.
func (p *predecessor) foundUpstream(find func() (string, error)) (string, error) {
	if p != nil && p.own.Upstream != "" {
		return p.own.Upstream, nil
	}
	return find()
}

// lock is the state directory's.
func (p *predecessor) lock(dir string) (*os.File, error) {
	if p == nil {
		return lockStateDir(dir)
	}
	if err := p.own.mayUse(dir); err != nil {
		return nil, err
	}
	return p.files.Take(p.own.Lock, "lock of the state directory")
}

// mayUse tells why a program cannot take over with this state directory: what runs has its files in the other one.
func (s processState) mayUse(stateDir string) error {
	if s.StateDir != stateDir {
		return fmt.Errorf("state_dir was changed from %s to %s, which needs a restart", s.StateDir, stateDir)
	}
	return nil
}

// socket listens on a Unix socket, by what was handed over if it is the same one.
func (p *predecessor) socket(address string, of func(processState) socketState) (net.Listener, error) {
	path := ""
	if address != "" {
		var err error
		if path, err = endpoint.Path(address); err != nil {
			return nil, err
		}
	}
	if p != nil && of(p.own).Descriptor != 0 {
		inherited := of(p.own)
		listener, err := p.files.TakeListener(inherited.Descriptor)
		if err != nil {
			return nil, err
		}
		adopted, err := endpoint.Adopt(listener, inherited.Place)
		if err == nil && inherited.Place.Path == path {
			return adopted, nil
		}
		// Another address was configured, or somebody has removed the socket: clients in its queue are refused.
		cmp.Or[net.Listener](adopted, listener).Close() //nolint:errcheck // it is not used
	}
	if path == "" {
		return nil, nil
	}
	return endpoint.Listen(path)
}

// address listens on a TCP address, by what was handed over if the same one was configured.
func (p *predecessor) address(address string, of func(processState) addressState) (net.Listener, error) {
	if p != nil && of(p.own).Descriptor != 0 {
		listener, err := p.files.TakeListener(of(p.own).Descriptor)
		if err != nil || of(p.own).Address == address {
			return listener, err
		}
		listener.Close() //nolint:errcheck // it is not used
	}
	if address == "" {
		return nil, nil
	}
	return net.Listen("tcp", address)
}
