package audit

import (
	"encoding/json"
	"errors"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"time"
)

// interrupted is the reason in the end record of a session that ended because its streamshim was killed.
const interrupted = "interrupted"

// openSuffix ends the names of open sessions' files.
const openSuffix = ".open"

// maxOpenFile bounds how many bytes of a file are read. A record has a command of up to 16 KiB.
const maxOpenFile = 256 << 10

// openSessions keeps one file per session whose start was audited but whose end was not, so that the next
// streamshim can write the ends that this one could not. It lives in the state directory, which does not survive a
// reboot.
type openSessions struct {
	dir string // "" disables it
}

// begin notes a session before its start record is written.
func (o openSessions) begin(record *Record) error {
	if o.dir == "" {
		return nil
	}
	if err := os.MkdirAll(o.dir, 0o700); err != nil {
		return err
	}
	return os.WriteFile(o.path(record.Session), record.line(), 0o600)
}

// end removes a session's note.
func (o openSessions) end(id string) {
	if o.dir != "" {
		os.Remove(o.path(id)) //nolint:errcheck // it may not have been noted
	}
}

func (o openSessions) path(id string) string { return filepath.Join(o.dir, id+openSuffix) }

// left returns the end records of sessions that a predecessor left open, as far as their files can be read.
func (o openSessions) left() ([]*Record, error) {
	if o.dir == "" {
		return nil, nil
	}
	entries, err := os.ReadDir(o.dir)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	var records []*Record
	var failures []error
	for _, entry := range entries {
		id, ours := strings.CutSuffix(entry.Name(), openSuffix)
		if !ours {
			continue
		}
		record, err := readRecord(o.path(id))
		if err != nil || record.Session != id {
			failures = append(failures, err)
			o.end(id) // truncated by the kill: its start record was not written either
			continue
		}
		record.Time, record.Event, record.Reason = time.Now().UTC(), End, interrupted
		record.Error = "streamshim was killed; when the session ended is not known"
		records = append(records, record)
	}
	return records, errors.Join(failures...)
}

func readRecord(path string) (*Record, error) {
	file, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer file.Close() //nolint:errcheck // only read
	text, err := io.ReadAll(io.LimitReader(file, maxOpenFile))
	if err != nil {
		return nil, err
	}
	var record Record
	return &record, json.Unmarshal(text, &record)
}
