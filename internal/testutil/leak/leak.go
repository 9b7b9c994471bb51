// Package leak fails a test that leaves something behind in its process: goroutines, descriptors,
// child processes, or threads in another network namespace.
package leak

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"go.uber.org/goleak"
)

const (
	// settleTime bounds the wait for what is ending: a goroutine after its last action, or a child that is about to be
	// reaped. Only a test that fails waits so long.
	settleTime = time.Minute
	settlePoll = 10 * time.Millisecond
)

// Check records the state of the process, compares with it at the test's cleanup, and fails the test with the
// differences. Call it first, so that its cleanup runs last. It does not work in parallel tests, which see each other's
// resources. The options name goroutines that may stay for a while, such as those of a library.
func Check(t testing.TB, ignored ...goleak.Option) {
	t.Helper()
	startPoller()
	before := takeAccount()
	goroutines := append(clientLibraries(), append(ignored, goleak.IgnoreCurrent())...)
	t.Cleanup(func() {
		if t.Failed() {
			return // a test that has failed early may leave something behind
		}
		if found := settle(before, goroutines, settleTime); found != "" {
			t.Errorf("left behind after %v:\n%s", settleTime, found)
		}
	})
}

// clientLibraries names goroutines of clients that stay after their connection's end, most of them for a moment.
func clientLibraries() []goleak.Option {
	return []goleak.Option{
		// Sees at its next tick, after up to 5 s, that the connection is closed.
		goleak.IgnoreTopFunction("k8s.io/client-go/tools/remotecommand.(*heartbeat).start"),
		// Stays for ever when its connection ends before the stream of its data is open: nobody receives its error.
		goleak.IgnoreTopFunction("k8s.io/client-go/tools/portforward.(*PortForwarder).handleConnection.func1"),
		// Waits a second for somebody to collect the error of a close.
		goleak.IgnoreTopFunction("github.com/moby/spdystream.(*Connection).shutdown"),
	}
}

// settle waits until nothing is left behind, and returns what is left after the limit.
func settle(before account, goroutines []goleak.Option, limit time.Duration) string {
	for end := time.Now().Add(limit); ; time.Sleep(settlePoll) {
		found := takeAccount().difference(before)
		if found == "" {
			// Last, because it does its own waiting.
			if err := goleak.Find(goroutines...); err != nil {
				found = err.Error()
			}
		}
		if found == "" || time.Now().After(end) {
			return found
		}
	}
}

// account is the resources of a process: for each kind, the description by key.
type account struct {
	descriptors map[string]string // number -> target
	children    map[string]string // pid -> name and state
	namespaces  map[string]string // namespace -> the threads in it, one of them
}

func takeAccount() account {
	return account{descriptors: descriptors(), children: children(), namespaces: namespaces()}
}

// difference lists what a has and before does not have, a line each.
func (a account) difference(before account) string {
	var lines []string
	for _, kind := range []struct {
		name        string
		now, before map[string]string
	}{
		{"descriptor", a.descriptors, before.descriptors},
		{"child process", a.children, before.children},
		{"threads in network namespace", a.namespaces, before.namespaces},
	} {
		for key, what := range kind.now {
			if was, ok := kind.before[key]; !ok {
				lines = append(lines, fmt.Sprintf("\t%s %s: %s", kind.name, key, what))
			} else if was != what && kind.name == "descriptor" {
				lines = append(lines, fmt.Sprintf("\t%s %s: %s, was %s", kind.name, key, what, was))
			}
		}
	}
	slices.Sort(lines)
	return strings.Join(lines, "\n")
}

// startPoller makes the Go runtime open the two descriptors of its poller. It opens them for the first file that waits,
// and keeps them.
func startPoller() {
	if r, w, err := os.Pipe(); err == nil {
		r.Close()
		w.Close()
	}
}

func descriptors() map[string]string {
	found := map[string]string{}
	entries, _ := os.ReadDir("/proc/self/fd")
	for _, entry := range entries {
		target, err := os.Readlink("/proc/self/fd/" + entry.Name())
		if err != nil || target == fmt.Sprintf("/proc/%d/fd", os.Getpid()) {
			continue // the descriptor of the listing itself
		}
		found[entry.Name()] = target
	}
	return found
}

// children returns the child processes of this process, including zombies.
func children() map[string]string {
	found := map[string]string{}
	for _, path := range statsOfChildren() {
		content, err := os.ReadFile(path)
		if err != nil {
			continue // it has ended meanwhile
		}
		// pid (name, which may contain anything) state parent ...
		open, end := strings.IndexByte(string(content), '('), strings.LastIndexByte(string(content), ')')
		if open < 0 || end < open {
			continue
		}
		fields := strings.Fields(string(content[end+1:]))
		if len(fields) > 1 && fields[1] == strconv.Itoa(os.Getpid()) {
			pid := strings.TrimSpace(string(content[:open]))
			found[pid] = fmt.Sprintf("%s, state %s", content[open:end+1], fields[0])
		}
	}
	return found
}

// statsOfChildren returns the paths of the stat files of this process's children, or of all processes if the kernel does
// not list children.
func statsOfChildren() []string {
	before := "never read"
	for range 20 {
		pids := ""
		lists, _ := filepath.Glob("/proc/self/task/*/children")
		for _, list := range lists {
			content, _ := os.ReadFile(list) // fails when the thread has ended
			pids += string(content)
		}
		// While children end the kernel may leave others out (proc_pid_children(5)).
		if len(lists) > 0 && pids == before {
			stats := strings.Fields(pids)
			for i, pid := range stats {
				stats[i] = "/proc/" + pid + "/stat"
			}
			return stats
		}
		before = pids
	}
	stats, _ := filepath.Glob("/proc/[0-9]*/stat")
	return stats
}

// namespaces returns the network namespaces that this process has threads in.
func namespaces() map[string]string {
	found := map[string]string{}
	links, _ := filepath.Glob("/proc/self/task/*/ns/net")
	for _, link := range links {
		if namespace, err := os.Readlink(link); err == nil {
			found[namespace] = "thread " + strings.Split(link, "/")[4]
		}
	}
	return found
}
