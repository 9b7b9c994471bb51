package main

import (
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"testing"

	"github.com/streamshim/streamshim/test/internal/node"
)

// TestLab does what "make lab" does without a terminal, twice, and "make lab-down".
func TestLab(t *testing.T) {
	node.Require(t)
	binary := node.Binary(t)
	dir, err := os.MkdirTemp("", "lab")
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := down(dir); err != nil {
			t.Error(err)
		}
		if _, err := os.Stat(dir); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("the lab's folder is still there: %v", err)
		}
	}()
	if err := up(t.Context(), dir, binary); err != nil {
		t.Fatal(err)
	}
	for script, args := range map[string][]string{"crictl": {"ps"}, "streamshim": {"sessions", "list"}} {
		if out, err := exec.Command(filepath.Join(dir, script), args...).CombinedOutput(); err != nil {
			t.Errorf("%s %v: %v\n%s", script, args, err, out)
		}
	}
	if out, _ := exec.Command(filepath.Join(dir, "streamshim"), "check").CombinedOutput(); !regexp.MustCompile(`(?m)^ok +upstream +containerd`).Match(out) {
		t.Errorf("check in the lab:\n%s", out)
	}
	containerd := pid(t, dir)
	if err := up(t.Context(), dir, binary); err != nil {
		t.Fatalf("the second time: %v", err)
	}
	if again := pid(t, dir); again != containerd {
		t.Errorf("the second lab has another containerd, process %d instead of %d", again, containerd)
	}
}

func pid(t *testing.T, dir string) int {
	t.Helper()
	n, err := node.Open(t.Context(), dir, t.Logf)
	if err != nil {
		t.Fatal(err)
	}
	defer n.Detach()
	return n.PID("containerd")
}
