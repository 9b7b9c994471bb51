package recording

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"slices"
	"strings"
	"time"
)

// File is a recording in a directory, as described by its name.
type File struct {
	Name      string // without the directory
	Namespace string
	Pod       string
	Container string
	SessionID string
	Started   time.Time
	Size      int64 // bytes; grows while the session lives
}

// maxListed bounds a list. Older recordings are omitted.
const maxListed = 10000

// nameTime is the time format in a recording's name.
const nameTime = "20060102T150405.000Z"

// parseName parses a name made by fileName. Names with fewer than five parts belong to sessions whose pod has no
// labels.
func parseName(name string) (File, bool) {
	parts := strings.Split(strings.TrimSuffix(name, Suffix), "_")
	if len(parts) != 5 || !strings.HasSuffix(name, Suffix) {
		return File{}, false
	}
	started, err := time.Parse(nameTime, parts[0])
	if err != nil {
		return File{}, false
	}
	return File{Name: name, Started: started, Namespace: parts[1], Pod: parts[2], Container: parts[3], SessionID: parts[4]}, true
}

// Files lists the recordings in a directory, newest first. A directory that does not exist has none.
func Files(directory string) ([]File, error) {
	entries, err := os.ReadDir(directory)
	if err != nil {
		if errors.Is(err, fs.ErrNotExist) {
			return nil, nil
		}
		return nil, fmt.Errorf("list recordings: %w", err)
	}
	var files []File
	for _, entry := range slices.Backward(entries) { // by name and thus by time
		if len(files) == maxListed {
			break
		}
		file, ok := parseName(entry.Name())
		if !ok || !entry.Type().IsRegular() {
			continue
		}
		info, err := entry.Info()
		if err != nil {
			continue // removed meanwhile
		}
		file.Size = info.Size()
		files = append(files, file)
	}
	return files, nil
}

// ErrNoRecording is returned by Open if no recording in the directory has this name.
var ErrNoRecording = errors.New("no such recording")

// Open opens a recording by its name in the directory. The caller must close it.
func Open(directory, name string) (*os.File, error) {
	if _, ok := parseName(name); !ok {
		return nil, fmt.Errorf("%w: %q", ErrNoRecording, name)
	}
	file, err := os.OpenInRoot(directory, name) // cannot leave the directory
	if errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("%w: %q; it may have been removed to make room", ErrNoRecording, name)
	}
	return file, err
}
