package cri

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"
	"sync"

	"github.com/streamshim/streamshim/pkg/workload"
)

const (
	// maxCachedContainers bounds the cache; a kubelet runs at most some hundred containers on a node.
	maxCachedContainers = 4096
	// cacheSweepSize is from how many entries on the cache looks for containers that have ended.
	cacheSweepSize = 128
)

// containerCache keeps the facts of running containers, so that neither a probe nor an exec needs
// the upstream, not even while it restarts. A container never starts again under the same ID: its
// facts hold as long as its init process lives, and that is looked at on every use.
type containerCache struct {
	mu      sync.Mutex
	byID    map[string]workload.Container // by full ID
	sweepAt int
}

func newContainerCache() *containerCache {
	return &containerCache{byID: make(map[string]workload.Container), sweepAt: cacheSweepSize}
}

// get returns the facts of a container that is still running.
func (c *containerCache) get(id string) (workload.Container, bool) {
	container, ok := c.peek(id)
	if !ok {
		return workload.Container{}, false
	}
	if !initAlive(container) {
		c.mu.Lock()
		delete(c.byID, id)
		c.mu.Unlock()
		return workload.Container{}, false
	}
	return container, true
}

// peek returns facts that hold for a container's whole life, whether it still runs or not.
func (c *containerCache) peek(id string) (workload.Container, bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	container, ok := c.byID[id]
	return container, ok
}

func (c *containerCache) put(container workload.Container) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if len(c.byID) >= c.sweepAt {
		for id, cached := range c.byID {
			if !initAlive(cached) {
				delete(c.byID, id)
			}
		}
		if len(c.byID) >= maxCachedContainers {
			clear(c.byID)
		}
		c.sweepAt = max(cacheSweepSize, min(2*len(c.byID), maxCachedContainers))
	}
	c.byID[container.ContainerID] = container
}

// initAlive says whether the container's init process runs and is the one that was seen first.
func initAlive(container workload.Container) bool {
	if container.InitStartTime == 0 {
		return false
	}
	started, err := processStartTime(container.InitPid)
	return err == nil && started == container.InitStartTime
}

// initStartTime is the start time of a container's init process. The pid comes from the upstream
// and may have been taken by another process by now, or belong to another pid namespace than ours;
// the cgroup, which every runtime names after the container, tells.
func initStartTime(pid int, containerID string) (uint64, error) {
	if pid <= 0 {
		return 0, errors.New("the runtime gives no pid")
	}
	started, err := processStartTime(pid)
	if err != nil {
		return 0, err
	}
	cgroup, err := os.ReadFile(fmt.Sprintf("/proc/%d/cgroup", pid))
	if err != nil {
		return 0, err
	}
	if !bytes.Contains(cgroup, []byte(containerID)) {
		return 0, fmt.Errorf("process %d is not in a cgroup of the container", pid)
	}
	return started, nil
}

// processStartTime reads field 22 of /proc/pid/stat (proc_pid_stat(5)), in clock ticks since boot. A
// process that has ended and waits to be reaped is an error.
func processStartTime(pid int) (uint64, error) {
	stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return 0, err
	}
	return parseProcessStartTime(string(stat))
}

func parseProcessStartTime(stat string) (uint64, error) {
	// Field 2 is the command in parentheses and may contain anything, also parentheses.
	end := strings.LastIndexByte(stat, ')')
	if end < 0 {
		return 0, errors.New("malformed /proc/pid/stat")
	}
	const state, startTime = 0, 19 // fields 3 and 22, counted from field 3
	fields := strings.Fields(stat[end+1:])
	if len(fields) <= startTime {
		return 0, errors.New("malformed /proc/pid/stat")
	}
	if s := fields[state]; s == "Z" || s == "X" {
		return 0, errors.New("the process has ended")
	}
	return strconv.ParseUint(fields[startTime], 10, 64)
}
