package daemon

import (
	"cmp"
	"fmt"
	"log/slog"
	"net"
	"os"
	"time"

	"github.com/streamshim/streamshim/pkg/admin"
	"github.com/streamshim/streamshim/pkg/config"
	"github.com/streamshim/streamshim/pkg/endpoint"
	"github.com/streamshim/streamshim/pkg/handover"
	"github.com/streamshim/streamshim/pkg/portforward"
)

// The parts of a state.
const (
	processPart = "process" // processState
	criPart     = "cri"     // cri.State
	execPart    = "exec"    // execproc.Runner.Freeze
	streamsPart = "streams" // streaming.Server.Freeze
	auditPart   = "audit"   // audit.Log.Freeze
	configPart  = "config"  // config.Config, as it was in force
)

// processState is the state of the process as a whole: its sockets, and the hand-over itself.
type processState struct {
	CRI, Admin       socketState
	Streams, Metrics addressState
	StateDir         string
	Lock             handover.Descriptor // of the state directory
	Inotify          handover.Descriptor // of the portforward.Watcher; zero means none
	Upstream         string
	Handover         admin.Handover // the one that this state is for
	Totals           handoverTotals
}

// socketState is a Unix socket that the process listens on.
type socketState struct {
	Descriptor handover.Descriptor
	Place      endpoint.Place
}

// addressState is a TCP address that the process listens on. Address is the configured one; its port may be 0.
type addressState struct {
	Descriptor handover.Descriptor
	Address    string
}

// predecessor is the program that has handed over to this one. A nil predecessor means that there was none.
type predecessor struct {
	state *handover.State
	files *handover.Files
	own   processState
	limit *time.Timer // of taking over
}

// received returns the predecessor of this program, nil if there is none.
func received() (*predecessor, error) {
	state, files, err := handover.Received()
	if state == nil || err != nil {
		return nil, err
	}
	p := &predecessor{state: state, files: files, limit: time.AfterFunc(takeOverLimit, giveUp)}
	if err := state.Get(processPart, &p.own); err != nil {
		files.Close()
		return nil, err
	}
	return p, nil
}

// giveUp ends a program that hangs while it takes over, with sessions that stand still. systemd starts it again.
func giveUp() {
	slog.Error("this program has not taken over in time and ends", "limit", takeOverLimit)
	os.Exit(1)
}

// close closes the descriptors that were not taken. It is called when this program serves.
func (p *predecessor) close() {
	if p != nil {
		p.limit.Stop()
		p.files.Close()
	}
}

// configuration returns that of the predecessor, or err if there is none. It takes the place of one that cannot be read for the
// reason err, but could when this program was checked: without it all sessions would end.
func (p *predecessor) configuration(err error) (config.Config, error) {
	encoded := p.part(configPart)
	if encoded == nil {
		return config.Config{}, err
	}
	c := config.Default()
	if handover.Decode(encoded, &c) != nil {
		return config.Config{}, err
	}
	log, _ := newLogger(c)
	log.Error("the configuration cannot be read any more; that of the program before stays in force", "error", err)
	return c, nil
}

// part returns an encoded part of the state, nil without a predecessor.
func (p *predecessor) part(name string) []byte {
	if p == nil {
		return nil
	}
	return p.state.Parts[name]
}

// foundUpstream returns the runtime's socket if the configuration does not name one. It prefers the predecessor's, because
// a runtime that is restarting cannot be found.
func (p *predecessor) foundUpstream(find func() (string, error)) (string, error) {
	if p != nil && p.own.Upstream != "" {
		return p.own.Upstream, nil
	}
	return find()
}

// lock returns the lock of the state directory.
func (p *predecessor) lock(dir string) (*os.File, error) {
	if p == nil {
		return lockStateDir(dir)
	}
	if err := p.own.mayUse(dir); err != nil {
		return nil, err
	}
	return p.files.Take(p.own.Lock, "lock of the state directory")
}

// watcher returns a watcher of network namespaces, with the predecessor's inotify instance if it had one.
func (p *predecessor) watcher(log *slog.Logger) (*portforward.Watcher, error) {
	if p == nil || p.own.Inotify == 0 {
		return portforward.NewWatcher(log)
	}
	inotify, err := p.files.Take(p.own.Inotify, "inotify")
	if err != nil {
		return nil, err
	}
	return portforward.ResumeWatcher(inotify), nil
}

// mayUse returns an error if the state directory has changed: running commands have their records in the old one.
func (s processState) mayUse(stateDir string) error {
	if s.StateDir != stateDir {
		return fmt.Errorf("state_dir was changed from %s to %s, which needs a restart", s.StateDir, stateDir)
	}
	return nil
}

// socket returns a listener on a Unix socket: the inherited one if its path is the same, else a new one. It returns nil
// for an empty address.
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
		// Another address is configured, or the socket was removed: clients in the old queue are refused.
		cmp.Or[net.Listener](adopted, listener).Close() //nolint:errcheck // it is not used
	}
	if path == "" {
		return nil, nil
	}
	return endpoint.Listen(path)
}

// address returns a listener on a TCP address: the inherited one if the same address is configured, else a new one. It
// returns nil for an empty address.
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
