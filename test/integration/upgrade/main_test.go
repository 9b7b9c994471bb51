// Package upgrade tests that another program takes over from a streamshim with all that goes on in it, with stock clients
// on a real node.
package upgrade

import (
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"testing"

	"github.com/streamshim/streamshim/test/internal/harness"
)

func TestMain(m *testing.M) {
	var err error
	if built.folder, err = os.MkdirTemp("", "upgrade"); err != nil {
		panic(err)
	}
	code := harness.Main(m, "upgrade")
	os.RemoveAll(built.folder)
	os.Exit(code)
}

// built are the programs of a run, by version.
var built struct {
	folder string
	mu     sync.Mutex
	paths  map[string]string
}

// build builds a streamshim with its own version, with more arguments for the Go tool.
func build(t *testing.T, version string, args ...string) string {
	t.Helper()
	built.mu.Lock()
	defer built.mu.Unlock()
	if path, ok := built.paths[version]; ok {
		return path
	}
	path := filepath.Join(built.folder, version)
	all := append([]string{"build", "-buildvcs=false", "-o", path, "-ldflags", "-s -w -X main.version=" + version}, args...)
	command := exec.Command("go", append(all, "github.com/streamshim/streamshim/cmd/streamshim")...)
	command.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := command.CombinedOutput(); err != nil {
		t.Fatalf("build %s: %v\n%s", version, err, out)
	}
	if built.paths == nil {
		built.paths = map[string]string{}
	}
	built.paths[version] = path
	return path
}
