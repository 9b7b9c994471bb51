package node

import (
	"fmt"
	"slices"
	"time"
)

// StartCompanion runs a program beside the node, such as a kubelet, and records it like the node's own programs. Its log is
// LogPath(name), and PID(name) returns its process ID. Close ends it. If the owner was killed, the next Start or Cleanup
// ends it. Companions end before streamshim and containerd, the last started first.
func (n *Node) StartCompanion(name, program string, args ...string) error {
	if slices.Contains([]string{containerdProcess, streamshimProcess, imageServerProcess}, name) {
		return fmt.Errorf("%s is one of the node's own processes", name)
	}
	n.mu.Lock()
	if !slices.Contains(n.state.Companions, name) {
		n.state.Companions = append(n.state.Companions, name)
	}
	n.mu.Unlock()
	return n.startProcess(name, program, args)
}

// StopCompanion ends a companion with SIGTERM, and with SIGKILL if it takes longer than the grace period. With a grace
// period of zero it sends SIGKILL at once. It waits until the companion is gone.
func (n *Node) StopCompanion(name string, grace time.Duration) error {
	return n.stopProcess(name, grace)
}

// CgroupRoot returns the parent of the cgroups that Close removes, in every hierarchy: the pods of other clients must be
// below it. It begins with a slash. It does not exist beforehand.
func (n *Node) CgroupRoot() string { return n.cgroupParent() }

func (n *Node) stopCompanions() []error {
	n.mu.Lock()
	names := slices.Clone(n.state.Companions)
	n.mu.Unlock()
	var errs []error
	for _, name := range slices.Backward(names) {
		errs = append(errs, n.stopProcess(name, stopGrace))
	}
	return errs
}
