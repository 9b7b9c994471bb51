package exec

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"k8s.io/client-go/tools/remotecommand"

	"github.com/streamshim/streamshim/test/internal/node"
)

// resident is how much memory a process holds, in KiB.
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

func threads(pid int) int { return len(glob(fmt.Sprintf("/proc/%d/task/*", pid))) }

// inParallel calls f for 0 to n-1, a few at a time. After a failure it begins no more: were all sessions
// to wait in vain, as they do when a container is stuck, the rest would take hours.
func inParallel(t *testing.T, n, atOnce int, f func(i int)) {
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

// expectNoLeak runs a load against a streamshim of its own and compares what the process holds before
// and after. At last it asks the process for its goroutines, in the way that ends it.
func expectNoLeak(t *testing.T, load func(shim *streamshim, n int), n int) {
	t.Helper()
	metrics := unusedAddress(t)
	shim := startStreamshim(t, fmt.Sprintf("metrics_address = %q\n", metrics))
	idle := goroutines(t, metrics)
	load(shim, 50) // buffers and threads that are kept
	pid := shim.pid()
	files, memory, tasks := descriptors(pid), resident(t, pid), threads(pid)
	load(shim, n)
	eventually(t, testTimeout, "all sessions have ended", func() bool {
		log, err := os.ReadFile(shim.log)
		return err == nil && bytes.Count(log, []byte("session start")) == bytes.Count(log, []byte("session end"))
	})
	eventually(t, testTimeout, fmt.Sprintf("descriptors are back to about %d", files), func() bool { return descriptors(pid) <= files+10 })
	eventually(t, testTimeout, "no zombies and no children are left", func() bool { return len(zombies(pid)) == 0 })
	t.Logf("before and after %d sessions: %d and %d descriptors, %d and %d KiB, %d and %d threads",
		n, files, descriptors(pid), memory, resident(t, pid), tasks, threads(pid))
	if after := resident(t, pid); after > memory+64<<10 {
		t.Errorf("%d KiB of memory, %d before", after, memory)
	}
	if after := threads(pid); after > tasks+20 {
		t.Errorf("%d threads, %d before", after, tasks)
	}
	eventually(t, testTimeout, "no files are left", func() bool {
		return len(glob(filepath.Join(shim.folder, "state", "exec", "*"))) == 0
	})
	// The last of a session comes after its log line. Whatever number is left then is told by its stacks.
	for begin := time.Now(); goroutines(t, metrics) > idle && time.Since(begin) < testTimeout; {
		time.Sleep(100 * time.Millisecond)
	}
	t.Logf("%d goroutines before, %d after", idle, goroutines(t, metrics))
	shim.stop(t, syscall.SIGQUIT)
	log, err := os.ReadFile(shim.log)
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
		for _, part := range []string{"remoteCommandSession", "/spdy.", "/websocket.", "(*relay)", "execproc.(*Process)", "os/exec"} {
			if strings.Contains(stack, part) {
				t.Errorf("a goroutine of a session is left:\n%s", stack)
				break
			}
		}
	}
}

// goroutines asks a streamshim's metrics for their number. The connection is closed each time, for it has a
// goroutine itself.
func goroutines(t *testing.T, metrics string) (n int) {
	t.Helper()
	client := http.Client{Transport: &http.Transport{DisableKeepAlives: true}, Timeout: testTimeout}
	response, err := client.Get("http://" + metrics + "/metrics")
	if err != nil {
		t.Fatal(err)
	}
	defer response.Body.Close()
	text, err := io.ReadAll(response.Body)
	if err != nil {
		t.Fatal(err)
	}
	_, rest, _ := strings.Cut(string(text), "\ngo_goroutines ")
	if _, err := fmt.Sscan(rest, &n); err != nil {
		t.Fatalf("no number of goroutines in %s", text)
	}
	return n
}

// unusedAddress is one at which nobody listens.
func unusedAddress(t *testing.T) string {
	t.Helper()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer listener.Close()
	return listener.Addr().String()
}

// Goroutines, descriptors and memory leak with every attach (CVE-2025-64329, A7).
func TestAttachLeaks(t *testing.T) {
	t.Parallel()
	container := runContainer(t, node.ContainerSpec{Stdin: true, Command: []string{"sh", "-c", "while :; do echo output; sleep 0.05; done"}})
	expectNoLeak(t, func(shim *streamshim, n int) {
		inParallel(t, n, 8, func(i int) {
			ctx, cancel := context.WithTimeout(context.Background(), testTimeout)
			defer cancel()
			// Dropped with the first output. Earlier would be a test of containerd 2.4, whose containers
			// may lose their output for good when a client goes while it is being attached.
			output := writerFunc(func(p []byte) (int, error) { cancel(); return len(p), nil })
			options := remotecommand.StreamOptions{Stdin: openStdin(t), Stdout: output, Stderr: io.Discard}
			u := shim.attachURL(t, container, options)
			err := stream(ctx, transports[i%2], u.String(), options)
			if !errors.Is(ctx.Err(), context.Canceled) {
				t.Errorf("%s: no output came within %v: %v", transports[i%2], testTimeout, err)
			}
		})
		if t.Failed() {
			logContainerdStacks(t, "WriterGroup", "spdystream")
		}
	}, 1000)
}

// logContainerdStacks logs those of containerd's goroutines that name one of the parts: who keeps the
// container's output.
func logContainerdStacks(t *testing.T, parts ...string) {
	t.Helper()
	if err := syscall.Kill(shared.node.PID("containerd"), syscall.SIGUSR1); err != nil {
		t.Error(err)
		return
	}
	const end = "=== END goroutine stack dump ==="
	var dump string
	eventually(t, testTimeout, "containerd has written its goroutines", func() bool {
		log, err := os.ReadFile(shared.node.LogPath("containerd"))
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

type writerFunc func([]byte) (int, error)

func (f writerFunc) Write(p []byte) (int, error) { return f(p) }

// The same for exec: 1000, good and failing and cut off, over both protocols.
func TestExecLeaks(t *testing.T) {
	t.Parallel()
	container := runContainer(t, node.ContainerSpec{})
	expectNoLeak(t, func(shim *streamshim, n int) {
		inParallel(t, n, 8, func(i int) {
			ctx, cancel := context.WithTimeout(context.Background(), testTimeout)
			defer cancel()
			options := remotecommand.StreamOptions{Stdout: io.Discard, Stderr: io.Discard}
			var command []string
			want := 0
			switch i / 2 % 4 {
			case 0:
				command = []string{"echo", "good"}
				options.Stdin = strings.NewReader("input")
			case 1:
				command, want = []string{"false"}, 1
			case 2:
				command, want = []string{"/no/such/file"}, 127
			case 3: // the client goes with the first output
				command, want = []string{"sh", "-c", "echo begin; exec sleep 1000"}, -1
				options.Stdout = writerFunc(func(p []byte) (int, error) { cancel(); return len(p), nil })
			}
			u := shim.execURL(t, container, options, command...)
			if err := stream(ctx, transports[i%2], u.String(), options); exitCodeOf(err) != want {
				t.Errorf("%s, %q: %v, want exit code %d", transports[i%2], command, err, want)
			}
		})
	}, 1000)
}

// Zombies pile up: as subreaper streamshim also inherits the orphans of containers that share the
// host's processes. None stays a zombie, and no status that somebody waits for is taken away.
func TestOrphansBecomeZombies(t *testing.T) {
	t.Parallel()
	pod := runPod(t, node.PodSpec{HostPID: true})
	container := runContainerIn(t, pod, node.ContainerSpec{})
	shim := startStreamshim(t, "")
	inParallel(t, 200, 8, func(i int) {
		code := i % 200
		// Orphans that end before, with and after the command.
		script := fmt.Sprintf("(sleep 0.2 &) ; (sh -c 'exit 9' &) ; (sleep 1 >/dev/null 2>&1 </dev/null &) ; exit %d", code)
		if i%2 == 0 {
			response, err := shim.execSync(context.Background(), container, 0, "sh", "-c", script)
			if err != nil || int(response.ExitCode) != code {
				t.Errorf("ExecSync: exit code %d, %v; want %d", response.GetExitCode(), err, code)
			}
			return
		}
		options := remotecommand.StreamOptions{Stdout: io.Discard}
		u := shim.execURL(t, container, options, "sh", "-c", script)
		ctx, cancel := context.WithTimeout(context.Background(), testTimeout)
		defer cancel()
		if err := stream(ctx, transports[i/2%2], u.String(), options); exitCodeOf(err) != code {
			t.Errorf("exec: %v, want exit code %d", err, code)
		}
	})
	eventually(t, testTimeout, "no zombies are left", func() bool { return len(zombies(shim.pid())) == 0 })
}
