package daemon

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"net/http"
	"os"
	"os/signal"
	"runtime/debug"
	"slices"
	"sync"
	"syscall"
	"time"

	"github.com/coreos/go-systemd/v22/daemon"

	"github.com/streamshim/streamshim/pkg/admin"
	"github.com/streamshim/streamshim/pkg/handover"
	"github.com/streamshim/streamshim/pkg/metrics"
	"github.com/streamshim/streamshim/pkg/rescue"
	"github.com/streamshim/streamshim/pkg/session"
	"github.com/streamshim/streamshim/pkg/session/limits"
)

// Limits of a hand-over, in addition to those of pkg/handover.
const (
	// quiesceLimit bounds the wait for a moment without long CRI calls.
	quiesceLimit = 30 * time.Second
	// freezeLimit bounds the wait for commands that are being started, and the freeze that follows.
	freezeLimit = 5 * time.Second
	// uncarriedLimit bounds the wait for the end of sessions that the new program cannot carry.
	uncarriedLimit = 5 * time.Second
	// settleLimit bounds the wait for pending disk writes, and for requests for metrics and on the admin socket.
	settleLimit = time.Second
)

// notCarried is the end reason of a session that could not be handed over.
const notCarried = "not-carried"

// handoverRequest asks the main goroutine to hand over to the installed program.
type handoverRequest struct {
	begun  admin.Handover
	failed chan struct{} // closed when the hand-over has failed; nil if nobody waits
}

// handoverTotals are counters that each hand-over passes on.
type handoverTotals struct{ Done, Failed, Carried, Ended int64 }

// handovers keeps track of hand-overs and queues requests for one. It is a session.Observer.
type handovers struct {
	version  string // of this program
	requests chan handoverRequest
	closing  chan struct{}

	mu      sync.Mutex
	current admin.Handover // the one under way, or the last one; its ID is empty before the first
	done    admin.Handover // the one by which this program has taken over; its ID is empty when there was none
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

// begin registers a new hand-over as the current one. It fails while another one is under way.
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

// ask passes a request to the main goroutine.
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

// set changes what is known of the current hand-over.
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

// takenOver records, in the new program, that the hand-over is complete.
func (h *handovers) takenOver(carried, size, descriptors int, pause time.Duration) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.current.Phase, h.current.Carried, h.current.State, h.current.Pause = admin.HandoverDone, carried, size, pause.Seconds()
	h.current.Descriptors = descriptors
	h.done = h.current
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
		Done: h.totals.Done, Failed: h.totals.Failed, Carried: h.totals.Carried, Ended: h.totals.Ended, Pause: h.done.Pause,
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

// Ended implements session.Observer. It records sessions that could not be carried.
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

// maxEndedSessions bounds the list of sessions that "streamshim upgrade" prints.
const maxEndedSessions = 100

// replace implements reloader.replace: it hands over if another version is installed.
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
		return // another hand-over is under way
	}
	failed := make(chan struct{})
	if p.handovers.ask(handoverRequest{begun: begun, failed: failed}) != nil {
		return
	}
	select {
	case <-failed: // on success this program is replaced and never gets here
	case <-ctx.Done():
	}
}

// handOver replaces this program by the installed one. It returns only after a failure or a dry run.
func (p *process) handOver(ctx context.Context, r handoverRequest) {
	if r.failed == nil { // the reloader notifies systemd itself
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

// tryHandOver hands over, or returns why it could not. It returns nil only after a dry run.
func (p *process) tryHandOver(ctx context.Context, h admin.Handover) error {
	begun := time.Now()
	check, err := p.startCheck(ctx)
	if err != nil {
		return err
	}
	defer check.Close()
	started := time.Since(begun)
	h.To = check.Program
	p.handovers.set(func(h *admin.Handover) { h.To = check.Program })
	p.log.Info("another program is about to take over", "version", check.Program, "reason", h.Reason, "dry run", h.DryRun)
	if h.DryRun {
		return p.rehearse(ctx, check, h, started)
	}

	// Undo the steps below in reverse order if the new program is not executed.
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

	var refused *refusedError
	if err := p.freezeAndExecute(ctx, check, h, false); !errors.As(err, &refused) {
		return err
	}
	// This program knows how to end those sessions; the new one may not even know who their clients are.
	check.Close() // a child reads one state only
	again, err := p.startCheck(ctx)
	if err != nil {
		return err
	}
	defer again.Close()
	ending, cancelEnding := context.WithTimeout(ctx, uncarriedLimit)
	defer cancelEnding()
	p.streams.EndUncarried(ending, refused.reasons)
	return p.freezeAndExecute(ctx, again, h, true)
}

// refusedError is that the new program cannot carry some sessions.
type refusedError struct{ reasons map[string]string } // by their ids

func (e *refusedError) Error() string {
	return fmt.Sprintf("%d sessions cannot be carried", len(e.reasons))
}

// startCheck starts the installed program as one that is checked.
func (p *process) startCheck(ctx context.Context) (*handover.Check, error) {
	program, err := handover.Program()
	if err != nil {
		return nil, err
	}
	return handover.StartCheck(ctx, program, append(slices.Clone(os.Args[1:]), "--check-state"))
}

// freezeAndExecute hands over to the program that is checked. After an error, which a panic becomes, all sessions go on. It is a
// *refusedError if the program cannot carry some of them, unless it is to be executed anyway: then it ends them as well as it can.
func (p *process) freezeAndExecute(ctx context.Context, check *handover.Check, h admin.Handover, anyway bool) (err error) {
	rescue.Call(func(fault *rescue.Panic) {
		p.log.Error("the hand-over has panicked", "panic", fault.Value, "stack", string(fault.Stack))
		err = fault
	}, func() { err = p.tryToExecute(ctx, check, h, anyway) })
	return err
}

func (p *process) tryToExecute(ctx context.Context, check *handover.Check, h admin.Handover, anyway bool) error {
	defer debug.SetGCPercent(debug.SetGCPercent(-1)) // as in resume
	files := handover.NewFiles()
	defer files.Close()
	state := handover.NewState(p.version)
	thaw, err := p.freeze(ctx, state, files)
	if err != nil {
		return err
	}
	defer thaw()
	if ctx.Err() != nil {
		return fmt.Errorf("streamshim is ending: %w", ctx.Err())
	}
	last, _ := p.handovers.lastOne()
	h.EndedSessions = last.EndedSessions
	return p.execute(ctx, check, h, state, files, anyway)
}

// freeze stops all sessions and processes where they are and adds them to the state. thaw resumes them.
func (p *process) freeze(ctx context.Context, state *handover.State, files *handover.Files) (thaw func(), err error) {
	ctx, cancel := context.WithTimeout(ctx, freezeLimit)
	defer cancel()
	streams, err := p.streams.Freeze(ctx, files)
	if err != nil {
		return nil, err
	}
	state.Frozen = p.streams.Frozen()
	var exec []byte
	frozen := false
	thaw = func() { p.resumeSessions(files, exec, streams) }
	defer func() {
		if frozen {
			return
		}
		if exec == nil {
			p.runner.Continue()
		}
		thaw() // after a panic, too
	}()
	if err := p.runner.Quiesce(ctx); err != nil {
		return nil, err
	}
	if exec, err = p.runner.Freeze(files); err != nil {
		return nil, err
	}
	fault("freeze")
	state.Parts[streamsPart], state.Parts[execPart] = streams, exec
	if err := p.settle(ctx, state); err != nil {
		return nil, err
	}
	frozen = true
	return thaw, nil
}

// settle waits until the recordings and audit records of this program are written. A slow disk aborts the hand-over,
// which can be tried again later. A disk that fails does not: its records are lost, and counted, either way.
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

// execute lets the child read the state, and then executes the new program.
func (p *process) execute(ctx context.Context, check *handover.Check, h admin.Handover, state *handover.State, files *handover.Files, anyway bool) error {
	fault("execute")
	if err := state.Put(criPart, p.cri.State()); err != nil {
		return err
	}
	own, err := p.state(files, h)
	if err != nil {
		return err
	}
	if err := errors.Join(state.Put(processPart, own), state.Put(configPart, *p.reloader.current.Load())); err != nil {
		return err
	}
	keepProgram(files)
	state.Descriptors = files.Descriptors()
	verdict, size, err := check.Read(ctx, state)
	if err != nil {
		return err
	}
	p.log.Info("the sessions stand still for the other program", "carried", verdict.Carried, "ended", len(verdict.Ended), "state", size, "after", handover.Since(state.Frozen))
	if len(verdict.Refused) > 0 && !anyway {
		return &refusedError{verdict.Refused}
	}
	// A SIGTERM that has arrived aborts the hand-over; one that arrives from now on ends the process at once. SIGHUP may be
	// dropped, because the new program reads the configuration anyway.
	if p.end.suspend() {
		return errors.New("streamshim is ending")
	}
	defer p.end.resume()
	signal.Ignore(syscall.SIGHUP)
	defer signal.Notify(p.hangups, syscall.SIGHUP)
	return check.Exec(files)
}

// keepProgram keeps the file of this program open until the new one serves. It has mostly been deleted by the installation of the
// new one. The kernel frees its blocks when nobody has it open, and execve would wait for that, some 20 ms, while
// the sessions stand still. No part of the state refers to it.
func keepProgram(files *handover.Files) {
	program, err := os.Open("/proc/self/exe")
	if err != nil {
		return // the pause is longer then
	}
	defer program.Close() //nolint:errcheck // was only read
	files.Keep(program)   //nolint:errcheck // as above
}

// What a hand-over costs for each session, for the estimate of a dry run. docs/upgrade.md has what was measured.
const (
	sessionPause = 500 * time.Microsecond
	sessionState = 4 << 10 // bytes, apart from data on its way
)

// rehearse finds out which sessions a hand-over would carry, and estimates what it would cost: the new program has taken the
// given time to start, and now reads a state without sessions. No session is touched.
func (p *process) rehearse(ctx context.Context, check *handover.Check, h admin.Handover, started time.Duration) error {
	state := handover.NewState(p.version)
	own, err := p.places()
	if err != nil {
		return err
	}
	own.Handover = h
	if err := errors.Join(state.Put(criPart, p.cri.State()), state.Put(processPart, own)); err != nil {
		return err
	}
	begun := time.Now()
	_, size, err := check.Read(ctx, state)
	if err != nil {
		return err
	}
	read := time.Since(begun)
	descriptors, err := limits.OpenDescriptors()
	if err != nil {
		return fmt.Errorf("count descriptors: %w", err)
	}
	carried, refused := p.streams.Carriable()
	p.handovers.rehearsed(func(h *admin.Handover) {
		h.Carried, h.EndedSessions = carried, lines(refused)
		h.State = size + carried*sessionState + int(p.operation.buffers.Used())
		h.Descriptors, h.DescriptorLimit = descriptors, limits.DescriptorLimit()
		h.Pause = (started + read + time.Duration(carried)*sessionPause).Seconds()
	})
	return nil
}

// rehearsed records what a dry run has found out, beside the last hand-over that was none.
func (h *handovers) rehearsed(record func(*admin.Handover)) {
	h.mu.Lock()
	defer h.mu.Unlock()
	record(&h.current)
	if h.done.ID != "" {
		last := h.done
		h.current.Last = &last
	}
}
