package daemon

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"runtime/debug"
	"slices"
	"time"

	"github.com/coreos/go-systemd/v22/daemon"
	"golang.org/x/sys/unix"

	"github.com/streamshim/streamshim/pkg/admin"
	"github.com/streamshim/streamshim/pkg/config"
	"github.com/streamshim/streamshim/pkg/cri"
	"github.com/streamshim/streamshim/pkg/endpoint"
	"github.com/streamshim/streamshim/pkg/execproc"
	"github.com/streamshim/streamshim/pkg/handover"
	"github.com/streamshim/streamshim/pkg/portforward"
	"github.com/streamshim/streamshim/pkg/streaming"
)

// process holds all parts that serve, from the sockets to the processes in containers.
type process struct {
	version   string
	config    config.Config
	log       *slog.Logger
	end       *termination
	hangups   chan os.Signal
	lock      *os.File
	operation *operation
	telemetry *telemetry
	runner    *execproc.Runner
	watcher   *portforward.Watcher
	upstream  *cri.Upstream
	streams   *streaming.Server
	cri       *cri.Server
	admin     *admin.Server
	reloader  *reloader
	handovers *handovers

	criSocket, adminSocket     net.Listener       // as opened
	criListener, adminListener *handover.Listener // as served; adminListener may be nil
	streamListener             *handover.Listener
	closers                    []func()
	ended                      chan error // of the servers
	running                    int        // servers
}

// serve builds the parts, resumes what a predecessor has left, serves until the end, and takes the parts down in reverse
// order. load reads the configuration again.
func serve(ctx context.Context, version string, c config.Config, load func() (config.Config, error), before *predecessor, end *termination, hangups chan os.Signal) error {
	p := &process{version: version, config: c, end: end, hangups: hangups}
	defer p.close()
	if err := p.build(ctx, load, before); err != nil {
		return err
	}
	warnOfMissing(p.log, c)
	// Before this point a signal ends the process at once: nothing is served yet that would need an orderly end.
	end.begin()
	p.resume(before)
	fault("serve")
	p.start()
	before.close() // after the start, because the kernel takes its time: see keepProgram
	sayReady(c, p.streamListener.Addr())
	if before != nil {
		// Also answers a "systemctl reload" that came during the hand-over: the configuration has just been read.
		notify(p.log, reloading())
	}
	notify(p.log, daemon.SdNotifyReady)
	return p.run(ctx)
}

// onClose registers a function for close, which calls the last one first.
func (p *process) onClose(f func()) { p.closers = append(p.closers, f) }

func (p *process) close() {
	for _, f := range slices.Backward(p.closers) {
		f()
	}
}

// build makes all parts. None of them serves yet.
func (p *process) build(ctx context.Context, load func() (config.Config, error), before *predecessor) (err error) {
	fault("build")
	c := p.config
	log, level := newLogger(c)
	p.log = log
	if p.criSocket, p.criListener, err = p.openSocket(before, c.Listen, func(s processState) socketState { return s.CRI }); err != nil {
		return err
	}
	if p.lock, err = before.lock(c.StateDir); err != nil {
		return err
	}
	p.onClose(func() { p.lock.Close() }) // after everything that uses the directory

	limitMemory(c, log)
	if p.operation, err = newOperation(c, log, level, before != nil); err != nil {
		return err
	}
	p.onClose(p.operation.close)
	p.handovers = newHandovers(p.version, before)
	if p.telemetry, err = newTelemetry(ctx, p.version, c, p.operation, p.handovers, before, log); err != nil {
		return err
	}
	p.onClose(p.telemetry.close)
	warnRemoved(c, log)
	p.telemetry.observe(p.operation.sessions)
	p.operation.sessions.Observe(p.handovers)
	observe := p.telemetry.hooks()

	if p.runner, err = execproc.NewRunner(runnerConfig(c, log, p.operation, observe, before != nil)); err != nil {
		return err
	}
	p.onClose(func() { p.runner.Close() }) // Shutdown is the orderly end

	if p.watcher, err = before.watcher(log); err != nil {
		return err
	}
	p.onClose(func() { p.watcher.Close() }) // nothing depends on it any more

	if p.upstream, err = cri.NewUpstream(c.Upstream, 0); err != nil {
		return err
	}
	p.onClose(func() { p.upstream.Close() }) // as above

	if p.adminSocket, p.adminListener, err = p.openSocket(before, c.Admin, func(s processState) socketState { return s.Admin }); err != nil {
		return err
	}
	if err := p.openStreams(before); err != nil {
		return err
	}
	engine := engine{p.upstream, p.runner, p.watcher}
	p.streams = streaming.NewServer(streamingConfig(c, log, p.operation, observe, engine), p.streamListener.Addr())
	p.cri, err = cri.NewServer(cri.Config{
		Upstream: p.upstream, Streams: p.streams, Runner: engine,
		StreamErrorCode: streamErrorCode, BeginSync: observe.countSync(p.operation.beginSync), Logger: log,
		Observe: observe.call, Trace: observe.trace,
	})
	if err != nil {
		return err
	}
	p.reloader = &reloader{log: log, load: load, apply: func(c config.Config) error { return p.operation.apply(c, p.streams) }, replace: p.replace}
	p.reloader.current.Store(&c)
	p.admin = admin.NewServer(admin.Config{
		Sessions: p.operation.sessions, Log: log,
		Settings: func() admin.Settings { return adminSettings(*p.reloader.current.Load()) },
		HandOver: p.handovers.request, LastHandover: p.handovers.lastOne,
	})
	return nil
}

// openSocket listens on a Unix socket. Without an address it returns nil.
func (p *process) openSocket(before *predecessor, address string, of func(processState) socketState) (net.Listener, *handover.Listener, error) {
	socket, err := before.socket(address, of)
	if socket == nil || err != nil {
		return nil, nil, err
	}
	p.onClose(func() { socket.Close() }) // closed before in the good case
	listener, err := handover.NewListener(socket)
	return socket, listener, err
}

func (p *process) openStreams(before *predecessor) error {
	inner, err := before.address(p.config.StreamAddress, func(s processState) addressState { return s.Streams })
	if err != nil {
		return fmt.Errorf("listen for streams: %w", err)
	}
	p.onClose(func() { inner.Close() }) // closed before in the good case
	if err := deferAccept(inner); err != nil {
		return fmt.Errorf("listen for streams: %w", err)
	}
	p.streamListener, err = handover.NewListener(inner)
	return err
}

// deferAccept makes the kernel keep connections in its queue until the client has sent something (TCP_DEFER_ACCEPT). So no
// connection is lost when this program is replaced before it has read the request.
func deferAccept(listener net.Listener) error {
	raw, err := listener.(*net.TCPListener).SyscallConn()
	if err != nil {
		return err
	}
	var fault error
	if err := raw.Control(func(fd uintptr) {
		fault = unix.SetsockoptInt(int(fd), unix.IPPROTO_TCP, unix.TCP_DEFER_ACCEPT, 1) // seconds
	}); err != nil {
		return err
	}
	return fault
}

// start starts the servers.
func (p *process) start() {
	p.ended = make(chan error, 3)
	p.running = 2
	go func() { p.ended <- p.streams.Serve(p.streamListener) }()
	go func() { p.ended <- p.cri.Serve(p.criListener) }()
	if p.adminListener != nil {
		p.running++
		go func() { p.ended <- p.admin.Serve(p.adminListener) }()
	}
	p.telemetry.serve(p.streams)
}

// run waits for the end and then ends everything in order. It also hands over, which only the main thread can do.
func (p *process) run(ctx context.Context) (err error) {
	reloading := make(chan struct{})
	reloadContext, stopReloading := context.WithCancel(p.end.ctx)
	defer stopReloading()
	go func() {
		defer close(reloading)
		p.reloader.run(reloadContext, p.hangups)
	}()
	for serving := true; serving; {
		select {
		case <-p.end.ctx.Done():
			p.log.Info("ending", "drain", time.Duration(p.config.Shutdown.Drain))
			serving = false
		case err = <-p.ended:
			p.running--
			serving = false
		case request := <-p.handovers.requests:
			p.handOver(p.end.ctx, request)
		}
	}
	p.handovers.close()
	stopReloading()
	<-reloading
	notify(p.log, daemon.SdNotifyStopping)
	drain, cancelDrain := context.WithTimeout(context.WithoutCancel(ctx), time.Duration(p.config.Shutdown.Drain))
	defer cancelDrain()
	// Sessions first: calls and probes are answered meanwhile.
	err = errors.Join(err, p.streams.Shutdown(drain))
	end, cancelEnd := context.WithTimeout(context.WithoutCancel(ctx), endTimeout)
	defer cancelEnd()
	err = errors.Join(err, p.runner.Shutdown(end))
	p.cri.Shutdown(drain)
	err = errors.Join(err, p.admin.Shutdown(end))
	for ; p.running > 0; p.running-- {
		err = errors.Join(err, <-p.ended)
	}
	return err
}

// state returns the processState for a hand-over.
func (p *process) state(files *handover.Files, h admin.Handover) (processState, error) {
	s, err := p.places()
	s.Handover, s.Totals = h, p.handovers.totalsNow()
	keep := func(listener *handover.Listener) (kept handover.Descriptor) {
		if listener != nil && err == nil {
			kept, err = listener.Keep(files)
		}
		return kept
	}
	s.CRI.Descriptor = keep(p.criListener)
	s.Admin.Descriptor = keep(p.adminListener)
	s.Metrics.Descriptor = keep(p.telemetry.listener)
	if err == nil {
		s.Streams.Descriptor, err = p.streams.KeepListener(files)
	}
	if err == nil {
		s.Inotify, err = p.watcher.Keep(files)
	}
	if err == nil {
		s.Lock, err = files.Keep(p.lock)
	}
	return s, err
}

// places returns the part of the processState that says where this program listens and keeps its files.
func (p *process) places() (processState, error) {
	s := processState{StateDir: p.config.StateDir, Upstream: p.config.Upstream}
	s.Streams.Address, s.Metrics.Address = p.config.StreamAddress, p.config.MetricsAddress
	var criErr, adminErr error
	s.CRI.Place, criErr = endpoint.PlaceOf(p.criSocket)
	if p.adminSocket != nil {
		s.Admin.Place, adminErr = endpoint.PlaceOf(p.adminSocket)
	}
	return s, errors.Join(criErr, adminErr)
}

// resume resumes everything that a predecessor has left.
func (p *process) resume(before *predecessor) {
	if before == nil {
		return
	}
	fault("resume")
	// The sessions would stand still for the garbage collection, too. The memory limit holds nevertheless.
	defer debug.SetGCPercent(debug.SetGCPercent(-1))
	var known cri.State
	if err := before.state.Get(criPart, &known); err != nil {
		p.log.Warn("what was known of containers is found out again", "error", err)
	}
	p.cri.Adopt(known)
	exec := before.part(execPart)
	if exec == nil { // Resume must be called anyway: before, the reaper takes no process for an orphan
		exec = []byte{}
	}
	carried := p.resumeSessions(before.files, exec, before.part(streamsPart))
	pause := handover.Since(before.state.Frozen)
	p.handovers.takenOver(carried, before.state.Size, len(before.state.Descriptors), pause)
	if err := p.operation.audit.Settle(before.part(auditPart)); err != nil {
		p.log.Warn("numbers of the audit log begin anew", "error", err)
	}
	last, _ := p.handovers.lastOne()
	p.operation.audit.HandedOver(last.Carried, len(last.EndedSessions), pause)
	p.log.Info("this program has taken over", "from", last.From, "version", p.version, "reason", last.Reason,
		"carried", last.Carried, "ended", len(last.EndedSessions), "pause", pause, "state", last.State, "descriptors", last.Descriptors)
}

// resumeSessions resumes processes and sessions, in the program that has frozen them or in the next one. It returns the
// number of resumed sessions.
func (p *process) resumeSessions(files *handover.Files, exec, streams []byte) (carried int) {
	if exec != nil {
		if err := p.runner.Resume(exec, files); err != nil {
			p.log.Error("processes in containers are lost to this program", "error", err)
		}
	}
	if streams != nil {
		var err error
		if carried, _, err = p.streams.Resume(streams, files); err != nil {
			p.log.Error("all sessions are lost", "error", err)
		}
	}
	if exec != nil {
		p.runner.EndUnclaimed(files)
	}
	return carried
}
