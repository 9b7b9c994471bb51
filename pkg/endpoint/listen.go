package endpoint

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

const (
	// listenLockTimeout is how long Listen waits for another Listen in the same directory.
	listenLockTimeout = 2 * time.Second
	// probeTimeout is how long Listen tries to connect to an existing socket.
	probeTimeout = 2 * time.Second
)

// Listen creates the Unix socket at path with mode 0600, and its directory with mode 0700 if it does not exist. It
// replaces a socket that a process has left behind. A socket on which somebody accepts connections is an error, and so is
// any other file. Closing the listener removes the socket, unless another process has replaced it.
func Listen(path string) (net.Listener, error) {
	if !filepath.IsAbs(path) {
		return nil, fmt.Errorf("listen on %q: the path of a socket must be absolute", path)
	}
	if len(path) > maxPath {
		return nil, fmt.Errorf("listen on %s: the path has %d characters, a Unix socket's may have %d", path, len(path), maxPath)
	}
	directory := filepath.Dir(path)
	if err := os.MkdirAll(directory, 0o700); err != nil {
		return nil, fmt.Errorf("listen on %s: %w", path, err)
	}
	unlock, err := lockDirectory(directory)
	if err != nil {
		return nil, fmt.Errorf("listen on %s: %w", path, err)
	}
	defer unlock()

	if err := removeStaleSocket(path); err != nil {
		return nil, fmt.Errorf("listen on %s: %w", path, err)
	}
	config := net.ListenConfig{Control: func(_, _ string, conn syscall.RawConn) error {
		// bind(2) uses the mode of the descriptor, so that others may not connect even for a moment. A umask
		// would do the same, but it affects the whole process.
		var chmodErr error
		if err := conn.Control(func(fd uintptr) { chmodErr = unix.Fchmod(int(fd), 0o600) }); err != nil {
			return err
		}
		return chmodErr
	}}
	listener, err := config.Listen(context.Background(), "unix", path)
	if err != nil {
		return nil, fmt.Errorf("listen on %s: %w", path, err)
	}
	unixListener := listener.(*net.UnixListener)
	unixListener.SetUnlinkOnClose(false)
	created, err := os.Lstat(path)
	if err != nil {
		listener.Close()
		return nil, fmt.Errorf("listen on %s: %w", path, err)
	}
	return &socketListener{UnixListener: unixListener, path: path, created: created}, nil
}

// Place identifies a listener's socket, for Adopt.
type Place struct {
	Path          string
	Device, Inode uint64
}

// PlaceOf returns the place of a listener that Listen or Adopt has returned.
func PlaceOf(listener net.Listener) (Place, error) {
	l, ok := listener.(*socketListener)
	if !ok {
		return Place{}, fmt.Errorf("a %T is no listener of this package", listener)
	}
	return l.place(), nil
}

// Adopt turns a listener that another program has opened at this place into one as Listen returns.
func Adopt(listener net.Listener, at Place) (net.Listener, error) {
	unixListener, ok := listener.(*net.UnixListener)
	if !ok {
		return nil, fmt.Errorf("listen on %s: a %T is no Unix socket", at.Path, listener)
	}
	unixListener.SetUnlinkOnClose(false)
	now, err := os.Lstat(at.Path)
	if err != nil {
		return nil, fmt.Errorf("listen on %s: the socket is gone: %w", at.Path, err)
	}
	adopted := &socketListener{UnixListener: unixListener, path: at.Path, created: now}
	if adopted.place() != at {
		return nil, fmt.Errorf("listen on %s: another process has put its own socket there", at.Path)
	}
	return adopted, nil
}

func (l *socketListener) place() Place {
	place := Place{Path: l.path}
	if stat, ok := l.created.Sys().(*syscall.Stat_t); ok {
		place.Device, place.Inode = stat.Dev, stat.Ino
	}
	return place
}

// socketListener removes its socket when it is closed, unless another process has replaced it.
type socketListener struct {
	*net.UnixListener
	path    string
	created fs.FileInfo
	once    sync.Once
}

// Close stops accepting and removes the socket.
func (l *socketListener) Close() error {
	err := l.UnixListener.Close()
	l.once.Do(func() {
		now, statErr := os.Lstat(l.path)
		if statErr == nil && os.SameFile(now, l.created) {
			statErr = os.Remove(l.path)
		}
		if statErr != nil && !errors.Is(statErr, fs.ErrNotExist) {
			err = errors.Join(err, statErr)
		}
	})
	return err
}

func removeStaleSocket(path string) error {
	info, err := os.Lstat(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	if info.Mode().Type() != fs.ModeSocket {
		return errors.New("there is a file at this path that is no socket: remove it, or choose another path")
	}
	conn, err := net.DialTimeout("unix", path, probeTimeout)
	if err == nil {
		conn.Close()
		return errors.New("another process is serving this socket: stop it, or choose another path")
	}
	// Any other error, such as a full backlog, means that the socket is in use.
	if !errors.Is(err, unix.ECONNREFUSED) && !errors.Is(err, unix.ENOENT) {
		return fmt.Errorf("the socket seems to be in use: %w", err)
	}
	if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("remove the socket left behind by another process: %w", err)
	}
	return nil
}

// lockDirectory locks the directory, so that two processes do not mistake each other's new socket for a stale one. There
// is no lock file that could be left behind.
func lockDirectory(directory string) (unlock func(), err error) {
	file, err := os.Open(directory)
	if err != nil {
		return nil, err
	}
	timeout := time.NewTimer(listenLockTimeout)
	defer timeout.Stop()
	retry := time.NewTicker(10 * time.Millisecond) // flock(2) cannot wait with a limit
	defer retry.Stop()
	for {
		err := unix.Flock(int(file.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		if err == nil {
			return func() { file.Close() }, nil
		}
		if !errors.Is(err, unix.EWOULDBLOCK) && !errors.Is(err, unix.EINTR) {
			file.Close()
			return nil, fmt.Errorf("lock %s: %w", directory, err)
		}
		select {
		case <-retry.C:
		case <-timeout.C:
			file.Close()
			return nil, fmt.Errorf("another process has kept %s locked for %v", directory, listenLockTimeout)
		}
	}
}
