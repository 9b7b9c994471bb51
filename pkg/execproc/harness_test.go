package execproc

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"regexp"
	"runtime"
	"strconv"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/streamshim/streamshim/pkg/execproc/internal/ociruntime"
	"github.com/streamshim/streamshim/pkg/execproc/internal/proc"
	"github.com/streamshim/streamshim/pkg/workload"
)

// The tests run real commands in real containers, with runc and a root file system of busybox. test/internal/peers/build.sh
// builds both. STREAMSHIM_PEERS names another folder that has them.

var rootfs string // made once, shared by all containers

func TestMain(m *testing.M) {
	if dir := os.Getenv(actorVariable); dir != "" {
		act(dir) // does not return
	}
	if dir := os.Getenv("EXECPROC_TEST_PREDECESSOR"); dir != "" {
		predecessor(dir) // does not return
	}
	// What the Go runtime opens or starts once and keeps is not a leak.
	signal.Stop(func() chan os.Signal { c := make(chan os.Signal, 1); signal.Notify(c, unix.SIGUSR1); return c }())
	if r, w, err := os.Pipe(); err == nil {
		r.Close()
		w.Close()
	}
	dir, err := os.MkdirTemp("", "execproc")
	if err != nil {
		panic(err)
	}
	os.Chmod(dir, 0o755)
	rootfs = filepath.Join(dir, "rootfs")
	code := m.Run()
	os.RemoveAll(dir)
	os.Exit(code)
}

// peer returns the path of a program that test/internal/peers/build.sh builds.
func peer(t testing.TB, name string) string {
	t.Helper()
	dir := os.Getenv("STREAMSHIM_PEERS")
	if dir == "" {
		home, err := os.UserHomeDir()
		if err != nil {
			t.Fatal(err)
		}
		dir = filepath.Join(home, ".cache", "streamshim", "peers", "bin")
	}
	path := filepath.Join(dir, name)
	if _, err := os.Stat(path); err != nil {
		t.Fatalf("%s is missing: run test/internal/peers/build.sh, or set STREAMSHIM_PEERS to a folder that has it (%v)", name, err)
	}
	return path
}

// makeRootfs unpacks busybox with the libraries that it needs, once.
func makeRootfs(t testing.TB) string {
	t.Helper()
	if _, err := os.Stat(rootfs); err == nil {
		return rootfs
	}
	if os.Getuid() != 0 {
		t.Fatal("these tests run containers and need root")
	}
	for _, dir := range []string{"bin", "dev", "proc", "sys", "tmp", "etc", "root"} {
		if err := os.MkdirAll(filepath.Join(rootfs, dir), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Chmod(filepath.Join(rootfs, "tmp"), 0o777|os.ModeSticky); err != nil {
		t.Fatal(err)
	}
	busybox := peer(t, "busybox")
	copyFile(t, busybox, filepath.Join(rootfs, "bin/busybox"), 0o755)
	libraries, _ := exec.Command("ldd", busybox).CombinedOutput() // fails for a static one, which needs none
	for _, library := range regexp.MustCompile(`/\S+\.so\S*`).FindAllString(string(libraries), -1) {
		copyFile(t, library, filepath.Join(rootfs, library), 0o755)
	}
	applets, err := exec.Command(busybox, "--list").Output()
	if err != nil {
		t.Fatal(err)
	}
	for _, applet := range strings.Fields(string(applets)) {
		if applet != "busybox" {
			if err := os.Symlink("busybox", filepath.Join(rootfs, "bin", applet)); err != nil {
				t.Fatal(err)
			}
		}
	}
	writeFile(t, filepath.Join(rootfs, "etc/passwd"), "root:x:0:0:root:/root:/bin/sh\n", 0o644)
	writeFile(t, filepath.Join(rootfs, "bin/not-executable"), "#!/bin/sh\n", 0o644)
	writeFile(t, filepath.Join(rootfs, "bin/missing-interpreter"), "#!/nope\n", 0o755)
	// An ELF header for a machine other than this one.
	other := []byte("\x7fELF\x02\x01\x01\x00\x00\x00\x00\x00\x00\x00\x00\x00\x02\x00\x16\x00\x01\x00\x00\x00")
	writeFile(t, filepath.Join(rootfs, "bin/wrong-machine"), string(append(other, make([]byte, 64)...)), 0o755)
	return rootfs
}

func copyFile(t testing.TB, from, to string, mode os.FileMode) {
	t.Helper()
	data, err := os.ReadFile(from)
	if err != nil {
		t.Fatal(err)
	}
	writeFile(t, to, string(data), mode)
}

func writeFile(t testing.TB, path, content string, mode os.FileMode) {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, []byte(content), mode); err != nil {
		t.Fatal(err)
	}
}

var containers atomic.Int64

// newContainer runs a container whose main process sleeps. The functions may change its specification.
func newContainer(t testing.TB, changes ...func(*specs.Spec)) workload.Container {
	t.Helper()
	return newContainerOf(t, peer(t, "runc"), changes...)
}

// newContainerOf is like newContainer, with another OCI runtime. The specification is runc's.
func newContainerOf(t testing.TB, binary string, changes ...func(*specs.Spec)) workload.Container {
	t.Helper()
	id := fmt.Sprintf("execproc-test-%d-%d-", os.Getpid(), containers.Add(1))
	id += strings.Repeat("0", 64-len(id)) // as long as those of containerd
	return runContainer(t, binary, t.TempDir(), id, changes...)
}

// runContainer is like newContainerOf, with an id and the folder for the runtime's state.
func runContainer(t testing.TB, binary, root, id string, changes ...func(*specs.Spec)) workload.Container {
	t.Helper()
	fs := makeRootfs(t)
	bundle := t.TempDir()
	spec := exec.Command(peer(t, "runc"), "spec")
	spec.Dir = bundle
	if out, err := spec.CombinedOutput(); err != nil {
		t.Fatalf("runc spec: %v: %s", err, out)
	}
	data, err := os.ReadFile(filepath.Join(bundle, "config.json"))
	if err != nil {
		t.Fatal(err)
	}
	var config specs.Spec
	if err := json.Unmarshal(data, &config); err != nil {
		t.Fatal(err)
	}
	config.Root = &specs.Root{Path: fs}
	config.Process.Terminal = false
	config.Process.Args = []string{"sleep", "100000"}
	config.Process.Env = []string{"PATH=/bin", "GREETING=hello"}
	config.Linux.CgroupsPath = "/" + id
	for _, change := range changes {
		change(&config)
	}
	if data, err = json.Marshal(config); err != nil {
		t.Fatal(err)
	}
	writeFile(t, filepath.Join(bundle, "config.json"), string(data), 0o644)
	pidFile := filepath.Join(bundle, "pid")
	run := exec.Command(binary, "--root", root, "run", "--detach", "--bundle", bundle, "--pid-file", pidFile, id)
	run.SysProcAttr = &unix.SysProcAttr{Setsid: false}
	log, err := os.Create(filepath.Join(bundle, "log"))
	if err != nil {
		t.Fatal(err)
	}
	defer log.Close()
	run.Stdout, run.Stderr = log, log
	if err := run.Run(); err != nil {
		text, _ := os.ReadFile(log.Name())
		t.Fatalf("runc run: %v: %s", err, text)
	}
	pid, err := ociruntime.ReadPidFile(pidFile)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		runc(t, workload.Container{Runtime: binary, Root: root}, "delete", "--force", id)
		// A process stays a subreaper. Without a Runner nobody else reaps.
		eventually(t, "the container's main process is reaped", func() bool {
			_, err := unix.Wait4(pid, nil, unix.WNOHANG, nil)
			return err == unix.ECHILD
		})
	})
	return workload.Container{
		Target:  workload.Target{ContainerID: id},
		Runtime: binary, Root: root, InitPid: pid, InitStartTime: mustStat(t, pid).Start, Process: config.Process,
		UIDMappings: config.Linux.UIDMappings, GIDMappings: config.Linux.GIDMappings,
	}
}

func runc(t testing.TB, c workload.Container, args ...string) {
	t.Helper()
	if out, err := exec.Command(c.Runtime, append([]string{"--root", c.Root}, args...)...).CombinedOutput(); err != nil {
		t.Errorf("runc %v: %v: %s", args, err, out)
	}
}

// noLeaks fails the test if, after all its clean-up, there are more goroutines, descriptors or children than before.
func noLeaks(t testing.TB) {
	t.Helper()
	before := resources(t)
	t.Cleanup(func() {
		var now [3]int
		deadline := time.Now().Add(patience)
		for {
			if now = resources(t); now[0] <= before[0] && now[1] <= before[1] && now[2] <= before[2] {
				return
			}
			if time.Now().After(deadline) {
				break
			}
			time.Sleep(20 * time.Millisecond)
		}
		if children, err := proc.OwnChildren(nil); err == nil {
			t.Logf("children: %+v", children)
		}
		buffer := make([]byte, 1<<20)
		t.Errorf("goroutines, descriptors, children: %v, at the start %v\n%s", now, before, buffer[:runtime.Stack(buffer, true)])
	})
}

func resources(t testing.TB) [3]int {
	t.Helper()
	fds, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	children, err := proc.OwnChildren(nil)
	if err != nil {
		t.Fatal(err)
	}
	return [3]int{runtime.NumGoroutine(), len(fds), len(children)}
}

// testConfig has the default times of users.
func testConfig(stateDir string) Config {
	return Config{
		StateDir: stateDir, OnDisconnect: PolicyHangup,
		StartTimeout: 30 * time.Second, TermAfter: 5 * time.Second, KillAfter: 10 * time.Second,
		DrainIdle: 2 * time.Second, DrainMax: 10 * time.Second, OutputLimit: 15 << 20,
	}
}

// newRunner returns a Runner with short graces. It is closed at the end of the test and must not leak.
func newRunner(t testing.TB, changes ...func(*Config)) *Runner {
	t.Helper()
	noLeaks(t)
	config := testConfig(filepath.Join(t.TempDir(), "exec"))
	config.TermAfter, config.KillAfter, config.DrainIdle = 300*time.Millisecond, 600*time.Millisecond, 200*time.Millisecond
	config.Logger = slog.New(slog.NewTextHandler(testLog{t}, nil))
	for _, change := range changes {
		change(&config)
	}
	r, err := NewRunner(config)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		r.Close()
		left, err := os.ReadDir(config.StateDir)
		if err != nil || (len(left) > 0 && config.OnDisconnect != PolicyKeep) {
			t.Errorf("left in the state directory: %v, %v", left, err)
		}
	})
	return r
}

type testLog struct{ testing.TB }

func (l testLog) Write(line []byte) (int, error) {
	l.Logf("%s", bytes.TrimSpace(line))
	return len(line), nil
}

func start(t testing.TB, r *Runner, c workload.Container, command workload.Command) *Process {
	t.Helper()
	p, err := r.Start(context.Background(), c, command)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { p.Close() })
	return p
}

func shell(script string) []string { return []string{"sh", "-c", script} }

// output runs a command to its end and returns its stdout and exit code.
func output(t testing.TB, r *Runner, c workload.Container, command workload.Command) (string, int) {
	t.Helper()
	command.Stdout = true
	p := start(t, r, c, command)
	defer p.Close()
	data, err := io.ReadAll(p.Stdout())
	if err != nil {
		t.Error(err)
	}
	return string(data), exitCode(t, p)
}

func exitCode(t testing.TB, p *Process) int {
	t.Helper()
	closes(t, p.Exited(), "the process's exit")
	return p.ExitCode()
}

// patience bounds waits for what happens soon, on a machine that is busy with other things.
const patience = time.Minute

func closes(t testing.TB, c <-chan struct{}, what string) {
	t.Helper()
	select {
	case <-c:
	case <-time.After(patience):
		t.Fatalf("waited in vain for %s", what)
	}
}

func eventually(t testing.TB, what string, condition func() bool) {
	t.Helper()
	for deadline := time.Now().Add(patience); !condition(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("waited in vain: %s", what)
		}
	}
}

// marked returns the living processes that have the marker among their arguments. Tests call it every few milliseconds, so
// it looks more closely only at what it finds.
func marked(t testing.TB, marker string) []int {
	t.Helper()
	entries, err := os.ReadDir("/proc")
	if err != nil {
		t.Fatal(err)
	}
	var found []int
	args := make([]byte, 128<<10)
	for _, entry := range entries {
		pid, err := strconv.Atoi(entry.Name())
		if err != nil {
			continue
		}
		fd, err := unix.Open("/proc/"+entry.Name()+"/cmdline", unix.O_RDONLY|unix.O_CLOEXEC, 0)
		if errors.Is(err, unix.ENOENT) {
			continue // it has ended meanwhile
		}
		if err != nil {
			t.Fatal(err) // it would look as if it had ended
		}
		n, err := unix.Read(fd, args)
		unix.Close(fd)
		if err != nil || !bytes.Contains(args[:n], []byte(marker)) {
			continue
		}
		if stat, err := proc.ReadStat(pid); err == nil && !stat.Zombie() {
			found = append(found, pid)
		}
	}
	return found
}

var markers atomic.Int64

// newMarker returns a number of seconds that no other process sleeps.
func newMarker() string { return fmt.Sprintf("3%05d%03d", os.Getpid(), markers.Add(1)) }
