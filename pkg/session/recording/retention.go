package recording

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
)

// retain removes the oldest recordings until the rest keeps to the limits. Those that are being
// written stay, and so does everything that is no recording.
func (r *Recorder) retain(config Config) {
	if config.MaxFiles == 0 && config.MaxTotal == 0 {
		return
	}
	r.retention.Lock()
	defer r.retention.Unlock()
	entries, err := os.ReadDir(config.Directory) // sorted by name, which is by time
	if err != nil {
		r.log.Warn("old recordings cannot be removed", "directory", config.Directory, "error", err)
		return
	}
	type old struct {
		path string
		size int64
	}
	var (
		files []old
		total int64
	)
	for _, entry := range entries {
		info, err := entry.Info()
		if err != nil || !info.Mode().IsRegular() || !strings.HasSuffix(entry.Name(), Suffix) {
			continue
		}
		files = append(files, old{filepath.Join(config.Directory, entry.Name()), info.Size()})
		total += info.Size()
	}
	left := len(files)
	for _, file := range files {
		if (config.MaxFiles == 0 || left <= config.MaxFiles) && (config.MaxTotal == 0 || total <= config.MaxTotal) {
			return
		}
		r.mu.Lock()
		live := r.live[file.path]
		r.mu.Unlock()
		if live {
			continue
		}
		if err := os.Remove(file.path); err != nil && !errors.Is(err, fs.ErrNotExist) {
			r.log.Warn("an old recording cannot be removed", "file", file.path, "error", err)
			continue
		}
		left--
		total -= file.size
	}
}
