package node

import (
	"os"
	"os/exec"
	"slices"
	"testing"
	"time"
)

func TestSplitRule(t *testing.T) {
	for line, want := range map[string][]string{
		`-N CNI-HOSTPORT-DNAT`: {"-N", "CNI-HOSTPORT-DNAT"},
		`-A CNI-HOSTPORT-DNAT -m comment --comment "dnat name: \"streamshim-x\" id: \"1234\"" -j CNI-DN-1`: {
			"-A", "CNI-HOSTPORT-DNAT", "-m", "comment", "--comment", `dnat name: "streamshim-x" id: "1234"`, "-j", "CNI-DN-1",
		},
		`-A X --comment "" -j Y`: {"-A", "X", "--comment", "", "-j", "Y"},
		``:                       nil,
	} {
		if got := splitRule(line); !slices.Equal(got, want) {
			t.Errorf("splitRule(%q) = %q, want %q", line, got, want)
		}
	}
}

// TestProcessIdentity checks that a recorded process is not confused with a later one of the same ID.
func TestProcessIdentity(t *testing.T) {
	self, err := identify(os.Getpid())
	if err != nil {
		t.Fatal(err)
	}
	if !self.alive() {
		t.Error("this process is not alive")
	}
	earlier := process{self.PID, "1"}
	if earlier.alive() {
		t.Error("a process that had the ID before counts as this one")
	}
	if err := earlier.stop(0); err != nil { // must not end this test
		t.Error(err)
	}
}

func TestStopKillsWhatIgnoresSIGTERM(t *testing.T) {
	command := exec.Command("sh", "-c", `trap "" TERM; echo ready; while :; do sleep 1; done`)
	stdout, err := command.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := command.Start(); err != nil {
		t.Fatal(err)
	}
	if _, err := stdout.Read(make([]byte, 8)); err != nil {
		t.Fatal(err)
	}
	p, err := identify(command.Process.Pid)
	if err != nil {
		t.Fatal(err)
	}
	if err := p.stop(100 * time.Millisecond); err != nil {
		t.Error(err)
	}
	if p.alive() {
		t.Error("still alive")
	}
	_ = command.Wait() // killed, as intended
	if err := p.stop(time.Second); err != nil {
		t.Errorf("stop of a process that is gone: %v", err)
	}
}
