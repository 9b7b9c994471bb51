package session

import (
	"cmp"
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"log/slog"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/streamshim/streamshim/pkg/rescue"
	"github.com/streamshim/streamshim/pkg/workload"
)

// Kind is the operation that a session serves.
type Kind string

// The kinds of session.
const (
	Exec        Kind = "exec"
	Attach      Kind = "attach"
	PortForward Kind = "portforward"
	// ExecSync is a command without streams, such as a probe. It is not a session in the registry, but it is
	// audited and may be denied like one.
	ExecSync Kind = "execsync"
)

// Phase says how far a session has come.
type Phase string

// A session starts, runs, and lingers: its process and container have been released, and only data that the client
// has not read yet is still being sent.
const (
	Starting  Phase = "starting"
	Running   Phase = "running"
	Lingering Phase = "lingering"
)

// Info is what is known about a session when it begins. It does not change.
type Info struct {
	Kind   Kind
	Target workload.Target
	// PodLabels are the labels of the pod's sandbox, nil if unknown. The map is shared and must not be modified.
	PodLabels map[string]string
	Protocol  string   // such as "SPDY/3.1 v4.channel.k8s.io"
	Peer      string   // the client's network address
	Command   []string // of an exec; never logged
	TTY       bool
	// User is the process's user inside the container, nil if unknown.
	User *User
	// AuditID is the API server's id of the request, passed on as KEP-6035 defines. It is empty if the client did
	// not come through an API server, or through one that does not pass it on (kubernetes#119640). It is not
	// trustworthy: it is a variable of the CRI call, which a client of the kubelet or of our socket may set, and a
	// client of the API server chooses it with the header Audit-ID.
	AuditID string
	// Trace is the W3C trace context of the CRI call ("traceparent", "tracestate"), nil if it has none.
	Trace map[string]string
}

// User is the user of a process as its container sees it.
type User struct {
	UID uint32 `json:"uid"`
	GID uint32 `json:"gid"`
}

// UserOf returns the user of the container's processes as the container sees it, nil if unknown.
func UserOf(c workload.Container) *User {
	if c.Process == nil {
		return nil
	}
	return &User{UID: c.Process.User.UID, GID: c.Process.User.GID}
}

// AuditIDVariable is the environment variable that carries a request's audit id (KEP-6035).
const AuditIDVariable = "KUBERNETES_EXEC_AUDIT_ID"

// AuditID returns the audit id from a request's environment variables, each "NAME=value". The last one counts, as
// it does for the process.
func AuditID(env []string) string {
	for _, variable := range slices.Backward(env) {
		if value, ok := strings.CutPrefix(variable, AuditIDVariable+"="); ok {
			return value
		}
	}
	return ""
}

// Connection is what the registry needs of a session's connection.
type Connection interface {
	// LastActivity returns when payload last moved in either direction.
	LastActivity() time.Time
	// Transferred returns the payload received from and sent to the client, in bytes.
	Transferred() (received, sent int64)
}

// EndError is the cause with which a session is told to end from outside: an idle timeout, a shutdown, an
// operator. Its text is for the client.
type EndError struct {
	Reason  string // one word for logs and metrics, such as "idle-timeout"
	Message string // a sentence for the client
}

func (e *EndError) Error() string { return e.Message }

// Session is one live session. When it must end, its context ends with an EndError as cause.
type Session struct {
	Info
	ID    string // 16 hexadecimal digits
	Start time.Time

	// Taps is where recorders and watchers attach.
	Taps Taps

	registry *Registry
	ctx      context.Context
	cancel   context.CancelCauseFunc

	mu       sync.Mutex
	conn     Connection // nil until Connect
	phase    Phase
	helper   string
	controls Controls // nil until the process runs
	told     []string // ids of watches that the user has been told of, the latest last
}

// Outcome says how a session ended.
type Outcome struct {
	Reason   string // one word: exited, client-gone, container-exited, idle-timeout, shutdown, …
	ExitCode int    // of an exec whose process ran; -1 if there is none
	Err      error  // what went wrong, or nil
	Helper   string // set by End from SetHelper
}

// Guard decides whether sessions may begin, and follows each admitted one to its end: limits, the audit log, the
// recorder. Its methods are called from many goroutines.
type Guard interface {
	// Check refuses at the CRI call what is certain to be refused later. It reserves nothing.
	Check(Info) error
	// Admit is called before the client's connection is upgraded. A *RefusedError, or any other error, refuses the
	// session.
	Admit(context.Context, *Session) error
	// Ended is called once for each session that this guard has admitted.
	Ended(*Session, Outcome)
	// Refused reports a session that another guard refused before this one was asked to admit it.
	Refused(Info, error)
}

// Refusal says why a session is refused. It determines the status code.
type Refusal string

// The kinds of refusal.
const (
	Denied      Refusal = "denied"      // a rule forbids it
	TooMany     Refusal = "too-many"    // a limit is reached; it may work later
	Unavailable Refusal = "unavailable" // it cannot be audited or recorded as the configuration demands
)

// RefusedError says why a guard refuses a session. Its text is for the client.
type RefusedError struct {
	Refusal Refusal
	Message string
}

func (e *RefusedError) Error() string { return e.Message }

// Registry holds the live sessions. Create it with NewRegistry.
type Registry struct {
	log    *slog.Logger
	guards []Guard
	// observers is complete before the first session begins.
	observers []Observer

	mu       sync.Mutex
	sessions map[string]*Session
	closed   bool
	emptied  chan struct{} // closed when the last session has ended; nil unless someone waits, see Empty
}

// ErrClosed is returned by Begin once the registry takes no more sessions.
var ErrClosed = errors.New("streamshim is shutting down and takes no new sessions")

// NewRegistry returns an empty registry that logs one line at the start and one at the end of each session. Guards
// are asked in order. If one refuses, those before it see the session end.
func NewRegistry(log *slog.Logger, guards ...Guard) *Registry {
	return &Registry{log: log, guards: guards, sessions: make(map[string]*Session)}
}

// Check returns an error if a session would be refused as things are now.
func (r *Registry) Check(info Info) error {
	for i, g := range r.guards {
		if err := g.Check(info); err != nil {
			r.refused(info, err, i)
			r.tellRefused(info, err)
			r.log.Info("session refused", append(info.attributes(), "error", err)...)
			return err
		}
	}
	return nil
}

const idBytes = 8

// Begin registers a session, before its client's connection is upgraded. The error is ErrClosed or a guard's. The
// caller gives the session its connection with Connect, and must end it with End, exactly once.
func (r *Registry) Begin(ctx context.Context, info Info) (*Session, error) {
	var id [idBytes]byte
	rand.Read(id[:]) //nolint:errcheck // never fails, see crypto/rand
	s := &Session{
		Info: info, ID: hex.EncodeToString(id[:]), Start: time.Now(),
		registry: r, phase: Starting,
	}
	s.ctx, s.cancel = context.WithCancelCause(ctx)
	r.mu.Lock()
	if r.closed {
		r.mu.Unlock()
		s.cancel(ErrClosed)
		return nil, ErrClosed
	}
	r.sessions[s.ID] = s
	r.mu.Unlock()
	for i, g := range r.guards {
		if err := s.rescued(func() error { return g.Admit(ctx, s) }); err != nil {
			for _, admitted := range slices.Backward(r.guards[:i]) {
				s.tell(func() { admitted.Ended(s, Outcome{Reason: "refused", ExitCode: -1, Err: err}) })
			}
			for _, later := range r.guards[i+1:] {
				s.tell(func() { later.Refused(info, err) })
			}
			s.cancel(err)
			r.remove(s)
			r.tellRefused(info, err)
			r.log.Info("session refused", append(s.attributes(), "error", err)...)
			return nil, err
		}
	}
	for _, o := range r.observers {
		s.tell(func() { o.Began(s) })
	}
	r.log.Info("session start", s.attributes()...)
	return s, nil
}

// rescued calls a guard or an observer. A panic of it concerns only this session: it becomes an error.
func (s *Session) rescued(call func() error) (err error) {
	rescue.Call(func(p *rescue.Panic) {
		s.Log().Error("what accompanies a session has panicked", "panic", p.Value, "stack", string(p.Stack))
		err = p
	}, func() { err = call() })
	return err
}

// tell is rescued for a call that cannot fail. After a panic the others are told nevertheless.
func (s *Session) tell(call func()) {
	s.rescued(func() error { call(); return nil }) //nolint:errcheck // it is logged
}

// refused tells the other guards that one of them refused a session.
func (r *Registry) refused(info Info, reason error, by int) {
	for i, g := range r.guards {
		if i != by {
			g.Refused(info, reason)
		}
	}
}

func (r *Registry) remove(s *Session) {
	r.mu.Lock()
	defer r.mu.Unlock()
	delete(r.sessions, s.ID)
	if len(r.sessions) == 0 && r.emptied != nil {
		close(r.emptied)
		r.emptied = nil
	}
}

// List returns the live sessions, oldest first.
func (r *Registry) List() []*Session {
	r.mu.Lock()
	defer r.mu.Unlock()
	list := make([]*Session, 0, len(r.sessions))
	for _, s := range r.sessions {
		list = append(list, s)
	}
	slices.SortFunc(list, func(a, b *Session) int {
		return cmp.Or(a.Start.Compare(b.Start), cmp.Compare(a.ID, b.ID))
	})
	return list
}

// Empty returns a channel that is closed as soon as no session lives. A new one may begin at any time.
func (r *Registry) Empty() <-chan struct{} {
	r.mu.Lock()
	defer r.mu.Unlock()
	if len(r.sessions) == 0 {
		none := make(chan struct{})
		close(none)
		return none
	}
	if r.emptied == nil {
		r.emptied = make(chan struct{})
	}
	return r.emptied
}

// Close makes Begin fail from now on.
func (r *Registry) Close() {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.closed = true
}

// Context returns a context that ends when the session is told to end. context.Cause then says why.
func (s *Session) Context() context.Context { return s.ctx }

// Stop tells the session to end. The first cause wins.
func (s *Session) Stop(cause *EndError) { s.cancel(cause) }

// Connect gives the session its connection.
func (s *Session) Connect(c Connection) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.conn = c
}

// Connection returns the session's connection, or nil before Connect.
func (s *Session) Connection() Connection {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.conn
}

// Transferred returns the payload received from and sent to the client so far, in bytes.
func (s *Session) Transferred() (received, sent int64) {
	if c := s.Connection(); c != nil {
		return c.Transferred()
	}
	return 0, 0
}

// Idle returns for how long no payload has moved.
func (s *Session) Idle(now time.Time) time.Duration {
	last := s.Start
	if c := s.Connection(); c != nil {
		if t := c.LastActivity(); t.After(last) {
			last = t
		}
	}
	return max(now.Sub(last), 0)
}

// Controls is what an operator can do to a running session.
type Controls interface {
	// PID returns the process's pid in our pid namespace, or 0 if unknown.
	PID() int
	// Signal signals the session's process. It returns ErrNotSupported if the process is not ours.
	Signal(syscall.Signal) error
	// Notice shows a line of text to a terminal's user. It may wait for the client to read, until the session ends
	// at the latest. A panic ends the session and becomes an error.
	Notice(text string) error
}

// ErrNotSupported is returned for a control that this session does not have.
var ErrNotSupported = errors.New("the process of this session is not ours: it is served by the runtime, or there is none")

// SetControls sets the controls once the session's process runs.
func (s *Session) SetControls(c Controls) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.controls = c
}

// Controls returns the session's controls, or nil while no process runs.
func (s *Session) Controls() Controls {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.controls
}

// maxTold bounds how many watches are remembered that the user has been told of. Watches are far fewer at a time.
const maxTold = 16

// Told records that the terminal's user is told of a watch.
func (s *Session) Told(watch string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.told = append(s.told, watch)
	s.told = s.told[max(0, len(s.told)-maxTold):]
}

// TakeTold forgets a watch, and reports whether the user has been told of it, perhaps by an earlier program.
func (s *Session) TakeTold(watch string) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	before := len(s.told)
	s.told = slices.DeleteFunc(s.told, func(other string) bool { return other == watch })
	return len(s.told) < before
}

// SetHelper records that a helper of ours runs in place of a command that the container lacks.
func (s *Session) SetHelper(name string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.helper = name
}

// Phase returns how far the session has come.
func (s *Session) Phase() Phase {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.phase
}

// SetPhase records how far the session has come.
func (s *Session) SetPhase(p Phase) {
	s.mu.Lock()
	changed := s.phase != p
	s.phase = p
	s.mu.Unlock()
	if !changed {
		return
	}
	for _, o := range s.registry.observers {
		s.tell(func() { o.PhaseChanged(s, p) })
	}
}

// Log returns a logger that names the session in each line.
func (s *Session) Log() *slog.Logger { return s.registry.log.With("session", s.ID) }

// End removes the session from the registry and logs how it ended, also if a guard or an observer panics.
func (s *Session) End(o Outcome) {
	s.cancel(nil)
	s.mu.Lock()
	o.Helper = s.helper
	s.mu.Unlock()
	r := s.registry
	for _, g := range slices.Backward(r.guards) {
		s.tell(func() { g.Ended(s, o) })
	}
	for _, observer := range r.observers {
		s.tell(func() { observer.Ended(s, o) })
	}
	r.remove(s)
	received, sent := s.Transferred()
	attributes := append(s.attributes(),
		"reason", o.Reason, "duration", time.Since(s.Start).Round(time.Millisecond),
		"received", received, "sent", sent)
	if o.ExitCode >= 0 {
		attributes = append(attributes, "exit_code", o.ExitCode)
	}
	if o.Helper != "" {
		attributes = append(attributes, "helper", o.Helper)
	}
	if o.Err != nil {
		attributes = append(attributes, "error", o.Err)
	}
	r.log.Info("session end", attributes...)
}

func (s *Session) attributes() []any { return append([]any{"session", s.ID}, s.Info.attributes()...) }

// attributes returns the known log attributes. At the CRI call there is no client yet.
func (i Info) attributes() []any {
	a := []any{"kind", i.Kind}
	for _, f := range []struct{ name, value string }{
		{"protocol", i.Protocol}, {"peer", i.Peer},
		{"namespace", i.Target.PodNamespace}, {"pod", i.Target.PodName},
		{"container", i.Target.ContainerName}, {"container_id", i.Target.ContainerID},
		{"sandbox_id", i.Target.SandboxID},
	} {
		if f.value != "" {
			a = append(a, f.name, f.value)
		}
	}
	if i.Kind != PortForward {
		a = append(a, "tty", i.TTY)
	}
	return a
}
