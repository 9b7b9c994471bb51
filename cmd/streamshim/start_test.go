package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// asProgram, in the environment, makes the test binary be streamshim.
const asProgram = "STREAMSHIM_TEST_MAIN"

func TestMain(m *testing.M) {
	if os.Getenv(asProgram) != "" {
		main()
		os.Exit(0)
	}
	os.Exit(m.Run())
}

// program is streamshim as a process of its own.
func program(t *testing.T, args ...string) (command *exec.Cmd, output *bytes.Buffer) {
	t.Helper()
	command = exec.Command(os.Args[0], args...)
	command.Env = append(os.Environ(), asProgram+"=1")
	output = &bytes.Buffer{}
	command.Stdout, command.Stderr = output, output
	return command, output
}

// silentFIFO is a FIFO with a writer that writes nothing: whoever reads it waits.
func silentFIFO(t *testing.T, path string) {
	t.Helper()
	if err := unix.Mkfifo(path, 0o600); err != nil {
		t.Fatal(err)
	}
	writer, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { writer.Close() })
}

// SIGTERM ends streamshim also while it waits for something, such as a file, before it serves.
func TestSignalEndsWhatWaits(t *testing.T) {
	fifo := filepath.Join(t.TempDir(), "fifo")
	silentFIFO(t, fifo)
	for _, args := range [][]string{{"serve", "--config", fifo}, {"check", "--config", fifo}, {"sessions", "list", "--config", fifo}, {"sessions", "replay", fifo}} {
		t.Run(args[0]+" "+args[1], func(t *testing.T) {
			t.Parallel()
			command, output := program(t, args...)
			if err := command.Start(); err != nil {
				t.Fatal(err)
			}
			// It has the FIFO open, so it waits.
			deadline := time.Now().Add(testTimeout)
			for !holds(command.Process.Pid, fifo) {
				if time.Now().After(deadline) {
					t.Fatalf("it does not open %s: %s", fifo, output)
				}
				time.Sleep(5 * time.Millisecond)
			}
			command.Process.Signal(syscall.SIGTERM) //nolint:errcheck // seen below
			ended := make(chan error, 1)
			go func() { ended <- command.Wait() }()
			select {
			case <-ended:
			case <-time.After(testTimeout):
				command.Process.Kill() //nolint:errcheck // as above
				t.Errorf("SIGTERM did not end it: %s", output)
			}
			if output.Len() > 0 {
				t.Errorf("it ended by itself: %s", output)
			}
		})
	}
}

func holds(pid int, path string) bool {
	links, _ := filepath.Glob(filepath.Join("/proc", strconv.Itoa(pid), "fd", "*")) //nolint:errcheck // the pattern is right
	for _, link := range links {
		if target, err := os.Readlink(link); err == nil && target == path {
			return true
		}
	}
	return false
}

// A file that does not come is given up, and one without an end is refused, by serve itself.
func TestConfigurationHasBounds(t *testing.T) {
	_, err := run(t, "serve", "--config", "/dev/zero")
	if err == nil || !strings.Contains(err.Error(), "larger than") {
		t.Errorf("/dev/zero: %v", err)
	}
	fifo := filepath.Join(t.TempDir(), "fifo")
	silentFIFO(t, fifo)
	if _, err := run(t, "serve", "--config", fifo); !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("a file that does not come: %v", err)
	}
}

// What streamshim cannot do stands in the log before it says that it is ready; in JSON every line is JSON, with
// durations for people.
func TestReadyComesLast(t *testing.T) {
	for _, format := range []string{"text", "json"} {
		t.Run(format, func(t *testing.T) {
			dir := t.TempDir()
			notify := notifySocket(t, dir)
			command, output := program(t, "serve", "--listen", "unix://"+filepath.Join(dir, "s.sock"), "--upstream", "unix://"+filepath.Join(dir, "away.sock"),
				"--state-dir", filepath.Join(dir, "state"), "--admin", "unix://"+filepath.Join(dir, "admin.sock"), "--log-format", format)
			if err := command.Start(); err != nil {
				t.Fatal(err)
			}
			wantState(t, notify, "READY=1")
			command.Process.Signal(syscall.SIGTERM) //nolint:errcheck // seen below
			if err := command.Wait(); err != nil {
				t.Errorf("%v: %s", err, output)
			}
			text := output.String()
			missing, ready := strings.Index(text, "the runtime's socket is not there"), strings.Index(text, "streamshim ready")
			if missing < 0 || ready < missing {
				t.Errorf("missing at %d, ready at %d: %s", missing, ready, text)
			}
			if format == "text" {
				return
			}
			drain := false
			for line := range strings.Lines(text) {
				var record map[string]any
				if err := json.Unmarshal([]byte(line), &record); err != nil {
					t.Errorf("no JSON: %s", line)
				}
				drain = drain || record["drain"] == "10s"
			}
			if !drain {
				t.Errorf("no duration as 10s: %s", text)
			}
		})
	}
}
