package node

import (
	"fmt"
	"slices"
	"time"
)

// StartCompanion runs a program beside the node, such as a kubelet, and records it like the node's
// own: its log is LogPath(name), PID(name) finds it, and Close ends it, or the next Start or Cleanup
// when nobody could. Companions end before streamshim and containerd, the last started first.
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

// StopCompanion ends a companion with SIGTERM, and with SIGKILL if it takes longer than the grace; a
// grace of zero is SIGKILL at once. It waits until the companion is gone.
func (n *Node) StopCompanion(name string, grace time.Duration) error {
	return n.stopProcess(name, grace)
}

// CgroupRoot is the cgroup below which pods must be for Close to find theirs, in every hierarchy. It
// begins with a slash and is not made beforehand.
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
