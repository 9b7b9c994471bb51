package daemon

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"
)

// lockStateDir prevents a second streamshim from using the state directory: it would take this one's processes and
// sessions for those of a predecessor that was killed, and end them. The lock lasts until the file is closed or the
// process ends.
func lockStateDir(dir string) (*os.File, error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, fmt.Errorf("state directory: %w", err)
	}
	file, err := os.OpenFile(filepath.Join(dir, "lock"), os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, fmt.Errorf("state directory: %w", err)
	}
	if err := unix.Flock(int(file.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		if errors.Is(err, unix.EWOULDBLOCK) {
			err = errors.New("another streamshim uses it; stop that one, or name another directory with --state-dir")
		}
		return nil, errors.Join(fmt.Errorf("state directory %s: %w", dir, err), file.Close())
	}
	return file, nil
}
