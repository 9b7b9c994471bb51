package session

import (
	"cmp"
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"log/slog"
	"slices"
	"sync"
	"time"
)

// Kind is the verb a session serves.
type Kind string

// The kinds of session.
const (
	Exec        Kind = "exec"
	Attach      Kind = "attach"
	PortForward Kind = "portforward"
)

// Phase says how far a session has come.
type Phase string

// A session starts, runs, and lingers: its process and its container are no longer held, only what
// the client has not read yet is still being sent.
const (
	Starting  Phase = "starting"
	Running   Phase = "running"
	Lingering Phase = "lingering"
)

// Info is what is known of a session when it begins. It does not change.
type Info struct {
	Kind     Kind
	Target   Target
	Protocol string   // such as "SPDY/3.1 v4.channel.k8s.io"
	Peer     string   // the client's network address
	Command  []string // of an exec; never logged
	TTY      bool
}

// Connection is what the registry asks of a session's connection.
type Connection interface {
	// LastActivity is when payload last moved in either direction.
	LastActivity() time.Time
	// Transferred is the payload received from and sent to the client, in bytes.
	Transferred() (received, sent int64)
}

// EndError is the cause with which a session is told to end from outside: an idle timeout, a
// shutdown, an operator. Its text is for the client.
type EndError struct {
	Reason  string // one word for logs and metrics, such as "idle-timeout"
	Message string // a sentence for the client
}

func (e *EndError) Error() string { return e.Message }

// Session is one live session. Its context ends with an EndError cause when the session has to end.
type Session struct {
	Info
	ID    string // 16 hexadecimal digits
	Start time.Time

	registry *Registry
	conn     Connection
	ctx      context.Context
	cancel   context.CancelCauseFunc

	mu    sync.Mutex
	phase Phase
}

// Outcome is how a session ended.
type Outcome struct {
	Reason   string // one word: exited, client-gone, container-exited, idle-timeout, shutdown, …
	ExitCode int    // of an exec whose process ran; -1 where there is none
	Err      error  // what went wrong, nil when nothing did
}

// Registry holds the live sessions. The zero value is not usable; see NewRegistry.
type Registry struct {
	log *slog.Logger

	mu       sync.Mutex
	sessions map[string]*Session
	closed   bool
	empty    chan struct{} // closed when the last session has ended after Close
}

// ErrClosed is returned by Begin once the registry takes no more sessions.
var ErrClosed = errors.New("streamshim is shutting down and takes no new sessions")

// NewRegistry returns an empty registry that logs one line at the start and one at the end of each
// session.
func NewRegistry(log *slog.Logger) *Registry {
	return &Registry{log: log, sessions: make(map[string]*Session), empty: make(chan struct{})}
}

// Begin registers a session. The caller ends it with End, exactly once.
func (r *Registry) Begin(ctx context.Context, info Info, conn Connection) (*Session, error) {
	var id [8]byte
	rand.Read(id[:]) //nolint:errcheck // never fails, see crypto/rand
	s := &Session{
		Info: info, ID: hex.EncodeToString(id[:]), Start: time.Now(),
		registry: r, conn: conn, phase: Starting,
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
	r.log.Info("session start", s.attributes()...)
	return s, nil
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

// Close makes Begin fail from now on.
func (r *Registry) Close() {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.closed {
		return
	}
	r.closed = true
	if len(r.sessions) == 0 {
		close(r.empty)
	}
}

// Drained is closed when, after Close, the last session has ended.
func (r *Registry) Drained() <-chan struct{} { return r.empty }

// Context ends when the session is told to end; context.Cause then tells why.
func (s *Session) Context() context.Context { return s.ctx }

// Stop tells the session to end. The first cause counts.
func (s *Session) Stop(cause *EndError) { s.cancel(cause) }

// Connection is the session's connection.
func (s *Session) Connection() Connection { return s.conn }

// Phase is how far the session has come.
func (s *Session) Phase() Phase {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.phase
}

// SetPhase notes how far the session has come.
func (s *Session) SetPhase(p Phase) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.phase = p
}

// Log returns a logger that names the session in each line.
func (s *Session) Log() *slog.Logger { return s.registry.log.With("session", s.ID) }

// End takes the session out of the registry and logs how it ended.
func (s *Session) End(o Outcome) {
	s.cancel(nil)
	r := s.registry
	r.mu.Lock()
	delete(r.sessions, s.ID)
	if r.closed && len(r.sessions) == 0 {
		close(r.empty)
	}
	r.mu.Unlock()
	received, sent := s.conn.Transferred()
	attributes := append(s.attributes(),
		"reason", o.Reason, "duration", time.Since(s.Start).Round(time.Millisecond),
		"received", received, "sent", sent)
	if o.ExitCode >= 0 {
		attributes = append(attributes, "exit_code", o.ExitCode)
	}
	if o.Err != nil {
		attributes = append(attributes, "error", o.Err)
	}
	r.log.Info("session end", attributes...)
}

func (s *Session) attributes() []any {
	a := []any{"session", s.ID, "kind", s.Kind, "protocol", s.Protocol, "peer", s.Peer}
	for _, f := range []struct{ name, value string }{
		{"namespace", s.Target.PodNamespace}, {"pod", s.Target.PodName},
		{"container", s.Target.ContainerName}, {"container_id", s.Target.ContainerID},
		{"sandbox_id", s.Target.SandboxID},
	} {
		if f.value != "" {
			a = append(a, f.name, f.value)
		}
	}
	if s.Kind != PortForward {
		a = append(a, "tty", s.TTY)
	}
	return a
}
