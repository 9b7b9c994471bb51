package portforward

import (
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/streamshim/streamshim/pkg/handover"
	"github.com/streamshim/streamshim/pkg/rescue"
)

const (
	// pollInterval is how often to check a namespace whose directory inotify cannot watch: any below /proc, or any
	// at all when the node is out of inotify instances or watches.
	pollInterval = time.Second
	// lookInterval is how often to check the others nevertheless: an unmount without removal of the file is not an
	// event in the directory.
	lookInterval = 15 * time.Second
)

// Watcher notices when network namespaces are gone from their paths, for all Forwarders of a process, with one
// inotify instance (a node has only 128 by default) and one goroutine. Its methods are safe for concurrent use.
type Watcher struct {
	file  *os.File // inotify, or one that is never readable
	polls bool     // there is no inotify
	done  chan struct{}

	mu      sync.Mutex
	watched map[*watchedNamespace]struct{}
	folders map[string]*watchedFolder
	polled  int // how many of watched have no inotify watch
}

type watchedNamespace struct {
	namespace *namespace
	folder    *watchedFolder // nil without an inotify watch
	gone      func()
}

type watchedFolder struct {
	path       string
	descriptor int
	users      int
}

// NewWatcher starts a Watcher. If inotify is not available, it logs that and polls. The caller must close it,
// after the Forwarders that use it.
func NewWatcher(log *slog.Logger) (*Watcher, error) {
	fd, err := unix.InotifyInit1(unix.IN_CLOEXEC | unix.IN_NONBLOCK)
	polls := err != nil
	if polls {
		log.Warn("inotify is not available: the end of a pod is noticed by polling, up to a second late; "+
			"raising fs.inotify.max_user_instances helps", "error", err)
		// A file that is never readable, so that only deadlines wake the goroutine.
		if fd, err = unix.Eventfd(0, unix.EFD_CLOEXEC|unix.EFD_NONBLOCK); err != nil {
			return nil, fmt.Errorf("watch network namespaces: %w", os.NewSyscallError("eventfd", err))
		}
	}
	return startWatcher(os.NewFile(uintptr(fd), "inotify"), polls), nil
}

// ResumeWatcher starts a Watcher with the inotify instance of another one, from Keep. It takes the file. A node may have no
// instance left for a new one, and the kernel takes up to 20 ms to let go of the old one. Directories that no
// Forwarder uses any more stay watched: their events say to look at what is used.
func ResumeWatcher(inotify *os.File) *Watcher { return startWatcher(inotify, false) }

func startWatcher(file *os.File, polls bool) *Watcher {
	w := &Watcher{
		file:    file,
		polls:   polls,
		done:    make(chan struct{}),
		watched: map[*watchedNamespace]struct{}{},
		folders: map[string]*watchedFolder{},
	}
	rescue.Go(rescue.Die, w.run) // belongs to no session
	return w
}

// Close stops watching and waits for the goroutine. No namespace is reported gone afterwards.
func (w *Watcher) Close() error {
	err := w.file.Close()
	<-w.done
	return err
}

// Keep adds the inotify instance to the files, for ResumeWatcher in another program. It returns zero if there is none.
func (w *Watcher) Keep(files *handover.Files) (handover.Descriptor, error) {
	if w.polls {
		return 0, nil
	}
	return files.Keep(w.file)
}

// watch calls gone, once and from the Watcher's goroutine, when the namespace is no longer at its path. It may
// miss for lookInterval what happened before it was set up, so callers check once themselves. stop ends the watch;
// gone may still be running when it returns.
func (w *Watcher) watch(n *namespace, gone func()) (stop func()) {
	w.mu.Lock()
	defer w.mu.Unlock()
	entry := &watchedNamespace{namespace: n, gone: gone}
	entry.folder = w.useFolder(n.path)
	w.watched[entry] = struct{}{}
	if entry.folder == nil {
		w.polled++
	}
	// Wake the goroutine, so that it sets its deadline anew.
	w.file.SetReadDeadline(time.Unix(1, 0))
	return func() {
		w.mu.Lock()
		defer w.mu.Unlock()
		w.forget(entry)
	}
}

// run checks all namespaces whenever something was removed from one of their directories. It ignores the events'
// contents: they only say when to check. So dropped events, and directories removed as a whole, do no harm.
func (w *Watcher) run() {
	defer close(w.done)
	events := make([]byte, 16<<10)
	for {
		w.rest()
		if _, err := w.file.Read(events); err != nil && !errors.Is(err, os.ErrDeadlineExceeded) {
			return // closed
		}
		for _, entry := range w.takeGone() {
			entry.gone()
		}
	}
}

// rest sets how long the next read may wait.
func (w *Watcher) rest() {
	w.mu.Lock()
	defer w.mu.Unlock()
	var deadline time.Time
	switch {
	case w.polled > 0:
		deadline = time.Now().Add(pollInterval)
	case len(w.watched) > 0:
		deadline = time.Now().Add(lookInterval)
	}
	w.file.SetReadDeadline(deadline)
}

// takeGone removes and returns the entries whose namespace is gone.
func (w *Watcher) takeGone() (gone []*watchedNamespace) {
	w.mu.Lock()
	defer w.mu.Unlock()
	for entry := range w.watched {
		if errors.Is(entry.namespace.check(), ErrSandboxGone) {
			w.forget(entry)
			gone = append(gone, entry)
		}
	}
	return gone
}

func (w *Watcher) forget(entry *watchedNamespace) {
	if _, ok := w.watched[entry]; !ok {
		return
	}
	delete(w.watched, entry)
	if entry.folder == nil {
		w.polled--
		return
	}
	entry.folder.users--
	if entry.folder.users == 0 {
		delete(w.folders, entry.folder.path)
		w.control(func(fd int) error { //nolint:errcheck // a watch that is gone already needs no removal
			_, err := unix.InotifyRmWatch(fd, uint32(entry.folder.descriptor)) // fails if the directory is gone
			return err
		})
	}
}

// useFolder watches the directory of the namespace's file. A watch on the file itself would be on the namespace's
// inode: it misses the unmount and keeps the namespace alive.
func (w *Watcher) useFolder(path string) *watchedFolder {
	path, err := filepath.EvalSymlinks(path)
	if err != nil {
		return nil // such as links in /proc/PID/ns, which lead to no path
	}
	path = filepath.Dir(path)
	folder := w.folders[path]
	if folder == nil {
		folder = &watchedFolder{path: path}
		err := w.control(func(fd int) (err error) {
			folder.descriptor, err = unix.InotifyAddWatch(fd, path,
				unix.IN_DELETE|unix.IN_MOVED_FROM|unix.IN_DELETE_SELF|unix.IN_MOVE_SELF|unix.IN_ONLYDIR)
			return err
		})
		if err != nil {
			return nil
		}
		w.folders[path] = folder
	}
	folder.users++
	return folder
}

func (w *Watcher) control(do func(fd int) error) error {
	raw, err := w.file.SyscallConn()
	if err != nil {
		return err
	}
	var doErr error
	return errors.Join(raw.Control(func(fd uintptr) { doErr = do(int(fd)) }), doErr)
}
