package audit

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"

	"golang.org/x/sys/unix"
)

// fileSink appends to a file that others may rename or remove at any time.
type fileSink struct {
	path     string
	maxSize  int64
	maxFiles int
	file     *os.File
	info     fs.FileInfo // identifies the open file
}

// openFile opens or creates the file for root only (0600), and if necessary its directory (0700).
func openFile(path string, maxSize int64, maxFiles int) (*fileSink, error) {
	s := &fileSink{path: path, maxSize: maxSize, maxFiles: maxFiles}
	if err := s.open(); err != nil {
		return nil, err
	}
	return s, nil
}

func (s *fileSink) open() error {
	file, err := openAppending(s.path)
	if err != nil {
		return err
	}
	info, err := file.Stat()
	if err == nil {
		err = endLine(file, info.Size())
	}
	if err != nil {
		file.Close() //nolint:errcheck // the first error matters
		return err
	}
	s.file, s.info = file, info
	return nil
}

// openAppending opens or creates a file for root only.
func openAppending(path string) (_ *os.File, err error) {
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		return nil, err
	}
	// Readable, so that its last byte can be checked.
	file, err := os.OpenFile(path, os.O_RDWR|os.O_APPEND|os.O_CREATE, 0o600)
	if err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			file.Close() //nolint:errcheck // the first error matters
		}
	}()
	info, err := file.Stat()
	if err != nil {
		return nil, err
	}
	if !info.Mode().IsRegular() {
		return nil, fmt.Errorf("%s is no regular file", path)
	}
	return file, file.Chmod(0o600)
}

// endLine terminates a line that a crash left incomplete.
func endLine(file *os.File, size int64) error {
	if size == 0 {
		return nil
	}
	last := make([]byte, 1)
	if _, err := file.ReadAt(last, size-1); err != nil {
		return err
	}
	if last[0] != '\n' {
		_, err := file.Write([]byte{'\n'})
		return err
	}
	return nil
}

func (s *fileSink) write(line []byte) error {
	size, err := s.follow()
	if err != nil {
		return err
	}
	if s.maxSize > 0 && size > 0 && size+int64(len(line)) > s.maxSize {
		if err := s.rotate(); err != nil {
			return fmt.Errorf("rotate: %w", err)
		}
		size = 0
	}
	n, err := s.file.Write(line)
	if err != nil && n > 0 {
		// Half a line would spoil the next one. Truncating works even on a full disk.
		err = errors.Join(err, s.file.Truncate(size))
	}
	return err
}

// follow makes sure that the open file is the one at the path, and returns its size.
func (s *fileSink) follow() (int64, error) {
	if s.file != nil {
		now, err := os.Stat(s.path)
		if err == nil && os.SameFile(now, s.info) {
			return now.Size(), nil
		}
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return 0, err
		}
		s.drop()
	}
	if err := s.open(); err != nil {
		return 0, err
	}
	return s.info.Size(), nil
}

func (s *fileSink) drop() {
	s.file.Close() //nolint:errcheck // what was written is with the kernel
	s.file = nil
}

// rotate renames PATH to PATH.1, PATH.1 to PATH.2 and so on, and starts a new file.
func (s *fileSink) rotate() error {
	numbered := func(n int) string { return s.path + "." + strconv.Itoa(n) }
	if err := s.file.Sync(); err != nil {
		return err
	}
	if s.maxFiles == 0 {
		if err := os.Remove(s.path); err != nil {
			return err
		}
	} else {
		for n := s.maxFiles - 1; n >= 1; n-- {
			if err := os.Rename(numbered(n), numbered(n+1)); err != nil && !errors.Is(err, fs.ErrNotExist) {
				return err
			}
		}
		if err := os.Rename(s.path, numbered(1)); err != nil {
			return err
		}
	}
	// max_files may have been lowered.
	for n := s.maxFiles + 1; os.Remove(numbered(n)) == nil; n++ {
	}
	s.drop()
	return s.open()
}

func (s *fileSink) sync() error {
	if s.file == nil {
		return nil
	}
	return unix.Fdatasync(int(s.file.Fd()))
}

func (s *fileSink) close() error {
	if s.file == nil {
		return nil
	}
	return s.file.Close()
}
