package execproc

import (
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// predecessor is the test binary playing a streamshim that is going to be killed: it starts the
// commands it is given, says so, and waits.
func predecessor(dir string) {
	fail := func(err error) {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	var c Container
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
	if os.Getenv("EXECPROC_TEST_STARTS") != "" {
		startOnAndOn(r, c, marker)
	}
	for _, script := range []string{
		"sleep " + marker,
		"trap '' HUP TERM; setsid sleep " + marker + " & sleep " + marker + "; sleep " + marker,
	} {
		if _, err := r.Start(context.Background(), c, Command{Args: shell(script), Stdin: true, Stdout: true, Stderr: true}); err != nil {
			fail(err)
		}
	}
	fmt.Println("started")
	time.Sleep(time.Hour)
}

// startOnAndOn starts commands that outlive a hang-up, several at a time, until it is killed.
func startOnAndOn(r *Runner, c Container, marker string) {
	fmt.Println("started")
	for worker := range 4 {
		go func() {
			for {
				command := Command{Args: shell("trap '' HUP TERM; sleep " + marker), Stdin: true, Stdout: true, TTY: worker%2 == 1}
				p, err := r.Start(context.Background(), c, command)
				if err != nil {
					fmt.Fprintln(os.Stderr, err)
					os.Exit(1)
				}
				p.Kill()
				<-p.Exited()
				p.Close()
			}
		}()
	}
	select {}
}

func startPredecessor(t *testing.T, c Container, dir, marker string, policy Policy, environment ...string) *exec.Cmd {
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

// What a streamshim that was killed has left running is ended by the next one, unless the policy is
// to keep it, and never while the other still lives.
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
			records := func() []string {
				names, _ := filepath.Glob(filepath.Join(dir, "*.record"))
				return names
			}
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

// A streamshim that is killed while it starts commands leaves nothing behind: the next one ends what the
// starts have come to, whatever the policy. EXECPROC_KILLS says how often; it is killed at another moment
// each time.
func TestKilledDuringStarts(t *testing.T) {
	kills := 8
	if text := os.Getenv("EXECPROC_KILLS"); text != "" {
		var err error
		if kills, err = strconv.Atoi(text); err != nil {
			t.Fatal(err)
		}
	}
	c := newContainer(t)
	dir, marker := filepath.Join(t.TempDir(), "exec"), newMarker()
	unfinished, longest := 0, time.Duration(0)
	for i := range kills {
		command := startPredecessor(t, c, dir, marker, PolicyKill, "EXECPROC_TEST_STARTS=1")
		time.Sleep(time.Duration(20+i*37%150) * time.Millisecond) // the moment
		command.Process.Kill()
		command.Wait()
		records, _ := filepath.Glob(filepath.Join(dir, "*"+recordEnding))
		for _, path := range records {
			data, err := os.ReadFile(path)
			if found, parseErr := parseRecord(data); err == nil && parseErr == nil && found.Pid == 0 {
				unfinished++
			}
		}
		began := time.Now()
		r := newRunner(t, func(config *Config) { config.StateDir, config.OnDisconnect = dir, PolicyKill })
		eventually(t, "nothing of the predecessor is left", func() bool {
			entries, err := os.ReadDir(dir)
			return err == nil && len(entries) == 0 && len(marked(t, marker)) == 0
		})
		longest = max(longest, time.Since(began))
		r.Close()
		// It may have been between two steps: nothing comes later either.
		if left := marked(t, marker); len(left) > 0 {
			t.Errorf("left after kill %d: %v", i, left)
		}
	}
	if unfinished == 0 {
		t.Error("it was never killed during a start")
	}
	eventually(t, "nothing is left in the end", func() bool { return len(marked(t, marker)) == 0 })
	t.Logf("%d kills, %d starts under way; nothing was left after %s at most", kills, unfinished, longest)
}

// A record whose pid now belongs to somebody else must hurt nobody.
func TestRecordOfReusedPid(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "exec")
	stranger := exec.Command("sleep", "1000")
	if err := stranger.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { stranger.Process.Kill(); stranger.Wait() })
	stat, err := readStat(stranger.Process.Pid)
	if err != nil {
		t.Fatal(err)
	}
	for i, left := range []record{
		{Pid: stat.pid, Start: stat.start - 1, Boot: bootID(), Policy: PolicyKill}, // another process
		{Pid: stat.pid, Start: stat.start, Boot: "another", Policy: PolicyKill},    // another boot
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
	eventually(t, "all but a stranger's file is removed", func() bool {
		entries, err := os.ReadDir(dir)
		return err == nil && len(entries) == 1 && entries[0].Name() == "not-ours"
	})
	if !stat.identity.alive() {
		t.Error("a stranger was killed")
	}
}

// The pid that a runtime has written is that of the command only as long as the process has begun before the
// writing. Afterwards it may be another's, also in the same container.
func TestWrittenPid(t *testing.T) {
	c := newContainer(t)
	living := newRunner(t)
	for _, test := range []struct {
		name    string
		began   int64 // of the start, after the process
		written time.Duration
		boot    string
		ended   bool
	}{
		{"the command", -1, 0, bootID(), true},
		{"written before the process began", -1, -time.Hour, bootID(), false},
		{"begun before the start", 1, 0, bootID(), false},
		{"another boot", -1, 0, "another", false},
	} {
		t.Run(test.name, func(t *testing.T) {
			p := start(t, living, c, Command{Args: []string{"sleep", "1000"}})
			defer p.Kill()
			stat := mustStat(t, p.PID())
			dir := filepath.Join(t.TempDir(), "exec")
			data, _ := json.Marshal(record{InitPid: c.InitPid, Began: uint64(int64(stat.start) + test.began), Boot: test.boot})
			writeFile(t, filepath.Join(dir, "1-1-1.record"), string(data)+"\n{\"pid\":1", 0o600)
			written := filepath.Join(dir, "1-1-1.pid")
			writeFile(t, written, strconv.Itoa(stat.pid), 0o600)
			moment := time.Now().Add(test.written)
			if err := os.Chtimes(written, moment, moment); err != nil {
				t.Fatal(err)
			}
			newRunner(t, func(config *Config) { config.StateDir = dir })
			eventually(t, "the files are gone", func() bool {
				entries, err := os.ReadDir(dir)
				return err == nil && len(entries) == 0
			})
			if alive := stat.identity.alive(); alive == test.ended {
				t.Errorf("alive: %v", alive)
			}
		})
	}
}

func FuzzParseRecord(f *testing.F) {
	f.Add(`{"container":"c","initPid":7,"pid":8,"start":9,"boot":"b","policy":"hangup"}`)
	f.Add(`{"container":"c","initPid":7,"began":8,"pipes":["pipe:[1]"],"boot":"b","policy":"hangup"}` + "\n" + `{"pid":9,"start`)
	f.Fuzz(func(t *testing.T, text string) {
		if found, err := parseRecord([]byte(text)); err == nil && (found.Pid < 0 || found.Pid == 1 || found.Pid == 0 && found.Began == 0) {
			t.Errorf("pid %d of %q", found.Pid, text)
		}
		if owner, ok := ownerOf(text); ok && (owner.pid <= 0 || !strings.Contains(text, "-")) {
			t.Errorf("owner %v of %q", owner, text)
		}
	})
}
