package portforward

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"runtime"

	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"

	"github.com/streamshim/streamshim/pkg/rescue"
)

// namespace is a handle on a pod's network namespace, or, if file is nil, on this process's own (a host-network
// pod). An open handle keeps the namespace alive in the kernel even after its mount is gone, so it must be closed
// when the sandbox goes.
type namespace struct {
	path string
	file *os.File // counts its users, so Close is safe while a socket is being made
	dev  uint64
	ino  uint64
}

// openNamespace opens the namespace mounted at path ("" for the host's). The error is ErrSandboxGone if there is
// nothing at path, or only the file that it was mounted on.
func openNamespace(path string) (*namespace, error) {
	if path == "" {
		return &namespace{}, nil
	}
	handle, err := netns.GetFromPath(path)
	if err != nil {
		return nil, namespacePathError(path, err)
	}
	file := os.NewFile(uintptr(handle), path)
	var where unix.Statfs_t
	var what unix.Stat_t
	if err := errors.Join(unix.Fstatfs(int(handle), &where), unix.Fstat(int(handle), &what)); err != nil {
		file.Close()
		return nil, fmt.Errorf("stat network namespace %s: %w", path, err)
	}
	// Runtimes first unmount the namespace and then unlink the file under it. In between, path is a plain, empty
	// file.
	if where.Type != unix.NSFS_MAGIC {
		file.Close()
		return nil, fmt.Errorf("%w: no network namespace is mounted at %s any more", ErrSandboxGone, path)
	}
	return &namespace{path: path, file: file, dev: uint64(what.Dev), ino: what.Ino}, nil
}

// check reports, at the cost of one stat, whether the namespace is still the one at its path.
func (n *namespace) check() error {
	if n.file == nil {
		return nil
	}
	var what unix.Stat_t
	if err := unix.Stat(n.path, &what); err != nil {
		return namespacePathError(n.path, err)
	}
	if uint64(what.Dev) != n.dev || what.Ino != n.ino {
		return fmt.Errorf("%w: its network namespace is no longer mounted at %s", ErrSandboxGone, n.path)
	}
	return nil
}

// namespacePathError turns the errors of a path that leads nowhere into ErrSandboxGone. /proc/PID/ns/net returns
// ESRCH if the process ends meanwhile.
func namespacePathError(path string, err error) error {
	if errors.Is(err, unix.ENOENT) || errors.Is(err, unix.ENOTDIR) || errors.Is(err, unix.ESRCH) {
		return fmt.Errorf("%w: there is no network namespace at %s", ErrSandboxGone, path)
	}
	return fmt.Errorf("open network namespace %s: %w", path, err)
}

// socket creates a non-blocking TCP socket in the namespace. A socket keeps its namespace for life, so everything
// else may happen on any thread.
func (n *namespace) socket(domain int) (fd int, err error) {
	err = n.do(func() (err error) {
		fd, err = unix.Socket(domain, unix.SOCK_STREAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, unix.IPPROTO_TCP)
		return os.NewSyscallError("socket", err)
	})
	return fd, err
}

// addresses returns the pod's own addresses, neither loopback nor link-local, at most limit of them.
func (n *namespace) addresses(limit int) (found []netip.Addr, err error) {
	var all []net.Addr
	// The kernel answers at once and on this thread; no goroutine or poller is involved.
	if err := n.do(func() (err error) { all, err = net.InterfaceAddrs(); return err }); err != nil {
		return nil, fmt.Errorf("list the pod's addresses: %w", err)
	}
	for _, each := range all {
		prefix, ok := each.(*net.IPNet)
		if !ok {
			continue
		}
		address, ok := netip.AddrFromSlice(prefix.IP)
		address = address.Unmap()
		if ok && address.IsGlobalUnicast() && len(found) < limit {
			found = append(found, address)
		}
	}
	return found, nil
}

// do runs work, which must not block, inside the namespace.
func (n *namespace) do(work func() error) error {
	if n.file == nil {
		return work()
	}
	raw, err := n.file.SyscallConn()
	if err != nil {
		return err
	}
	var workErr error
	if err := raw.Control(func(fd uintptr) { workErr = inNamespace(netns.NsHandle(fd), netns.Set, work) }); err != nil {
		return err // os.ErrClosed
	}
	return workErr
}

// inNamespace runs work on a thread that is in the target namespace only for that time. restore puts a thread back
// into its own namespace; outside tests it is netns.Set.
//
// The work gets a goroutine of its own, which lives for a few microseconds. If the thread cannot be put back, this
// goroutine ends without unlocking it, and the runtime destroys the thread with the goroutine. (The process's
// first thread cannot be destroyed; the runtime parks it for good, so nothing runs on it either.) Threads that the
// runtime starts meanwhile do not inherit the pod's namespace: it never clones a thread from a locked one.
//
// A worker locked to a thread per sandbox would make a socket in 9 us instead of 8, or, for 64 goroutines at a
// time, in 3 instead of 6, at the cost of a thread that lives in the pod's namespace.
func inNamespace(target netns.NsHandle, restore func(netns.NsHandle) error, work func() error) error {
	result := make(chan error, 1)
	rescue.Go(func(p *rescue.Panic) { result <- p }, func() {
		runtime.LockOSThread()
		home, err := netns.Get()
		if err != nil {
			runtime.UnlockOSThread()
			result <- fmt.Errorf("open the thread's own network namespace: %w", err)
			return
		}
		defer home.Close()
		if err := netns.Set(target); err != nil {
			runtime.UnlockOSThread() // a failed setns changes nothing
			result <- fmt.Errorf("enter the pod's network namespace: %w", err)
			return
		}
		workErr := work()
		if err := restore(home); err != nil {
			result <- errors.Join(workErr, fmt.Errorf("leave the pod's network namespace: %w", err))
			return
		}
		runtime.UnlockOSThread()
		result <- workErr
	})
	return <-result
}

// close releases the namespace. It may be called more than once.
func (n *namespace) close() {
	if n.file != nil {
		n.file.Close()
	}
}
