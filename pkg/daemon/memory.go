package daemon

import (
	"fmt"
	"log/slog"
	"math"
	"os"
	"path/filepath"
	"runtime/debug"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/streamshim/streamshim/pkg/config"
)

// share is the default of a memory limit: a part of the machine's memory, between two bounds.
type share struct {
	part        int64 // divisor of the memory
	least, most int64 // bytes
}

var (
	buffersShare    = share{16, 64 << 20, 1 << 30}   // limits.buffers
	syncOutputShare = share{32, 64 << 20, 512 << 20} // limits.sync_output
	recordingShare  = share{32, 64 << 20, 512 << 20} // limits.recording_buffers
)

// of returns the limit in bytes: the configured one unless that is negative, else the share of memory. 0 is no limit.
func (s share) of(memory, configured int64) int64 {
	if configured >= 0 {
		return configured
	}
	return min(max(memory/s.part, s.least), s.most)
}

// budgets bound the bytes held by all sessions and calls together. 0 is no limit.
type budgets struct{ buffers, syncOutput, recordings int64 }

func budgetsOf(c config.Config, memory int64) budgets {
	return budgets{
		buffers:    buffersShare.of(memory, c.Limits.Buffers),
		syncOutput: syncOutputShare.of(memory, c.Limits.SyncOutput),
		recordings: recordingShare.of(memory, c.Limits.RecordingBuffers),
	}
}

// sum returns the sum of all budgets, or 0 if one has no limit.
func (b budgets) sum() int64 {
	if b.buffers == 0 || b.syncOutput == 0 || b.recordings == 0 {
		return 0
	}
	return b.buffers + b.syncOutput + b.recordings
}

// memoryBesideBuffers is allowed for everything but the budgets when the cgroup sets no lower limit.
const memoryBesideBuffers = 512 << 20

// limitMemory sets the soft memory limit of the garbage collector: nine tenths of the cgroup's limit, or the budgets and
// what 4096 sessions need besides, whichever is less. GOMEMLIMIT in the environment takes precedence.
func limitMemory(c config.Config, log *slog.Logger) {
	if os.Getenv("GOMEMLIMIT") != "" {
		return
	}
	limit := cgroupMemory("/proc/self/cgroup", "/sys/fs/cgroup")
	from := "the cgroup"
	if limit < math.MaxInt64 {
		limit -= limit / 10
	}
	if all := budgetsOf(c, availableMemory()).sum(); all > 0 && all+memoryBesideBuffers < limit {
		limit, from = all+memoryBesideBuffers, "limits.buffers, limits.sync_output and limits.recording_buffers"
	}
	if limit == math.MaxInt64 {
		return
	}
	debug.SetMemoryLimit(limit)
	log.Info("memory limit of the garbage collector", "bytes", limit, "from", from)
}

// availableMemory returns the machine's memory in bytes, or the limit of our cgroup if that is less.
func availableMemory() int64 {
	var info unix.Sysinfo_t
	if err := unix.Sysinfo(&info); err != nil {
		return 0 // which selects the lower bounds; sysinfo(2) does not fail in practice
	}
	return min(int64(info.Totalram)*int64(info.Unit), cgroupMemory("/proc/self/cgroup", "/sys/fs/cgroup")) //nolint:gosec // far less than 2^63
}

// cgroupMemory returns the lowest memory limit of a process's cgroup (v1 or v2) and its ancestors, or math.MaxInt64.
func cgroupMemory(membership, root string) int64 {
	limit := int64(math.MaxInt64)
	text, err := os.ReadFile(membership)
	if err != nil {
		return limit
	}
	for line := range strings.Lines(string(text)) {
		fields := strings.SplitN(strings.TrimSpace(line), ":", 3)
		if len(fields) < 3 {
			continue
		}
		top, name := root, "memory.max"
		switch {
		case strings.Contains(","+fields[1]+",", ",memory,"):
			top, name = filepath.Join(root, "memory"), "memory.limit_in_bytes"
		case fields[1] != "":
			continue
		}
		// Levels without the file are outside our view, or have no limit of their own.
		for path := filepath.Join("/", fields[2]); ; path = filepath.Dir(path) {
			if value, err := readInt(filepath.Join(top, path, name)); err == nil && value > 0 {
				limit = min(limit, value)
			}
			if path == "/" {
				break
			}
		}
	}
	if limit > math.MaxInt64/2 { // cgroup v1 represents "no limit" by a huge number
		return math.MaxInt64
	}
	return limit
}

func readInt(path string) (int64, error) {
	text, err := os.ReadFile(path)
	if err != nil {
		return 0, err
	}
	value, err := strconv.ParseInt(strings.TrimSpace(string(text)), 10, 64) // fails for "max"
	if err != nil {
		return 0, fmt.Errorf("%s: %w", path, err)
	}
	return value, nil
}
