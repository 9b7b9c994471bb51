package handover

import (
	"fmt"
	"os"
	"runtime"
	"strconv"
	"syscall"

	"golang.org/x/sys/unix"
)

// Exec replaces this program by the checked one in the same process (execve(2)). The new program gets our arguments and
// environment, the files, and the state that it has read during the check. It inherits no other descriptors but the
// standard streams. Exec returns only on failure; then this program continues unchanged.
//
// Until the new program installs its handlers, signals that the caller has ignored stay ignored and all others have
// their default action.
func (c *Check) Exec(files *Files) error {
	c.EndChild()
	if now, err := os.Stat(c.path); err != nil || !os.SameFile(now, c.file) || now.Size() != c.file.Size() || !now.ModTime().Equal(c.file.ModTime()) {
		return fmt.Errorf("%s is not the file any more that was checked", c.path)
	}
	// A child forked now would inherit the files, too.
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
		files.Disinherit() //nolint:errcheck // the first error says more
		return fmt.Errorf("execute the new program: %w", err)
	}
	err = syscall.Exec(c.path, os.Args, append(os.Environ(), variable+"="+strconv.Itoa(int(memory)))) //nolint:gosec // as in StartCheck
	if limitErr == nil {
		unix.Setrlimit(unix.RLIMIT_NOFILE, &limit) //nolint:errcheck // syscall.Exec has restored the limit that the new program should start with
	}
	files.Disinherit() //nolint:errcheck // as above
	return fmt.Errorf("execute %s: %w", c.path, err)
}
