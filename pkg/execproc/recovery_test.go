package execproc

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/streamshim/streamshim/internal/testutil"
	"github.com/streamshim/streamshim/pkg/execproc/internal/ociruntime"
	"github.com/streamshim/streamshim/pkg/execproc/internal/proc"
	"github.com/streamshim/streamshim/pkg/execproc/internal/record"
	"github.com/streamshim/streamshim/pkg/workload"
)

// predecessor plays a streamshim that will be killed: it starts the commands that it is given, reports that, and waits.
func predecessor(dir string) {
	fail := func(err error) {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	var c workload.Container
	if err := json.Unmarshal([]byte(os.Getenv("EXECPROC_TEST_CONTAINER")), &c); err != nil {
		fail(err)
	}
	config := testConfig(dir)
	if policy := os.Getenv("EXECPROC_TEST_POLICY"); policy != "" {
		config.OnDisconnect = Policy(policy)
	}
	r, err := NewRunner(config)
	if err != nil {
		fail(err)
	}
	marker := os.Getenv("EXECPROC_TEST_MARKER")
	if os.Getenv("EXECPROC_TEST_BUSY") != "" {
		startWithoutEnd(r, c, marker)
	}
	for _, script := range []string{
		"sleep " + marker,
		"trap '' HUP TERM; setsid sleep " + marker + " & sleep " + marker + "; sleep " + marker,
	} {
		if _, err := r.Start(context.Background(), c, workload.Command{Args: shell(script), Stdin: true, Stdout: true, Stderr: true}); err != nil {
			fail(err)
		}
	}
	fmt.Println("started")
	time.Sleep(time.Hour)
}

// startWithoutEnd starts commands one after the other, several at a time, until the process is killed.
func startWithoutEnd(r *Runner, c workload.Container, marker string) {
	for i := range 4 {
		go func() {
			for {
				command := workload.Command{Args: []string{"sleep", marker}, Stdin: true, Stdout: true, Stderr: i%2 == 0, TTY: i%2 != 0}
				if _, err := r.Start(context.Background(), c, command); err != nil {
					fmt.Fprintln(os.Stderr, err)
				}
			}
		}()
	}
	fmt.Println("started")
	select {}
}

func startPredecessor(t *testing.T, c workload.Container, dir, marker string, policy Policy, environment ...string) *exec.Cmd {
	t.Helper()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	encoded, err := json.Marshal(c)
	if err != nil {
		t.Fatal(err)
	}
	command := exec.Command(self)
	command.Env = append(os.Environ(), "EXECPROC_TEST_PREDECESSOR="+dir, "EXECPROC_TEST_CONTAINER="+string(encoded),
		"EXECPROC_TEST_MARKER="+marker, "EXECPROC_TEST_POLICY="+string(policy))
	command.Env = append(command.Env, environment...)
	command.Stderr = os.Stderr
	out, err := command.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := command.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		command.Process.Kill()
		command.Wait()
	})
	if line, err := bufio.NewReader(out).ReadString('\n'); err != nil || line != "started\n" {
		t.Fatalf("predecessor: %q, %v", line, err)
	}
	return command
}

// TestKilledPredecessor checks that the next streamshim ends what one that was killed has left running. It must not if the
// policy is to keep it, and never while the other still lives.
func TestKilledPredecessor(t *testing.T) {
	for _, policy := range []Policy{PolicyHangup, PolicyKill, PolicyKeep} {
		t.Run(string(policy), func(t *testing.T) {
			c := newContainer(t)
			dir, marker := filepath.Join(t.TempDir(), "exec"), newMarker()
			command := startPredecessor(t, c, dir, marker, policy)
			successor := func() *Runner {
				return newRunner(t, func(config *Config) { config.StateDir, config.OnDisconnect = dir, policy })
			}
			eventually(t, "all processes run", func() bool { return len(marked(t, "sleep\x00"+marker)) == 3 })
			records := func() []string { return recordsIn(dir) }
			eventually(t, "two records", func() bool { return len(records()) == 2 })
			processes, recorded := marked(t, marker), records()

			first := successor()
			if !slices.Equal(records(), recorded) || !slices.Equal(marked(t, marker), processes) {
				t.Errorf("processes of a living streamshim were touched: %v, had %v", records(), recorded)
			}
			first.Close()

			command.Process.Kill()
			command.Wait()
			second := successor()
			if policy == PolicyKeep {
				if len(marked(t, marker)) == 0 {
					t.Error("a process to be kept was ended")
				}
				for _, pid := range marked(t, marker) {
					unix.Kill(pid, unix.SIGKILL)
				}
			}
			eventually(t, "nothing of the predecessor is left", func() bool {
				entries, err := os.ReadDir(dir)
				return len(marked(t, marker)) == 0 && err == nil && len(entries) == 0
			})
			second.Close()
		})
	}
}

// TestKilledWhileStarting checks that a streamshim that is killed at any step of a start leaves no command that the next
// one does not end. EXECPROC_TEST_KILLS sets how many are killed.
func TestKilledWhileStarting(t *testing.T) {
	kills := 10
	if n, err := strconv.Atoi(os.Getenv("EXECPROC_TEST_KILLS")); err == nil {
		kills = n
	}
	c := newContainer(t)
	dir, marker := filepath.Join(t.TempDir(), "exec"), newMarker()
	newRunner(t, func(config *Config) { config.StateDir = filepath.Join(t.TempDir(), "exec") }) // reaps those who lose their parent
	for i := range kills {
		command := startPredecessor(t, c, dir, marker, PolicyHangup, "EXECPROC_TEST_BUSY=1")
		time.Sleep(time.Duration(i*7%100) * time.Millisecond) // the moment of the kill
		command.Process.Kill()
		command.Wait()
	}
	interrupted := 0
	for _, path := range recordsIn(dir) {
		if data, err := os.ReadFile(path); err == nil && strings.Contains(string(data), `"since"`) {
			interrupted++
		}
	}
	t.Logf("%d processes, %d interrupted starts", len(marked(t, marker)), interrupted)
	if interrupted == 0 {
		t.Error("no start was interrupted: the test shows nothing")
	}
	successor := newRunner(t, func(config *Config) { config.StateDir = dir })
	eventually(t, "nothing of the predecessors is left", func() bool {
		entries, err := os.ReadDir(dir)
		return len(marked(t, marker)) == 0 && err == nil && len(entries) == 0
	})
	successor.Close()
	// Copies of a predecessor that was killed between fork and execve. The reaper takes them for children of this test,
	// because of their session. Those of a service would belong to init.
	for pid := 1; pid > 0; {
		pid, _ = unix.Wait4(-1, nil, unix.WNOHANG, nil)
	}
}

// TestForkedRuntimeIsAwaited checks a streamshim that is killed between fork and execve of a runtime. The child does not
// look like a runtime yet, but holds the lock of the start's record.
func TestForkedRuntimeIsAwaited(t *testing.T) {
	testutil.Slow(t)
	dir := filepath.Join(t.TempDir(), "exec")
	f := ociruntime.FilesOf(filepath.Join(dir, "1-1-1"))
	data, _ := json.Marshal(record.Record{Since: 1, Boot: proc.BootID(), Policy: PolicyKill})
	writeFile(t, f.Record, string(data), 0o600)
	locked, err := os.Open(f.Record)
	if err != nil {
		t.Fatal(err)
	}
	defer locked.Close()
	if err := unix.Flock(int(locked.Fd()), unix.LOCK_EX); err != nil {
		t.Fatal(err)
	}
	forked := exec.Command("sh", "-c", `sleep 1; exec 3>&-; exec sh -c 'sleep 1000; :' runtime "$PROCESS"`)
	forked.Env = append(os.Environ(), "PROCESS="+f.Process)
	forked.ExtraFiles = []*os.File{locked}
	if err := forked.Start(); err != nil {
		t.Fatal(err)
	}
	locked.Close()
	ended := make(chan struct{})
	go func() { forked.Wait(); close(ended) }()
	defer forked.Process.Kill()
	newRunner(t, func(config *Config) { config.StateDir = dir })
	closes(t, ended, "the end of what became a runtime")
	eventually(t, "the files are gone", func() bool {
		entries, err := os.ReadDir(dir)
		return err == nil && len(entries) == 0
	})
}

func recordsIn(dir string) []string {
	names, _ := filepath.Glob(filepath.Join(dir, "[0-9]*.record"))
	return names
}

// TestRecordOfReusedPid checks that a record whose pid belongs to another process by now hurts nobody.
func TestRecordOfReusedPid(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "exec")
	stranger := exec.Command("sleep", "1000")
	if err := stranger.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { stranger.Process.Kill(); stranger.Wait() })
	stat, err := proc.ReadStat(stranger.Process.Pid)
	if err != nil {
		t.Fatal(err)
	}
	for i, left := range []record.Record{
		{Pid: stat.Pid, Start: stat.Start - 1, Boot: proc.BootID(), Policy: PolicyKill}, // another process
		{Pid: stat.Pid, Start: stat.Start, Boot: "another", Policy: PolicyKill},         // another boot
	} {
		data, _ := json.Marshal(left)
		writeFile(t, filepath.Join(dir, fmt.Sprintf("1-1-%d.record", i)), string(data), 0o600)
	}
	writeFile(t, filepath.Join(dir, "1-1-2.record"), "{", 0o600)
	writeFile(t, filepath.Join(dir, "1-1-3.process"), "{}", 0o600)
	writeFile(t, filepath.Join(dir, ".1-1-3.pid"), "", 0o600)
	writeFile(t, filepath.Join(dir, "not-ours"), "", 0o600)
	r := newRunner(t, func(config *Config) { config.StateDir = dir; config.OnDisconnect = PolicyKeep })
	defer r.Close()
	entries, err := os.ReadDir(dir)
	if err != nil || len(entries) != 1 || entries[0].Name() != "not-ours" {
		t.Errorf("left: %v, %v", entries, err)
	}
	if !stat.Identity.Alive() {
		t.Error("a stranger was killed")
	}
}

// TestRecordOnFullDisk checks that the record of a command has its pid even if the disk becomes full during the start.
// Without the pid the command would stay for ever if streamshim were killed while it runs.
func TestRecordOnFullDisk(t *testing.T) {
	r := newRunner(t)
	c := newContainer(t)
	dir := t.TempDir()
	if err := unix.Mount("tmpfs", dir, "tmpfs", 0, "size=64k"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Unmount(dir, unix.MNT_DETACH) }) //nolint:errcheck // nothing else could be done
	r.config.StateDir = dir
	launch := func(ctx context.Context, c workload.Container, spec *specs.Process, f ociruntime.Files, streams [3]*os.File, stderr *os.File) (int, error) {
		pid, err := ociruntime.Exec(ctx, c, spec, f, streams, stderr)
		if err := os.WriteFile(filepath.Join(dir, "filler"), make([]byte, 1<<20), 0o600); !errors.Is(err, unix.ENOSPC) {
			t.Errorf("the disk was not filled: %v", err)
		}
		return pid, err
	}
	p, err := r.start(context.Background(), c, workload.Command{Args: []string{"sleep", newMarker()}}, PolicyHangup, launch)
	if err != nil {
		t.Fatal(err)
	}
	defer p.Close()
	defer p.Kill()
	data, err := os.ReadFile(p.record)
	if err != nil {
		t.Fatal(err)
	}
	if found, err := record.Parse(data); err != nil || found.Pid != p.PID() {
		t.Errorf("the record has pid %d, %v; want %d", found.Pid, err, p.PID())
	}
}
