package tree

import (
	"os"
	"strconv"

	"golang.org/x/sys/unix"
)

// PipeWatch tells whether anybody holds a process's ends of its pipes, also after ours were closed. It
// holds no end itself, only references to the pipes (O_PATH, open(2)), so that who writes to a pipe that
// nobody reads gets SIGPIPE as ever.
type PipeWatch struct{ pipes []watchedPipe }

type watchedPipe struct {
	fd    int
	input bool // the process's end is for reading
}

// WatchPipes returns a watch of pipes by our ends of them, nil for none; or nil when one was closed. The caller
// closes it.
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
		if err != nil { // closed already
			w.Close()
			return nil
		}
		w.pipes = append(w.pipes, watchedPipe{path, file == stdin})
	}
	return w
}

// Close ends the watch, also one that is nil.
func (w *PipeWatch) Close() {
	if w != nil {
		for _, pipe := range w.pipes {
			unix.Close(pipe.fd)
		}
	}
}

// Held reports whether anybody may hold an end of the process's. Of pipes that are not watched it is not
// known.
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

// held opens an end like ours for a moment, to ask it: a pipe that nobody writes to has hung up, one that
// nobody reads is broken, poll(2). Opening an anonymous pipe by its path never waits.
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
	ask := []unix.PollFd{{Fd: int32(fd)}} // both are told without being asked for
	_, err = unix.Poll(ask, 0)
	return err != nil || ask[0].Revents&alone == 0
}
