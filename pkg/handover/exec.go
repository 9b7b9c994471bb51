package handover

import (
	"fmt"
	"os"
	"runtime"
	"strconv"
	"syscall"

	"golang.org/x/sys/unix"
)

// Exec executes the program in this process, with this program's arguments and environment, the files, and the state that
// it has read as a Check. It returns only when it fails; then this program goes on as it was. Nothing but the files
// and the standard streams is inherited, because everything else is closed on execve.
//
// What the caller does with signals before decides what becomes of those that come until the new program has asked for
// its own: an ignored one stays ignored, any other does what it does by default.
func (c *Check) Exec(files *Files) error {
	c.EndChild()
	if now, err := os.Stat(c.path); err != nil || !os.SameFile(now, c.file) || now.Size() != c.file.Size() || !now.ModTime().Equal(c.file.ModTime()) {
		return fmt.Errorf("%s is not the file any more that was checked", c.path)
	}
	// Whoever is forked now would have the files as well.
	syscall.ForkLock.Lock()
	defer syscall.ForkLock.Unlock()
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	var limit unix.Rlimit
	limitErr := unix.Getrlimit(unix.RLIMIT_NOFILE, &limit)
	memory, err := files.KeepFD(int(c.memory.Fd()))
	if err != nil {
		return fmt.Errorf("execute the new program: %w", err)
	}
	if _, err := files.Inherit(); err != nil {
		files.Disinherit() //nolint:errcheck // the first error is the one to tell
		return fmt.Errorf("execute the new program: %w", err)
	}
	err = syscall.Exec(c.path, os.Args, append(os.Environ(), variable+"="+strconv.Itoa(int(memory)))) //nolint:gosec // as in StartCheck
	if limitErr == nil {
		unix.Setrlimit(unix.RLIMIT_NOFILE, &limit) //nolint:errcheck // syscall.Exec has lowered it to what the new program was to have
	}
	files.Disinherit() //nolint:errcheck // as above
	return fmt.Errorf("execute %s: %w", c.path, err)
}
