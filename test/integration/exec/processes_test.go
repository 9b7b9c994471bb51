package exec

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"
)

// markVariable marks the processes of one session: children inherit it.
const markVariable = "SYMPTOM_MARK"

// marked is a command line whose process, with all that descends from it, carries the mark.
func marked(mark, script string) []string {
	return []string{"env", markVariable + "=" + mark, "sh", "-c", script}
}

// withMark finds the living processes that carry a mark; zombies have no environment any more.
func withMark(mark string) []int {
	var found []int
	for _, path := range glob("/proc/[0-9]*/environ") {
		environment, err := os.ReadFile(path)
		if err != nil {
			continue // it has ended meanwhile
		}
		for _, variable := range bytes.Split(environment, []byte{0}) {
			if string(variable) == markVariable+"="+mark {
				pid, _ := strconv.Atoi(filepath.Base(filepath.Dir(path))) //nolint:errcheck // it is a number
				found = append(found, pid)
			}
		}
	}
	return found
}

func glob(pattern string) []string {
	paths, _ := filepath.Glob(pattern) //nolint:errcheck // the patterns are good
	return paths
}

// awaitMarked waits until so many processes carry the mark.
func awaitMarked(t *testing.T, mark string, atLeast int) []int {
	t.Helper()
	var found []int
	eventually(t, testTimeout, fmt.Sprintf("%d processes of %s are there", atLeast, mark), func() bool {
		found = withMark(mark)
		return len(found) >= atLeast
	})
	return found
}

// awaitNone waits until no process carries the mark, and returns how long that took.
func awaitNone(t *testing.T, mark string, limit time.Duration) time.Duration {
	t.Helper()
	begin := time.Now()
	for {
		left := withMark(mark)
		if len(left) == 0 {
			return time.Since(begin)
		}
		if time.Since(begin) > limit {
			var lines []string
			for _, pid := range left {
				lines = append(lines, fmt.Sprintf("%d: %s", pid, commandLine(pid)))
			}
			t.Errorf("%s: left behind after %v:\n%s", mark, limit, strings.Join(lines, "\n"))
			return time.Since(begin)
		}
		time.Sleep(50 * time.Millisecond)
	}
}

func commandLine(pid int) string {
	text, _ := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", pid)) //nolint:errcheck // empty when it has ended
	return strings.ReplaceAll(strings.TrimRight(string(text), "\x00"), "\x00", " ")
}

// zombies are the children of a process that have ended and were not reaped.
func zombies(parent int) []string {
	var found []string
	for _, path := range glob("/proc/[0-9]*/stat") {
		text, err := os.ReadFile(path)
		if err != nil {
			continue
		}
		_, rest, ok := strings.Cut(string(text), ") ")
		if fields := strings.Fields(rest); ok && len(fields) > 1 && fields[0] == "Z" && fields[1] == strconv.Itoa(parent) {
			found = append(found, strings.TrimSpace(string(text)))
		}
	}
	return found
}
