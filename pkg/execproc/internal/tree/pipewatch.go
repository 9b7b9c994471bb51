package tree

import (
	"os"
	"strconv"

	"golang.org/x/sys/unix"
)

// PipeWatch tells whether anyone holds the process's ends of its pipes, even after ours were closed. It holds no
// end itself, only references to the pipes (O_PATH, open(2)), so a writer to a pipe without readers still gets
// SIGPIPE.
type PipeWatch struct{ pipes []watchedPipe }

type watchedPipe struct {
	fd    int
	input bool // the process reads from it
}

// WatchPipes watches pipes through our ends of them; a nil end is skipped. It returns nil if one was closed
// already. The caller must close the watch.
func WatchPipes(stdin, stdout, stderr *os.File) *PipeWatch {
	w := &PipeWatch{}
	for _, file := range []*os.File{stdin, stdout, stderr} {
		if file == nil {
			continue
		}
		raw, err := file.SyscallConn()
		path := -1
		if err == nil {
			ctlErr := raw.Control(func(fd uintptr) {
				path, err = unix.Open("/proc/self/fd/"+strconv.Itoa(int(fd)), unix.O_PATH|unix.O_CLOEXEC, 0)
			})
			if ctlErr != nil {
				err = ctlErr
			}
		}
		if err != nil { // already closed
			w.Close()
			return nil
		}
		w.pipes = append(w.pipes, watchedPipe{path, file == stdin})
	}
	return w
}

// Close ends the watch. It is safe on nil.
func (w *PipeWatch) Close() {
	if w != nil {
		for _, pipe := range w.pipes {
			unix.Close(pipe.fd)
		}
	}
}

// Held reports whether anyone may hold one of the process's ends. A nil watch does not know and reports true.
func (w *PipeWatch) Held() bool {
	if w == nil {
		return true
	}
	for _, pipe := range w.pipes {
		if pipe.held() {
			return true
		}
	}
	return false
}

// held briefly opens an end like ours and polls it: a pipe without writers reports POLLHUP, one without readers
// POLLERR (poll(2)). Opening an anonymous pipe by its path never blocks.
func (p watchedPipe) held() bool {
	flags, alone := unix.O_RDONLY, int16(unix.POLLHUP)
	if p.input {
		flags, alone = unix.O_WRONLY, unix.POLLERR
	}
	fd, err := unix.Open("/proc/self/fd/"+strconv.Itoa(p.fd), flags|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
	if err != nil {
		return true
	}
	defer unix.Close(fd)
	ask := []unix.PollFd{{Fd: int32(fd)}} // both are reported without being requested
	_, err = unix.Poll(ask, 0)
	return err != nil || ask[0].Revents&alone == 0
}
