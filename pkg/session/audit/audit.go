// Package audit writes the audit log of who did what: one JSON line at the start and one at the end of each
// session.
package audit

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"github.com/streamshim/streamshim/pkg/rescue"
	"github.com/streamshim/streamshim/pkg/session"
)

// Destination says where records go.
type Destination string

// The destinations of records.
const (
	Off      Destination = "off"
	File     Destination = "file"
	Stdout   Destination = "stdout"
	Journald Destination = "journald"
)

// Fsync says when records in a file are synced to disk.
type Fsync string

// The policies: whenever the kernel does, about every second, or before anyone continues.
const (
	FsyncNever    Fsync = "never"
	FsyncInterval Fsync = "interval"
	FsyncAlways   Fsync = "always"
)

// Config configures a Log.
type Config struct {
	Destination Destination
	File        string // path, for Destination File
	MaxSize     int64  // size in bytes at which the file is rotated; 0 means never
	MaxFiles    int    // number of rotated files to keep
	Command     session.CommandLevel
	ExecSync    bool // also write records of ExecSync calls
	Fsync       Fsync
	// Deny refuses a session whose start cannot be written.
	Deny bool
	// OpenDir holds a note of each open session, so that after a kill the next New writes its end, with the reason
	// "interrupted". Only one process may use it. If empty, no notes are kept.
	OpenDir string
	// HandedOver says that another program has handed its sessions over. New then leaves the sessions noted in
	// OpenDir alone until Settle.
	HandedOver bool
}

const (
	// queueSize is the number of records that may wait for a slow disk.
	queueSize = 1024
	// updatesSize is the number of configuration changes that may wait behind them.
	updatesSize = 8
	// writeTimeout bounds how long the start of a session waits for its record if Config.Deny is set.
	writeTimeout = 5 * time.Second
	syncInterval = time.Second
	// complainInterval is the minimum time between complaints about a log that cannot be written.
	complainInterval = time.Minute
)

var (
	errQueueFull = errors.New("the queue of audit records is full: the disk is too slow")
	errTimeout   = fmt.Errorf("the audit record was not written within %v", writeTimeout)
	errClosed    = errors.New("the audit log is closed")
	errStuck     = errors.New("the disk of the audit log does not answer, and earlier changes still wait for it")
)

// Log is the audit log, a session.Guard. A goroutine of its own writes the records. Sessions wait for it only if
// Config.Deny is set.
type Log struct {
	log   *slog.Logger
	open  openSessions
	queue chan entry
	done  chan struct{} // closed when the goroutine has ended
	gone  atomic.Int64  // records lost since the log was opened

	interrupted []*Record // records of sessions that a killed predecessor left open

	mu        sync.Mutex // guards what follows, and sends to a queue that may be closed
	unclaimed []*Record  // records of sessions open in another program's hand-over and not resumed yet
	config    Config
	closed    bool
	lost      int64 // records that found the queue full
}

// entry is a record for the goroutine to write, or an instruction to it.
type entry struct {
	line    []byte
	replace *destination // to be used from now on
	written chan<- error // nil if nobody waits; buffered, like settled
	ends    string       // the session that ends with this line, if any
	settled chan<- settlement
}

// settlement answers an entry that waits for everything before it.
type settlement struct {
	lost int64 // not yet noted in the log itself
	err  error // of the disk
}

// destination is a sink with its settings.
type destination struct {
	sink  sink
	fsync Fsync
}

// sink takes lines. A single goroutine calls its methods.
type sink interface {
	// write writes one whole line, or else nothing of it and returns an error.
	write(line []byte) error
	sync() error
	close() error
}

// New opens the destination and starts the log. It complains about a failing destination to log, at most once a
// minute. The caller must Close the Log.
func New(config Config, log *slog.Logger) (*Log, error) {
	s, err := open(config)
	if err != nil {
		return nil, fmt.Errorf("audit log: %w", err)
	}
	l := &Log{log: log, config: config, open: openSessions{config.OpenDir}, queue: make(chan entry, queueSize+updatesSize), done: make(chan struct{})}
	var unreadable error
	if l.interrupted, unreadable = l.open.left(); unreadable != nil {
		log.Warn("not all sessions that an earlier streamshim left open are known", "error", unreadable)
	}
	if config.HandedOver {
		l.unclaimed, l.interrupted = l.interrupted, nil
	}
	rescue.Go(rescue.Die, func() { l.run(destination{s, config.Fsync}) }) // without it no session may begin
	return l, nil
}

// Try reports why a log with this configuration could not be kept. It writes nothing to it.
func Try(config Config) error {
	var err error
	switch config.Destination {
	case File:
		var file *os.File
		if file, err = openAppending(config.File); err == nil {
			err = file.Close()
		}
	case Journald:
		var journal *journalSink
		if journal, err = openJournal(journalSocket); err == nil {
			err = journal.close()
		}
	}
	if err != nil {
		return fmt.Errorf("audit log: %w", err)
	}
	return nil
}

func open(config Config) (sink, error) {
	switch config.Destination {
	case File:
		return openFile(config.File, config.MaxSize, config.MaxFiles)
	case Stdout:
		return stdoutSink{}, nil
	case Journald:
		return openJournal(journalSocket)
	default:
		return discard{}, nil
	}
}

// Update changes how the log is kept from the next record on, without waiting for earlier ones to be written.
// After an error the old configuration stays.
func (l *Log) Update(config Config) error {
	s, err := open(config)
	if err != nil {
		return fmt.Errorf("audit log: %w", err)
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.closed {
		return errors.Join(errClosed, s.close())
	}
	select {
	case l.queue <- entry{replace: &destination{s, config.Fsync}}:
		l.config = config
		return nil
	default: // waiting for room would block every session, because the lock is held
		return fmt.Errorf("audit log: %w", errors.Join(errStuck, s.close()))
	}
}

// Close writes what is queued and closes the destination.
func (l *Log) Close() {
	l.mu.Lock()
	if !l.closed {
		l.closed = true
		close(l.queue)
	}
	l.mu.Unlock()
	<-l.done
}

// Check implements session.Guard.
func (l *Log) Check(session.Info) error { return nil }

// Admit implements session.Guard.
func (l *Log) Admit(ctx context.Context, s *session.Session) error {
	return l.start(ctx, s.ID, s.Info)
}

// Ended implements session.Guard.
func (l *Log) Ended(s *session.Session, o session.Outcome) {
	in, out := s.Transferred()
	l.end(s.ID, s.Info, s.Start, in, out, o)
}

// Refused implements session.Guard.
func (l *Log) Refused(info session.Info, reason error) {
	config := l.current()
	if config.Destination == Off || (info.Kind == session.ExecSync && !config.ExecSync) {
		return
	}
	record := describe(Refused, "", info, config.Command)
	record.Reason = "refused"
	var refused *session.RefusedError
	if errors.As(reason, &refused) {
		record.Reason = string(refused.Refusal)
	}
	record.Error = reason.Error()
	l.put(entry{line: record.line()}) //nolint:errcheck // losses are counted
}

// BeginSync writes the start of an ExecSync. end writes how it ended and how many bytes of output it produced; it
// is not nil unless there is an error. The error is a *session.RefusedError.
func (l *Log) BeginSync(ctx context.Context, info session.Info) (end func(o session.Outcome, output int64), err error) {
	if config := l.current(); config.Destination == Off || !config.ExecSync {
		return func(session.Outcome, int64) {}, nil
	}
	var random [8]byte
	rand.Read(random[:]) //nolint:errcheck // never fails, see crypto/rand
	id, began := hex.EncodeToString(random[:]), time.Now()
	if err := l.start(ctx, id, info); err != nil {
		return nil, err
	}
	return func(o session.Outcome, output int64) { l.end(id, info, began, 0, output, o) }, nil
}

func (l *Log) current() Config {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.config
}

func (l *Log) start(ctx context.Context, id string, info session.Info) error {
	config := l.current()
	if config.Destination == Off {
		return nil
	}
	record := describe(Start, id, info, config.Command)
	if err := l.open.begin(record); err != nil {
		l.log.Warn("an audited session cannot be noted; were streamshim killed now, it would have no end record", "session", id, "error", err)
	}
	line := record.line()
	if !config.Deny {
		l.put(entry{line: line}) //nolint:errcheck // losses are counted
		return nil
	}
	written := make(chan error, 1)
	timeout := time.NewTimer(writeTimeout)
	defer timeout.Stop()
	began := time.Now()
	err := l.put(entry{line: line, written: written})
	if err == nil {
		givenUp := false
		select {
		case err = <-written:
		case <-timeout.C:
			err, givenUp = errTimeout, true
		case <-ctx.Done():
			err, givenUp = context.Cause(ctx), true
		}
		if givenUp {
			// The start's record is still queued: follow it with one that says that nothing came of it.
			l.end(id, info, began, 0, 0, session.Outcome{Reason: "refused", ExitCode: -1, Err: err})
		}
	}
	if err == nil {
		return nil
	}
	if !errors.Is(err, errTimeout) && ctx.Err() == nil {
		l.open.end(id) // no start was written; otherwise the end record does it
	}
	l.log.Error("a session is denied because its start cannot be audited", "session", id, "error", err)
	return &session.RefusedError{
		Refusal: session.Unavailable,
		Message: "the start of this session could not be written to the node's audit log, without which none is allowed (audit.on_failure = \"deny\")",
	}
}

func (l *Log) end(id string, info session.Info, began time.Time, in, out int64, o session.Outcome) {
	config := l.current()
	if config.Destination == Off {
		l.open.end(id)
		return
	}
	record := describe(End, id, info, config.Command)
	record.finish(began, in, out, o)
	if l.put(entry{line: record.line(), ends: id}) != nil { // losses are counted
		l.open.end(id)
	}
}

// put queues a line. It never waits: if there is no room, it counts the line as lost.
func (l *Log) put(e entry) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.closed {
		return errClosed
	}
	if len(l.queue) >= queueSize { // the rest is room for Update; only holders of the lock add to it
		l.lost++
		l.gone.Add(1)
		return errQueueFull
	}
	l.queue <- e
	return nil
}

// Lost returns how many records could not be written since the log was opened.
func (l *Log) Lost() int64 { return l.gone.Load() }

func (l *Log) takeLost() int64 {
	l.mu.Lock()
	defer l.mu.Unlock()
	n := l.lost
	l.lost = 0
	return n
}

// writer is the state of the writing goroutine.
type writer struct {
	destination
	log        *slog.Logger
	open       openSessions
	lost       int64         // not yet noted in the log itself
	gone       *atomic.Int64 // shared with the Log
	complained time.Time
	dirty      bool // written but not synced
}

func (l *Log) run(d destination) {
	defer close(l.done)
	w := &writer{destination: d, log: l.log, open: l.open, gone: &l.gone}
	w.endInterrupted(l.interrupted)
	ticker := time.NewTicker(syncInterval)
	defer ticker.Stop()
	for {
		select {
		case e, ok := <-l.queue:
			if !ok {
				w.finish()
				return
			}
			w.batch(e, l)
			w.lost += l.takeLost()
		case <-ticker.C:
			w.noteLost()
			if w.dirty && w.fsync == FsyncInterval {
				w.complain(w.sync())
			}
		}
	}
}

// batch writes an entry and everything queued behind it, so that they share one fsync.
func (w *writer) batch(e entry, l *Log) {
	var waiting []chan<- error
	var settling []chan<- settlement
	for more := true; more; {
		if e.settled != nil {
			settling = append(settling, e.settled)
		} else if e.replace != nil {
			w.replace(*e.replace)
		} else if err := w.line(e.line); e.written != nil {
			if err != nil {
				e.written <- err
			} else {
				waiting = append(waiting, e.written)
			}
		}
		if e.ends != "" {
			w.open.end(e.ends)
		}
		if len(waiting) >= queueSize {
			break
		}
		select {
		case e, more = <-l.queue:
		default:
			more = false
		}
	}
	if len(settling) > 0 {
		w.lost += l.takeLost()
		w.noteLost()
	}
	var err error
	if w.dirty && (w.fsync == FsyncAlways || len(settling) > 0 && w.fsync != FsyncNever) {
		err = w.sync()
		w.complain(err)
	}
	for _, written := range waiting {
		written <- err
	}
	for _, settled := range settling {
		settled <- settlement{w.lost, err}
	}
}

// endInterrupted writes the end records that a predecessor could not write.
func (w *writer) endInterrupted(records []*Record) {
	for _, record := range records {
		w.line(record.line()) //nolint:errcheck // losses are counted
		w.open.end(record.Session)
	}
}

// line writes a line, preceded by the number of records lost so far. Losses during a batch are noted after it.
func (w *writer) line(line []byte) error {
	w.noteLost()
	err := w.sink.write(line)
	if err != nil {
		w.lost++
		w.gone.Add(1)
		w.complain(err)
		return err
	}
	w.dirty = true
	return nil
}

// noteLost tries to write how many records were lost.
func (w *writer) noteLost() {
	if w.lost == 0 {
		return
	}
	note := &Record{Version: SchemaVersion, Time: time.Now().UTC(), Event: Lost, LostRecords: w.lost}
	if w.sink.write(note.line()) == nil {
		w.lost = 0
		w.dirty = true
	}
}

func (w *writer) sync() error {
	w.dirty = false
	return w.sink.sync()
}

func (w *writer) complain(err error) {
	if err != nil && time.Since(w.complained) >= complainInterval {
		w.complained = time.Now()
		w.log.Error("the audit log cannot be written", "error", err, "lost_records", w.lost)
	}
}

func (w *writer) replace(d destination) {
	w.finish()
	w.destination = d
	w.dirty = false
}

func (w *writer) finish() {
	w.noteLost()
	if w.dirty && w.fsync != FsyncNever {
		w.complain(w.sync())
	}
	if err := w.sink.close(); err != nil {
		w.complain(err)
	}
}
