package daemon

import (
	"path/filepath"
	"strings"
	"testing"
)

// Two processes on one state directory would end each other's commands.
func TestStateDirIsLocked(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "state")
	first, err := lockStateDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := lockStateDir(dir); err == nil || !strings.Contains(err.Error(), "another streamshim") || !strings.Contains(err.Error(), "--state-dir") {
		t.Errorf("the second: %v", err)
	}
	if err := first.Close(); err != nil {
		t.Fatal(err)
	}
	again, err := lockStateDir(dir)
	if err != nil {
		t.Errorf("after the first: %v", err)
	}
	again.Close()
}
