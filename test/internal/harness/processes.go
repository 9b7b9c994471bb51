package harness

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/streamshim/streamshim/internal/testutil"
)

// markVariable marks the processes of one session. Children inherit it.
const markVariable = "SYMPTOM_MARK"

// Marked returns a command line whose process and all its descendants carry the mark.
func Marked(mark, script string) []string {
	return []string{"env", markVariable + "=" + mark, "sh", "-c", script}
}

// WithMark returns the living processes that carry a mark. Zombies have no environment. It must be cheap, because many
// tests call it again and again at the same time.
func WithMark(mark string) []int {
	pids, _ := os.ReadDir("/proc") //nolint:errcheck // it is there
	carried := []byte("\x00" + markVariable + "=" + mark + "\x00")
	environment := make([]byte, 256<<10)
	var found []int
	for _, entry := range pids {
		pid, err := strconv.Atoi(entry.Name())
		if err != nil {
			continue // no process
		}
		fd, err := syscall.Open("/proc/"+entry.Name()+"/environ", syscall.O_RDONLY|syscall.O_CLOEXEC, 0)
		if err != nil {
			continue // it has ended meanwhile
		}
		n, err := syscall.Read(fd, environment[1:]) // all of it, unless it is longer
		syscall.Close(fd)                           //nolint:errcheck // only read
		if err == nil && n > 0 && bytes.Contains(environment[:n+1], carried) {
			found = append(found, pid)
		}
	}
	return found
}

// Glob returns the paths that match.
func Glob(pattern string) []string {
	paths, _ := filepath.Glob(pattern) //nolint:errcheck // the patterns are good
	return paths
}

// AwaitMarked waits until at least so many processes carry the mark.
func AwaitMarked(t *testing.T, mark string, atLeast int) []int {
	t.Helper()
	var found []int
	testutil.Eventually(t, fmt.Sprintf("%d processes of %s are there", atLeast, mark), func() bool {
		found = WithMark(mark)
		return len(found) >= atLeast
	})
	return found
}

// AwaitNone waits until no process carries the mark, and returns how long that took.
func AwaitNone(t *testing.T, mark string, limit time.Duration) time.Duration {
	t.Helper()
	begin := time.Now()
	for {
		left := WithMark(mark)
		if len(left) == 0 {
			return time.Since(begin)
		}
		if time.Since(begin) > limit {
			var lines []string
			for _, pid := range left {
				lines = append(lines, fmt.Sprintf("%d: %s", pid, CommandLine(pid)))
			}
			t.Errorf("%s: left behind after %v:\n%s", mark, limit, strings.Join(lines, "\n"))
			return time.Since(begin)
		}
		time.Sleep(50 * time.Millisecond)
	}
}

// CommandLine returns a process's command line. It is empty if the process has ended.
func CommandLine(pid int) string {
	text, _ := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", pid)) //nolint:errcheck // empty when it has ended
	return strings.ReplaceAll(strings.TrimRight(string(text), "\x00"), "\x00", " ")
}

// Zombies returns the children of a process that have ended and were not reaped.
func Zombies(parent int) []string {
	return slices.DeleteFunc(Children(parent), func(stat string) bool {
		_, rest, _ := strings.Cut(stat, ") ")
		return !strings.HasPrefix(rest, "Z ")
	})
}

// Children returns a line of each child of a process, from its /proc/PID/stat.
func Children(parent int) []string {
	var found []string
	for _, path := range Glob("/proc/[0-9]*/stat") {
		text, err := os.ReadFile(path)
		if err != nil {
			continue
		}
		_, rest, ok := strings.Cut(string(text), ") ")
		if fields := strings.Fields(rest); ok && len(fields) > 1 && fields[1] == strconv.Itoa(parent) {
			found = append(found, strings.TrimSpace(string(text)))
		}
	}
	return found
}
