package recording

import (
	"context"
	"errors"
	"fmt"
	"io"
	"path/filepath"
	"time"

	"github.com/streamshim/streamshim/pkg/asciicast"
	"github.com/streamshim/streamshim/pkg/handover"
	"github.com/streamshim/streamshim/pkg/rescue"
	"github.com/streamshim/streamshim/pkg/session"
	"github.com/streamshim/streamshim/pkg/session/transcript"
	"github.com/streamshim/streamshim/pkg/workload"
)

// stateVersion is the version of State. A reader with another version refuses it.
const stateVersion = 1

// State is the state of a recording whose session is handed over.
type State struct {
	Version int
	Path    string
	File    handover.Descriptor
	// Input, MaxSize, Buffer, Command and Deny are those of the Config that it began with.
	Input    bool
	MaxSize  int64
	Buffer   int
	Command  session.CommandLevel
	Deny     bool
	Flawed   bool // already counted as incomplete
	Over     bool // nothing more is written although the session continues; the fields below are not used
	Size     int64
	Last     time.Duration // time of the last event since the beginning
	Cut      transcript.State
	Events   int // events other than sizes; while 0 the header may still change
	LastSize workload.Size
}

// Carried implements session.Carrier.
func (r *Recorder) Carried() string { return "recording" }

// Freeze implements session.Carrier. Everything shown so far is in the file, which still counts as being written.
func (r *Recorder) Freeze(s *session.Session, files *handover.Files) ([]byte, error) {
	r.mu.Lock()
	rec := r.recordings[s]
	delete(r.recordings, s)
	r.mu.Unlock()
	if rec == nil {
		return nil, nil
	}
	state, err := rec.freeze(files)
	if err != nil {
		return nil, rec.handleFailure(err)
	}
	return handover.Encode(state)
}

// handleFailure returns err if the session must not continue without its recording, and otherwise logs it.
func (rec *recording) handleFailure(err error) error {
	if rec.config.Deny {
		return err
	}
	rec.session.Log().Error("the recording of a session could not be handed over", "file", rec.path, "error", err)
	return nil
}

func (rec *recording) freeze(files *handover.Files) (State, error) {
	rec.frozen.Store(true)
	rec.remove()
	rec.queue.Close()
	if !rec.awaitWriter() {
		rec.flawed()
		return State{}, errSlowDisk
	}
	c := rec.config
	state := State{
		Version: stateVersion, Path: rec.path, Over: rec.over, Flawed: rec.isFlawed.Load(),
		Input: c.Input, MaxSize: c.MaxSize, Buffer: c.Buffer, Command: c.Command, Deny: c.Deny,
	}
	if rec.over {
		return state, nil
	}
	defer rec.file.Close() //nolint:errcheck // everything is written
	var err error
	if state.File, err = files.Keep(rec.file); err != nil {
		rec.flawed()
		rec.finish(err)
		rec.place.end(filepath.Base(rec.path), rec.size)
		return State{}, err
	}
	rec.place.grew(-rec.size) // until Resume counts it again
	state.Size, state.Last, state.Cut = rec.size, rec.cast.Last(), rec.encoder.State()
	state.Events, state.LastSize = rec.events, rec.lastSize
	return state, nil
}

// freezePatience is how long a freeze waits for the last write of a recording. All sessions stand still meanwhile.
const freezePatience = time.Second

// awaitWriter waits until the writer has ended, and reports whether it has. A writer that is too slow finishes the recording by
// itself once its disk answers.
func (rec *recording) awaitWriter() bool {
	patience := time.NewTimer(freezePatience)
	defer patience.Stop()
	select {
	case <-rec.ended:
		return true
	case <-patience.C:
	}
	if !rec.left.Swap(true) {
		return false
	}
	<-rec.ended // it was about to
	return true
}

// Resume implements session.Carrier: the recording continues in the same file.
func (r *Recorder) Resume(s *session.Session, encoded []byte, files *handover.Files) error {
	if encoded == nil {
		return nil // it was not recorded
	}
	state, err := decode(encoded)
	if err != nil {
		return r.handleUnreadable(s, err)
	}
	config := Config{
		Directory: filepath.Dir(state.Path),
		Input:     state.Input, MaxSize: state.MaxSize, Buffer: state.Buffer, Command: state.Command, Deny: state.Deny,
	}
	rec := r.newRecording(config, s, state.Path, nil)
	rec.isFlawed.Store(state.Flawed)
	if state.Over {
		r.resumeEnded(rec)
		return nil
	}
	if err := rec.resume(state, files); err != nil {
		rec.flawed()
		return rec.handleFailure(err)
	}
	r.listen(rec)
	r.mu.Lock()
	r.recordings[s] = rec
	r.mu.Unlock()
	r.write(rec)
	return nil
}

func decode(encoded []byte) (state State, err error) {
	if err := handover.Decode(encoded, &state); err != nil {
		return state, err
	}
	if state.Version != stateVersion {
		return state, fmt.Errorf("%w: version %d, only %d is known", errBadState, state.Version, stateVersion)
	}
	return state, nil
}

// handleUnreadable returns err unless sessions may continue unrecorded. The configuration of this recording is
// unknown.
func (r *Recorder) handleUnreadable(s *session.Session, err error) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.incomplete.Add(1)
	if r.config.Deny {
		return err
	}
	r.log.Error("the recording of a session does not go on", "session", s.ID, "error", err)
	return nil
}

// resumeEnded keeps blocking delivery in a session whose recording has ended but must not have; see run.
func (r *Recorder) resumeEnded(rec *recording) {
	if !rec.config.Deny {
		return
	}
	rec.over = true
	close(rec.ended)
	r.listen(rec)
	rec.blocking.end()
	r.mu.Lock()
	defer r.mu.Unlock()
	r.recordings[rec.session] = rec
}

var errBadState = errors.New("state of a recording that cannot be read")

// resume reopens the recording's file at its old position.
func (rec *recording) resume(state State, files *handover.Files) (err error) {
	if state.Size < 0 || state.Last < 0 || state.Events < 0 || state.Buffer <= 0 || filepath.Ext(state.Path) != Suffix {
		return errBadState
	}
	if rec.file, err = files.Take(state.File, state.Path); err != nil {
		return err
	}
	info, err := rec.file.Stat()
	if err == nil && !info.Mode().IsRegular() {
		err = fmt.Errorf("%w: %s is no regular file", errBadState, state.Path)
	}
	if err == nil {
		_, err = rec.file.Seek(state.Size, io.SeekStart)
	}
	if err != nil {
		return errors.Join(err, rec.file.Close())
	}
	rec.place.begin(filepath.Base(state.Path))
	rec.place.grew(state.Size)
	rec.size, rec.events, rec.lastSize = state.Size, state.Events, state.LastSize
	rec.cast = asciicast.Continue(rec, state.Last)
	rec.encoder = transcript.Continue(rec.cast, rec.session.Start, rec.session.TTY, state.Cut)
	return nil
}

// Settle waits until the recordings of ended sessions are complete. Call it after all sessions were frozen.
func (r *Recorder) Settle(ctx context.Context) error {
	written := make(chan struct{})
	rescue.Go(rescue.Die, func() {
		defer close(written)
		r.writers.Wait()
	})
	select {
	case <-written:
		return nil
	case <-ctx.Done():
		return fmt.Errorf("recordings are still being written: %w", context.Cause(ctx))
	}
}

var _ session.Carrier = (*Recorder)(nil)
