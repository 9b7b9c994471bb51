// Package audit writes down who did what: one JSON line at the start and one at the end of each
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

	"github.com/streamshim/streamshim/pkg/session"
)

// Destination is where records go.
type Destination string

// The destinations.
const (
	Off      Destination = "off"
	File     Destination = "file"
	Stdout   Destination = "stdout"
	Journald Destination = "journald"
)

// Fsync says when records in a file are forced to the disk.
type Fsync string

// The policies: when the kernel likes, about every second, before anybody goes on.
const (
	FsyncNever    Fsync = "never"
	FsyncInterval Fsync = "interval"
	FsyncAlways   Fsync = "always"
)

// Config is how the log is kept.
type Config struct {
	Destination Destination
	File        string // path, for Destination File
	MaxSize     int64  // bytes after which the file is rotated, 0 is never
	MaxFiles    int    // rotated files that are kept
	Command     session.CommandLevel
	ExecSync    bool // write records of ExecSync calls, too
	Fsync       Fsync
	// Deny refuses a session whose start cannot be written.
	Deny bool
	// OpenDir is where sessions are noted while they are open, so that after a kill the next New writes their
	// ends, with the reason "interrupted". Only one process may use it. Empty means that nobody does.
	OpenDir string
	// HandedOver says that another program has handed its sessions over to this one: New leaves those that are noted there
	// until Settle.
	HandedOver bool
}

const (
	// queueSize is how many records may wait for a slow disk.
	queueSize = 1024
	// updatesSize is how many changes of the configuration may wait behind them.
	updatesSize = 8
	// writeTimeout is how long the start of a session waits for its record when Config.Deny is set.
	writeTimeout = 5 * time.Second
	syncInterval = time.Second
	// complainInterval is how often a log that cannot be written is complained about.
	complainInterval = time.Minute
)

var (
	errQueueFull = errors.New("the queue of audit records is full: the disk is too slow")
	errTimeout   = fmt.Errorf("the audit record was not written within %v", writeTimeout)
	errClosed    = errors.New("the audit log is closed")
	errStuck     = errors.New("the disk of the audit log does not answer, and earlier changes still wait for it")
)

// Log is the audit log, a session.Guard. Records are written by a goroutine of its own; sessions
// wait for it only where Config.Deny says so.
type Log struct {
	log   *slog.Logger
	open  openSessions
	queue chan entry
	done  chan struct{} // closed when the goroutine has ended
	gone  atomic.Int64  // records that were lost, ever

	interrupted []*Record // of sessions that a predecessor has left open

	mu        sync.Mutex // guards what follows, and sending to a queue that may be closed
	unclaimed []*Record  // of sessions that are open in another program's hand-over, and not resumed yet
	config    Config
	closed    bool
	lost      int64 // records that found the queue full
}

// entry is a record on its way to the goroutine, or an order to it.
type entry struct {
	line    []byte
	replace *destination // to be used from now on
	written chan<- error // nil when nobody waits; has room for one, as settled has
	ends    string       // the session that is over with this line, if any
	settled chan<- settlement
}

// settlement answers an entry that waits for all before it.
type settlement struct {
	lost int64 // not yet noted in the log itself
	err  error // of the disk
}

// destination is a sink and how it is used.
type destination struct {
	sink  sink
	fsync Fsync
}

// sink is a place for lines. All methods are called by one goroutine.
type sink interface {
	// write writes one whole line, or nothing of it and returns why.
	write(line []byte) error
	sync() error
	close() error
}

// New opens the destination and starts the log. Close ends it. Complaints about a destination that
// fails go to the logger, at most one a minute.
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
	go l.run(destination{s, config.Fsync})
	return l, nil
}

// Try tells why a log could not be kept as the configuration says. It writes nothing to it.
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

// Update changes how the log is kept from the next record on, without waiting for those that are not
// written yet. After an error it is kept as before.
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
	default: // waiting for room would hold up every session: the lock is held
		return fmt.Errorf("audit log: %w", errors.Join(errStuck, s.close()))
	}
}

// Close writes what waits and closes the destination.
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
	l.put(entry{line: record.line()}) //nolint:errcheck // what is lost is counted
}

// BeginSync writes the start of an ExecSync. End, which is never nil without an error, writes how it
// ended and how many bytes of output it gave. The error is a *session.RefusedError.
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
		l.put(entry{line: line}) //nolint:errcheck // as in Refused
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
			// The record of the start still waits: behind it must stand that nothing followed.
			l.end(id, info, began, 0, 0, session.Outcome{Reason: "refused", ExitCode: -1, Err: err})
		}
	}
	if err == nil {
		return nil
	}
	if !errors.Is(err, errTimeout) && ctx.Err() == nil {
		l.open.end(id) // no start was written; else the record of the end does it
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
	if l.put(entry{line: record.line(), ends: id}) != nil { // what is lost is counted
		l.open.end(id)
	}
}

// put queues a line and never waits. Without room the line is lost, which is counted.
func (l *Log) put(e entry) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.closed {
		return errClosed
	}
	if len(l.queue) >= queueSize { // the rest is room for Update; only the lock's holder adds to it
		l.lost++
		l.gone.Add(1)
		return errQueueFull
	}
	l.queue <- e
	return nil
}

// Lost is how many records could not be written since the log was opened.
func (l *Log) Lost() int64 { return l.gone.Load() }

func (l *Log) takeLost() int64 {
	l.mu.Lock()
	defer l.mu.Unlock()
	n := l.lost
	l.lost = 0
	return n
}

// writer is the state of the goroutine that writes.
type writer struct {
	destination
	log        *slog.Logger
	open       openSessions
	lost       int64         // not yet noted in the log itself
	gone       *atomic.Int64 // the Log's
	complained time.Time
	dirty      bool // written and not synced
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

// batch writes an entry and all that wait behind it, so that they share one fsync.
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

// endInterrupted writes the ends that a predecessor could not write.
func (w *writer) endInterrupted(records []*Record) {
	for _, record := range records {
		w.line(record.line()) //nolint:errcheck // what is lost is counted
		w.open.end(record.Session)
	}
}

// line writes a line, and before it how many could not be written: what was lost while a batch was
// written is noted behind it.
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

// noteLost writes how many records could not be written, if that can.
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
