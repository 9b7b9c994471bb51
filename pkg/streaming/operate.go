package streaming

import (
	"context"
	"encoding/json"
	"errors"
	"io"
	"net/http"
	"syscall"
	"time"

	"github.com/streamshim/streamshim/pkg/session"
	"github.com/streamshim/streamshim/pkg/workload"
)

// What operators do to sessions: refuse them, hold them back, listen to them, signal their process.

// StartGate bounds how many commands start at the same time.
type StartGate interface {
	// Acquire waits for a turn of the session. Release ends it; it is nil with an error, which is a
	// *session.RefusedError when too many wait already, or the context's.
	Acquire(ctx context.Context, info session.Info) (release func(), err error)
}

// startFunc starts a command. What it buffers counts in the share.
type startFunc = func(context.Context, workload.Command, *bufferShare) (Process, error)

// startWhenAllowed is for commands that are started here. What the upstream starts, or has started, costs
// nothing here and takes no turn: were the upstream to hang, it would keep local ones waiting.
func startWhenAllowed(gate StartGate, info session.Info, start startFunc) startFunc {
	if gate == nil {
		return start
	}
	return func(ctx context.Context, c workload.Command, buffers *bufferShare) (Process, error) {
		release, err := gate.Acquire(ctx, info)
		if err != nil {
			return nil, err
		}
		defer release()
		return start(ctx, c, buffers)
	}
}

// writeRefused answers a request whose session was refused.
func writeRefused(w http.ResponseWriter, err error) { writeStatus(w, refusedStatus(err)) }

// writeError answers a request that cannot be served.
func writeError(w http.ResponseWriter, code int, message string) {
	writeStatus(w, &status{Status: statusFailure, Reason: statusReasons[code], Code: code, Message: message})
}

// writeStatus answers with a metav1.Status, whose message clients show. Plain text would do as well, if
// client-go did not try to read it as YAML first: a sentence with a colon is a mapping, and so a Status without
// a message (transport/websocket).
func writeStatus(w http.ResponseWriter, s *status) {
	body, err := json.Marshal(struct {
		Kind       string `json:"kind"`
		APIVersion string `json:"apiVersion"`
		*status
	}{"Status", "v1", s})
	if err != nil {
		body = []byte(s.Message) // cannot happen: the struct holds strings and an int
	}
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(s.Code)
	w.Write(append(body, '\n')) //nolint:errcheck // the client has gone
}

// statusReasons are those of metav1.StatusReason.
var statusReasons = map[int]string{
	http.StatusBadRequest:          "BadRequest",
	http.StatusForbidden:           "Forbidden",
	http.StatusNotFound:            "NotFound",
	http.StatusTooManyRequests:     "TooManyRequests",
	http.StatusInternalServerError: "InternalError",
	http.StatusServiceUnavailable:  "ServiceUnavailable",
}

func refusedCode(err error) int {
	var refused *session.RefusedError
	if errors.As(err, &refused) {
		switch refused.Refusal {
		case session.Denied:
			return http.StatusForbidden
		case session.TooMany:
			return http.StatusTooManyRequests
		}
	}
	return http.StatusServiceUnavailable
}

// refusedStatus is the outcome of a session that was refused.
func refusedStatus(err error) *status {
	code := refusedCode(err)
	return &status{Status: statusFailure, Reason: statusReasons[code], Code: code, Message: err.Error()}
}

// beginOperating lets operators at the session, whose process runs now. A terminal can always be
// listened to: it is slow by itself. Other sessions are only if somebody listens from the start,
// because their output goes from pipe to socket without passing here otherwise.
func (s *remoteCommandSession) beginOperating(p Process) {
	if s.command.TTY || s.session.Taps.Count() > 0 {
		s.session.Taps.Open()
	}
	s.bandwidth = newBandwidth(s.config.Bandwidth, s.client.Done())
	s.session.SetControls(&controls{process: p, tty: s.command.TTY, stdout: s.client.stdout})
}

// operatedOutput is the client's stream as the output's copier sees it.
func (s *remoteCommandSession) operatedOutput(from session.Output, to workload.Stream) workload.Stream {
	if to == nil {
		return nil
	}
	if s.session.Taps.Opened() {
		to = tappedStream{Stream: to, sent: func(p []byte) error {
			err := s.session.Taps.Output(from, p)
			if err != nil {
				s.withheld.Store(true)
			}
			return err
		}}
	}
	return s.bandwidth.stream(to)
}

// operatedInput is the client's stream as the input's copier sees it.
func (s *remoteCommandSession) operatedInput(from workload.Stream) workload.Stream {
	if s.session.Taps.Opened() {
		from = tappedStream{Stream: from, received: s.session.Taps.Input}
	}
	return s.bandwidth.stream(from)
}

// announcingSizes is the process with taps that hear of its terminal's sizes.
func (s *remoteCommandSession) announcingSizes(p Process) Process {
	return sizeAnnouncer{Process: p, taps: &s.session.Taps}
}

type sizeAnnouncer struct {
	Process
	taps *session.Taps
}

func (a sizeAnnouncer) Resize(size workload.Size) error {
	a.taps.Resize(size)
	return a.Process.Resize(size)
}

// tappedStream shows what is moved to taps.
type tappedStream struct {
	workload.Stream
	sent, received func([]byte) error // nil when nobody wants it
}

func (t tappedStream) ReadFrom(r io.Reader) (int64, error) {
	if t.sent == nil {
		return t.Stream.ReadFrom(r)
	}
	return t.Stream.ReadFrom(tappedReader{r, t.sent})
}

func (t tappedStream) WriteTo(w io.Writer) (int64, error) {
	if t.received == nil {
		return t.Stream.WriteTo(w)
	}
	return t.Stream.WriteTo(tappedWriter{w, t.received})
}

type tappedReader struct {
	io.Reader
	show func([]byte) error
}

func (t tappedReader) Read(p []byte) (int, error) {
	n, err := t.Reader.Read(p)
	if n > 0 {
		if showErr := t.show(p[:n]); showErr != nil {
			return 0, showErr
		}
	}
	return n, err
}

type tappedWriter struct {
	io.Writer
	show func([]byte) error
}

func (t tappedWriter) Write(p []byte) (int, error) {
	if err := t.show(p); err != nil {
		return 0, err
	}
	return t.Writer.Write(p)
}

// controls implements session.Controls.
type controls struct {
	process Process
	tty     bool
	stdout  workload.Stream
}

// PID implements session.Controls.
func (c *controls) PID() int {
	return c.process.PID()
}

// Signal implements session.Controls.
func (c *controls) Signal(signal syscall.Signal) error {
	return c.process.Signal(signal)
}

// Notice implements session.Controls.
func (c *controls) Notice(text string) error {
	if !c.tty || c.stdout == nil {
		return nil
	}
	_, err := io.WriteString(c.stdout, "\r\n[streamshim: "+text+"]\r\n")
	return err
}

// bandwidth holds the streams of one session to a number of bytes a second, each direction for
// itself. A nil one does not.
type bandwidth struct {
	sent, received *tokenBucket
}

func newBandwidth(bytesPerSecond int64, end <-chan struct{}) *bandwidth {
	if bytesPerSecond <= 0 {
		return nil
	}
	return &bandwidth{sent: newTokenBucket(bytesPerSecond, end), received: newTokenBucket(bytesPerSecond, end)}
}

func (b *bandwidth) stream(s workload.Stream) workload.Stream {
	if b == nil {
		return s
	}
	return limitedStream{s, b}
}

// limitedStream moves no more than its bandwidth allows. Only the two ways by which sessions move
// bytes in bulk are held back.
type limitedStream struct {
	workload.Stream
	limit *bandwidth
}

func (l limitedStream) ReadFrom(r io.Reader) (int64, error) {
	return l.Stream.ReadFrom(limitedReader{r, l.limit.sent})
}

func (l limitedStream) WriteTo(w io.Writer) (int64, error) {
	return l.Stream.WriteTo(limitedWriter{w, l.limit.received})
}

type limitedReader struct {
	io.Reader
	bucket *tokenBucket
}

func (l limitedReader) Read(p []byte) (int, error) {
	n, err := l.Reader.Read(p[:min(len(p), l.bucket.burst)])
	l.bucket.take(n)
	return n, err
}

type limitedWriter struct {
	io.Writer
	bucket *tokenBucket
}

func (l limitedWriter) Write(p []byte) (int, error) {
	written := 0
	for written < len(p) {
		n, err := l.Writer.Write(p[written:min(len(p), written+l.bucket.burst)])
		l.bucket.take(n)
		written += n
		if err != nil {
			return written, err
		}
	}
	return written, nil
}

// waitForTurn waits for the duration or for the end.
func waitForTurn(d time.Duration, end <-chan struct{}) {
	if d <= 0 {
		return
	}
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
	case <-end:
	}
}
