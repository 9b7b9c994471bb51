package node

import (
	"fmt"
	"os"
	"runtime"
	"strconv"

	"golang.org/x/sys/unix"
)

// InNetworkNamespace runs do in the network namespace of a process. Sockets that do opens stay there.
func InNetworkNamespace(pid int, do func() error) error {
	result := make(chan error)
	go func() {
		runtime.LockOSThread() // never unlocked, so the thread ends with the goroutine
		result <- func() error {
			namespace, err := os.Open("/proc/" + strconv.Itoa(pid) + "/ns/net")
			if err != nil {
				return err
			}
			defer namespace.Close() //nolint:errcheck // read only
			if err := unix.Setns(int(namespace.Fd()), unix.CLONE_NEWNET); err != nil {
				return fmt.Errorf("enter the pod's network namespace: %w", err)
			}
			return do()
		}()
	}()
	return <-result
}
