package node

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"testing"
)

// programs are what a node runs. test/internal/peers/build.sh builds them.
var programs = []string{
	"containerd", "containerd-shim-runc-v2", "runc", "crictl",
	"bridge", "host-local", "loopback", "portmap", "busybox",
}

// programsVariable is a folder of programs of other versions.
const programsVariable = "STREAMSHIM_PROGRAMS"

// DefaultPrograms returns the folder of the programs: $STREAMSHIM_PROGRAMS, which test/matrix sets for other versions, or
// $STREAMSHIM_CACHE/peers/bin, where test/internal/peers/build.sh puts them. STREAMSHIM_CACHE defaults to
// ~/.cache/streamshim.
func DefaultPrograms() string {
	if folder := os.Getenv(programsVariable); folder != "" {
		return folder
	}
	cache := os.Getenv("STREAMSHIM_CACHE")
	if cache == "" {
		base, err := os.UserCacheDir()
		if err != nil {
			base = "/root/.cache"
		}
		cache = filepath.Join(base, "streamshim")
	}
	return filepath.Join(cache, "peers", "bin")
}

// Ready returns nil if a node can be started here. That needs root, and the programs in the folder (DefaultPrograms if it
// is empty). The error tells what to do.
func Ready(programFolder string) error {
	if os.Geteuid() != 0 {
		return errors.New("real containers need root")
	}
	if programFolder == "" {
		programFolder = DefaultPrograms()
	}
	for _, name := range programs {
		if _, err := os.Stat(filepath.Join(programFolder, name)); err != nil {
			return fmt.Errorf("%w; please run test/internal/setup.sh and test/internal/peers/build.sh (make test does)", err)
		}
	}
	return nil
}

// Require skips a test that needs a node if none can be started. If the environment has STREAMSHIM_REAL=required, as make
// test sets it, the test fails instead, so that it cannot be skipped unnoticed.
func Require(t testing.TB) {
	t.Helper()
	if err := Ready(""); err != nil {
		if os.Getenv("STREAMSHIM_REAL") == "required" {
			t.Fatal(err)
		}
		t.Skip(err)
	}
}

// StartForTest starts a node for one test and closes it when the test ends. If Dir is empty, it is always the same for the
// same Name and working copy, so that the next run cleans up after a run that was killed. If the test has failed, the logs
// stay and the test's log names their folder.
func StartForTest(t testing.TB, config Config) *Node {
	t.Helper()
	Require(t)
	if config.Dir == "" {
		workingFolder, err := os.Getwd()
		if err != nil {
			t.Fatal(err)
		}
		suffix := fmt.Sprintf("%04x", hash(workingFolder)&0xffff)
		config.Dir = filepath.Join(os.TempDir(), "streamshim-test", config.Name+"-"+suffix)
		config.Name = fmt.Sprintf("%.7s-%s", config.Name, suffix)
	}
	if config.Logf == nil {
		config.Logf = t.Logf
	}
	n, err := Start(t.Context(), config)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := n.Close(); err != nil {
			t.Error(err)
		}
		if t.Failed() {
			t.Logf("the logs of containerd and streamshim are in %s", n.path("log"))
			return
		}
		if err := os.RemoveAll(n.dir); err != nil {
			t.Error(err)
		}
	})
	return n
}

// Binary returns the path of the streamshim program under test. See FindBinary. If there is none, the test is skipped or
// fails, as with Require.
func Binary(t testing.TB) string {
	t.Helper()
	path, err := FindBinary()
	if err != nil {
		if os.Getenv("STREAMSHIM_REAL") == "required" {
			t.Fatal(err)
		}
		t.Skip(err)
	}
	return path
}

// FindBinary returns the path of the streamshim program under test: $STREAMSHIM_BINARY, or bin/streamshim
// at the top of the working copy.
func FindBinary() (string, error) {
	path := os.Getenv("STREAMSHIM_BINARY")
	if path == "" {
		folder, err := os.Getwd()
		if err != nil {
			return "", err
		}
		for ; folder != "/"; folder = filepath.Dir(folder) {
			if _, err := os.Stat(filepath.Join(folder, "go.mod")); err == nil {
				break
			}
		}
		path = filepath.Join(folder, "bin", "streamshim")
	}
	if _, err := os.Stat(path); err != nil {
		return "", fmt.Errorf("%w; please run make build", err)
	}
	return path, nil
}
