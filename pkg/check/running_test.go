package check

import (
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"github.com/streamshim/streamshim/pkg/config"
)

// listenVariable has the test binary listen on a socket until its stdin ends.
const listenVariable = "CHECK_TEST_LISTEN"

func TestMain(m *testing.M) {
	if path := os.Getenv(listenVariable); path != "" {
		if _, err := net.Listen("unix", path); err != nil {
			panic(err)
		}
		os.Stdout.WriteString("ready")
		os.Stdin.Read(make([]byte, 1))
		os.Exit(0)
	}
	os.Exit(m.Run())
}

// A program that was replaced while it runs is seen, and so is that the same build was put in its place.
func TestRunning(t *testing.T) {
	dir := t.TempDir()
	c := config.Config{Listen: "unix://" + filepath.Join(dir, "s.sock")}
	if r := running(c); r.Level != OK || r.Detail != "none runs" {
		t.Errorf("nobody listens: %+v", r)
	}
	program := filepath.Join(dir, "program")
	put := func(text []byte) {
		if err := os.WriteFile(program+".new", text, 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.Rename(program+".new", program); err != nil {
			t.Fatal(err)
		}
	}
	text, err := os.ReadFile("/proc/self/exe")
	if err != nil {
		t.Fatal(err)
	}
	put(text)
	command := exec.Command(program)
	command.Env = append(os.Environ(), listenVariable+"="+filepath.Join(dir, "s.sock"))
	stdin, err := command.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	stdout, err := command.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := command.Start(); err != nil {
		t.Fatal(err)
	}
	defer command.Wait()
	defer stdin.Close()
	stdout.Read(make([]byte, 5))
	if r := running(c); r.Level != OK {
		t.Errorf("as it was started: %+v", r)
	}
	put(text)
	if r := running(c); r.Level != OK {
		t.Errorf("the same build in another file: %+v", r)
	}
	put(append(text, "another"...))
	if r := running(c); r.Level != Warning {
		t.Errorf("another program: %+v", r)
	}
}
