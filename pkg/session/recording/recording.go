// Package recording records what sessions show as asciicast v2 files.
package recording

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/streamshim/streamshim/pkg/asciicast"
	"github.com/streamshim/streamshim/pkg/handover"
	"github.com/streamshim/streamshim/pkg/rescue"
	"github.com/streamshim/streamshim/pkg/session"
	"github.com/streamshim/streamshim/pkg/session/transcript"
	"github.com/streamshim/streamshim/pkg/workload"
)

// Config says what is recorded, and where. A limit of 0 means no limit, except where noted.
type Config struct {
	Directory string
	Rules     []session.Selector // a session is recorded if any of them matches
	Input     bool               // also record what the client sends
	NonTTY    bool               // also record sessions without a terminal
	MaxSize   int64              // bytes per recording
	MaxFiles  int                // number of recordings to keep
	MaxTotal  int64              // bytes of all recordings to keep
	MinAge    time.Duration      // recordings are kept this long whatever the limits; new ones are refused instead
	Buffer    int                // bytes per session that may wait to be written; required
	Command   session.CommandLevel
	// Deny refuses or ends a session that cannot be recorded completely, and shows nothing before it is written.
	// Otherwise the session continues with a gap in its recording, or without one.
	Deny bool
}

// Suffix is the file name suffix of recordings.
const Suffix = ".cast"

// Recorder is a session.Guard that records the sessions that its rules match. Unless Deny is set, sessions never
// wait for their recording: each has a buffer, from which a goroutine writes.
type Recorder struct {
	log        *slog.Logger
	room       session.TapRoom
	incomplete atomic.Int64

	mu         sync.Mutex
	config     Config
	recordings map[*session.Session]*recording
	places     map[string]*directory // by path; one for each directory ever configured
	closed     bool
	writers    rescue.Group
}

// New returns a recorder. room, if not nil, bounds what waits to be written for all recordings together. Close the
// recorder when all sessions have ended.
func New(config Config, room session.TapRoom, log *slog.Logger) *Recorder {
	return &Recorder{
		log: log, room: room, config: config,
		recordings: make(map[*session.Session]*recording), places: make(map[string]*directory),
		writers: rescue.Group{Report: func(fault *rescue.Panic) {
			log.Error("what deals with recordings has panicked", "panic", fault.Value, "stack", string(fault.Stack))
		}},
	}
}

// Update replaces the configuration. Recordings in progress keep the one they began with.
func (r *Recorder) Update(config Config) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.config = config
}

// Close waits until all recordings are written.
func (r *Recorder) Close() {
	r.mu.Lock()
	r.closed = true
	r.mu.Unlock()
	r.writers.Wait()
}

// Incomplete returns how many recordings could not be begun, have gaps, or ended before their session.
func (r *Recorder) Incomplete() int64 { return r.incomplete.Load() }

// Check implements session.Guard.
func (r *Recorder) Check(session.Info) error { return nil }

// Refused implements session.Guard.
func (r *Recorder) Refused(session.Info, error) {}

// wanted reports whether a session is to be recorded. A pod whose labels are unknown is, because it might have to
// be.
func (c Config) wanted(info session.Info) bool {
	if info.Kind == session.PortForward || (!info.TTY && !c.NonTTY) {
		return false
	}
	for _, rule := range c.Rules {
		if matches, unknown := rule.Matches(info); matches || unknown {
			return true
		}
	}
	return false
}

// Admit implements session.Guard: it opens the recording and adds its tap.
func (r *Recorder) Admit(_ context.Context, s *session.Session) error {
	r.mu.Lock()
	config, closed := r.config, r.closed
	r.mu.Unlock()
	if closed || !config.wanted(s.Info) {
		return nil
	}
	rec, err := r.begin(config, s)
	if err == nil {
		r.mu.Lock()
		r.recordings[s] = rec
		r.mu.Unlock()
		return nil
	}
	r.incomplete.Add(1)
	if !config.Deny {
		r.log.Error("a session is not recorded", "session", s.ID, "error", err)
		return nil
	}
	r.log.Error("a session is denied because it cannot be recorded", "session", s.ID, "error", err)
	return &session.RefusedError{
		Refusal: session.Unavailable,
		Message: "this session cannot be recorded, without which it is not allowed (recording.on_failure = \"deny\")",
	}
}

// Ended implements session.Guard. The rest is written in the background.
func (r *Recorder) Ended(s *session.Session, o session.Outcome) {
	r.mu.Lock()
	rec := r.recordings[s]
	delete(r.recordings, s)
	r.mu.Unlock()
	if rec != nil {
		rec.end(o)
	}
}

// place returns the record of a directory's contents.
func (r *Recorder) place(path string) *directory {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.places[path] == nil {
		r.places[path] = newDirectory(path, r.log)
	}
	return r.places[path]
}

func (r *Recorder) begin(config Config, s *session.Session) (*recording, error) {
	if err := os.MkdirAll(config.Directory, 0o700); err != nil {
		return nil, err
	}
	name := fileName(s)
	path := filepath.Join(config.Directory, name)
	place := r.place(config.Directory)
	place.begin(name) // before the file exists, or a clean-up could find it first
	if config.MinAge > 0 {
		place.retain(config)
		if place.full(config) {
			place.abandon(name, 0)
			return nil, fmt.Errorf("%s has as much as recording.max_files and recording.max_total allow, and nothing in it is older than recording.min_age (%v)",
				config.Directory, config.MinAge)
		}
	}
	file, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		place.abandon(name, 0)
		return nil, err
	}
	rec := r.newRecording(config, s, path, file)
	// Write the first bytes now, so that a full disk is noticed while the session can still be denied.
	if err := rec.writeHeader(defaultWidth, defaultHeight); err != nil {
		err = errors.Join(err, file.Close(), os.Remove(path))
		place.abandon(name, rec.size)
		return nil, err
	}
	r.listen(rec)
	r.writers.Go(func() { place.retain(config) }) // in the background, so that the session's buffer does not fill up meanwhile
	r.write(rec)
	return rec, nil
}

func (r *Recorder) newRecording(config Config, s *session.Session, path string, file *os.File) *recording {
	rec := &recording{
		config: config, session: s, place: r.place(config.Directory), path: path, file: file,
		outcome: make(chan session.Outcome, 1), ended: make(chan struct{}),
	}
	rec.flawed = func() {
		if !rec.isFlawed.Swap(true) {
			r.incomplete.Add(1)
		}
	}
	return rec
}

// listen adds the recording to the session's taps.
func (r *Recorder) listen(rec *recording) {
	rec.queue = session.NewTapQueue(rec.config.Buffer, r.room, rec.config.Input, rec.overflow)
	var tap session.Tap = rec.queue
	if rec.config.Deny {
		rec.blocking = newBlockingTap(rec, r.room)
		tap = rec.blocking
	}
	rec.remove = rec.session.Taps.Add(tap)
}

// write starts the recording's goroutine.
func (r *Recorder) write(rec *recording) {
	r.writers.Go(func() {
		defer close(rec.ended)
		rescue.Call(rec.panicked, func() {
			if rec.over = rec.run(); rec.over {
				rec.place.end(filepath.Base(rec.path), rec.size)
			}
		})
	})
}

// panicked ends a recording that has panicked, and its session where that must be recorded.
func (rec *recording) panicked(fault *rescue.Panic) {
	rec.session.Log().Error("the recording of a session has panicked and ends", "panic", fault.Value, "stack", string(fault.Stack))
	rec.flawed()
	if rec.config.Deny {
		rec.failed()
		rec.blocking.end()
	}
	rec.over = true
	rec.place.end(filepath.Base(rec.path), rec.size)
	rec.queue.Close()
	rec.queue.Release()
	rec.file.Close() //nolint:errcheck // it is incomplete either way
}

// fileName returns a name that sorts by time and describes the session.
func fileName(s *session.Session) string {
	t := s.Target
	parts := []string{s.Start.UTC().Format("20060102T150405.000Z")}
	for _, part := range []string{t.PodNamespace, t.PodName, t.ContainerName} {
		if part != "" {
			parts = append(parts, plain(part))
		}
	}
	return strings.Join(append(parts, s.ID), "_") + Suffix
}

// maxNamePart bounds how much of a Kubernetes name, which may have 253 characters, goes into a file name, which
// may have 255.
const maxNamePart = 63

// plain replaces characters that are unsuitable in a file name. The names come from labels, which are not
// validated.
func plain(name string) string {
	name = strings.Map(func(c rune) rune {
		switch {
		case c >= 'a' && c <= 'z', c >= 'A' && c <= 'Z', c >= '0' && c <= '9', c == '-', c == '.':
			return c
		}
		return '-'
	}, name)
	return name[:min(len(name), maxNamePart)]
}

// recording is one file that is being written.
type recording struct {
	config   Config
	session  *session.Session
	place    *directory
	path     string
	file     *os.File
	queue    *session.TapQueue
	blocking *blockingTap // only with Deny; the queue then has only sizes
	remove   func()
	flawed   func()               // counts the recording as incomplete, once
	outcome  chan session.Outcome // filled at the end of the session

	isFlawed atomic.Bool
	frozen   atomic.Bool   // the writer is to end without finishing the recording
	left     atomic.Bool   // what is left to do with the file after frozen is claimed: by freeze, or by the writer
	ended    chan struct{} // closed when the writer has ended
	over     bool          // nothing more is written; valid once ended

	cast     *asciicast.Writer
	encoder  *transcript.Encoder
	buffer   []byte        // lines not written yet
	size     int64         // bytes written
	events   int           // events other than sizes
	ending   bool          // the last event may use endReserve
	lastSize workload.Size // of the terminal
}

// defaultWidth and defaultHeight are used while a session's terminal size is unknown.
const (
	defaultWidth  = 80
	defaultHeight = 24
)

// resize records a new terminal size. The first one, before any output, goes into the header, because not all
// players support later ones.
func (rec *recording) resize(e *session.TapEvent) error {
	if e.Size == rec.lastSize {
		return nil
	}
	rec.lastSize = e.Size
	if rec.events > 0 {
		return rec.encoder.Encode(e)
	}
	if err := rec.file.Truncate(0); err != nil {
		return err
	}
	if _, err := rec.file.Seek(0, io.SeekStart); err != nil {
		return err
	}
	rec.place.grew(-rec.size)
	rec.size, rec.buffer = 0, rec.buffer[:0]
	return rec.writeHeader(int(e.Size.Width), int(e.Size.Height))
}

func (rec *recording) writeHeader(width, height int) error {
	s := rec.session
	env := make(map[string]string)
	if s.TTY {
		env["TERM"] = "xterm" // what the command sees, unless its image sets another
	}
	if len(s.Command) > 0 && strings.HasSuffix(s.Command[0], "sh") && rec.config.Command != session.CommandNone {
		env["SHELL"] = s.Command[0]
	}
	t := s.Target
	command, _ := rec.config.Command.Visible(s.Command)
	title := fmt.Sprintf("%s %s/%s/%s: %s", s.Kind, t.PodNamespace, t.PodName, t.ContainerName, strings.Join(command, " "))
	var err error
	rec.cast, err = asciicast.NewWriter(rec, asciicast.Header{
		Width: width, Height: height, Timestamp: s.Start.Unix(),
		Title: strings.TrimSuffix(title, ": "), Env: env,
	})
	if err != nil {
		return err
	}
	rec.encoder = transcript.NewEncoder(rec.cast, s.Start, s.TTY)
	return rec.flush()
}

var errFull = errors.New("the recording has reached its size limit")

// endReserve is room for the last event beyond the limit, in bytes.
const endReserve = 512

// flushSize is how much to write at once, in bytes.
const flushSize = 256 << 10

// Write takes one line for the file, within the size limit.
func (rec *recording) Write(line []byte) (int, error) {
	size := rec.size + int64(len(rec.buffer)+len(line))
	if rec.config.MaxSize > 0 && !rec.ending && size > rec.config.MaxSize-endReserve {
		return 0, errFull
	}
	rec.buffer = append(rec.buffer, line...)
	if len(rec.buffer) < flushSize {
		return len(line), nil
	}
	return len(line), rec.flush()
}

// flush writes the buffered lines. If that fails, only whole lines remain in the file.
func (rec *recording) flush() error {
	n, err := rec.file.Write(rec.buffer)
	whole := n
	if err != nil {
		whole = bytes.LastIndexByte(rec.buffer[:n], '\n') + 1
	}
	rec.buffer = rec.buffer[:0]
	rec.size += int64(whole)
	rec.place.grew(int64(whole))
	if whole < n {
		_, seekErr := rec.file.Seek(rec.size, io.SeekStart)
		err = errors.Join(err, rec.file.Truncate(rec.size), seekErr)
	}
	return err
}

// overflow is called from the session when the disk is too slow for it, or with Deny if its terminal is resized
// absurdly often.
func (rec *recording) overflow() {
	rec.flawed()
	if rec.config.Deny {
		rec.failed()
	}
}

// failed ends a session that must be recorded completely but is not.
func (rec *recording) failed() {
	rec.session.Stop(&session.EndError{
		Reason:  "recording-failed",
		Message: "the session was ended because it could not be recorded, without which it is not allowed (recording.on_failure = \"deny\")",
	})
}

// run writes the queue's events until the session has ended or writing fails. It returns false if the recording
// was frozen instead; the file is then still open.
func (rec *recording) run() (over bool) {
	err := rec.copy()
	if errors.Is(err, handover.ErrFrozen) {
		if !rec.left.Swap(true) {
			rec.queue.Release()
			return false
		}
		err = errSlowDisk // freeze waits no more
	}
	defer rec.file.Close() //nolint:errcheck // see finish
	if err != nil && rec.config.Deny {
		rec.failed() // before whoever waits for the write continues
	}
	if rec.blocking != nil {
		rec.blocking.end() // the tap stays until the session has ended, so nothing more is delivered
	} else {
		rec.remove()
	}
	rec.queue.Close()
	rec.queue.Release()
	if err != nil {
		rec.flawed()
		rec.session.Log().Warn("the recording ends before its session", "file", rec.path, "error", err)
	}
	rec.finish(err)
	return true
}

func (rec *recording) copy() error {
	var awaited chan blockingEvent
	if rec.blocking != nil {
		awaited = rec.blocking.events
	}
	for {
		var now blockingEvent
		select {
		case <-rec.queue.Ready(): // ready at the latest when end closes the queue
		case now = <-awaited:
		}
		events, more := rec.queue.Take()
		for i := range events {
			if err := rec.encode(&events[i]); err != nil {
				return err
			}
		}
		if now.written != nil {
			if err := rec.encode(&now.TapEvent); err != nil {
				return err
			}
		}
		if !more && rec.frozen.Load() {
			return cmp.Or(rec.flush(), handover.ErrFrozen)
		}
		if !more {
			return rec.encoder.Close(time.Now())
		}
		if err := rec.flush(); err != nil {
			return err
		}
		if now.written != nil {
			now.written <- struct{}{}
		}
	}
}

func (rec *recording) encode(e *session.TapEvent) error {
	if e.Kind == session.TapResize {
		return rec.resize(e)
	}
	rec.events++
	return rec.encoder.Encode(e)
}

// finish writes why the recording ends.
func (rec *recording) finish(problem error) {
	var label string
	if problem != nil {
		label = "the recording ends here: " + problem.Error()
	} else {
		o := <-rec.outcome
		label = "the session has ended: " + o.Reason
		if o.ExitCode >= 0 {
			label += fmt.Sprintf(", exit code %d", o.ExitCode)
		}
	}
	rec.ending = true
	err := rec.cast.Write(time.Since(rec.session.Start), asciicast.Marker, []byte("streamshim: "+label))
	err = errors.Join(err, rec.flush())
	if err == nil {
		err = rec.file.Sync()
	}
	if err != nil && problem == nil {
		rec.session.Log().Warn("the end of a recording could not be written", "file", rec.path, "error", err)
	}
}

// end tells the writer that nothing more will come.
func (rec *recording) end(o session.Outcome) {
	rec.remove()
	rec.outcome <- o
	rec.queue.Close()
}
