package main

import (
	"errors"
	"os"
	"testing"

	"github.com/streamshim/streamshim/test/node"
)

// TestLab goes through what "make lab" does without a terminal, twice, and "make lab-down".
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
