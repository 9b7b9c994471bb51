package streaming

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"net/url"
	"strings"
	"sync"
	"time"

	"github.com/streamshim/streamshim/pkg/handover"
	"github.com/streamshim/streamshim/pkg/rescue"
	"github.com/streamshim/streamshim/pkg/session"
	"github.com/streamshim/streamshim/pkg/streaming/buffers"
	"github.com/streamshim/streamshim/pkg/streaming/event"
	"github.com/streamshim/streamshim/pkg/streaming/internal/lifetime"
	"github.com/streamshim/streamshim/pkg/streaming/internal/status"
	"github.com/streamshim/streamshim/pkg/streaming/internal/transport"
	"github.com/streamshim/streamshim/pkg/streaming/portforward"
	"github.com/streamshim/streamshim/pkg/streaming/remotecommand"
)

// Config configures a Server. Log, Sessions, Commands.Runtime and PortForwards.Pods are required. The defaults of
// what users may set stand in pkg/config only. Zero means off where a comment says so.
type Config struct {
	Log      *slog.Logger
	Sessions *session.Registry

	Commands     remotecommand.Config
	PortForwards portforward.Config

	// LingerIdle is how long a finished session waits, without any progress, for the client to read
	// what is left and to close the connection.
	LingerIdle time.Duration
	// Settings are the initial ones. Server.Update changes them.
	Settings
	// Buffers bounds the unread data of all sessions. Nil is no limit.
	Buffers *buffers.Pool
	// Observe is called for each event as it happens, from many goroutines. It must not block. It may
	// be nil.
	Observe func(event.Event)

	waits // zero means the package's default
}

// Settings are the part of Config that may change while the server runs. Zero, or a missing kind of session,
// is no limit.
type Settings struct {
	// IdleTimeout ends a session in which no payload has moved for this long. Pings do not count
	// (containerd#5563).
	IdleTimeout map[session.Kind]time.Duration
	// MaxLifetime ends a session this long after its start.
	MaxLifetime map[session.Kind]time.Duration
	// Bandwidth bounds the bytes a second of one session in each direction. Control frames such as pings are
	// not limited.
	Bandwidth int64
}

// waits are times that no user sets.
type waits struct {
	// warning is how long before IdleTimeout or MaxLifetime ends a session a line on the terminal warns of it.
	// A limit of at most twice this time gets no warning.
	warning time.Duration
	// peerSilence is how long the network may stay silent while an answer is due. After that the
	// client is considered gone.
	peerSilence time.Duration
}

func (w waits) complete() waits {
	return waits{
		warning:     cmp.Or(w.warning, time.Minute),
		peerSilence: cmp.Or(w.peerSilence, 45*time.Second),
	}
}

const (
	requestTimeout      = 10 * time.Second // to read an HTTP request, and to write its response
	keepAliveTimeout    = 60 * time.Second // of an HTTP connection between requests
	maxHeaderBytes      = 64 << 10
	maxPlainConnections = 2 * maxTokens // not upgraded; nobody needs more than there are tokens

	redeemGrace = 2 * time.Second // at shutdown, for the last URLs to be opened
)

// Server issues streaming URLs and serves them.
type Server struct {
	config Config
	tokens *tokenCache
	http   *http.Server
	base   url.URL // scheme and address of the URLs
	plain  *plainConnections

	ctx      context.Context // of all sessions
	cancel   context.CancelCauseFunc
	sessions sync.WaitGroup // one for each session's goroutine
	watch    *lifetime.Watcher

	mu       sync.Mutex
	listener net.Listener // nil before Serve
	served   map[*served]struct{}
	sealed   bool             // no more URLs are issued
	closed   bool             // no more URLs are served
	closing  chan struct{}    // closed when closed is set
	deaf     bool             // the listener has failed and is not open again
	thawed   chan struct{}    // closed by Resume; nil while the server is not frozen
	frozen   handover.Instant // see Frozen
	passing  int              // calls and requests that are being answered or upgraded
	passed   chan struct{}    // closed when passing becomes 0; nil unless Freeze waits for that
	settings Settings
}

// served is one session that the server runs.
type served struct {
	live    *session.Session
	running running
	terms   lifetime.Terms
	once    sync.Once     // of over
	unwatch func() bool   // nobody looks any more whether it has panicked
	done    chan struct{} // closed when the session is over, with outcome
	outcome session.Outcome
}

// Update changes the settings of new sessions. Live sessions keep those they began with.
func (s *Server) Update(settings Settings) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.settings = settings
}

// NewServer returns a server whose URLs point to the listener's address. Clients on this node must be able to
// dial it. Serve starts the server.
func NewServer(config Config, listener net.Addr) *Server {
	config.waits = config.waits.complete()
	if config.Observe == nil {
		config.Observe = func(event.Event) {}
	}
	s := &Server{
		config:   config,
		settings: config.Settings,
		served:   make(map[*served]struct{}),
		plain:    newPlainConnections(maxPlainConnections),
		closing:  make(chan struct{}),
		base:     url.URL{Scheme: "http", Host: listener.String()},
	}
	s.tokens = newTokenCache(s.config.Observe)
	s.ctx, s.cancel = context.WithCancelCause(context.Background())
	s.watch = lifetime.NewWatcher(lifetime.WatchConfig{
		LingerIdle: config.LingerIdle, PeerSilence: config.peerSilence, Observe: config.Observe,
	})
	// These limits do not apply to an upgraded connection: net/http no longer owns it.
	s.http = &http.Server{
		Handler:        s.handler(),
		ReadTimeout:    requestTimeout, // also of the body, which net/http reads to its end before it answers
		WriteTimeout:   requestTimeout,
		IdleTimeout:    keepAliveTimeout,
		MaxHeaderBytes: maxHeaderBytes,
		ConnState:      s.plain.changed,
		ErrorLog:       slog.NewLogLogger(s.config.Log.Handler(), slog.LevelDebug),
	}
	return s
}

// Exec keeps the request and returns a one-time URL that serves it. The error is ErrTooManyRequests,
// ErrShuttingDown, ErrNotListening or that of a guard of Config.Sessions, such as a *session.RefusedError. While
// the server is frozen, Exec waits.
func (s *Server) Exec(r *remotecommand.Request) (string, error) {
	return s.insert(r.Info(session.Exec), r)
}

// Attach is like Exec, for an attach.
func (s *Server) Attach(r *remotecommand.Request) (string, error) {
	return s.insert(r.Info(session.Attach), r)
}

// PortForward is like Exec, for a port-forward.
func (s *Server) PortForward(r *portforward.Request) (string, error) {
	return s.insert(r.Info(), r)
}

func (s *Server) insert(info session.Info, request any) (string, error) {
	s.pass()
	defer s.letGo()
	s.mu.Lock()
	sealed, deaf := s.sealed, s.deaf
	s.mu.Unlock()
	if sealed {
		return "", ErrShuttingDown
	}
	if deaf {
		return "", ErrNotListening
	}
	if err := s.config.Sessions.Check(info); err != nil {
		return "", err
	}
	token, err := s.tokens.insert(info.Kind, request)
	if err != nil {
		return "", err
	}
	return s.base.JoinPath(string(info.Kind), token).String(), nil
}

// WaitingTokens returns how many URLs were issued and not opened yet.
func (s *Server) WaitingTokens() int { return s.tokens.waiting() }

// Serve serves the listener until Shutdown and closes it. If the listener fails, Serve opens it again. Freeze
// pauses a listener that is a Pausable, and Serve continues.
func (s *Server) Serve(listener net.Listener) error {
	watching := make(chan struct{})
	rescue.Go(rescue.Die, func() { // belongs to no session
		defer close(watching)
		s.watch.Run(s.ctx)
	})
	s.accept(listener)
	<-s.ctx.Done()
	<-watching
	return nil
}

// listenPause is the pause between two attempts to open the listener again.
const listenPause = 500 * time.Millisecond

// accept accepts connections until Shutdown. A listener that fails is opened again at the same address, and no URLs
// are issued until then. A lack of descriptors is no such failure: net/http retries.
func (s *Server) accept(listener net.Listener) {
	address := listener.Addr()
	for {
		s.listen(listener)
		err := s.http.Serve(listener) // closes it
		if errors.Is(err, http.ErrServerClosed) {
			return
		}
		s.config.Log.Error("the listener for streams has failed and is opened again", "address", address.String(), "error", err)
		s.setDeaf(true)
		for {
			pause := time.NewTimer(listenPause)
			select {
			case <-pause.C:
			case <-s.closing:
				pause.Stop()
				return
			}
			if listener, err = net.Listen(address.Network(), address.String()); err == nil {
				break
			}
			s.config.Log.Error("the listener for streams cannot be opened", "address", address.String(), "error", err)
		}
		s.setDeaf(false)
	}
}

func (s *Server) setDeaf(deaf bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.deaf = deaf
}

// Shutdown ends the server. It first waits until no session is live or the context is done. Meanwhile new sessions
// are accepted, so that one open shell does not lock out everybody else. Then no more URLs are issued. Those that
// clients already have are served for a moment longer, at most until the context is done. Sessions that are still
// live then end with a status that gives the shutdown as the reason.
func (s *Server) Shutdown(ctx context.Context) error {
	select {
	case <-s.config.Sessions.Empty():
	case <-ctx.Done():
	}
	s.mu.Lock()
	s.sealed = true
	s.mu.Unlock()
	waitOr(ctx, s.tokens.empty(), redeemGrace)
	s.mu.Lock()
	if !s.closed {
		s.closed = true
		close(s.closing)
	}
	s.mu.Unlock()
	ended := make(chan struct{})
	rescue.Go(rescue.Die, func() {
		defer close(ended)
		s.sessions.Wait() // includes sessions that are about to begin
	})
	select {
	case <-ended:
	case <-ctx.Done():
	}
	s.config.Sessions.Close()
	err := s.http.Close() // idle and half-read connections; net/http does not own upgraded ones
	s.cancel(&session.EndError{Reason: "shutdown", Message: ErrShuttingDown.Error()})
	s.sessions.Wait()
	return err
}

// waitOr waits until done is closed, the context is done, or the limit has passed.
func waitOr(ctx context.Context, done <-chan struct{}, limit time.Duration) {
	timer := time.NewTimer(limit)
	defer timer.Stop()
	select {
	case <-done:
	case <-ctx.Done():
	case <-timer.C:
	}
}

func (s *Server) handler() http.Handler {
	mux := http.NewServeMux()
	for _, kind := range []session.Kind{session.Exec, session.Attach, session.PortForward} {
		handle := func(w http.ResponseWriter, r *http.Request) { s.redeem(w, r, kind) }
		mux.HandleFunc(fmt.Sprintf("GET /%s/{token}", kind), handle)
		mux.HandleFunc(fmt.Sprintf("POST /%s/{token}", kind), handle)
	}
	return mux
}

// enter adds a request to s.sessions, or returns false if the server is shutting down. The caller calls leave when the
// request was passed on or answered. While the server is frozen, enter waits. If it still waits when the next
// program takes over, the request's connection ends with this program.
func (s *Server) enter() bool {
	s.pass()
	s.mu.Lock()
	closed := s.closed
	if !closed {
		s.sessions.Add(1)
	}
	s.mu.Unlock()
	if closed {
		s.letGo()
	}
	return !closed
}

func (s *Server) leave() {
	s.letGo()
	s.sessions.Done()
}

// pass waits until the server is not frozen. Until letGo is called, the server cannot be frozen.
func (s *Server) pass() {
	for {
		s.mu.Lock()
		thawed := s.thawed
		if thawed == nil || s.closed {
			s.passing++
			s.mu.Unlock()
			return
		}
		s.mu.Unlock()
		select {
		case <-thawed:
		case <-s.closing:
		}
	}
}

func (s *Server) letGo() {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.passing--; s.passing == 0 && s.passed != nil {
		close(s.passed)
		s.passed = nil
	}
}

// redeem starts the session of a request that can be upgraded. A request that cannot be upgraded does not use its
// token up.
func (s *Server) redeem(w http.ResponseWriter, r *http.Request, kind session.Kind) {
	// From here on Shutdown waits for the session that is about to begin.
	if !s.enter() {
		status.WriteError(w, http.StatusServiceUnavailable, ErrShuttingDown.Error())
		return
	}
	defer s.leave()
	token := r.PathValue("token")
	if !s.tokens.holds(kind, token) {
		s.tokenNotFound(w, kind)
		return
	}
	up, err := negotiateUpgrade(r, kind)
	if err != nil {
		writeUpgradeError(w, kind, err)
		return
	}
	request, ok := s.tokens.consume(kind, token)
	if !ok {
		s.tokenNotFound(w, kind)
		return
	}
	s.serve(w, r, up, kind, request)
}

// running is a session whose client's connection was upgraded.
type running interface {
	lifetime.Client
	Network() net.Conn
	// Run serves the session to its end, or until it is frozen. When it was frozen, the outcome is session.Frozen,
	// and the session holds nothing except what Freeze returns.
	Run() session.Outcome
	// Carriable returns why the session cannot be handed over, or nil if no reason is known.
	Carriable() error
	// Freeze makes Run return, and returns the session's state as CBOR. The context bounds it. After an error the
	// session continues as before, or ends.
	Freeze(context.Context, *handover.Files) ([]byte, error)
}

// serve upgrades the connection and runs the session in a new goroutine, so that net/http's goroutine and buffers
// are freed.
func (s *Server) serve(w http.ResponseWriter, r *http.Request, up transport.Upgrade, kind session.Kind, request any) {
	info := infoOf(kind, request)
	info.Protocol = strings.TrimSpace(up.Name() + " " + up.Protocol)
	info.Peer = r.RemoteAddr
	live, err := s.config.Sessions.Begin(s.ctx, info)
	if err != nil {
		status.Write(w, status.Refused(err))
		return
	}
	terms := s.terms(kind)
	var accepted running
	var outcome session.Outcome
	rescue.Call(func(p *rescue.Panic) {
		lifetime.Panic(live, terms, nil, p)
		accepted, outcome = nil, lifetime.Stopped(live.Context())
	}, func() { accepted, outcome = s.upgrade(w, r, up, request, live, terms) })
	if accepted == nil {
		terms.Buffers.Close()
		live.End(outcome)
		return
	}
	s.run(live, accepted, terms)
}

// run serves a session in a new goroutine, to its end or until it is frozen.
func (s *Server) run(live *session.Session, running running, terms lifetime.Terms) {
	each := &served{live: live, running: running, terms: terms, done: make(chan struct{})}
	live.Connect(running)
	// What has panicked may have left a lock for which the others wait for ever.
	each.unwatch = terms.Fault.After(each.reportPanic, func() { s.awaitEnd(each, lifetime.StuckGrace) })
	s.mu.Lock()
	s.served[each] = struct{}{}
	s.mu.Unlock()
	s.sessions.Add(1)
	rescue.Go(each.reportPanic, func() {
		var outcome session.Outcome
		rescue.Call(func(p *rescue.Panic) {
			each.reportPanic(p)
			outcome = lifetime.Stopped(live.Context())
		}, func() { outcome = s.runToEnd(each) })
		s.over(each, outcome)
	})
}

func (each *served) reportPanic(p *rescue.Panic) {
	lifetime.Panic(each.live, each.terms, each.running.Network(), p)
}

// over ends a session, or leaves it to be resumed when it was frozen. Further calls do nothing.
func (s *Server) over(each *served, outcome session.Outcome) {
	each.once.Do(func() {
		defer s.sessions.Done()
		defer close(each.done)
		each.unwatch()
		each.outcome = outcome
		s.forget(each) // one that was frozen is served again when it is resumed
		if !outcome.Frozen() {
			each.live.End(outcome)
		}
	})
}

// awaitEnd waits for the end of a session that has panicked, which is given up when it takes longer: it is no session any more, whatever is left
// of its goroutines.
func (s *Server) awaitEnd(each *served, limit time.Duration) {
	timer := time.NewTimer(limit)
	defer timer.Stop()
	select {
	case <-each.done:
	case <-timer.C:
		each.live.Log().Error("a session that has panicked does not end: it is given up", "after", limit)
		if network := each.running.Network(); network != nil {
			lifetime.Reset(network)
		}
		each.terms.Buffers.Close()
		s.over(each, lifetime.Stopped(each.live.Context()))
	}
}

func (s *Server) runToEnd(each *served) session.Outcome {
	defer each.terms.Buffers.Close()
	defer s.watch.Add(each.live, each.running, each.running.Network())()
	defer each.terms.Limits.Limit(each.live)()
	return each.running.Run()
}

func (s *Server) forget(each *served) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.served, each)
}

func infoOf(kind session.Kind, request any) session.Info {
	if forward, ok := request.(*portforward.Request); ok {
		return forward.Info()
	}
	return request.(*remotecommand.Request).Info(kind)
}

// terms returns the terms of a session that begins now.
func (s *Server) terms(kind session.Kind) lifetime.Terms {
	terms := s.shared()
	s.mu.Lock()
	defer s.mu.Unlock()
	terms.Limits = lifetime.Limits{Idle: s.settings.IdleTimeout[kind], Max: s.settings.MaxLifetime[kind], Warning: s.config.warning}
	terms.Bandwidth = s.settings.Bandwidth
	return terms
}

// shared returns the terms that are the same for all sessions.
func (s *Server) shared() lifetime.Terms {
	return lifetime.Terms{Buffers: s.config.Buffers.Share(), Observe: s.config.Observe, Fault: lifetime.NewFault()}
}

// upgrade passes a connection to the package that serves its kind of request. If it returns no session, the outcome
// says why, and the request was answered.
func (s *Server) upgrade(w http.ResponseWriter, r *http.Request, up transport.Upgrade, request any, live *session.Session, terms lifetime.Terms) (running, session.Outcome) {
	if forward, ok := request.(*portforward.Request); ok {
		accepted, outcome := portforward.Accept(w, r, up, forward, live, s.config.PortForwards, terms)
		if accepted == nil {
			return nil, outcome // a nil *Session would not be a nil interface
		}
		return accepted, outcome
	}
	accepted, err := remotecommand.Accept(w, r, up, request.(*remotecommand.Request), live, s.config.Commands, terms)
	if err != nil {
		return nil, lifetime.ClientGone(err)
	}
	return accepted, session.Outcome{}
}

func (s *Server) tokenNotFound(w http.ResponseWriter, kind session.Kind) {
	s.config.Observe(event.TokenUnknown)
	status.WriteError(w, http.StatusNotFound, fmt.Sprintf("no %s request waits at this URL: its token is unknown, has been used, or has expired "+
		"(a token is good for one connection within %v of the CRI call)", kind, s.tokens.ttl))
}
