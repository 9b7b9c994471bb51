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
	"sync"
	"time"

	"github.com/streamshim/streamshim/pkg/session"
)

// Config is what a Server needs to know. Log, Sessions, Runtime and Pods are required. Every value is taken as it is: the
// defaults of what users may set stand in pkg/config alone, and zero is off where a comment says so.
type Config struct {
	Log      *slog.Logger
	Sessions *session.Registry
	Runtime  Runtime
	Pods     Pods

	// DrainIdle is how long the output of a command that has exited must be silent before it is
	// taken to be complete although some background child still holds it (kubernetes#44371).
	// Zero waits for the end of output for ever, as other runtimes do.
	DrainIdle time.Duration
	// DrainMax bounds the same wait while output still flows.
	DrainMax time.Duration
	// LingerIdle is how long a finished session waits without any progress for the client to take
	// what is left and to close the connection.
	LingerIdle time.Duration
	// StatusWait bounds how long the status of a finished command is held back for a client over SPDY,
	// which may translate for somebody else, to have read the output: since the last sign that it has read
	// something. Zero does not hold it back.
	StatusWait time.Duration
	// InputGrace is how long a command without a terminal, whose client has left in order, may take none of
	// the input that came before, and, once it has all of it, how long it may run on before it is treated as
	// one whose client has gone. Zero is not at all.
	InputGrace time.Duration
	// KeepProcesses says that processes live on without their clients, so that a session whose client
	// has gone does not wait for its process to follow.
	KeepProcesses bool
	// Settings are those at the start, see Server.Update.
	Settings
	// Starts bounds how many commands start at the same time. Nil is no bound.
	Starts StartGate
	// Stall is how long one forwarded connection whose pod reads nothing may hold up its neighbours,
	// once it has used up the room that all of them share, before it is reset (kubernetes#78446).
	// Zero is never.
	Stall time.Duration
	// ReportRefused makes port-forward write a refused or failed dial on the error stream, at which
	// kubectl ends the whole port-forward (kubernetes#111825).
	ReportRefused bool
	// AttachBuffer is how many bytes of output wait for an attached client that reads too slowly;
	// what comes beyond is skipped.
	AttachBuffer int
	// AttachStays keeps an attached client whose input has ended, without a terminal, until it leaves. Otherwise
	// it is detached as the runtimes do, but not before the container has been silent for a moment.
	AttachStays bool
	// MayConnect is asked before each forwarded connection, which its error resets. Nil allows all.
	MayConnect func() error
	// Buffers bounds the unread data of all sessions. Nil is no limit.
	Buffers *Buffers
	// Observe is told of each Event as it happens, from many goroutines; it must not block. Nil
	// means that nobody asks.
	Observe func(Event)

	waits // those that are zero become the package's own
}

// Settings are the part of Config that may change while the server runs. A zero, or a kind of session
// that is missing, is no limit.
type Settings struct {
	// IdleTimeout ends a session in which no payload has moved for this long. Pings do not count
	// (containerd#5563).
	IdleTimeout map[session.Kind]time.Duration
	// MaxLifetime ends a session this long after its start.
	MaxLifetime map[session.Kind]time.Duration
	// Bandwidth is how many bytes a second one session may move in each direction, its bursts
	// included. The sessions' counters and pings are not held up by it.
	Bandwidth int64
}

// waits are the times that no user sets.
type waits struct {
	// streamCreation is how long a client may take to open its streams after the upgrade.
	streamCreation time.Duration
	// firstSize is how long the start of a command with a terminal waits for the terminal's size, so
	// that the command finds it right from its first instruction (kubernetes#47990). A busy node with two
	// proxies between needs it. A client that is known to send none waits less, see firstsize.go.
	firstSize time.Duration
	// sizeSlack is how long the size may come after the first input, or after the answer to a ping: a client
	// that sends one does so at once, but maybe from another thread.
	sizeSlack time.Duration
	// warning is how long before the end by IdleTimeout or MaxLifetime a line on the terminal says
	// so, when the limit is more than twice as long.
	warning time.Duration
	// peerSilence is how long the network may stay silent, although an answer is due, before the
	// client is taken to be gone.
	peerSilence time.Duration
	// processEnd is how long a session whose client has gone stays in the registry until its process has
	// followed.
	processEnd time.Duration
}

func (w waits) complete() waits {
	return waits{
		streamCreation: cmp.Or(w.streamCreation, 30*time.Second),
		firstSize:      cmp.Or(w.firstSize, 500*time.Millisecond),
		sizeSlack:      cmp.Or(w.sizeSlack, 60*time.Millisecond),
		warning:        cmp.Or(w.warning, time.Minute),
		peerSilence:    cmp.Or(w.peerSilence, 45*time.Second),
		processEnd:     cmp.Or(w.processEnd, 30*time.Second),
	}
}

const (
	requestTimeout      = 10 * time.Second // for an HTTP request to come, and for its answer to be taken
	keepAliveTimeout    = 60 * time.Second // of an HTTP connection between requests
	maxHeaderBytes      = 64 << 10
	maxPlainConnections = 2 * maxTokens // not upgraded; nobody needs more than there are tokens

	shutdownGrace = 2 * time.Second // for clients to read the status at shutdown
	redeemGrace   = 2 * time.Second // at shutdown, for the last URLs to be opened
)

// Server gives out streaming URLs and serves them.
type Server struct {
	config Config
	tokens *tokenCache
	http   *http.Server
	base   url.URL // scheme and address of the URLs
	plain  *plainConnections

	ctx      context.Context // of all sessions
	cancel   context.CancelCauseFunc
	sessions sync.WaitGroup // one for each session's goroutine
	watch    *watcher

	mu       sync.Mutex
	sealed   bool          // no URL is given out any more
	closed   bool          // none is served any more
	closing  chan struct{} // closed with it
	deaf     bool          // nobody listens at the address of the URLs
	settings Settings
}

// Update takes over new settings. Sessions that live keep those they began with.
func (s *Server) Update(settings Settings) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.settings = settings
}

// current is the configuration of a session that begins now.
func (s *Server) current() Config {
	s.mu.Lock()
	defer s.mu.Unlock()
	c := s.config
	c.Settings = s.settings
	return c
}

// NewServer returns a server whose URLs point to the listener's address, which must be one that
// clients on this node can dial. Serve starts it.
func NewServer(config Config, listener net.Addr) *Server {
	config.waits = config.waits.complete()
	if config.Observe == nil {
		config.Observe = func(Event) {}
	}
	s := &Server{
		config:   config,
		settings: config.Settings,
		plain:    newPlainConnections(maxPlainConnections),
		closing:  make(chan struct{}),
		base:     url.URL{Scheme: "http", Host: listener.String()},
	}
	s.tokens = newTokenCache(s.config.Observe)
	s.ctx, s.cancel = context.WithCancelCause(context.Background())
	s.watch = newWatcher(s.config)
	// None of the limits holds for a connection that was upgraded: net/http has let go of it.
	s.http = &http.Server{
		Handler:        s.handler(),
		ReadTimeout:    requestTimeout, // of the body too, which net/http reads to its end before it answers
		WriteTimeout:   requestTimeout,
		IdleTimeout:    keepAliveTimeout,
		MaxHeaderBytes: maxHeaderBytes,
		ConnState:      s.plain.changed,
		ErrorLog:       slog.NewLogLogger(s.config.Log.Handler(), slog.LevelDebug),
	}
	return s
}

// Exec keeps the request and returns the one-time URL at which a client may have it served. The
// error is ErrTooManyRequests, ErrShuttingDown, ErrNotListening or that of a guard of Config.Sessions, such as a
// *session.RefusedError.
func (s *Server) Exec(r *CommandRequest) (string, error) { return s.insert(r.info(session.Exec), r) }

// Attach is Exec's twin for an attach.
func (s *Server) Attach(r *CommandRequest) (string, error) {
	return s.insert(r.info(session.Attach), r)
}

// PortForward is Exec's twin for a port-forward.
func (s *Server) PortForward(r *PortForwardRequest) (string, error) {
	return s.insert(r.info(), r)
}

func (s *Server) insert(info session.Info, request any) (string, error) {
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

// WaitingTokens is how many URLs have been given out that nobody has opened yet.
func (s *Server) WaitingTokens() int { return s.tokens.waiting() }

// Serve serves the listener until Shutdown. It closes the listener, and opens it again if it fails.
func (s *Server) Serve(listener net.Listener) error {
	watching := make(chan struct{})
	go func() {
		defer close(watching)
		s.watch.run(s.ctx)
	}()
	s.accept(listener)
	<-s.ctx.Done()
	<-watching
	return nil
}

// listenPause is between two attempts to open the listener again.
const listenPause = 500 * time.Millisecond

// accept takes connections until Shutdown. A listener that fails, which is not for want of descriptors,
// is opened again at the same address; until then no URLs are given out.
func (s *Server) accept(listener net.Listener) {
	address := listener.Addr()
	for {
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

// Shutdown ends the server. Until no session lives, or the context is done, all goes on, and new sessions are
// taken: whoever has a shell open during an upgrade does not lock the others out. Then no URLs are given out any
// more; those that clients have already are served for a moment, also until the context is done. Sessions that
// are left end with a status that says so.
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
	go func() {
		defer close(ended)
		s.sessions.Wait() // also for those that are about to begin
	}()
	select {
	case <-ended:
	case <-ctx.Done():
	}
	s.config.Sessions.Close()
	err := s.http.Close() // idle and half-read connections; upgraded ones are ours, not net/http's
	s.cancel(&session.EndError{Reason: "shutdown", Message: ErrShuttingDown.Error()})
	s.sessions.Wait()
	return err
}

// waitOr waits until done is closed, the context is done, or the time is up.
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
	for kind, serve := range map[session.Kind]serveFunc{
		session.Exec:        s.serveExec,
		session.Attach:      s.serveAttach,
		session.PortForward: s.servePortForward,
	} {
		handle := func(w http.ResponseWriter, r *http.Request) { s.redeem(w, r, kind, serve) }
		mux.HandleFunc(fmt.Sprintf("GET /%s/{token}", kind), handle)
		mux.HandleFunc(fmt.Sprintf("POST /%s/{token}", kind), handle)
	}
	return mux
}

// serveFunc upgrades the connection and starts the session of a redeemed request.
type serveFunc func(w http.ResponseWriter, r *http.Request, up upgrade, request any)

// enter counts a request among the sessions, unless the server is shutting down. The caller calls
// sessions.Done when the request has been handed on or answered.
func (s *Server) enter() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return false
	}
	s.sessions.Add(1)
	return true
}

// redeem hands a request that can be upgraded over to its verb. One that cannot is answered without
// using its token up.
func (s *Server) redeem(w http.ResponseWriter, r *http.Request, kind session.Kind, serve serveFunc) {
	// Counted from here on, so that Shutdown waits also for a session that is about to begin.
	if !s.enter() {
		writeError(w, http.StatusServiceUnavailable, ErrShuttingDown.Error())
		return
	}
	defer s.sessions.Done()
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
	serve(w, r, up, request)
}

func (s *Server) tokenNotFound(w http.ResponseWriter, kind session.Kind) {
	s.config.Observe(TokenUnknown)
	writeError(w, http.StatusNotFound, fmt.Sprintf("no %s request waits at this URL: its token is unknown, has been used, or has expired "+
		"(a token is good for one connection within %v of the CRI call)", kind, s.tokens.ttl))
}
