package daemon

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"net/http"
	"os"
	"os/signal"
	"slices"
	"sync"
	"syscall"
	"time"

	"github.com/coreos/go-systemd/v22/daemon"

	"github.com/streamshim/streamshim/pkg/admin"
	"github.com/streamshim/streamshim/pkg/handover"
	"github.com/streamshim/streamshim/pkg/metrics"
	"github.com/streamshim/streamshim/pkg/session"
)

// Limits of a hand-over, beside those of pkg/handover.
const (
	// quiesceLimit is how long a moment without long CRI calls is waited for.
	quiesceLimit = 30 * time.Second
	// freezeLimit is how long commands that are being started are waited for. Sessions stand still during a part of it.
	freezeLimit = 5 * time.Second
	// settleLimit is for what is written to disk, and for requests on the admin socket and for metrics.
	settleLimit = time.Second
)

// notCarried is the reason of a session that ended because it could not be handed over.
const notCarried = "not-carried"

// handoverRequest is that the installed program takes over.
type handoverRequest struct {
	begun  admin.Handover
	failed chan struct{} // closed when it was not carried out; nil if nobody waits for that
}

// handoverTotals go over to the next program with each hand-over.
type handoverTotals struct{ Done, Failed, Carried, Ended int64 }

// handovers is what is known of hand-overs: the last one, and the one that is asked for. It is a session.Observer.
type handovers struct {
	version  string // of this program
	requests chan handoverRequest
	closing  chan struct{}

	mu      sync.Mutex
	current admin.Handover // the last one, or the one under way; no ID when there was none
	totals  handoverTotals
}

func newHandovers(version string, before *predecessor) *handovers {
	h := &handovers{version: version, requests: make(chan handoverRequest), closing: make(chan struct{})}
	if before != nil {
		h.current, h.totals = before.own.Handover, before.own.Totals
		h.current.To = version
	}
	return h
}

func (h *handovers) close() { close(h.closing) }

// begin makes a new hand-over the current one, unless one is under way.
func (h *handovers) begin(reason string, dryRun bool) (admin.Handover, error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.current.Phase == admin.HandoverRunning {
		return admin.Handover{}, &admin.Error{Code: http.StatusConflict, Message: "another program is taking over already"}
	}
	h.current = admin.Handover{
		ID: rand.Text(), Reason: reason, DryRun: dryRun, Began: time.Now(), Phase: admin.HandoverRunning, From: h.version,
	}
	return h.current, nil
}

// request implements admin.Config.HandOver.
func (h *handovers) request(r admin.HandoverRequest) (admin.Handover, error) {
	begun, err := h.begin("upgrade", r.DryRun)
	if err != nil {
		return admin.Handover{}, err
	}
	if err := h.ask(handoverRequest{begun: begun}); err != nil {
		return admin.Handover{}, err
	}
	return begun, nil
}

// ask has the main goroutine hand over.
func (h *handovers) ask(r handoverRequest) error {
	select {
	case h.requests <- r:
		return nil
	case <-h.closing:
		h.failed(errors.New("streamshim is ending"))
		return &admin.Error{Code: http.StatusServiceUnavailable, Message: "streamshim is ending"}
	}
}

// lastOne implements admin.Config.LastHandover.
func (h *handovers) lastOne() (admin.Handover, bool) {
	h.mu.Lock()
	defer h.mu.Unlock()
	last := h.current
	last.EndedSessions = slices.Clone(last.EndedSessions)
	return last, last.ID != ""
}

// set notes how far it has come.
func (h *handovers) set(change func(*admin.Handover)) {
	h.mu.Lock()
	defer h.mu.Unlock()
	change(&h.current)
}

func (h *handovers) failed(err error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.current.Phase, h.current.Error = admin.HandoverFailed, err.Error()
	if !h.current.DryRun {
		h.totals.Failed++
	}
}

// takenOver is told by the new program that it is done.
func (h *handovers) takenOver(carried, size int, pause time.Duration) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.current.Phase, h.current.Carried, h.current.State, h.current.Pause = admin.HandoverDone, carried, size, pause.Seconds()
	h.totals.Done++
	h.totals.Carried += int64(carried)
}

func (h *handovers) totalsNow() handoverTotals {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.totals
}

// numbers is metrics.Config.Handovers.
func (h *handovers) numbers() metrics.Handovers {
	h.mu.Lock()
	defer h.mu.Unlock()
	return metrics.Handovers{
		Done: h.totals.Done, Failed: h.totals.Failed, Carried: h.totals.Carried, Ended: h.totals.Ended, Pause: h.current.Pause,
	}
}

// Began implements session.Observer, as the methods below do.
func (h *handovers) Began(*session.Session) {}

// Resumed implements session.Observer.
func (h *handovers) Resumed(*session.Session) {}

// PhaseChanged implements session.Observer.
func (h *handovers) PhaseChanged(*session.Session, session.Phase) {}

// Refused implements session.Observer.
func (h *handovers) Refused(session.Info, error) {}

// Ended notes a session that ended because it could not be carried.
func (h *handovers) Ended(s *session.Session, o session.Outcome) {
	if o.Reason != notCarried {
		return
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	h.totals.Ended++
	if len(h.current.EndedSessions) < maxEndedSessions {
		h.current.EndedSessions = append(h.current.EndedSessions, fmt.Sprintf("%s %s: %v", s.ID, s.Kind, o.Err))
	}
}

// maxEndedSessions bounds a list that is for people.
const maxEndedSessions = 100

// replace is for the reloader: if another version was installed, it takes over.
func (p *process) replace(ctx context.Context) {
	path, err := handover.Program()
	same := false
	if err == nil {
		same, err = handover.IsRunning(path)
	}
	if err != nil {
		p.log.Warn("whether another version is installed cannot be told", "error", err)
	}
	if err != nil || same {
		return
	}
	begun, err := p.handovers.begin("reload", false)
	if err != nil {
		return // it is being done
	}
	failed := make(chan struct{})
	if p.handovers.ask(handoverRequest{begun: begun, failed: failed}) != nil {
		return
	}
	select {
	case <-failed: // otherwise nothing comes any more: this program is no more
	case <-ctx.Done():
	}
}

// handOver executes the installed program in this process. It returns when that was not done, or not to be.
func (p *process) handOver(ctx context.Context, r handoverRequest) {
	if r.failed == nil { // otherwise the reloader does so
		notify(p.log, reloading())
		defer notify(p.log, daemon.SdNotifyReady)
	} else {
		defer close(r.failed)
	}
	err := p.tryHandOver(ctx, r.begun)
	if err != nil {
		p.handovers.failed(err)
		p.log.Error("no other program takes over, this one goes on", "reason", r.begun.Reason, "dry run", r.begun.DryRun, "error", err)
	} else {
		p.handovers.set(func(h *admin.Handover) { h.Phase = admin.HandoverDone })
		last, _ := p.handovers.lastOne()
		p.log.Info("the installed program could take over", "version", last.To, "carried", last.Carried, "ended", len(last.EndedSessions))
	}
}

// tryHandOver hands over, or tells why not. Without an error, in a dry run, it would have done so.
func (p *process) tryHandOver(ctx context.Context, h admin.Handover) error {
	program, err := handover.Program()
	if err != nil {
		return err
	}
	check, err := handover.StartCheck(ctx, program, append(slices.Clone(os.Args[1:]), "--check-state"))
	if err != nil {
		return err
	}
	defer check.Close()
	h.To = check.Program
	p.handovers.set(func(h *admin.Handover) { h.To = check.Program })
	p.log.Info("another program is about to take over", "version", check.Program, "program", program, "reason", h.Reason, "dry run", h.DryRun)
	if h.DryRun {
		return p.rehearse(ctx, check, h)
	}

	// What follows is undone in reverse order, unless the program is executed.
	var undo []func()
	defer func() {
		for _, f := range slices.Backward(undo) {
			f()
		}
	}()
	limited, cancel := context.WithTimeout(ctx, quiesceLimit)
	defer cancel()
	if err := p.cri.Quiesce(limited); err != nil {
		return err
	}
	undo = append(undo, p.cri.Resume)
	settled, cancelSettle := context.WithTimeout(ctx, settleLimit)
	defer cancelSettle()
	p.admin.Quiesce(settled)
	undo = append(undo, p.admin.Resume)
	p.telemetry.quiesce(settled)
	undo = append(undo, p.telemetry.resume)

	files := handover.NewFiles()
	undo = append(undo, files.Close)
	state := handover.NewState(p.version)
	thaw, err := p.freeze(ctx, state, files)
	if err != nil {
		return err
	}
	undo = append(undo, thaw)
	if ctx.Err() != nil {
		return fmt.Errorf("streamshim is ending: %w", ctx.Err())
	}
	last, _ := p.handovers.lastOne()
	h.EndedSessions = last.EndedSessions
	return p.execute(ctx, check, h, state, files)
}

// freeze brings all sessions and processes to a stop and puts them into the state. thaw has them go on.
func (p *process) freeze(ctx context.Context, state *handover.State, files *handover.Files) (thaw func(), err error) {
	ctx, cancel := context.WithTimeout(ctx, freezeLimit)
	defer cancel()
	streams, err := p.streams.Freeze(ctx, files)
	if err != nil {
		return nil, err
	}
	state.Frozen = p.streams.Frozen()
	var exec []byte
	if err = p.runner.Quiesce(ctx); err == nil {
		exec, err = p.runner.Freeze(files)
	}
	if err != nil {
		p.runner.Continue()
		p.resumeSessions(files, nil, streams)
		return nil, err
	}
	state.Parts[streamsPart], state.Parts[execPart] = streams, exec
	thaw = func() { p.resumeSessions(files, exec, streams) }
	if err := p.settle(ctx, state); err != nil {
		thaw()
		return nil, err
	}
	return thaw, nil
}

// settle has everything written that this program has to write of sessions. A disk that is slow is a reason to go on and to
// try it later, one that fails is not: what is lost by it is lost and counted.
func (p *process) settle(ctx context.Context, state *handover.State) error {
	ctx, cancel := context.WithTimeout(ctx, settleLimit)
	defer cancel()
	if err := p.operation.recorder.Settle(ctx); err != nil {
		return err
	}
	written, err := p.operation.audit.FreezeLog(ctx)
	switch {
	case ctx.Err() != nil && err != nil:
		return err
	case err != nil:
		p.log.Warn("audit records are lost", "error", err)
	default:
		state.Parts[auditPart] = written
	}
	return nil
}

// execute has the new program read the state, and executes it.
func (p *process) execute(ctx context.Context, check *handover.Check, h admin.Handover, state *handover.State, files *handover.Files) error {
	if err := state.Put(criPart, p.cri.State()); err != nil {
		return err
	}
	own, err := p.state(files, h)
	if err != nil {
		return err
	}
	if err := state.Put(processPart, own); err != nil {
		return err
	}
	state.Descriptors = files.Descriptors()
	verdict, size, err := check.Read(ctx, state)
	if err != nil {
		return err
	}
	p.log.Info("the sessions stand still for the other program", "carried", verdict.Carried, "ended", len(verdict.Ended), "state", size, "after", handover.Since(state.Frozen))
	// A signal that came before is served here; one that comes from now on ends the process or, if it asks for a reload, is
	// thrown away: the new program reads the configuration anyway.
	if p.end.suspend() {
		return errors.New("streamshim is ending")
	}
	defer p.end.resume()
	signal.Ignore(syscall.SIGHUP)
	defer signal.Notify(p.hangups, syscall.SIGHUP)
	return check.Exec(files)
}

// rehearse tells what a hand-over would carry and what not.
func (p *process) rehearse(ctx context.Context, check *handover.Check, h admin.Handover) error {
	state := handover.NewState(p.version)
	own, err := p.places()
	if err != nil {
		return err
	}
	own.Handover = h
	if err := errors.Join(state.Put(criPart, p.cri.State()), state.Put(processPart, own)); err != nil {
		return err
	}
	if _, _, err := check.Read(ctx, state); err != nil {
		return err
	}
	carried, ended := p.streams.Carriable()
	p.handovers.set(func(h *admin.Handover) { h.Carried, h.EndedSessions = carried, ended })
	return nil
}
