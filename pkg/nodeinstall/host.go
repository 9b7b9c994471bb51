package nodeinstall

import (
	"context"
	"fmt"
	"net"
	"os"
	"os/exec"
	"runtime"

	"golang.org/x/sys/unix"
)

// StartOnHost starts a command in the mount, network and UTS namespaces of a process of the node, such as
// process 1 where the pod has hostPID, so that it sees the node's files and addresses. It needs
// CAP_SYS_ADMIN, CAP_SYS_CHROOT and CAP_SYS_PTRACE. The command's path is looked up there.
func StartOnHost(process int, command *exec.Cmd) error {
	return onThread(func() error {
		// A thread may enter a mount namespace when it shares its root and working directory with no other.
		if err := unix.Unshare(unix.CLONE_FS); err != nil {
			return fmt.Errorf("unshare: %w", err)
		}
		for _, namespace := range []struct {
			name string
			kind int
		}{{"net", unix.CLONE_NEWNET}, {"uts", unix.CLONE_NEWUTS}, {"mnt", unix.CLONE_NEWNS}} {
			if err := enter(process, namespace.name, namespace.kind); err != nil {
				return err
			}
		}
		return command.Start()
	})
}

// onThread runs f on a thread that ends with it, and that is not the process's first one: that one does not
// end, and its namespaces are those that others take for the process's, such as a runtime that starts
// a command in this container.
func onThread(f func() error) error {
	result := make(chan error, 1)
	go func() {
		runtime.LockOSThread()
		if unix.Gettid() == unix.Getpid() {
			result <- onThread(f) // this goroutine keeps the first thread meanwhile
			runtime.UnlockOSThread()
			return
		}
		result <- f() // never unlocked: the thread ends with this goroutine
	}()
	return <-result
}

// DialOnHost connects to a TCP address, IP and port, in the network namespace of a process.
func DialOnHost(ctx context.Context, process int, address string) (net.Conn, error) {
	var conn net.Conn
	err := onThread(func() error {
		if err := enter(process, "net", unix.CLONE_NEWNET); err != nil {
			return err
		}
		// One address is dialled in this goroutine, so that its socket is made on this thread.
		var err error
		conn, err = (&net.Dialer{}).DialContext(ctx, "tcp", address)
		return err
	})
	return conn, err
}

func enter(process int, name string, kind int) error {
	file, err := os.Open(fmt.Sprintf("/proc/%d/ns/%s", process, name))
	if err != nil {
		return fmt.Errorf("%w; the pod needs hostPID and to be privileged", err)
	}
	defer file.Close() //nolint:errcheck // only read
	if err := unix.Setns(int(file.Fd()), kind); err != nil {
		return fmt.Errorf("enter the node's %s namespace: %w; the pod needs to be privileged", name, err)
	}
	return nil
}
