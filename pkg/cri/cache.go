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
	// maxCachedContainers bounds the cache. A kubelet runs at most a few hundred containers on a node.
	maxCachedContainers = 4096
	// cacheSweepSize is the number of entries from which the cache is searched for containers that have ended.
	cacheSweepSize = 128
)

// containerCache keeps the facts of running containers, so that neither a probe nor an exec needs the upstream,
// even while it restarts. A container never starts again under the same id, so its facts hold while its init
// process lives, which is checked on every use.
type containerCache struct {
	mu      sync.Mutex
	byID    map[string]workload.Container // by full id
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

// peek returns facts that hold for a container's whole life, whether or not it still runs.
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

// initAlive reports whether the container's init process runs and is the one first seen.
func initAlive(container workload.Container) bool {
	if container.InitStartTime == 0 {
		return false
	}
	started, err := processStartTime(container.InitPid)
	return err == nil && started == container.InitStartTime
}

// initStartTime returns the start time of a container's init process. The pid comes from the upstream. It may have
// been reused by now, or belong to a pid namespace other than ours; the cgroup, which every runtime names after
// the container, tells.
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

// processStartTime returns field 22 of /proc/pid/stat (proc_pid_stat(5)), in clock ticks since boot. It fails for
// a zombie.
func processStartTime(pid int) (uint64, error) {
	stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return 0, err
	}
	return parseProcessStartTime(string(stat))
}

func parseProcessStartTime(stat string) (uint64, error) {
	// Field 2 is the command in parentheses and may contain anything, even parentheses.
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
