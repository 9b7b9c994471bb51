package harness

import (
	"bytes"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/streamshim/streamshim/internal/testutil"
)

// resident returns how much memory a process uses, in KiB.
func resident(t *testing.T, pid int) (size int) {
	t.Helper()
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		t.Fatal(err)
	}
	_, rest, _ := strings.Cut(string(text), "VmRSS:")
	if _, err := fmt.Sscan(rest, &size); err != nil {
		t.Fatal(err)
	}
	return size
}

func threads(pid int) int { return len(Glob(fmt.Sprintf("/proc/%d/task/*", pid))) }

// InParallel calls f for 0 to n-1, atOnce at a time. After a failure it starts no more: if every session waited in vain, as
// they do when a container hangs, the rest would take hours.
func InParallel(t *testing.T, n, atOnce int, f func(i int)) {
	t.Helper()
	var next atomic.Int64
	var all sync.WaitGroup
	for range atOnce {
		all.Go(func() {
			for i := int(next.Add(1)) - 1; i < n && !t.Failed(); i = int(next.Add(1)) - 1 {
				f(i)
			}
		})
	}
	all.Wait()
	if done := min(int(next.Load()), n); t.Failed() && done < n {
		t.Fatalf("given up after %d of %d", done, n)
	}
}

// ExpectNoLeak runs a load against its own streamshim and compares what the process holds before and after. At the end it
// gets the stacks of the goroutines with SIGQUIT, which ends the process.
func ExpectNoLeak(t *testing.T, load func(shim *Streamshim, n int), n int) {
	t.Helper()
	metrics := unusedAddress(t)
	shim := StartStreamshim(t, fmt.Sprintf("metrics_address = %q\n", metrics))
	idle := goroutines(t, metrics)
	load(shim, 50) // fills buffers and threads that are kept
	pid := shim.PID()
	files, memory, tasks := Descriptors(pid), resident(t, pid), threads(pid)
	load(shim, n)
	testutil.Eventually(t, "all sessions have ended", func() bool {
		log, err := os.ReadFile(shim.Log)
		return err == nil && bytes.Count(log, []byte("session start")) == bytes.Count(log, []byte("session end"))
	})
	testutil.Eventually(t, fmt.Sprintf("descriptors are back to about %d", files), func() bool { return Descriptors(pid) <= files+10 })
	testutil.Eventually(t, "no zombies and no children are left", func() bool { return len(Zombies(pid)) == 0 })
	t.Logf("before and after %d sessions: %d and %d descriptors, %d and %d KiB, %d and %d threads",
		n, files, Descriptors(pid), memory, resident(t, pid), tasks, threads(pid))
	if after := resident(t, pid); after > memory+64<<10 {
		t.Errorf("%d KiB of memory, %d before", after, memory)
	}
	if after := threads(pid); after > tasks+20 {
		t.Errorf("%d threads, %d before", after, tasks)
	}
	testutil.Eventually(t, "no files are left", func() bool {
		return len(Glob(filepath.Join(shim.Folder, "state", "exec", "*"))) == 0
	})
	// Some goroutines of a session end after its log line. If there are too many at the end, their stacks tell which.
	for begin := time.Now(); goroutines(t, metrics) > idle && time.Since(begin) < testutil.Patience; {
		time.Sleep(100 * time.Millisecond)
	}
	t.Logf("%d goroutines before, %d after", idle, goroutines(t, metrics))
	shim.Stop(t, syscall.SIGQUIT)
	log, err := os.ReadFile(shim.Log)
	if err != nil {
		t.Fatal(err)
	}
	_, dump, found := strings.Cut(string(log), "SIGQUIT: quit")
	if !found {
		t.Fatal("no goroutines in the log")
	}
	stacks := strings.Split(dump, "\n\n")
	t.Logf("%d goroutines", len(stacks))
	if len(stacks) > 60 {
		t.Errorf("%d goroutines", len(stacks))
	}
	for _, stack := range stacks {
		for _, part := range []string{"streaming/remotecommand.(*Session)", "/spdy.", "/websocket.", "(*relay)", "execproc.(*Process)", "os/exec"} {
			if strings.Contains(stack, part) {
				t.Errorf("a goroutine of a session is left:\n%s", stack)
				break
			}
		}
	}
}

// Goroutines returns the number of goroutines of the streamshim that serves metrics at this address.
func Goroutines(t *testing.T, metrics string) int { return goroutines(t, metrics) }

// UnusedAddress returns an address at which nobody listens.
func UnusedAddress(t *testing.T) string { return unusedAddress(t) }

// Metric returns a metric of a streamshim, one without labels. It closes the connection each time, because streamshim has a
// goroutine for each connection.
func Metric(t *testing.T, metrics, name string) (value float64) {
	t.Helper()
	client := http.Client{Transport: &http.Transport{DisableKeepAlives: true}, Timeout: testutil.Patience}
	response, err := client.Get("http://" + metrics + "/metrics")
	if err != nil {
		t.Fatal(err)
	}
	defer response.Body.Close()
	text, err := io.ReadAll(response.Body)
	if err != nil {
		t.Fatal(err)
	}
	_, rest, _ := strings.Cut(string(text), "\n"+name+" ")
	if _, err := fmt.Sscan(rest, &value); err != nil {
		t.Fatalf("no %s in %s", name, text)
	}
	return value
}

func goroutines(t *testing.T, metrics string) int {
	t.Helper()
	return int(Metric(t, metrics, "go_goroutines"))
}

func unusedAddress(t *testing.T) string {
	t.Helper()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer listener.Close()
	return listener.Addr().String()
}

// LogContainerdStacks logs those goroutines of containerd that name one of the parts. They tell who keeps the container's
// output.
func LogContainerdStacks(t *testing.T, parts ...string) {
	t.Helper()
	if err := syscall.Kill(Shared.Node.PID("containerd"), syscall.SIGUSR1); err != nil {
		t.Error(err)
		return
	}
	const end = "=== END goroutine stack dump ==="
	var dump string
	testutil.Eventually(t, "containerd has written its goroutines", func() bool {
		log, err := os.ReadFile(Shared.Node.LogPath("containerd"))
		_, after, begun := strings.Cut(string(log), "=== BEGIN goroutine stack dump ===")
		dump = strings.NewReplacer(`\n`, "\n", `\t`, "\t").Replace(after)
		return err == nil && begun && strings.Contains(after, end)
	})
	for _, stack := range strings.Split(dump, "\n\n") {
		if slices.ContainsFunc(parts, func(part string) bool { return strings.Contains(stack, part) }) {
			t.Logf("containerd: %s", stack)
		}
	}
}

// WriterFunc is a function that implements io.Writer.
type WriterFunc func([]byte) (int, error)

func (f WriterFunc) Write(p []byte) (int, error) { return f(p) }

// Usage is what a process holds.
type Usage struct{ Descriptors, Threads, RSSKiB int }

// UsageOf returns what a process holds now. Of its memory it counts only anonymous memory.
func UsageOf(t testing.TB, pid int) Usage {
	t.Helper()
	var u Usage
	entries, err := os.ReadDir(fmt.Sprintf("/proc/%d/fd", pid))
	if err != nil {
		t.Fatal(err)
	}
	u.Descriptors = len(entries)
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(status)) {
		name, value, _ := strings.Cut(line, ":")
		number, _ := strconv.Atoi(strings.TrimSuffix(strings.TrimSpace(value), " kB"))
		switch name {
		case "Threads":
			u.Threads = number
		case "RssAnon":
			u.RSSKiB = number
		}
	}
	return u
}
