package admin

import (
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/streamshim/streamshim/pkg/asciicast"
	"github.com/streamshim/streamshim/pkg/handover"
	"github.com/streamshim/streamshim/pkg/rescue"
	"github.com/streamshim/streamshim/pkg/session"
	"github.com/streamshim/streamshim/pkg/session/recording"
	"github.com/streamshim/streamshim/pkg/session/transcript"
)

const (
	readHeaderTimeout = 10 * time.Second
	maxBody           = 64 << 10 // bytes of a request
	// watchBuffer bounds the bytes that wait for a watcher that reads too slowly. More than that is skipped.
	watchBuffer = 1 << 20
	// maxTaps bounds the watchers and recorders of one session. Each costs it a copy.
	maxTaps      = 8
	watchTimeout = 30 * time.Second // for a watcher to read what was sent
	maxSignal    = 64               // SIGRTMAX
)

// Config configures a Server.
type Config struct {
	Sessions *session.Registry
	Log      *slog.Logger
	// Settings returns the current settings. It is called for each request.
	Settings func() Settings
	// HandOver starts a hand-over and does not wait for it. An *Error says why it cannot be started.
	HandOver func(HandoverRequest) (Handover, error)
	// LastHandover returns the last hand-over, or false if there was none.
	LastHandover func() (Handover, bool)
}

// Settings are the settings that may change while the server runs.
type Settings struct {
	Command     session.CommandLevel // how much of a command line is shown
	NotifyWatch bool                 // tell the user of a terminal that an operator watches
	Recordings  string               // directory of the recordings
}

// Server serves the API.
type Server struct {
	config   Config
	http     *http.Server
	requests handover.Requests

	mu     sync.Mutex
	ctx    context.Context         // of all watches
	cancel context.CancelCauseFunc // with a *watchesEnd
}

// watchesEnd is why all watches end.
type watchesEnd struct{ end WatchEnd }

func (e *watchesEnd) Error() string { return "watches end: " + string(e.end) }

// NewServer returns a server. The caller calls Serve.
func NewServer(config Config) *Server {
	s := &Server{config: config}
	s.ctx, s.cancel = context.WithCancelCause(context.Background())
	mux := http.NewServeMux()
	for pattern, handle := range map[string]func(http.ResponseWriter, *http.Request) error{
		"GET /v1/sessions":            s.list,
		"GET /v1/sessions/{id}":       s.show,
		"POST /v1/sessions/{id}/kill": s.kill,
		"GET /v1/sessions/{id}/watch": s.watch,
		"GET /v1/recordings":          s.recordings,
		"GET /v1/recordings/{name}":   s.recording,
		"POST /v1/handover":           s.handOver,
		"GET /v1/handover":            s.lastHandover,
	} {
		mux.HandleFunc(pattern, func(w http.ResponseWriter, r *http.Request) {
			if err := handle(w, r); err != nil {
				WriteError(w, err)
			}
		})
	}
	s.http = &http.Server{
		Handler:           s.requests.Count(mux),
		ReadHeaderTimeout: readHeaderTimeout,
		ErrorLog:          slog.NewLogLogger(config.Log.Handler(), slog.LevelDebug),
	}
	return s
}

// Serve serves the listener until Shutdown, then returns nil. It closes the listener. The listener decides who may
// connect.
func (s *Server) Serve(listener net.Listener) error {
	s.requests.From(listener)
	if err := s.http.Serve(listener); err != nil && !errors.Is(err, http.ErrServerClosed) {
		return fmt.Errorf("serve the admin API on %s: %w", listener.Addr(), err)
	}
	return nil
}

// Shutdown ends watches and waits for the other requests until the context is done.
func (s *Server) Shutdown(ctx context.Context) error {
	s.endWatches(WatchShutdown)
	if err := s.http.Shutdown(ctx); err != nil {
		return errors.Join(err, s.http.Close())
	}
	return nil
}

// Quiesce stops accepting connections, ends watches, and waits for the other requests until the context is done. New
// connections wait for Resume, or for another program that has the same socket.
func (s *Server) Quiesce(ctx context.Context) {
	s.requests.Pause()
	s.endWatches(WatchHandover)
	s.requests.Wait(ctx)
}

// Resume serves again after Quiesce.
func (s *Server) Resume() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.requests.Resume()
	s.ctx, s.cancel = context.WithCancelCause(context.Background())
}

func (s *Server) endWatches(end WatchEnd) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.cancel(&watchesEnd{end})
}

// watches returns the context of watches that begin now.
func (s *Server) watches() context.Context {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.ctx
}

func (s *Server) handOver(w http.ResponseWriter, r *http.Request) error {
	var request HandoverRequest
	if err := json.NewDecoder(http.MaxBytesReader(w, r.Body, maxBody)).Decode(&request); err != nil && !errors.Is(err, io.EOF) {
		return &Error{Code: http.StatusBadRequest, Message: "the request is not a HandoverRequest: " + err.Error()}
	}
	begun, err := s.config.HandOver(request)
	if err != nil {
		return err
	}
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(http.StatusAccepted)
	return WriteJSON(w, begun)
}

func (s *Server) lastHandover(w http.ResponseWriter, _ *http.Request) error {
	last, ok := s.config.LastHandover()
	if !ok {
		return &Error{Code: http.StatusNotFound, Message: "there was no hand-over since this program was started"}
	}
	return WriteJSON(w, last)
}

func (s *Server) list(w http.ResponseWriter, _ *http.Request) error {
	answer := SessionList{Sessions: []Session{}}
	for _, live := range s.config.Sessions.List() {
		answer.Sessions = append(answer.Sessions, s.describe(live))
	}
	return WriteJSON(w, answer)
}

func (s *Server) show(w http.ResponseWriter, r *http.Request) error {
	live, err := s.find(r)
	if err != nil {
		return err
	}
	return WriteJSON(w, s.describe(live))
}

func (s *Server) kill(w http.ResponseWriter, r *http.Request) error {
	live, err := s.find(r)
	if err != nil {
		return err
	}
	var request KillRequest
	if err := json.NewDecoder(http.MaxBytesReader(w, r.Body, maxBody)).Decode(&request); err != nil && !errors.Is(err, io.EOF) {
		return &Error{Code: http.StatusBadRequest, Message: "the request is not a KillRequest: " + err.Error()}
	}
	if request.Signal < 0 || request.Signal > maxSignal {
		return &Error{Code: http.StatusBadRequest, Message: fmt.Sprintf("%d is no signal", request.Signal)}
	}
	if request.Signal == 0 {
		live.Log().Info("an operator ends the session")
		live.Stop(&session.EndError{Reason: "operator", Message: "the session was ended by an operator of this node"})
		w.WriteHeader(http.StatusNoContent)
		return nil
	}
	controls := live.Controls()
	if controls == nil {
		return &Error{Code: http.StatusConflict, Message: "the session has no process that could be signalled: " + string(live.Kind) + ", " + string(live.Phase())}
	}
	switch err := controls.Signal(syscall.Signal(request.Signal)); {
	case errors.Is(err, session.ErrNotSupported):
		return &Error{Code: http.StatusConflict, Message: err.Error()}
	case errors.Is(err, syscall.ESRCH):
		return &Error{Code: http.StatusConflict, Message: "the process has ended"}
	case err != nil:
		return fmt.Errorf("signal the process: %w", err)
	}
	live.Log().Info("an operator signals the process", "signal", request.Signal)
	w.WriteHeader(http.StatusNoContent)
	return nil
}

// watch sends the session's output to the operator. The session never waits for it.
func (s *Server) watch(w http.ResponseWriter, r *http.Request) error {
	live, err := s.find(r)
	if err != nil {
		return err
	}
	if !live.Taps.Opened() {
		return &Error{Code: http.StatusConflict, Message: "this session cannot be watched: only one with a terminal, or one that is recorded, and only while its process runs"}
	}
	queue := session.NewTapQueue(watchBuffer, nil, false, nil)
	remove := live.Taps.Add(queue)
	defer remove()
	defer queue.Close()
	if live.Taps.Count() > maxTaps {
		return &Error{Code: http.StatusTooManyRequests, Message: fmt.Sprintf("%d operators and recorders listen to this session already", maxTaps)}
	}
	live.Log().Info("an operator watches the session")
	watch := rand.Text()
	handedOver := false
	defer func() {
		if !handedOver { // who left is announced when it comes back
			live.TakeTold(watch)
		}
	}()
	switch {
	case live.TakeTold(r.Header.Get(HeaderWatch)):
		live.Told(watch)
	case s.config.Settings().NotifyWatch:
		if controls := live.Controls(); controls != nil {
			told := make(chan struct{})
			defer func() { <-told }()      // Notice returns at the latest when the session ends
			rescue.Go(rescue.Die, func() { // the session deals with a panic itself
				defer close(told)
				if err := controls.Notice("an operator of this node is watching this session"); err == nil {
					live.Told(watch)
				}
			})
		}
	}

	out := http.NewResponseController(w)
	w.Header().Set("Content-Type", "application/x-asciicast")
	w.Header().Set("Connection", "close") // who watches again behind a hand-over is to connect to the next program
	w.Header().Set("Trailer", trailerWatchEnd+", "+trailerBytesOut)
	w.Header().Set(headerBytesOut, bytesOut(live))
	w.Header().Set(HeaderWatch, watch)
	size := live.Taps.Size()
	now := time.Now()
	cast, err := asciicast.NewWriter(w, asciicast.Header{
		Width: orDefault(size.Width, 80), Height: orDefault(size.Height, 24), Timestamp: now.Unix(), Title: title(live.Info),
	})
	if err != nil {
		return nil //nolint:nilerr // the watcher has gone
	}
	watches := s.watches()
	encoder := transcript.NewEncoder(cast, now, live.TTY)
	for more := true; more; {
		out.SetWriteDeadline(time.Now().Add(watchTimeout)) //nolint:errcheck // a Unix socket has deadlines
		if err := out.Flush(); err != nil {
			return nil //nolint:nilerr // as above
		}
		select {
		case <-queue.Ready():
		case <-live.Context().Done():
			queue.Close()
		case <-r.Context().Done():
			return nil
		case <-watches.Done():
			var all *watchesEnd
			if errors.As(context.Cause(watches), &all) {
				handedOver = all.end == WatchHandover
				w.Header().Set(trailerWatchEnd, string(all.end))
				w.Header().Set(trailerBytesOut, bytesOut(live))
			}
			return nil
		}
		var events []session.TapEvent
		events, more = queue.Take()
		for i := range events {
			if err := encoder.Encode(&events[i]); err != nil {
				return nil //nolint:nilerr // as above
			}
		}
	}
	encoder.Close(time.Now()) //nolint:errcheck // as above
	w.Header().Set(trailerWatchEnd, string(WatchSessionEnded))
	return nil
}

// bytesOut is what the session's client has got so far.
func bytesOut(live *session.Session) string {
	_, sent := live.Transferred()
	return strconv.FormatInt(sent, 10)
}

func (s *Server) recordings(w http.ResponseWriter, _ *http.Request) error {
	files, err := recording.Files(s.config.Settings().Recordings)
	if err != nil {
		return err
	}
	answer := RecordingList{Recordings: []Recording{}}
	for _, f := range files {
		answer.Recordings = append(answer.Recordings, Recording{
			Name: f.Name, PodNamespace: f.Namespace, PodName: f.Pod, Container: f.Container,
			SessionID: f.SessionID, Started: f.Started, Size: f.Size,
		})
	}
	return WriteJSON(w, answer)
}

func (s *Server) recording(w http.ResponseWriter, r *http.Request) error {
	file, err := recording.Open(s.config.Settings().Recordings, r.PathValue("name"))
	if errors.Is(err, recording.ErrNoRecording) {
		return &Error{Code: http.StatusNotFound, Message: err.Error()}
	}
	if err != nil {
		return fmt.Errorf("open the recording: %w", err)
	}
	defer file.Close() //nolint:errcheck // only read
	s.config.Log.Info("an operator reads a recording", "recording", r.PathValue("name"))
	w.Header().Set("Content-Type", "application/x-asciicast")
	io.Copy(w, file) //nolint:errcheck // the operator has gone
	return nil
}

func orDefault(n uint16, def int) int {
	if n == 0 {
		return def
	}
	return int(n)
}

// title returns the title of a watch.
func title(info session.Info) string {
	t := info.Target
	return strings.Trim(fmt.Sprintf("%s %s/%s/%s", info.Kind, t.PodNamespace, t.PodName, t.ContainerName), " /")
}

// find returns the session whose ID begins with the one in the path.
func (s *Server) find(r *http.Request) (*session.Session, error) {
	prefix := r.PathValue("id")
	found := slices.DeleteFunc(s.config.Sessions.List(), func(live *session.Session) bool {
		return !strings.HasPrefix(live.ID, prefix)
	})
	switch len(found) {
	case 0:
		return nil, &Error{Code: http.StatusNotFound, Message: fmt.Sprintf("no live session %q; it may have ended", prefix)}
	case 1:
		return found[0], nil
	}
	return nil, &Error{Code: http.StatusConflict, Message: fmt.Sprintf("%d sessions begin with %q; write more of the id", len(found), prefix)}
}

func (s *Server) describe(live *session.Session) Session {
	now := time.Now()
	command, _ := s.config.Settings().Command.Visible(live.Command)
	d := Session{
		ID: live.ID, Kind: live.Kind, Phase: live.Phase(),
		PodNamespace: live.Target.PodNamespace, PodName: live.Target.PodName, PodUID: live.Target.PodUID,
		Container: live.Target.ContainerName, ContainerID: live.Target.ContainerID, SandboxID: live.Target.SandboxID,
		Command: command, TTY: live.TTY, Watchable: live.Taps.Opened(), Protocol: live.Protocol, Peer: live.Peer,
		User: live.User, AuditID: live.AuditID, Started: live.Start,
		Age: now.Sub(live.Start).Seconds(), Idle: live.Idle(now).Seconds(),
	}
	if live.AuditID != "" {
		d.AuditIDVerified = new(bool)
	}
	d.BytesIn, d.BytesOut = live.Transferred()
	if controls := live.Controls(); controls != nil {
		d.PID = controls.PID()
	}
	return d
}

// WriteJSON answers a request with v. It returns an error, and has answered nothing, when v is no JSON.
func WriteJSON(w http.ResponseWriter, v any) error {
	text, err := json.Marshal(v)
	if err != nil {
		return err
	}
	w.Header().Set("Content-Type", "application/json")
	w.Write(append(text, '\n')) //nolint:errcheck // the operator has gone
	return nil
}

// WriteError answers a request with an *Error, or another error as an internal one.
func WriteError(w http.ResponseWriter, err error) {
	var known *Error
	if !errors.As(err, &known) {
		known = &Error{Code: http.StatusInternalServerError, Message: err.Error()}
	}
	text, err := json.Marshal(known)
	if err != nil {
		text = []byte("{}") // cannot happen: the struct has only a string
	}
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(known.Code)
	w.Write(append(text, '\n')) //nolint:errcheck // as above
}
